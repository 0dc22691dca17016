"""One HTML page with tables and figures that needs nothing beside itself."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pliant._files import atomic_path


@dataclass(frozen=True)
class TableBlock:
    """A table of a report: its title, what it depends on, headings and cells."""

    title: str
    note: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class FigureBlock:
    """A figure of a report: an SVG file, whose text is put into the page."""

    title: str
    caption: str
    path: Path


def write_report(
    path: str | Path,
    title: str,
    *,
    findings: Sequence[str],
    tables: Sequence[TableBlock],
    figures: Sequence[FigureBlock],
    provenance: Mapping[str, object],
) -> Path:
    """Write a page that can be mailed: style and figures inside, no script, no network.

    Args:
        path: the file, replaced whole or not at all.
        title: of the page.
        findings: sentences above the tables.
        tables: shown in this order.
        figures: SVG files, shown in this order after the tables.
        provenance: where the figures come from, by label.

    Raises:
        ValueError: a figure that is no SVG.
    """
    from jinja2 import Environment, PackageLoader
    from markupsafe import Markup

    page = Environment(loader=PackageLoader("pliant"), autoescape=True).get_template("report.html")
    drawn = [
        {"title": f.title, "caption": f.caption, "svg": Markup(_inline(f.path, f"f{n}-"))}
        for n, f in enumerate(figures)
    ]
    text = page.render(title=title, findings=findings, tables=tables, figures=drawn, provenance=provenance)
    path = Path(path)
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def _inline(path: Path, prefix: str) -> str:
    """The ``<svg>`` element of a file, its ids made unique within the page."""
    text = path.read_text(encoding="utf-8")
    start = text.find("<svg")
    if start < 0:
        raise ValueError(f"{path} is no SVG file; a report takes only those")
    text = text[start:]
    text = re.sub(r'\bid="', f'id="{prefix}', text)
    text = re.sub(r'(xlink:href|href)="#', rf'\1="#{prefix}', text)
    return re.sub(r"url\(#", f"url(#{prefix}", text)
