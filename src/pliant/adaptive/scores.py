"""Score every depth of an adaptive network in one call: `evaluate_depths`.

Shapes: x float32 [B, C, S, S], images; y int64 [B], classes; logits [B, classes].
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from pliant import tables
from pliant.measuring.entrants import by_name
from pliant.methods.adaptive_depth.depth import at_depth, depths, get_depth
from pliant.methods.adaptive_depth.switch import Skip, check_skips, depth_name, depth_role
from pliant.provenance import provenance
from pliant.records import Origin, write_records
from pliant.train.data import Part
from pliant.train.evaluation import Scores, prepare

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class DepthScore(Origin):
    """One depth of one network: what it costs and reaches.

    Attributes:
        network: the architecture.
        depth: a letter for each stage that can skip, ``T`` skips, as the paper writes it:
            ``"FFFF"`` is the whole network (super-net), ``"TTTT"`` the base network.
        parameters: that this depth uses.
        macs: multiply-accumulates of one image.
        top1: share of images whose class has the highest output, in percent.
        top5: share whose class is among the five highest, in percent; None below ten classes.
        loss: mean cross entropy.
        images: how many were scored.
        unreadable: how many more could not be read, and are left out.
        data: name of the data set.
        part: ``"test"`` or ``"val"``.
        pixels: height and width of the images.
    """

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
        return tuple(letter == "T" for letter in self.depth)

    @property
    def role(self) -> str:
        """``"super"``, ``"base"``, or empty between the two."""
        return depth_role(self.skip)


def evaluate_depths(
    model: nn.Module | str | os.PathLike[str],
    data: str | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    skips: Iterable[Sequence[bool]] | None = None,
    part: Part = "test",
    batch: int = 256,
    device: str = "auto",
    workers: int = 2,
    pixels: int | None = None,
) -> list[DepthScore]:
    """Score the depths of an adaptive network on the same images, read once.

    Args:
        model: a network converted by `AdaptiveDepth`, or the folder of a saved one or of a
            run. Its own depth stays as it is.
        data: this, and all but `skips`, as of `pliant.train.evaluate`.
        path: likewise.
        skips: which depths; None: all.
        part: likewise.
        batch: likewise.
        device: likewise.
        workers: likewise.
        pixels: likewise.

    Returns:
        A row for each depth, in the order of `pliant.depths` (the whole network first), or of
        `skips`.

    Raises:
        ValueError: the network has no adaptive depth, or other flags; or as `evaluate`.
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
    mode = network.training
    network.to(ready.device).eval()
    try:
        with torch.no_grad():
            for x, y in ready.batches:
                x, y = x.to(ready.device), y.to(ready.device)
                for skip, score in scores.items():
                    with at_depth(network, skip):
                        score.update(network(x), y)
    finally:
        network.train(mode)
    name = next(iter(by_name(network)))
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
                top1=100 * found.top1,
                top5=None if found.top5 is None else 100 * found.top5,
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


def report_depths(
    model: nn.Module | str | os.PathLike[str],
    data: str | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    rows: str | Path | None = None,
    plot: str | Path | None = None,
    **options: Any,
) -> list[DepthScore]:
    """`evaluate_depths`, and its files.

    Args:
        model: as of `evaluate_depths`.
        data: likewise.
        path: likewise.
        rows: CSV file that gets the rows, appended.
        plot: figure of accuracy against multiply-accumulates.
        options: further keywords of `evaluate_depths`.

    Raises:
        ValueError: as `evaluate_depths`; or a file that could not be written, before the
            scoring.
        FileNotFoundError: as `evaluate_depths`.
    """
    from pliant.adaptive.depth_plots import plot_depths
    from pliant.figures import check_suffix

    if plot is not None:
        check_suffix(plot)
    if rows is not None:
        write_depth_scores(rows, [], append=True)
    scores = evaluate_depths(model, data, path, **options)
    if rows is not None:
        write_depth_scores(rows, scores, append=True)
    if plot is not None:
        plot_depths(scores, plot)
    return scores


# Heading, and what a row says in it.
_COLUMNS: dict[str, Callable[[DepthScore], str]] = {
    "depth": lambda r: f"{r.depth} ({r.role})" if r.role else r.depth,
    "top-1, %": lambda r: f"{r.top1:.2f}",
    "top-5, %": lambda r: "" if r.top5 is None else f"{r.top5:.2f}",
    "loss": lambda r: f"{r.loss:.4f}",
    "MACs, M": lambda r: f"{r.macs / 1e6:.2f}",
    "parameters": lambda r: f"{r.parameters:,}",
}


def depth_table(scores: Sequence[DepthScore]) -> Table:
    """Scores for `rich.print`."""
    title, headings, body = _layout(scores)
    return tables.terminal(headings, body, title=title)


def depth_markdown(scores: Sequence[DepthScore]) -> str:
    """Scores as a Markdown table, under a line that says of what."""
    title, headings, body = _layout(scores)
    return f"{title}\n\n{tables.markdown(headings, body)}"


def _layout(scores: Sequence[DepthScore]) -> tuple[str, list[str], list[list[str]]]:
    told = dict.fromkeys(
        f"{r.network}, {r.data} {r.part}, {r.images} images of {r.pixels} px"
        + (f", {r.unreadable} unreadable" if r.unreadable else "")
        for r in scores
    )
    if len(told) != 1:
        raise ValueError(f"a table is of one network on one set of images; these are {len(told)}")
    headings = [h for h, text in _COLUMNS.items() if any(map(text, scores))]
    return next(iter(told)), headings, [[_COLUMNS[h](r) for h in headings] for r in scores]


def write_depth_scores(path: str | Path, scores: Iterable[DepthScore], append: bool = False) -> None:
    """Write scores to a CSV file; the file is replaced whole or not at all.

    Args:
        path: the file; its folder is made if missing.
        scores: what to write.
        append: keep the rows that the file has, and add these.

    Raises:
        ValueError: `append` to a file with other columns.
    """
    write_records(path, DepthScore, scores, append=append, number=".4f", called="scores of depths")
