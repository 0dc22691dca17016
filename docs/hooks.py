"""Hooks of the site: of mkdocs, and of mkdocstrings.

What stands beside docs/ in the repository is part of the site too. Pages link to files of the repository as
GitHub shows them (``../results/latency-cpu.md``). On the site these files lie below the pages
(``results/latency-cpu.md``), so such links are rewritten.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath
from typing import Any

import griffe
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
BESIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "results/*.*", "examples/*.py")
_LINK = re.compile(r"(?<=\]\()([^)\s#:]+)(?=[)#\s])")


def on_files(files: Files, config: Any) -> Files:
    """Add the files beside docs/."""
    for pattern in BESIDE:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Rewrite links that leave the page's folder to where their targets lie on the site."""
    here = PurePosixPath(page.file.src_uri)
    beside = not (ROOT / "docs" / here).exists()
    folder = ROOT / ("" if beside else "docs") / here.parent

    def moved(link: re.Match[str]) -> str:
        target = Path(os.path.normpath(folder / link[0])).relative_to(ROOT).as_posix()
        on_site = "index.md" if target == "README.md" else target.removeprefix("docs/")
        return PurePosixPath(os.path.relpath(on_site, here.parent)).as_posix()

    return _LINK.sub(moved, markdown)


class Examples(griffe.Extension):
    """Shows an ``Example:`` of a docstring as code, which mkdocstrings does with ``Examples:`` alone."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename the section."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)
