"""Tables of text: Markdown for files, rich for a terminal; and the figures in them."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

LIMIT = 0.2  # largest spread of a time or a ratio of times, as a share of it, with which it is a result
UNDECIDED = "undecided"
MACHINE_BUSY = f"{UNDECIDED}, machine busy"
WHY_UNDECIDED = f"{MACHINE_BUSY}: spread over {LIMIT:.0%} of the figure, time it again on a quiet machine"


def markdown(
    headings: Sequence[str], rows: Iterable[Sequence[str]], text: Collection[str] | None = None
) -> str:
    """A Markdown table; columns of text are aligned left, figures right.

    Args:
        headings: one for each column.
        rows: cells of each row.
        text: headings of the columns of text; by default the first column alone.

    Example:
        >>> print(markdown(("network", "test, %"), [("plain", "88.0")]))
        | network | test, % |
        |---|---:|
        | plain | 88.0 |
    """
    text = headings[:1] if text is None else text
    rule = "|".join("---" if heading in text else "---:" for heading in headings)
    lines = [[cell.replace("|", r"\|").replace("\n", " ") for cell in row] for row in (headings, *rows)]
    first, *rest = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([first, f"|{rule}|", *rest])


def terminal(
    headings: Sequence[str],
    rows: Iterable[Sequence[str]],
    text: Collection[str] | None = None,
    *,
    title: str | None = None,
    caption: str | None = None,
) -> Table:
    """The same table for `rich.print`. Figures stay whole in a narrow terminal; text breaks between words.

    Args:
        headings: one for each column.
        rows: cells of each row.
        text: headings of the columns of text; by default the first column alone.
        title: above the table.
        caption: below it. Neither this nor the cells are read as rich's markup.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    below = None if caption is None else Text(caption)
    table = Table(title=title, caption=below, caption_justify="left", box=SIMPLE_HEAD, padding=0)
    lines = list(rows)
    for number, heading in enumerate(headings):
        if heading in (headings[:1] if text is None else text):
            words = [word for row in (headings, *lines) for word in row[number].split()]
            table.add_column(heading, overflow="fold", min_width=min(20, max(map(len, words))))
        else:
            told = [line for row in (headings, *lines) for line in row[number].splitlines()]
            widest = max(map(len, told), default=0)
            table.add_column(heading, justify="right", no_wrap=True, min_width=widest)
    for row in lines:
        table.add_row(*map(Text, row))
    return table


def narrowest(table: Table) -> int:
    """Characters that the lines of a table take at least, without cutting a word or a figure."""
    from rich.console import Console

    return Console(width=1000).measure(table).minimum


def undecided(value: float | None, spread: float | None) -> bool:
    """Whether a time, or a ratio of times, is no result because its spread is above `LIMIT` of it.

    Example:
        >>> undecided(10.0, 1.0), undecided(10.0, 3.0), undecided(10.0, None)
        (False, True, False)
    """
    return value is not None and spread is not None and spread > LIMIT * abs(value)


def with_spread(
    value: float | None,
    spread: float | None,
    digits: int | None = 1,
    unit: str = "",
    *,
    over: float = 0.0,
) -> str:
    """A time, or a ratio of times, with its spread in brackets; empty where there is none.

    Args:
        value: the figure.
        spread: its interquartile range; None: no brackets.
        digits: decimals of both; None: to the first digit of the spread, at most four digits of the value,
            and three where there is no spread.
        unit: stands behind the figure.
        over: what was subtracted from the figure: the spread of a tax in percent is that of 100 + tax.

    Returns:
        The text; ``undecided`` if the spread is above `LIMIT`.

    Example:
        >>> with_spread(12.34, 0.5), with_spread(7.1, None, 0, " %"), with_spread(None, None)
        ('12.3 (0.5)', '7 %', '')
        >>> with_spread(1234.5, 40.0, None), with_spread(5.0, 2.0), with_spread(5.0, 2.0, over=100)
        ('1234 (40)', 'undecided', '5.0 (2.0)')
    """
    if value is None:
        return ""
    if undecided(value + over, spread):
        return UNDECIDED
    if digits is None:
        whole = math.floor(math.log10(value)) if value > 0 else 0
        if not spread:
            return f"{value:.{max(0, 2 - whole)}f}{unit}"
        digits = max(0, min(-math.floor(math.log10(spread)), 3 - whole))
    text = f"{round(value, digits) + 0.0:.{digits}f}{unit}"  # 0, not -0
    return text if spread is None else f"{text} ({spread:.{digits}f})"
