"""Writing a matplotlib figure the same way everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pliant._files import atomic_path

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".svg", ".png", ".pdf")


def check_suffix(path: str | Path) -> Path:
    """`path`, if its suffix is one that `write_figure` knows.

    Raises:
        ValueError: another suffix.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise ValueError(f"{path.name}: the suffix must be one of {', '.join(SUFFIXES)}")
    return path


def write_figure(figure: Figure, path: Path) -> Path:
    """Write a figure, whole or not at all; the same figure gives the same file."""
    import matplotlib

    # Text stays text, so that a page can search it; no date, so that files compare.
    with (
        atomic_path(path) as temporary,
        matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "pliant"}),
    ):
        metadata: dict[str, Any] = {"Date": None} if path.suffix == ".svg" else {}
        figure.savefig(temporary, dpi=150, metadata=metadata)
    return path


def plain(axes: Axes) -> None:
    """A light grid and no box."""
    axes.grid(color="#EEEEEE", zorder=0)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
