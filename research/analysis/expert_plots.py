"""Figures 4 to 7 of *CondConv* (arXiv 1904.04971), for the data at hand.

Each draws the `RoutingWeights` that `routing_weights` collected. Experts are numbered
from 0, as in the tensors.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from pliant.figures import check_suffix, plain, write_figure
from research.analysis.experts import ClassWeight, RoutingWeights

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FEW = 4  # classes, layers and experts that are drawn unless told, as in the paper

# Okabe and Ito's colours, told apart by the colour-blind too; then the next marker.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D")
GREY = "#D5D5D5"


def plot_mean_routing(
    weights: RoutingWeights,
    path: str | Path,
    *,
    classes: Sequence[str | int] | None = None,
    layers: Sequence[str] | None = None,
) -> Path:
    """Draw the mean weight of each expert, for some classes against all (figure 4).

    A panel for each layer: bars are the mean over all images, dots that of a class. Dots
    that leave their bars deeper in the network say that routing becomes class-specific.

    Args:
        weights: of the data at hand.
        path: where the figure goes, as SVG, PNG or PDF by its suffix.
        classes: names or labels; None: the first four that have images.
        layers: paths; None: four at equal distances, the first and the last among them.

    Returns:
        `path`.

    Raises:
        ValueError: a class without images, an unknown layer or suffix, or nothing to draw.
    """
    path = check_suffix(path)
    labels = _labels(weights, classes)
    layers = _at_all_depths(weights) if layers is None else list(layers)
    if not layers:
        raise ValueError(f"no layer to draw; there are {', '.join(weights.layers)}")
    most = max(weights.experts(layer) for layer in layers)
    # The dots of an expert stand side by side on its bar.
    shifts = np.linspace(-0.28, 0.28, len(labels)) if len(labels) > 1 else np.zeros(1)
    width = _width(most, len(labels))
    names = [_short(weights.classes[label], 24) for label in labels]
    # Inches of a marker and a name, about.
    columns = int(width / (0.45 + 0.08 * max(10, *map(len, names)))) or 1
    figure = _figure(width, 0.8 + 1.7 * len(layers) + 0.2 * ((len(names) + 1) // columns))
    panels = figure.subplots(len(layers), 1, squeeze=False)[:, 0]
    for axes, layer in zip(panels, layers, strict=True):
        numbers = np.arange(weights.experts(layer))
        axes.bar(numbers, weights.overall(layer).numpy(), width=0.86, color=GREY, label="all images")
        mean = weights.mean(layer)
        for n, (label, shift) in enumerate(zip(labels, shifts, strict=True)):
            axes.plot(
                numbers + shift,
                mean[label].numpy(),
                linestyle="",
                marker=MARKERS[n // len(COLOURS) % len(MARKERS)],
                markersize=4.5,
                color=COLOURS[n % len(COLOURS)],
                label=names[n],
                clip_on=False,
                zorder=3,
            )
        axes.set_title(_title(weights, layer), fontsize=10, loc="left")
        _of_experts(axes, weights.experts(layer))
    _same_height(panels)
    panels[-1].set_xlabel("expert")
    figure.supylabel("mean routing weight", fontsize=10)
    handles, texts = panels[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc="outside lower center", ncols=columns, fontsize=9, frameon=False)
    return write_figure(figure, path)


def plot_routing_spread(
    weights: RoutingWeights,
    path: str | Path,
    *,
    classes: Sequence[str | int] | None = None,
    layer: str | None = None,
) -> Path:
    """Draw mean and standard deviation of each expert's weight within classes (figure 5).

    A panel for each class. A high bar with a short line is an expert of the class; a long
    line one that tells its images apart.

    Args:
        weights: of the data at hand.
        path: where the figure goes, as SVG, PNG or PDF by its suffix.
        classes: names or labels; None: the first four that have images.
        layer: path; None: the last.

    Returns:
        `path`.

    Raises:
        ValueError: as `plot_mean_routing`.
    """
    path = check_suffix(path)
    labels = _labels(weights, classes)
    layer = weights.layers[-1] if layer is None else layer
    mean, std, counts = weights.mean(layer), weights.std(layer), weights.counts()
    figure = _figure(_width(weights.experts(layer)), 0.8 + 1.7 * len(labels))
    panels = figure.subplots(len(labels), 1, sharex=True, squeeze=False)[:, 0]
    for n, (axes, label) in enumerate(zip(panels, labels, strict=True)):
        axes.bar(
            range(mean.shape[1]),
            mean[label].numpy(),
            yerr=std[label].numpy(),
            width=0.86,
            color=COLOURS[n % len(COLOURS)],
            alpha=0.75,
            error_kw={"elinewidth": 1, "capsize": 2, "ecolor": "#333333"},
        )
        images = f"{counts[label]:,} image{'s' * (int(counts[label]) > 1)}"
        axes.set_title(f"{_short(weights.classes[label], 60)} ({images})", fontsize=10, loc="left")
        _of_experts(axes, mean.shape[1])
    _same_height(panels)
    panels[-1].set_xlabel(f"expert of {_title(weights, layer)}")
    figure.supylabel("routing weight, mean ± s.d.", fontsize=10)
    return write_figure(figure, path)


def plot_top_classes(
    weights: RoutingWeights,
    image: Callable[[int], Any],
    path: str | Path,
    *,
    layer: str | None = None,
    experts: Sequence[int] | None = None,
    n: int = 10,
) -> Path:
    """Draw the classes with the highest mean weight for some experts (figure 6).

    A row for each expert; each class with its image of the highest weight, its name and
    its mean weight.

    Args:
        weights: of the data at hand.
        image: gives the image of a number of ``weights.examples``: from PIL, or an array
            [H, W], [H, W, 1] or [H, W, 3] of bytes or of numbers from 0 to 1. For a data
            set of PyTorch's, ``lambda number: dataset[number][0]`` without a transform.
        path: where the figure goes, as SVG, PNG or PDF by its suffix.
        layer: path; None: the last.
        experts: numbers; None: the four whose mean weight differs most between classes.
        n: classes for each expert, at most.

    Returns:
        `path`.

    Raises:
        ValueError: an unknown layer, expert or suffix, or nothing to draw.
    """
    path = check_suffix(path)
    layer = weights.layers[-1] if layer is None else layer
    experts = _most_specific(weights, layer) if experts is None else list(experts)
    if n < 1 or not experts:
        raise ValueError(f"nothing to draw: experts = {experts}, n = {n}")
    rows = [weights.top_classes(layer, expert, n) for expert in experts]
    across = max(len(row) for row in rows)
    lines = max(len(_lines(found)) for row in rows for found in row)
    figure = _figure(max(4.2, 0.7 + 1.15 * across), 0.5 + (1.2 + 0.12 * lines) * len(rows))
    panels = figure.subplots(len(rows), across, squeeze=False)
    for line, row, expert in zip(panels, rows, experts, strict=True):
        for axes, found in zip(line, row, strict=True):
            number = weights.best_example(layer, expert, found.label)
            _show(axes, image(number), found)
        line[0].set_ylabel(f"expert {expert}", fontsize=10)
    figure.suptitle(f"highest mean routing weight in {_title(weights, layer)}", fontsize=10)
    return write_figure(figure, path)


def plot_weight_histogram(
    weights: RoutingWeights, path: str | Path, *, layer: str | None = None, bins: int = 50
) -> Path:
    """Draw how routing weights are distributed over all images and experts (figure 7).

    Two peaks, at 0 and at 1, say that experts are used sparsely.

    Args:
        weights: of the data at hand.
        path: where the figure goes, as SVG, PNG or PDF by its suffix.
        layer: path; None: the last.
        bins: how many, between 0 and 1.

    Returns:
        `path`.

    Raises:
        ValueError: an unknown layer or suffix, or no bin.
    """
    path = check_suffix(path)
    layer = weights.layers[-1] if layer is None else layer
    counts, edges = weights.histogram(layer, bins)
    figure = _figure(6.4, 3.6)
    axes = figure.subplots()
    share = 100 * counts.double() / counts.sum()
    axes.bar(
        edges[:-1].numpy(),
        share.numpy(),
        width=edges.diff().numpy(),
        align="edge",
        color=COLOURS[0],
        edgecolor="white",
        linewidth=0.4,
    )
    axes.set_xlim(float(edges[0]), float(edges[-1]))
    axes.set(xlabel="routing weight", ylabel="share of weights, %")
    number = weights.experts(layer)
    experts = f"{number} expert{'s' * (number > 1)}, {len(weights.labels):,} images"
    axes.set_title(f"{_title(weights, layer)}: {experts}", fontsize=10, loc="left")
    plain(axes)
    return write_figure(figure, path)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _width(experts: int, dots: int = 1) -> float:
    """Inches that so many bars want, with so many dots side by side on each."""
    return min(30.0, max(6.4, 1.5 + max(0.2, 0.06 * dots) * experts))


def _of_experts(axes: Axes, experts: int) -> None:
    """An axis with a number for each expert, as far as they have room."""
    step = 1 if experts <= 32 else 4
    axes.set_xticks(range(0, experts, step))
    axes.set_xlim(-0.7, experts - 0.3)
    axes.tick_params(labelsize=8)
    plain(axes)
    axes.grid(visible=False, axis="x")


def _same_height(panels: Iterable[Axes]) -> None:
    """Let weights be compared between panels: all reach from 0 to where the highest does."""
    top = max(axes.get_ylim()[1] for axes in panels)
    for axes in panels:
        axes.set_ylim(0, top)


def _title(weights: RoutingWeights, layer: str) -> str:
    source = weights.shared.get(layer)
    return layer if source is None else f"{layer} (routing of {source})"


def _labels(weights: RoutingWeights, classes: Sequence[str | int] | None) -> list[int]:
    if classes is None:
        return weights.counts().nonzero().flatten().tolist()[:FEW]
    if not classes:
        raise ValueError("no class to draw")
    return [weights.label(name) for name in classes]


def _at_all_depths(weights: RoutingWeights) -> list[str]:
    """The first, the last and two between, of the layers that have routers of their own."""
    own = [layer for layer in weights.layers if layer not in weights.shared]
    places = np.linspace(0, len(own) - 1, min(FEW, len(own))).round().astype(int)
    return [own[place] for place in places]


def _most_specific(weights: RoutingWeights, layer: str) -> list[int]:
    """The experts whose mean weight differs most between classes, in order of number."""
    mean = weights.mean(layer)[weights.counts() > 0]
    best = mean.std(0, correction=0).argsort(descending=True, stable=True)[:FEW]
    return sorted(best.tolist())


def _show(axes: Axes, picture: Any, found: ClassWeight) -> None:
    array = np.asarray(picture.cpu() if isinstance(picture, torch.Tensor) else picture)
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[-1] not in (3, 4)):
        raise ValueError(f"an image must be of [H, W] or [H, W, 3], not {array.shape}")
    axes.imshow(array, cmap="gray", vmin=0, vmax=255 if array.dtype == np.uint8 else 1)
    axes.set_title("\n".join(_lines(found)), fontsize=7)
    axes.set_anchor("N")  # names stand in a line, whatever shape the images have
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def _lines(found: ClassWeight) -> list[str]:
    return [*textwrap.wrap(_short(found.name, 30), 15), f"{found.mean:.2f}"]


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else f"{name[: length - 1]}…"
