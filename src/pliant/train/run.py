"""The folder of a training run, and what comes back from one.

``recipe.json`` and ``environment.json`` are written at the start, ``metrics.csv`` after
each epoch, ``best/`` (the network, by `pliant.checkpoint`) and ``run.json`` at the end.
``checkpoints/`` and ``tensorboard/`` are Lightning's.
"""

from __future__ import annotations

import csv
import io
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pliant._files import atomic_path
from pliant.measuring.provenance import provenance
from pliant.train.recipe import WHERE, Recipe, differences

RECIPE, ENVIRONMENT, METRICS, RESULT, BEST = (
    "recipe.json",
    "environment.json",
    "metrics.csv",
    "run.json",
    "best",
)
TENSORBOARD = "tensorboard"
LAST = Path("checkpoints", "last.ckpt")


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished training run.

    Attributes:
        folder: where it lies.
        recipe: what was run.
        model: the network of the best epoch, in evaluation mode, on the CPU.
        history: one row an epoch; see `pliant.train.tasks.Classification`.
        best_epoch: the first with the highest validation accuracy (of an adaptive network
            that is trained at both depths, the mean of theirs); an index into `history`.
        val_accuracy: of that epoch, in [0, 1].
        test_accuracy: of `model` on the test set, scored once, in float32; None where
            the data has no test set.
        seconds: of all epochs, validation included.
        unreadable: how many images could not be read.
        unreadable_paths: which.
    """

    folder: Path
    recipe: Recipe
    model: nn.Module = field(repr=False)
    history: list[dict[str, float]] = field(repr=False)
    best_epoch: int
    val_accuracy: float
    test_accuracy: float | None
    seconds: float
    unreadable: int = 0
    unreadable_paths: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Run:
        """Read a finished run back; see `read_run`."""
        return read_run(folder)


def read_run(folder: str | os.PathLike[str]) -> Run:
    """The run that `fit` left in a folder, with its network.

    Raises:
        FileNotFoundError: there is no run, or it has not finished.
    """
    from pliant.checkpoint import load

    folder = Path(folder)
    if not (folder / RESULT).is_file():
        unfinished = (folder / RECIPE).is_file()
        why = "a run that has not finished; continue it with resume" if unfinished else "no run"
        raise FileNotFoundError(f"{folder} holds {why} (there is no {RESULT})")
    result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    return Run(
        folder=folder,
        recipe=Recipe.from_dict(result["recipe"]),
        model=load(folder / BEST),
        history=result["history"],
        best_epoch=result["best_epoch"],
        val_accuracy=result["val_accuracy"],
        test_accuracy=result["test_accuracy"],
        seconds=result["seconds"],
        unreadable=result["unreadable"],
        unreadable_paths=tuple(result["unreadable_paths"]),
    )


def write_run(run: Run) -> None:
    """Write ``run.json``, which says that the run has finished."""
    result = {f.name: getattr(run, f.name) for f in fields(run) if f.name not in ("folder", "model")}
    write_json(run.folder / RESULT, result | {"recipe": run.recipe.as_dict()})


def claim(folder: Path, recipe: Recipe, *, resume: bool) -> Path | None:
    """Take a folder for a run.

    Returns:
        Lightning's checkpoint to continue from, or None to begin.

    Raises:
        ValueError: the folder holds something else, or a run of another recipe; or it
            holds this run and `resume` was not asked for; or there is none to resume.
    """
    written = folder / RECIPE
    if not written.is_file():
        if resume:
            raise ValueError(f"{folder} holds no run to resume; start it without resume")
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ValueError(f"{folder} is not empty and holds no run; choose another folder")
    else:
        before = Recipe.from_dict(json.loads(written.read_text(encoding="utf-8")))
        other = differences(before, recipe, leaving_out=WHERE)
        if other:
            raise ValueError(
                f"{folder} holds a run of another recipe: {', '.join(other)}; choose another folder"
            )
        if not resume:
            raise ValueError(
                f"{folder} holds this run already; continue it with resume, or choose another folder"
            )
        # Killed before the end of its first epoch, a run begins again.
        return folder / LAST if (folder / LAST).is_file() else None
    folder.mkdir(parents=True, exist_ok=True)
    gpu = recipe.accelerator != "cpu" and torch.cuda.is_available()
    write_json(folder / ENVIRONMENT, provenance("cuda" if gpu else "cpu"))
    write_json(written, recipe.as_dict())
    return None


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a file whole, or not at all."""
    _write(path, json.dumps(values, indent=2) + "\n")


def write_metrics(path: Path, history: Sequence[Mapping[str, float]]) -> None:
    """Write the history as CSV, one row an epoch; after a resume it is whole again."""
    names = list(dict.fromkeys(name for row in history for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(history)
    _write(path, text.getvalue())


def _write(path: Path, text: str) -> None:
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
