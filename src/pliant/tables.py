"""Tables of text: Markdown for files, rich for a terminal."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


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
            table.add_column(heading, justify="right", no_wrap=True)
    for row in lines:
        table.add_row(*map(Text, row))
    return table


def with_spread(value: float | None, spread: float | None, digits: int = 1, unit: str = "") -> str:
    """A figure with its spread in brackets; empty where there is none.

    Example:
        >>> with_spread(12.34, 0.5), with_spread(7.1, None, 0, " %"), with_spread(None, None)
        ('12.3 (0.5)', '7 %', '')
    """
    if value is None:
        return ""
    return f"{value:.{digits}f}{unit}" + ("" if spread is None else f" ({spread:.{digits}f})")
