"""Files of the repository: short, without traces of one machine, of one version, each test asserting."""

from __future__ import annotations

import ast
import importlib.metadata
import re
from pathlib import Path

import yaml

import pliant
from _repository import ROOT, tracked

LONGEST = 500  # lines of a file of Python; CONTRIBUTING says about 400


def test_one_version_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == pliant.__version__
    assert importlib.metadata.version("pliant") == pliant.__version__
    assert f"## {pliant.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    project = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in project
    assert 'version = { attr = "pliant._version.__version__" }' in project


def test_citation_names_the_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["license"] == "Apache-2.0"
    urls = [reference["url"] for reference in citation["references"]]
    for paper in ("2409.17016", "1904.04971", "2312.16392"):
        assert f"https://arxiv.org/abs/{paper}" in urls


def text_of(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:  # an image
        return ""


def test_no_path_of_one_machine_and_no_registry_in_the_repository():
    # Put together here, so that this file does not hold them itself.
    tops = ("root", "work", "home/(?!someone/)", "Users", "opt/" + "py", "opt/" + "wheels")
    hosts = ["py" + "pi.org", "python" + "hosted.org", "download." + "pytorch.org", "find-" + "links"]
    places = [rf"(?<![\w.])/{top}" + ("" if top.startswith(("home", "opt")) else "/") for top in tops]
    pattern = re.compile("|".join(places + [re.escape(host) for host in hosts]))
    found = [
        f"{path.relative_to(ROOT)}:{n}: {line.strip()}"
        for path in tracked()
        for n, line in enumerate(text_of(path).splitlines(), 1)
        if pattern.search(line)
    ]
    assert found == []


def test_no_lock_file():
    locks = re.compile(r"(\.lock|lock\.(json|ya?ml|toml))$")
    assert [f for f in tracked() if locks.search(f.name)] == []


def test_files_are_short():
    lengths = {
        str(f.relative_to(ROOT)): len(text_of(f).splitlines()) for f in tracked() if f.suffix == ".py"
    }
    assert {name: n for name, n in lengths.items() if n > LONGEST} == {}
    assert {Path(name).parts[0] for name in lengths} >= {"src", "research", "tests", "examples"}


def test_the_folders_of_tests_are_folders_of_the_source():
    """So that the tests of a file are found, and `make check` finds them."""
    folders = {f.parent.relative_to(ROOT / "tests") for f in (ROOT / "tests").rglob("test_*.py")}
    alone = [f for f in folders if not (ROOT / "src" / "pliant" / f).is_dir() and not (ROOT / f).is_dir()]
    assert alone == [Path("repository")]


def _asserts(function: ast.AST, helpers: set[str]) -> bool:
    """Whether a function asserts, expects an exception, or calls a helper that asserts."""
    for node in ast.walk(function):
        if isinstance(node, ast.Assert):
            return True
        if isinstance(node, ast.Call):
            called = (
                node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            )
            if (
                called in helpers
                or called.startswith("assert_")
                or called in ("raises", "fail", "gradcheck")
            ):
                return True
    return False


def test_every_test_asserts():
    mute = []
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        tree = ast.parse(path.read_text())
        functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
        helpers: set[str] = set()
        for _ in range(3):  # helpers of helpers
            helpers |= {f.name for f in functions if _asserts(f, helpers)}
        tests = [f for f in functions if f.name.startswith("test")]
        mute += [f"{path.name}::{f.name}" for f in tests if f.name not in helpers]
        assert tests, f"{path.name} holds no test"
    assert mute == []
