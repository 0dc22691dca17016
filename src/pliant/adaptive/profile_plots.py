"""Latency of an adaptive network's depths, drawn by matplotlib."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pliant.figures import check_suffix, plain, write_figure

if TYPE_CHECKING:
    from pliant.adaptive.profiling import DepthProfile
    from pliant.measuring.rows import Measurement

# Okabe and Ito's, told apart by the colour-blind too.
ON, OFF = "#0072B2", "#999999"


def plot_profile(profile: DepthProfile, path: str | Path) -> Path:
    """Draw each depth's accuracy, or multiply-accumulates, against its latency.

    The front is a line of filled points with their flags; the other depths are grey.

    Args:
        profile: from `pliant.profile_depths`.
        path: where the figure goes, as SVG, PNG or PDF by its suffix.

    Returns:
        `path`.

    Raises:
        ValueError: an unknown suffix.
    """
    from matplotlib.figure import Figure

    path = check_suffix(path)
    front = profile.front
    names = {row.variant for row in front}
    rest = tuple(row for row in profile.rows if row.median_ms is not None and row.variant not in names)

    def worth(row: Measurement) -> float:
        return (row.accuracy if profile.has_accuracy else (row.macs or 0) / 1e6) or 0.0

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for rows, style, color, label, order in ((rest, "o", OFF, "beaten", 2), (front, "o-", ON, "front", 3)):
        times = [row.median_ms or 0.0 for row in rows]
        axes.plot(times, [worth(row) for row in rows], style, color=color, label=label, zorder=order)
    for row in front:
        axes.annotate(
            row.variant.removeprefix("depth "),
            (row.median_ms or 0.0, worth(row)),
            textcoords="offset points",
            xytext=(6, -10),
            fontsize="small",
        )
    first = front[0]
    axes.set_xlabel(f"latency, ms ({first.device}, batch {first.batch}, {first.engine})")
    axes.set_ylabel("top-1 accuracy, %" if profile.has_accuracy else "multiply-accumulates, M")
    axes.set_title(f"{first.model}: depths (T skips)")
    axes.legend(frameon=False)
    plain(axes)
    return write_figure(figure, path)
