"""Accuracy against latency of an adaptive ResNet-20's depths: the README's picture.

Accuracies are those that the rows of results hold (`SCORES`, `BASELINE`); latencies are measured here, all
depths in turn. The baseline is the plain network, trained on by the same recipe.

Shapes: images [B, 3, 32, 32].
"""

from __future__ import annotations

from pathlib import Path

import timm
import torch

from pliant.adaptive.profiling import DepthProfile, profile_depths
from pliant.adaptive.scores import DepthScore
from pliant.compare import PLAIN, read_scores
from pliant.figures import plain, write_figure
from pliant.records import percent, read_records

SCORES = "cifar10-adn-specialized-depths.csv"
BASELINE = "cifar10-adn-specialized.csv"
# Okabe and Ito's colours, which the colour-blind tell apart too.
FRONT, REST = "#0072B2", "#999999"


def run_depth_bench(results: Path, quick: bool = False, threads: int | None = None) -> Path:
    """Time the depths of `resnet20_cifar_adn`, and draw their accuracy against their latency.

    Args:
        results: folder that has the rows of accuracy, and gets ``depths-cpu.csv`` and ``.svg``.
        quick: one round, to see that it works; the files then end in ``-quick``.
        threads: of PyTorch; None: one, which times such small networks with the least spread.

    Returns:
        The figure.

    Raises:
        FileNotFoundError: a file of accuracies is missing.
    """
    scores = read_records(results / SCORES, DepthScore)
    accuracy = {tuple(letter == "T" for letter in row.depth): row.top1 for row in scores}
    network = timm.create_model(scores[0].network).eval()
    often = {"rounds": 1, "min_run_time": 0.0} if quick else {"rounds": 31}
    profile = profile_depths(
        network, torch.randn(1, 3, 32, 32), accuracy=accuracy, threads=threads or 1, **often
    )
    name = "depths-cpu" + "-quick" * quick
    profile.save(results / f"{name}.csv")
    return plot_depth_bench(profile, _baseline(results), results / f"{name}.svg")


def plot_depth_bench(profile: DepthProfile, baseline: float, path: Path) -> Path:
    """Draw the accuracy of each depth against its latency, with the plain network's accuracy.

    Args:
        profile: with accuracies.
        baseline: test accuracy of the plain network, a share. It takes as long as full depth, whose
            layers it has.
        path: of the SVG.
    """
    from matplotlib.figure import Figure

    rows = [row for row in profile.rows if row.median_ms is not None]
    front = {row.variant for row in profile.front}
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    plain(axes)
    for row in rows:
        colour = FRONT if row.variant in front else REST
        axes.errorbar(
            row.median_ms or 0.0,
            percent(row.accuracy or 0.0),
            xerr=(row.iqr_ms or 0.0) / 2,
            fmt="o",
            color=colour,
            capsize=2,
            linewidth=1,
        )
        axes.annotate(
            row.variant.removeprefix("depth "),
            (row.median_ms or 0.0, percent(row.accuracy or 0.0)),
            (7, -11),
            textcoords="offset points",
            fontsize=9,
            color=colour,
        )
    axes.plot(
        [row.median_ms or 0.0 for row in profile.front],
        [percent(row.accuracy or 0.0) for row in profile.front],
        color=FRONT,
        label="one network, switched while it serves",
    )
    axes.plot([], [], "o", color=REST, label="depths that another one beats")
    full = next(row for row in rows if "T" not in row.variant.removeprefix("depth "))
    axes.plot(
        full.median_ms or 0.0,
        percent(baseline),
        "s",
        color="#000000",
        markerfacecolor="none",
        markersize=11,
        label="plain ResNet-20",
    )
    axes.margins(x=0.12, y=0.2)
    axes.set_xlabel(f"latency of one image, ms ({full.engine}, threads {full.threads})")
    axes.set_ylabel("CIFAR-10 test accuracy, %")
    axes.set_title("ResNet-20 with adaptive depth (a letter a stage: T skips its last blocks)", fontsize=10)
    axes.legend(frameon=False, loc="upper left")
    return write_figure(figure, path)


def _baseline(results: Path) -> float:
    """Test accuracy of the plain network."""
    scores = {row.label: row.test_accuracy for row in read_scores(results / BASELINE)}
    accuracy = scores[PLAIN]
    assert accuracy is not None, BASELINE
    return accuracy
