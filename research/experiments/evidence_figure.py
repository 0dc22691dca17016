"""Accuracy of Mixture-of-Depths and its controls against their latency."""

from __future__ import annotations

import statistics
from pathlib import Path

from pliant.compare import PLAIN
from pliant.figures import plain, write_figure
from pliant.methods.mixture_of_depths.recipes import CONTROLS as MOD_CONTROLS
from pliant.methods.mixture_of_depths.recipes import REMOVED
from research.experiments.evidence import Evidence
from research.experiments.variants import VARIANTS

# Kind of a network: marker and colour (Okabe and Ito's).
_KINDS = {
    "plain network, and without blocks": ("s", "#000000"),
    "learned selection": ("o", "#D55E00"),
    "selection that is not learned": ("o", "#0072B2"),
    "variants": ("D", "#CC79A7"),
    "plain, of another depth": ("^", "#009E73"),
}


def plot_evidence(evidence: Evidence, path: Path) -> Path | None:
    """Draw test accuracy against the latency ratio, a panel for each timing.

    Upright bars are standard deviations over seeds, level ones interquartile ranges over
    rounds. The dotted line joins plain networks of all depths: a network below it is worse than a
    plain network of the same latency.

    Returns:
        `path`; None where none of them has both an accuracy and a time.
    """
    from matplotlib.figure import Figure

    # All other networks, some several times as slow, are in the tables alone.
    labels = [label for family in ("controls", "variants", "depth") for label in evidence.labels(family)]
    panels = {
        timing: [name for name in labels if evidence.accuracy(name) and evidence.time(name, timing)]
        for timing in evidence.timings()
    }
    panels = {timing: names for timing, names in panels.items() if names}
    if not panels:
        return None
    across = min(2, len(panels))
    down = -(-len(panels) // across)
    figure = Figure(figsize=(6.6 * across, 4.6 * down + 0.5), layout="constrained")
    drawn = {}
    for at, (timing, names) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(down, across, at)
        plain(axes)
        depths = []
        for number, name in enumerate(names):
            accuracies = list(evidence.accuracy(name).values())
            timed = evidence.time(name, timing)
            assert timed is not None
            x, y = timed.time_ratio or 0.0, statistics.fmean(accuracies)
            marker, colour = _KINDS[kind := _kind(name)]
            drawn[kind] = axes.errorbar(
                x,
                y,
                xerr=(timed.time_ratio_iqr or 0.0) / 2,
                yerr=statistics.stdev(accuracies) if len(accuracies) > 1 else None,
                fmt=marker,
                color=colour,
                markersize=6,
                capsize=2,
                linewidth=1,
                zorder=3,
            )
            # Names alternate above and below, since controls lie close together.
            up = 6 if number % 2 else -11
            axes.annotate(name, (x, y), (4, up), textcoords="offset points", fontsize=7, zorder=4)
            if name in evidence.depths:
                depths.append((x, y))
        if len(depths) > 1:
            axes.plot(*zip(*sorted(depths), strict=True), linestyle=":", color="#777777", zorder=2)
        axes.margins(x=0.15, y=0.12)
        axes.set_title(f"{evidence.network}, {timing}", fontsize=10)
        axes.set_xlabel("latency over the plain network's")
        axes.set_ylabel("test accuracy, %")
    figure.legend(
        handles=list(drawn.values()),
        labels=list(drawn),
        loc="outside lower center",
        ncols=len(drawn),
        fontsize=9,
        frameon=False,
    )
    return write_figure(figure, path)


def _kind(label: str) -> str:
    if label in (PLAIN, REMOVED):
        return "plain network, and without blocks"
    if label in list(MOD_CONTROLS)[:2]:
        return "learned selection"
    if label in VARIANTS:
        return "variants"
    return "selection that is not learned" if label in MOD_CONTROLS else "plain, of another depth"
