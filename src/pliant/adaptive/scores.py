"""Accuracy of the depths of an adaptive network: `evaluate_depths`, its tables, rows and figure.

Shapes: x float32 [B, C, S, S], images; y int64 [B], classes; logits [B, classes].
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from pliant import outside, tables
from pliant.evaluating import evaluating
from pliant.figures import check_suffix, plain, write_figure
from pliant.methods.adaptive_depth.depth import at_depth, depths, get_depth
from pliant.methods.adaptive_depth.switch import (
    Skip,
    SkipLike,
    check_skip,
    check_skips,
    depth_name,
    depth_role,
)
from pliant.provenance import provenance
from pliant.records import Origin, percent, write_records
from pliant.train.data import Part
from pliant.train.evaluation import Scores, prepare

if TYPE_CHECKING:
    from rich.table import Table

_COLOUR = "#0072B2"


@dataclass(frozen=True, kw_only=True)
class DepthScore(Origin):
    """Cost and accuracy of one depth of one network.

    Attributes:
        network: name of the architecture.
        depth: one letter for each stage that can skip, ``T`` skips: ``"FFFF"`` is the whole
            network (super-net in the paper), ``"TTTT"`` the base network.
        parameters: number of parameters that this depth uses.
        macs: multiply-accumulates of one image.
        top1: share of images whose class has the highest output, in [0, 1]; percent in tables and files.
        top5: share of images whose class is among the five highest; None below ten classes.
        loss: mean cross entropy.
        images: number of images scored.
        unreadable: number of images that could not be read, and are left out.
        data: name of the data set.
        part: ``"test"`` or ``"val"``.
        pixels: height and width of the images.
    """

    PERCENT: ClassVar[tuple[str, ...]] = ("top1", "top5")

    network: str
    depth: str
    parameters: int
    macs: int
    top1: float
    top5: float | None
    loss: float
    images: int
    unreadable: int
    data: str
    part: str
    pixels: int

    @property
    def skip(self) -> Skip:
        """The flags, as `pliant.set_depth` takes them."""
        return check_skip(self.depth)

    @property
    def role(self) -> str:
        """``"super"``, ``"base"``, or empty between the two."""
        return depth_role(self.skip)


def evaluate_depths(
    model: nn.Module | str | os.PathLike[str],
    data: str | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    skips: Iterable[SkipLike] | None = None,
    part: Part = "test",
    batch: int = 256,
    device: str = "auto",
    workers: int = 2,
    pixels: int | None = None,
) -> list[DepthScore]:
    """Score the depths of an adaptive network on the same images, read once.

    Args:
        model: a network converted by `AdaptiveDepth`, or the folder of a saved one or of a
            run. Its own depth is not changed.
        data: name of the data set, as of `pliant.evaluate`; None: that of the run.
        path: folder of the data, as of `pliant.evaluate`.
        skips: which depths, such as ``["TTFF", "FFFF"]``; None: all.
        part: ``"test"`` or ``"val"``.
        batch: images a forward.
        device: ``"auto"``, ``"cpu"`` or ``"cuda"``.
        workers: processes that load images.
        pixels: height and width of the images; None: those of the run or the network.

    Returns:
        One row for each depth, in the order of `skips` or of `pliant.depths` (the whole network
        first).

    Raises:
        ValueError: the network has no adaptive depth, or other flags; as `pliant.evaluate`.
        FileNotFoundError: no data, or no checkpoint.

    Example:
        >>> import timm, pliant
        >>> model = timm.create_model("resnet20_cifar_adn", in_chans=1, num_classes=10)
        >>> scores = evaluate_depths(model, "digits", part="val", pixels=8)
        >>> [score.depth for score in scores][:3], scores[-1].role
        (['FFF', 'FFT', 'FTF'], 'base')
    """
    ready = prepare(
        model, data, path, part=part, batch=batch, device=device, workers=workers, pixels=pixels
    )
    network, side = ready.network, ready.recipe.pixels
    flags = len(get_depth(network))
    wanted = check_skips(skips, flags)
    costs = {info.skip: info for info in depths(network, (ready.recipe.in_chans, side, side))}
    scores = {skip: Scores(ready.classes, ready.device) for skip in wanted}
    with evaluating(network.to(ready.device)), torch.no_grad():
        for x, y in ready.batches:
            x, y = x.to(ready.device), y.to(ready.device)
            for skip, score in scores.items():
                with at_depth(network, skip):
                    score.update(network(x), y)
    name = outside.name_of(network)
    origin = provenance(ready.device)
    rows = []
    for skip, score in scores.items():
        found = score.result()
        macs = costs[skip].macs
        assert macs is not None  # a size was given
        rows.append(
            DepthScore(
                network=name,
                depth=depth_name(skip),
                parameters=costs[skip].parameters,
                macs=macs,
                top1=found.top1,
                top5=found.top5,
                loss=found.loss,
                images=found.images,
                unreadable=len(ready.batches.unreadable),
                data=ready.recipe.data,
                part=part,
                pixels=side,
                **origin,
            )
        )
    return rows


# Heading of a column, and the text of a row in it.
_COLUMNS: dict[str, Callable[[DepthScore], str]] = {
    "depth": lambda r: f"{r.depth} ({r.role})" if r.role else r.depth,
    "top-1, %": lambda r: f"{percent(r.top1):.2f}",
    "top-5, %": lambda r: "" if r.top5 is None else f"{percent(r.top5):.2f}",
    "loss": lambda r: f"{r.loss:.4f}",
    "MACs, M": lambda r: f"{r.macs / 1e6:.2f}",
    "parameters": lambda r: f"{r.parameters:,}",
}


def depth_table(scores: Sequence[DepthScore]) -> Table:
    """Scores as a table for `rich.print`."""
    title, headings, body = _layout(scores)
    return tables.terminal(headings, body, title=title)


def depth_markdown(scores: Sequence[DepthScore]) -> str:
    """Scores as a Markdown table, under a line that names network and images."""
    title, headings, body = _layout(scores)
    return f"{title}\n\n{tables.markdown(headings, body)}"


def _layout(scores: Sequence[DepthScore]) -> tuple[str, list[str], list[list[str]]]:
    told = dict.fromkeys(
        f"{r.network}, {r.data} {r.part}, {r.images} images of {r.pixels} px"
        + (f", {r.unreadable} unreadable" if r.unreadable else "")
        for r in scores
    )
    if len(told) != 1:
        raise ValueError(
            f"the scores are of {len(told)} networks or sets of images; give those of one, a table each"
        )
    headings = [h for h, text in _COLUMNS.items() if any(map(text, scores))]
    return next(iter(told)), headings, [[_COLUMNS[h](r) for h in headings] for r in scores]


def write_depth_scores(path: str | Path, scores: Iterable[DepthScore], append: bool = False) -> None:
    """Write scores to a CSV file; the file is replaced whole or not at all.

    Args:
        path: name of the file; its folder is made if it is missing.
        scores: the rows to write.
        append: keep the rows that the file has, and add these.

    Raises:
        ValueError: `append` to a file with other columns.
    """
    write_records(path, DepthScore, scores, append=append, number=".4f", called="scores of depths")


def plot_depths(scores: Sequence[DepthScore], path: str | Path) -> Path:
    """Draw the accuracy of each depth against its multiply-accumulates.

    Figure 3(a) of *Adaptive Depth Networks* (arXiv 2312.16392). The two depths that are
    trained, the whole network and the base network, are filled; the others are hollow.

    Args:
        scores: the rows of `evaluate_depths`.
        path: file of the figure: SVG, PNG or PDF by its suffix.

    Returns:
        `path`.

    Raises:
        ValueError: no scores, or an unknown suffix.
    """
    from matplotlib.figure import Figure

    path = check_suffix(path)
    if not scores:
        raise ValueError("there are no scores to draw; evaluate_depths gives them")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    rows = sorted(scores, key=lambda r: (r.macs, r.top1))
    for filled, label in ((True, "trained: super and base"), (False, "not trained themselves")):
        own = [r for r in rows if bool(r.role) == filled]
        if own:
            axes.plot(
                [r.macs / 1e6 for r in own],
                [percent(r.top1) for r in own],
                "o",
                color=_COLOUR,
                markerfacecolor=_COLOUR if filled else "white",
                label=label,
                zorder=3,
            )
    for macs in dict.fromkeys(r.macs for r in rows):
        # Many depths cost the same: their names stand on either side in turn.
        for n, row in enumerate(r for r in rows if r.macs == macs):
            axes.annotate(
                row.depth,
                (macs / 1e6, percent(row.top1)),
                (-6 if n % 2 else 6, 0),
                textcoords="offset points",
                ha="right" if n % 2 else "left",
                va="center",
                fontsize=7,
            )
    axes.margins(x=0.1, y=0.15)
    axes.set(
        xlabel="multiply-accumulates of an image, M", ylabel="top-1 accuracy, %", title=rows[0].network
    )
    axes.legend(fontsize=8, frameon=False, loc="lower right")
    plain(axes)
    return write_figure(figure, path)
