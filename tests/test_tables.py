"""Tables of text."""

from __future__ import annotations

import io

from rich.console import Console

from pliant import tables


def test_markdown_aligns_figures_and_keeps_bars_in_their_cell():
    text = tables.markdown(("a", "b", "c"), [("x|y", "1", "z")], ("a", "c"))
    assert text.splitlines() == ["| a | b | c |", "|---|---:|---|", r"| x\|y | 1 | z |"]
    assert tables.markdown(("a", "b"), []).splitlines() == ["| a | b |", "|---|---:|"]


def test_a_terminal_keeps_figures_whole():
    console = Console(file=io.StringIO(), width=24)
    console.print(tables.terminal(("network", "MACs"), [("a very long name of it", "1,234,567")]))
    assert "1,234,567" in console.file.getvalue()
