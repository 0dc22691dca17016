"""`import pliant` and the help of all commands are quick: what is heavy is imported on use."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product

import pytest

import pliant

HEAVY = (
    "fvcore",
    "lightning",
    "matplotlib",
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "ptflops",
    "rich",
    "sklearn",
    "tensorboard",
    "timm",
    "torch",
    "torchmetrics",
    "torchvision",
    "typer",
)


def child(code: str) -> subprocess.CompletedProcess[str]:
    """What a fresh interpreter makes of some code."""
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)


def loaded_by(statement: str) -> list[str]:
    """Which of `HEAVY` a fresh interpreter holds after one statement."""
    code = f"{statement}\nimport json, sys; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = child(code)
    return json.loads(done.stdout.splitlines()[-1])


def test_import_leaves_heavy_things_alone():
    assert loaded_by("import pliant; dir(pliant)") == []


@pytest.mark.parametrize(
    ("module", "words"),
    [
        *product(("pliant", "pliant.cli", "research"), ("-h", "--help", "--version")),
        *product(("pliant", "pliant.cli"), ("measure --help", "export -h")),
        ("research", "bench -h"),
    ],
)
def test_help_needs_no_torch(words, module):
    """By `python -m`, and by the module that the command `pliant` runs."""
    code = f"import runpy, sys\nsys.argv[1:] = {words.split()!r}\n"
    code += f"try:\n    runpy.run_module({module!r}, run_name='__main__')\nexcept SystemExit as end:\n"
    code += "    assert not end.code, end\nprint()"
    heavy = loaded_by(code)
    assert "typer" in heavy
    assert {"torch", "timm", "lightning", "numpy", "rich"} & set(heavy) == set()


def test_the_check_sees_what_is_imported():
    assert "matplotlib" in loaded_by("import matplotlib")


def test_nothing_is_compiled_by_importing(tmp_path):
    # A compiler that only says that it was called, and an empty cache.
    called = tmp_path / "called"
    compiler = tmp_path / "g++"
    compiler.write_text(f"#!/bin/sh\ntouch {called}\nexit 1\n")
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    code = (
        "import pathlib, pliant, pliant.cli\n"
        "from pliant.methods.mixture_of_depths.ops import building, fused\n"
        f"assert not pathlib.Path({str(called)!r}).exists()\n"
        "building.ready()"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)
    assert called.exists()


def test_public_names():
    """Every public name can be imported by `from pliant import NAME`; no further name is promised."""
    assert {"at_depth", "convert", "measure", "set_depth", "MixtureOfDepths"} <= set(pliant.__all__)
    for name in pliant.__all__:
        scope: dict[str, object] = {}
        exec(f"from pliant import {name}", scope)
        assert scope[name] is getattr(pliant, name)
    assert {*pliant._HOMES, "__version__"} == set(pliant.__all__) <= set(dir(pliant))
    with pytest.raises(AttributeError, match="module 'pliant' has no attribute 'konvert'"):
        pliant.konvert  # noqa: B018 - an attribute that is not there


REGISTERED = """
for name in ('resnet20_cifar', 'resnet20_cifar_mod', 'cc_mobilenetv1_050', 'resnet18_adn'):
    assert timm.is_model(name), name
import sys
assert not any('pliant' in type(f).__module__ for f in sys.meta_path)
assert 'pliant' not in type(timm.__loader__).__module__
"""


def test_networks_are_registered_with_timm_whoever_imports_it(tmp_path):
    (tmp_path / "timm.py").write_text("raise ImportError('no such luck')")
    imports = [
        "import timm, pliant",
        "import pliant; pliant.convert; import timm",  # pliant's own import brings timm
        "import importlib.util, pliant; importlib.util.find_spec('timm'); import timm",  # only looked for
        "import sys, pliant\n"  # an import that fails leaves the waiting for timm as it was
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "try:\n    import timm\nexcept ImportError as error:\n    assert 'luck' in str(error)\n"
        "del sys.path[0]\n"
        "sys.path_importer_cache.clear()\n"
        "import timm",
    ]
    # Each in a process of its own, all of which begin with PyTorch, whose import takes long.
    code = "import os, torchvision\n"
    code += f"for code in {[each + REGISTERED for each in imports]!r}:\n"
    code += "    if not (child := os.fork()):\n        exec(code)\n        os._exit(0)\n"
    code += "    assert not os.waitpid(child, 0)[1], code\n"
    assert child(code).returncode == 0
