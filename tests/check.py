"""`make check FILE=...`: ruff, the doctests, and the tests that mirror one file or folder.

Tests mirror the source tree: `src/pliant/deploy/export.py` has its tests in `tests/deploy/test_export.py`
and in what else begins so. A file that no test is named after is checked by the tests that import it; where
none does, by all tests of its folder.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def module_of(path: Path) -> str:
    """The dotted name of a source file, `src/pliant/deploy/export.py` -> `pliant.deploy.export`."""
    parts = path.with_suffix("").parts[path.parts[0] == "src" :]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def folder_of(path: Path, root: Path = ROOT) -> Path:
    """The folder of the tests of a source folder: `src/pliant/deploy` -> `tests/deploy`.

    A room whose tests lie in one folder answers for what lies below it.
    """
    folder = Path("tests", *(path.parts[2:] if path.parts[0] == "src" else path.parts))
    while len(folder.parts) > 2 and not (root / folder).is_dir():
        folder = folder.parent
    return folder


def below(folder: Path, root: Path = ROOT) -> list[Path]:
    """The test files below a folder of tests."""
    return sorted(f.relative_to(root) for f in (root / folder).rglob("test_*.py"))


def importing(module: str, root: Path = ROOT) -> list[Path]:
    """The test files that import a module, or something of it."""
    package, _, name = module.rpartition(".")
    pattern = rf"^\s*(from|import) {re.escape(module)}\b"
    if package:
        pattern += rf"|^\s*from {re.escape(package)} import (\([^)#]*?|[^\n(#]*?)\b{re.escape(name)}\b"
    return [f for f in below(Path("tests"), root) if re.search(pattern, (root / f).read_text(), re.M)]


def mirroring(path: Path, root: Path = ROOT) -> list[Path]:
    """The test files that check one file or folder, perhaps none: paths relative to the repository's root.

    Args:
        path: of a source file, a test file, a helper of tests or a folder of these.
        root: the repository.

    Raises:
        ValueError: when the file lies outside the trees that have tests.
    """
    if path.parts[0] == "tests":
        if (root / path).is_dir():
            return below(path, root)
        return [path] if path.name.startswith("test_") else importing(path.stem, root)
    if path.parts[0] not in ("src", "research"):
        raise ValueError(f"{path} is no file of src, research or tests; name one of these")
    package = path if (root / path).is_dir() else path.parent
    room = folder_of(package, root)
    inside = below(room, root) if room != Path("tests") else []
    if package == path:
        return inside or importing(module_of(path), root)
    name = path.stem.strip("_")
    own = [f for f in below(room, root) if f.parent == room and re.match(rf"test_{name}(_|\.py$)", f.name)]
    imported = [] if path.name.startswith("__") else importing(module_of(path), root)
    return own or imported or inside


def main(arguments: Sequence[str]) -> int:
    """Check what the command line names; the exit status is 0 when all holds, 2 for a wrong name."""
    parser = argparse.ArgumentParser(description="Check one file or folder.", allow_abbrev=False)
    parser.add_argument("file", type=Path, help="source file, test file or folder to check")
    path = parser.parse_args(arguments).file
    try:
        if not path.exists():
            raise ValueError(f"{path} is not there; name a file or folder that is")
        if not path.resolve().is_relative_to(ROOT):
            raise ValueError(f"{path} is outside the repository; name a file of src, research or tests")
        path = path.resolve().relative_to(ROOT)
        tests = mirroring(path)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if not tests:
        print(f"No test is named after {path} or imports it: only its doctests run.")
    pytest = ["pytest", "-m", "not slow and not gpu", "--durations=3", *dict.fromkeys((path, *tests))]
    steps = [["ruff", "check", path], ["ruff", "format", "--check", path], pytest]
    return max([subprocess.call([sys.executable, "-m", *map(str, step)], cwd=ROOT) for step in steps])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
