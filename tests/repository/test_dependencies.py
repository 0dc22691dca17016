"""What pyproject.toml, the constraints files and the imports say of dependencies agrees."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import sys

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from _repository import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

PYTHONS = ("3.10", "3.11", "3.12", "3.13")
# Torch's own metadata fixes these, other versions for other torches.
OF_TORCH = ("nvidia-", "cuda-", "triton")


def pins(path: str, python: str) -> dict[str, str]:
    """Name -> version that a constraints file fixes on one version of Python."""
    found = {}
    for line in (ROOT / path).read_text().splitlines():
        if not line or line.startswith("#"):
            continue
        pin = Requirement(line)
        assert not pin.url, line
        assert re.fullmatch(r"==[\w.+]+", str(pin.specifier)), line
        if pin.marker is None or pin.marker.evaluate({"python_version": python}):
            assert canonicalize_name(pin.name) not in found, f"{pin.name} twice on Python {python}"
            found[canonicalize_name(pin.name)] = str(pin.specifier)[2:]
    return found


def requirements() -> list[Requirement]:
    """What pyproject.toml says is needed, extras and groups included."""
    stated = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = stated["project"]
    more = (*project["optional-dependencies"].values(), *stated["dependency-groups"].values())
    lines = [*project["dependencies"], *(line for lines in more for line in lines)]
    return [r for r in map(Requirement, lines) if r.name != "pliant"]


def wanted(name: str, extras: frozenset[str], python: str, found: set[str]) -> None:
    """Add `name`, and what it needs in turn by the metadata installed here, to `found`."""
    key = canonicalize_name(name)
    if key in found:
        return
    found.add(key)
    try:
        lines = importlib.metadata.requires(name) or []
    except importlib.metadata.PackageNotFoundError:
        return  # of another version of Python, or of another system
    for need in map(Requirement, lines):
        settings = [
            {"python_version": python, "python_full_version": f"{python}.1", "extra": e}
            for e in ("", *extras)
        ]
        if need.marker is None or any(need.marker.evaluate(s) for s in settings):
            wanted(need.name, frozenset(need.extras), python, found)


def test_constraints_pin_everything_that_is_installed():
    """On this Python; on another, other versions of packages need other packages."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    pinned = pins("constraints.txt", python)
    installed = Version(importlib.metadata.version("torch")).base_version
    if installed != pinned["torch"]:
        pytest.skip(f"torch is {installed} here: these are not the versions of constraints.txt")
    needed: set[str] = set()
    for need in requirements():
        wanted(need.name, frozenset(need.extras), python, needed)
    needed = {name for name in needed if not name.startswith(OF_TORCH)}
    assert needed - pinned.keys() == set()
    assert {"torch", "numpy", "timm", "lightning", "pip", "setuptools"} <= pinned.keys()


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_fit_the_ranges(python):
    pinned = pins("constraints.txt", python)
    for need in requirements():
        assert pinned[canonicalize_name(need.name)] in need.specifier, need


def test_the_lowest_constraints_are_the_floors_of_the_ranges():
    floors = pins("constraints-lowest.txt", "3.10")
    for need in requirements():
        named = {s.operator: s.version for s in need.specifier}
        floor = named.get(">=") or named["=="]
        assert floors[canonicalize_name(need.name)] in need.specifier, need
        assert floors[canonicalize_name(need.name)].startswith(floor), need


def test_every_third_party_import_of_the_package_is_a_dependency():
    modules = {"sklearn": "scikit-learn", "PIL": "pillow"}
    declared = {canonicalize_name(r.name) for r in requirements()}
    # In every version torchvision needs Pillow, and jinja2 MarkupSafe; torch brings triton where
    # there is one, and what imports it is imported on use.
    dependencies = {*declared, "pillow", "markupsafe", "triton"}
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            else:
                continue
            for top in {name.partition(".")[0] for name in names} - sys.stdlib_module_names - {"pliant"}:
                assert canonicalize_name(modules.get(top, top)) in dependencies, f"{path}: {top}"
