"""Accuracy of an adaptive network's depths, drawn by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from pliant.figures import check_suffix, plain, write_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from pliant.adaptive.scores import DepthScore

# Okabe and Ito's, told apart by the colour-blind too.
ADAPTIVE, INDIVIDUAL = "#0072B2", "#000000"


def plot_depths(
    scores: Sequence[DepthScore],
    path: str | Path,
    individual: Mapping[str, tuple[int, float]] | None = None,
) -> Path:
    """Draw the accuracy of each depth against its multiply-accumulates.

    Figure 3(a) of *Adaptive Depth Networks* (arXiv 2312.16392). The two depths that are
    trained, the whole network and the base network, are filled; the others are hollow.

    Args:
        scores: from `pliant.train.evaluate_depths`.
        path: where the figure goes, as SVG, PNG or PDF by its suffix.
        individual: networks trained by themselves: name to multiply-accumulates and top-1
            accuracy in percent.

    Returns:
        `path`.

    Raises:
        ValueError: nothing to draw, or an unknown suffix.
    """
    from matplotlib.figure import Figure

    path = check_suffix(path)
    if not scores:
        raise ValueError("no scores to draw; evaluate_depths gives them")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    rows = sorted(scores, key=lambda r: (r.macs, r.top1))
    for filled, label in ((True, "trained: super and base"), (False, "not trained themselves")):
        own = [r for r in rows if bool(r.role) == filled]
        if own:
            axes.plot(
                [r.macs / 1e6 for r in own],
                [r.top1 for r in own],
                "o",
                color=ADAPTIVE,
                markerfacecolor=ADAPTIVE if filled else "white",
                label=label,
                zorder=3,
            )
    for macs in dict.fromkeys(r.macs for r in rows):
        # Many depths cost the same: their names stand on either side in turn.
        for n, row in enumerate(r for r in rows if r.macs == macs):
            _name(axes, row.depth, macs, row.top1, right=n % 2 == 0)
    for n, (name, (macs, top1)) in enumerate((individual or {}).items()):
        label = "trained by themselves" if n == 0 else "_"
        axes.plot(macs / 1e6, top1, "s", color=INDIVIDUAL, label=label, zorder=3)
        _name(axes, name, macs, top1, right=False)
    axes.margins(x=0.1, y=0.15)
    axes.set(
        xlabel="multiply-accumulates of an image, M", ylabel="top-1 accuracy, %", title=rows[0].network
    )
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    plain(axes)
    return write_figure(figure, path)


def _name(axes: Axes, name: str, macs: int, top1: float, right: bool) -> None:
    axes.annotate(
        name,
        (macs / 1e6, top1),
        (6 if right else -6, 0),
        textcoords="offset points",
        ha="left" if right else "right",
        va="center",
        fontsize=7,
    )
