"""Counts that the papers print, beside what our networks count.

The printed rows are in one CSV file for each paper, with their exceptions. Each paper counts
multiply-accumulates in its own way; a count that is compared with a paper uses that paper's
convention, here and nowhere else. One module for each paper says which network a row is, and how
the paper counts (`mod`, `condconv`, `adn`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from research.published import adn, condconv, mod
from research.published.adn import fvcore_macs, without_attention_macs
from research.published.condconv import tf_profiler_macs
from research.published.counts import CountReport, CountRow, Paper, markdown, render
from research.published.mod import INSTALL_COUNTS, has_ptflops, ptflops_macs
from research.published.printed import PublishedRow, published_rows

__all__ = [
    "INSTALL_COUNTS",
    "PAPERS",
    "CountReport",
    "CountRow",
    "Paper",
    "PublishedRow",
    "fvcore_macs",
    "has_ptflops",
    "markdown",
    "ptflops_macs",
    "published_rows",
    "render",
    "reproduce_counts",
    "tf_profiler_macs",
    "without_attention_macs",
]

PAPERS: dict[str, Paper] = {"mod": mod.PAPER, "condconv": condconv.PAPER, "adn": adn.PAPER}


def reproduce_counts(
    method: str = "mod",
    tables: Sequence[str] | None = None,
    progress: Callable[[CountRow], None] | None = None,
) -> CountReport:
    """Count our networks as a paper does, beside what it prints.

    Networks are built without weights (on the meta device), so nothing is computed.

    Args:
        method: ``"mod"`` (*CNN Mixture-of-Depths*), ``"condconv"`` (*CondConv*) or ``"adn"``
            (*Adaptive Depth Networks*).
        tables: numbers of tables, for example ``("1", "11")``; None is all.
        progress: called with each row as it is done.

    Raises:
        ValueError: a method whose counts are not reproduced, or a table that its
            paper's file does not hold.

    Example:
        >>> row = reproduce_counts("condconv", ["5"]).rows[0]
        >>> row.published.macs, row.printed_macs, row.verdict
        (Decimal('55.7'), Decimal('55.7'), 'match')
    """
    if method not in PAPERS:
        raise ValueError(f"no counts to reproduce for {method!r}; there are some for {', '.join(PAPERS)}")
    rows: list[CountRow] = []
    left_out: list[tuple[PublishedRow, str]] = []
    for published in published_rows(method, tables):
        counted = PAPERS[method].count(published)
        if isinstance(counted, str):
            left_out.append((published, counted))
            continue
        rows.append(counted)
        if progress is not None:
            progress(counted)
    return CountReport(PAPERS[method], tuple(rows), tuple(left_out))
