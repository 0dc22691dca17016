"""`make check FILE=...`: which tests it finds for a file or folder, and what it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import check
from check import ROOT, main, mirroring

FILES = {
    "src/pliant/surgery.py": "",
    "src/pliant/_files.py": "",
    "src/pliant/__init__.py": "",
    "src/pliant/precision.py": "",
    "src/pliant/deploy/__init__.py": "",
    "src/pliant/deploy/export.py": "",
    "src/pliant/deploy/facts.py": "",
    "src/pliant/deploy/hidden.py": "",
    "src/pliant/deploy/engines/base.py": "",
    "research/bench/steps.py": "",
    "tests/_small.py": "",
    "tests/test_init.py": "import pliant",
    "tests/test_surgery.py": "from pliant.surgery import convert",
    "tests/test_surgery_pairs.py": "from _small import images",
    "tests/test_surgeryless.py": "",
    "tests/deploy/test_export.py": "from pliant.deploy import facts, export  # hidden",
    "tests/deploy/test_export_parity.py": "from pliant.deploy.engines.base import Engine",
    "tests/research/test_steps.py": "    from pliant import (\n        _files,\n    )",
}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("path", "found"),
    [
        ("src/pliant/deploy/export.py", ["deploy/test_export.py", "deploy/test_export_parity.py"]),
        ("src/pliant/surgery.py", ["test_surgery.py", "test_surgery_pairs.py"]),
        ("src/pliant/__init__.py", ["test_init.py"]),
        # No test is named after it: those that import it.
        ("src/pliant/deploy/facts.py", ["deploy/test_export.py"]),
        ("src/pliant/deploy/engines/base.py", ["deploy/test_export_parity.py"]),
        ("src/pliant/_files.py", ["research/test_steps.py"]),
        # None imports it: those of its room.
        ("src/pliant/deploy/hidden.py", ["deploy/test_export.py", "deploy/test_export_parity.py"]),
        ("src/pliant/precision.py", []),
        ("src/pliant/deploy", ["deploy/test_export.py", "deploy/test_export_parity.py"]),
        ("research/bench/steps.py", ["research/test_steps.py"]),
        ("tests/_small.py", ["test_surgery_pairs.py"]),
        ("tests/deploy", ["deploy/test_export.py", "deploy/test_export_parity.py"]),
        ("tests/test_surgery.py", ["test_surgery.py"]),
    ],
)
def test_the_tests_of_a_file(tree, path, found):
    assert mirroring(Path(path), tree) == [Path("tests", name) for name in found]


def test_a_file_without_tests_of_its_own_kind_is_refused(tree):
    with pytest.raises(ValueError, match=r"README\.md is no file of src, research or tests"):
        mirroring(Path("README.md"), tree)


def test_ruff_doctests_and_tests_are_run_and_one_failure_tells(monkeypatch):
    ran = []

    def call(command, cwd):
        assert cwd == ROOT
        ran.append(command[2:])
        return int(command[2:4] == ["ruff", "check"])

    monkeypatch.setattr(check.subprocess, "call", call)
    path = ROOT / "src" / "pliant" / "surgery.py"
    assert main([str(path)]) == 1
    name = str(path.relative_to(ROOT))
    assert ran[:2] == [["ruff", "check", name], ["ruff", "format", "--check", name]]
    assert ran[2][0] == "pytest"
    assert ran[2][-3:] == [name, "tests/test_surgery.py", "tests/test_surgery_identity.py"]
    assert len(ran) == 3


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("src/pliant/nowhere.py", "src/pliant/nowhere.py is not there; name a file or folder that is"),
        ("docs", "docs is no file of src, research or tests"),
        ("", "name the file or folder to check, as in: make check FILE=src/pliant/surgery.py"),
    ],
)
def test_make_check_says_what_is_wrong(file, message):
    make = ["make", "--no-print-directory", "-o", "setup", "check", f"FILE={file}", f"VENV={sys.prefix}"]
    done = subprocess.run(make, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert message in done.stderr
