"""The table of speed in docs/mod-tax.md: one line for each engine and batch, made from rows.

Speed-up is over the baseline in the same run, the tax over the same network without its
Mixture-of-Depths blocks; plain blocks first, then their best form in that engine, and where
there is one its native form.
"""

from __future__ import annotations

from collections.abc import Sequence

from pliant.measuring.rows import (
    AS_IS,
    LOWER_RESOLUTION,
    OF_PARTS,
    OPTIMIZED,
    ORIGINS,
    Measurement,
    grouped,
    tax_text,
)
from pliant.tables import UNDECIDED, WHY_UNDECIDED, markdown, undecided

BEGIN, END = "<!-- speed:begin -->", "<!-- speed:end -->"


def speed_table(rows: Sequence[Measurement]) -> str:
    """Rows of Mixture-of-Depths networks as one Markdown table under a line of conditions.

    Args:
        rows: as `research.bench.suites.run_bench` writes them, of one machine.

    Raises:
        ValueError: no row has a tax.

    Example:
        >>> base = {"against": "resnet50", "engine": "eager", "threads": 2}
        >>> print(speed_table([
        ...     Measurement(model="resnet50", median_ms=40.0, time_ratio=1.0, **base),
        ...     Measurement(model="r_mod", time_ratio=0.8, tax=0.1, **base),
        ...     Measurement(model="r_mod", time_ratio=0.75, tax=0.02, form="optimized", **base),
        ... ]))
        device cpu · threads 2 · speed-up over resnet50 (MoD tax); plain blocks → optimized
        <BLANKLINE>
        | engine | batch | resnet50, ms | r_mod |
        |---|---:|---:|---:|
        | eager | 1 | 40.0 | 1.25x (10 %) → 1.33x (2 %) |
    """
    names = list(dict.fromkeys(row.model for row in rows if row.tax is not None))
    if not names:
        raise ValueError(f"none of {len(rows)} rows has a tax: no table of speed can be made of them")
    groups = grouped(rows)
    against = rows[0].against
    lower = list(dict.fromkeys(row.label for row in rows if row.variant == LOWER_RESOLUTION))
    precise = len({row.dtype for row in rows}) > 1
    headings = ["engine", "batch", *(["dtype"] if precise else []), f"{against}, ms", *lower, *names]
    lines = []
    for group in groups:
        first = group[0]
        base = next((r for r in group if (r.model, r.variant) == (against, AS_IS)), first)
        cells = [first.engine, str(first.batch), *([first.dtype] if precise else [])]
        cells.append(_milliseconds(base))
        cells += [_cell([r for r in group if r.label == name]) for name in lower]
        cells += [_cell([r for r in group if (r.model, r.variant) == (n, AS_IS)]) for n in names]
        lines.append(cells)
    steps = " → ".join(form for form in OF_PARTS if any(row.form == form for row in rows)) or OPTIMIZED
    doubt = [WHY_UNDECIDED] * any(UNDECIDED in cell for line in lines for cell in line)
    told = [_machine(rows), f"speed-up over {against} (MoD tax); plain blocks → {steps}"]
    for heading, text in ORIGINS.values():
        if found := sorted({text(r) for r in rows} - {""}):
            told.append(f"{heading} {', '.join(found)}")
    return f"{' · '.join(filter(None, [*told, *doubt]))}\n\n{markdown(headings, lines)}"


def _cell(rows: Sequence[Measurement]) -> str:
    """Speed-ups of one network, of each form that was measured."""
    return " → ".join(map(_speed, rows)) or "not measured"


def _speed(row: Measurement) -> str:
    if row.speedup is None:
        return "not measured"
    if undecided(row.time_ratio, row.time_ratio_iqr):
        return UNDECIDED
    tax = tax_text(row).partition(" (")[0]
    return f"{row.speedup:.2f}x{tax and f' ({tax})'}"


def _milliseconds(row: Measurement) -> str:
    if row.median_ms is None:
        return "not measured"
    return UNDECIDED if undecided(row.median_ms, row.iqr_ms) else f"{row.median_ms:.1f}"


def _machine(rows: Sequence[Measurement]) -> str:
    first = rows[0]
    return " · ".join(filter(None, [first.hardware, f"device {first.device}", f"threads {first.threads}"]))
