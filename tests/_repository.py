"""What tests of the repository itself share: its root, its files, and commands run in it."""

from __future__ import annotations

import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def run(*command: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(c) for c in command], cwd=cwd, capture_output=True, text=True, check=False)


@cache
def tracked() -> tuple[Path, ...]:
    """The files that git does not ignore; in an archive without it, those of the known folders."""
    listing = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    if listing.returncode == 0:
        found = [ROOT / name for name in listing.stdout.split("\0") if name]
    else:
        tops = ("src", "tests", "docs", "examples", "results", ".ci")
        found = [f for top in tops for f in (ROOT / top).rglob("*")] + list(ROOT.glob("*"))
    return tuple(f for f in found if f.is_file() and "__pycache__" not in f.parts)
