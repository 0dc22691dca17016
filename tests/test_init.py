"""`import pliant` is quick: heavy and optional parts are imported on use."""

from __future__ import annotations

import json
import os
import subprocess
import sys

HEAVY = (
    "fvcore",
    "lightning",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "onnxscript",
    "openvino",
    "ptflops",
    "rich",
    "sklearn",
    "tensorboard",
    "torchmetrics",
    "typer",
)


def loaded_by(statement: str) -> list[str]:
    """Which of `HEAVY` a fresh interpreter holds after one statement."""
    code = f"{statement}; import json, sys; print(json.dumps([m for m in {HEAVY!r} if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def test_import_leaves_heavy_things_alone():
    # torch, torchvision and timm, which are needed, import none of them by themselves.
    assert loaded_by("import pliant") == []


def test_the_check_sees_what_is_imported():
    assert loaded_by("import matplotlib") == ["matplotlib"]


def test_nothing_is_compiled_by_importing(tmp_path):
    # A compiler that only says that it was called, and an empty cache.
    called = tmp_path / "called"
    compiler = tmp_path / "g++"
    compiler.write_text(f"#!/bin/sh\ntouch {called}\nexit 1\n")
    compiler.chmod(0o755)
    environment = {**os.environ, "CXX": str(compiler), "XDG_CACHE_HOME": str(tmp_path / "cache")}

    def run(code):
        subprocess.run([sys.executable, "-c", code], check=True, env=environment, capture_output=True)

    run("import pliant, pliant.cli; from pliant.methods.mixture_of_depths.ops import building, fused")
    assert not called.exists()
    run("from pliant.methods.mixture_of_depths.ops import building; building.ready()")
    assert called.exists()


def test_public_names():
    import pliant

    for name in pliant.__all__:
        assert getattr(pliant, name) is not None
    assert {"MixtureOfDepths", "Plan", "convert", "plan"} <= set(pliant.__all__)
