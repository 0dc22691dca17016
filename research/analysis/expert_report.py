"""The routing of a saved CondConv network on a data set: a file, rows and four figures."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from pliant.records import write_records
from pliant.train.data import Part
from pliant.train.evaluation import prepare
from research.analysis.expert_plots import (
    plot_mean_routing,
    plot_routing_spread,
    plot_top_classes,
    plot_weight_histogram,
)
from research.analysis.experts import ExpertRow, RoutingWeights, routing_weights

WEIGHTS, ROWS = "routing.npz", "experts.csv"
FIGURES = ("mean.svg", "spread.svg", "top-classes.png", "histogram.svg")  # figures 4 to 7


def report_experts(
    model: nn.Module | str | os.PathLike[str],
    folder: str | Path,
    data: str | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    part: Part = "test",
    classes: Sequence[str] | None = None,
    per_class: int | None = None,
    batch: int = 256,
    device: str = "auto",
    workers: int = 2,
) -> RoutingWeights:
    """Collect the routing weights of a network on a data set, and write what they show.

    The folder gets ``routing.npz`` (`RoutingWeights.load` reads it), ``experts.csv`` (an
    `ExpertRow` a line, with the name of the image of highest weight), and figures 4 to 7
    of the paper: ``mean.svg``, ``spread.svg``, ``top-classes.png``, ``histogram.svg``.

    Args:
        model: a network, which stays on `device`, or the folder of a saved one or a run.
        folder: where the files go.
        data: as `pliant.train.evaluate`; so `path`, `part`, `batch`, `device`, `workers`.
        path: see `data`.
        part: see `data`.
        classes: names of those that are drawn against all; None: the first four.
        per_class: at most so many images of a class; None takes all.
        batch: see `data`.
        device: see `data`.
        workers: see `data`.

    Returns:
        The weights. ``examples`` are the images' numbers in the set, those that cannot be
        read counted.

    Raises:
        ValueError: as `evaluate` and `routing_weights`; or an unknown class.
        FileNotFoundError: as `evaluate`.

    Example:
        >>> import tempfile, timm, pliant
        >>> model = timm.create_model("cc_mobilenetv1_025_cifar", experts=2, in_chans=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     found = report_experts(model, folder, "digits", per_class=3, device="cpu")
        ...     sorted(p.name for p in Path(folder).iterdir())
        ['experts.csv', 'histogram.svg', 'mean.svg', 'routing.npz', 'spread.svg', 'top-classes.png']
    """
    folder = Path(folder)
    given = prepare(model, data, path, part=part, batch=batch, device=device, workers=workers)
    found = routing_weights(
        given.network.to(given.device), given.batches, given.classes, per_class=per_class
    )
    names = [given.images.where(i) for i in range(len(given.images))]
    read = torch.tensor([i for i, name in enumerate(names) if name not in given.batches.unreadable])
    found = replace(found, examples=read[found.examples])
    for name in classes or ():
        found.label(name)  # refused before anything is written
    found.save(folder / WEIGHTS)
    rows = [replace(row, best_image=names[row.best_example]) for row in found.rows()]
    write_records(folder / ROWS, ExpertRow, rows)
    mean, spread, top, histogram = (folder / name for name in FIGURES)
    plot_mean_routing(found, mean, classes=classes)
    plot_routing_spread(found, spread, classes=classes)
    plot_top_classes(found, given.images.image, top)
    plot_weight_histogram(found, histogram)
    return found
