"""Measurements as one HTML page: a table for each run, the figure, and what to know of them."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path

from pliant.measuring.rows import COLUMNS, Measurement, grouped, layout
from pliant.report import FigureBlock, TableBlock, write_report


def write_page(path: str | Path, rows: Sequence[Measurement]) -> Path:
    """Write rows as a page that needs nothing beside itself.

    Args:
        path: path of the page.
        rows: rows of one machine.

    Returns:
        `path`.

    Raises:
        ValueError: there is no row.

    Example:
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     page = write_page(f"{folder}/a.html", [Measurement(model="resnet50", median_ms=40.0)])
        ...     "<td>resnet50</td>" in page.read_text()
        True
    """
    from pliant.measuring.figure import plot_against_latency

    if not rows:
        raise ValueError("a page of no rows says nothing; measure something first")
    tables = []
    for group in grouped(rows):
        shared, headings, cells = layout(group, None)
        first = group[0]
        tables.append(
            TableBlock(f"{first.engine}, batch {first.batch}, {first.dtype}", shared, headings, cells)
        )
    first = rows[0]
    with tempfile.TemporaryDirectory() as folder:
        figures = []
        if any(r.median_ms is not None and r.macs is not None for r in rows):
            svg = plot_against_latency(rows, "macs", Path(folder) / "macs.svg")
            said = "A dotted line leads from a network to its control: its length is the tax."
            figures.append(FigureBlock("Operations against latency", said, svg))
        return write_report(
            path,
            "Latency",
            findings=_findings(rows),
            tables=tables,
            figures=figures,
            provenance={
                "command": "pliant measure",
                "machine": f"{first.hardware}, {first.os}",
                "versions": ", ".join(
                    f"{name} {getattr(first, name)}" for name in ("pliant", "torch", "timm", "python")
                ),
                "commit": first.commit or "installed package",
                "date": first.date,
            },
        )


def _findings(rows: Sequence[Measurement]) -> list[str]:
    """What no reader may overlook: notes and failures, each with where it holds."""
    where: dict[str, list[str]] = {}
    for row in rows:
        if told := COLUMNS["note"][1](row):
            where.setdefault(told, []).append(f"{row.label} ({row.engine}, batch {row.batch}, {row.dtype})")
    said = [f"{told[0].upper()}{told[1:]}: {', '.join(places)}." for told, places in where.items()]
    return [
        "Networks of one run are timed in turn; a ratio is taken within each round. Fewer operations "
        "are not less time.",
        *said,
    ]
