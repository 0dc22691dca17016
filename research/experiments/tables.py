"""Tables of the pages, in Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def markdown(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table whose first column is text and whose others are figures.

    Example:
        >>> markdown(("network", "test, %"), [("plain", "88.0")])
        ['| network | test, % |', '|---|---:|', '| plain | 88.0 |']
    """
    lines = [f"| {' | '.join(cells)} |" for cells in [heading, *rows]]
    return [lines[0], "|---" + "|---:" * (len(heading) - 1) + "|", *lines[1:]]
