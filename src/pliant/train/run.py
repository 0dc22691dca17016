"""The folder of a training run, and its result.

``recipe.json``, ``environment.json`` and ``images.json`` are written at the start, ``metrics.csv``
after each epoch, ``best/`` (the network, by `pliant.checkpoint`) and ``run.json`` at the end.
`pliant.train.saved` describes ``checkpoints/``; Lightning writes ``tensorboard/``; ``run.lock`` names
the process that works there.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from torch import nn

from pliant._files import atomic_path, leftovers, writing
from pliant._lock import held
from pliant.provenance import provenance
from pliant.train.division import Division
from pliant.train.processes import device_of
from pliant.train.recipe import WHERE, Recipe, differences
from pliant.train.saved import ADVICE, AGAIN, DAMAGED, LAST, newest

RECIPE, ENVIRONMENT, IMAGES = "recipe.json", "environment.json", "images.json"
METRICS, RESULT = "metrics.csv", "run.json"
BEST, TENSORBOARD, LOCK = "best", "tensorboard", "run.lock"


@dataclass(frozen=True, kw_only=True)
class Run:
    """A finished training run.

    Attributes:
        folder: folder of the run.
        recipe: what was run.
        model: the network of the best epoch, in evaluation mode, on the CPU.
        history: one row an epoch; see `pliant.train.tasks.Classification`.
        best_epoch: index into `history` of the first epoch with the highest validation accuracy (for an
            adaptive network trained at both depths, the mean of the two).
        val_accuracy: of that epoch, in [0, 1].
        test_accuracy: of `model` on the test set, scored once, in float32; None where
            the data has no test set.
        seconds: duration of all epochs, validation included.
        unreadable: number of images that could not be read.
        unreadable_paths: paths of these images.
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


_KEPT = [f.name for f in fields(Run) if f.name not in ("folder", "model")]  # what ``run.json`` holds


def read_run(folder: str | os.PathLike[str]) -> Run:
    """The run that `fit` left in a folder, with its network.

    Raises:
        FileNotFoundError: there is no run, or it has not finished.
    """
    from pliant.checkpoint import load

    folder = Path(folder)
    if not (folder / RESULT).is_file():
        if (folder / RECIPE).is_file():
            raise FileNotFoundError(
                f"{folder} holds an unfinished run (no {RESULT}); to continue it, {AGAIN}"
            )
        raise FileNotFoundError(f"{folder} holds no run; give the folder that fit wrote")
    result = json.loads((folder / RESULT).read_text(encoding="utf-8"))
    kept = {name: result[name] for name in _KEPT}
    kept["recipe"] = Recipe.from_dict(kept["recipe"])
    kept["unreadable_paths"] = tuple(kept["unreadable_paths"])
    return Run(folder=folder, model=load(folder / BEST), **kept)


def network_folder(folder: Path) -> Path:
    """The folder of the network in a run's folder; any other folder as it is."""
    return folder / BEST if (folder / BEST).is_dir() else folder


def run_of(folder: Path) -> Path | None:
    """The folder of the run that a folder is, or whose network it holds; None if there is none."""
    inside = [folder.parent] if folder.name == BEST else []
    return next((place for place in (folder, *inside) if (place / RECIPE).is_file()), None)


def read_recipe(folder: Path) -> Recipe | None:
    """The recipe of the run in a folder, or None if there is no run.

    Raises:
        ValueError: the file is damaged, or of another version of pliant.
    """
    written = folder / RECIPE
    if not written.is_file():
        return None
    try:
        return Recipe.from_dict(json.loads(written.read_text(encoding="utf-8")))
    except ValueError as error:
        raise ValueError(f"{written} cannot be read: {error}") from error


def read_division(folder: Path) -> Division | None:
    """Which images the run in a folder has in which part; None if none is recorded.

    Raises:
        ValueError: the file is damaged.
    """
    written = folder / IMAGES
    if not written.is_file():
        return None
    try:
        return Division.from_dict(json.loads(written.read_text(encoding="utf-8")))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{written} cannot be read: {error!r}; restore a copy") from error


def write_run(run: Run) -> None:
    """Write ``run.json``, which says that the run has finished."""
    result = {name: getattr(run, name) for name in _KEPT}
    write_json(run.folder / RESULT, result | {"recipe": run.recipe.as_dict()})


@contextmanager
def claimed(folder: Path, recipe: Recipe, *, resume: bool) -> Iterator[Path | None]:
    """Hold a folder for a run of this process until the block ends.

    What killed processes left of half-written files is removed. A damaged checkpoint is set aside as
    ``damaged.ckpt``.

    Yields:
        The checkpoint to continue from, or None to begin.

    Raises:
        ValueError: as `check_claim`; another process has the folder (`FolderInUseError`); no
            checkpoint of the run is whole (`DamagedCheckpointError`).
        NotWrittenError: the folder cannot be written.
    """
    check_claim(folder, recipe, resume=resume)
    advice = "choose a folder that can be"
    with ExitStack() as stack:
        with writing(folder, advice):
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(held(folder / LOCK))
        check_claim(folder, recipe, resume=resume)  # another may have been quicker
        with writing(folder, advice):
            for path in _left(folder):
                shutil.rmtree(path)
            if not (folder / RECIPE).is_file():  # first: it says that the folder is a run's
                write_json(folder / RECIPE, recipe.as_dict())
            if not (folder / ENVIRONMENT).is_file():
                write_json(folder / ENVIRONMENT, provenance(device_of(recipe)))
            # Killed before its first checkpoint, a run begins again.
            checkpoint = newest(folder)
            if checkpoint not in (None, folder / LAST) and (folder / LAST).is_file():
                (folder / LAST).replace(folder / DAMAGED)
        yield checkpoint


def check_claim(folder: Path, recipe: Recipe, *, resume: bool) -> None:
    """Refuse a folder that is not for this run; nothing is written.

    Raises:
        ValueError: the folder holds something else or a run of another recipe, holds this run without
            `resume`, or holds no run with it.
    """
    before = read_recipe(folder)
    if before is None:
        if resume:
            raise ValueError(
                f"{folder} holds no run to resume; to start one, leave out resume=True or --resume"
            )
        ours = {folder / LOCK, *_left(folder)}  # left by a process that was killed at its very start
        if folder.exists() and (not folder.is_dir() or set(folder.iterdir()) - ours):
            raise ValueError(f"{folder} is not empty and holds no run; choose another folder")
        return
    if other := differences(before, recipe, leaving_out=WHERE):
        raise ValueError(
            f"{folder} holds a run of another recipe: {', '.join(other)}; choose another folder"
        )
    if not resume:
        raise ValueError(
            f"{folder} holds this run already; to continue it, {AGAIN}; or choose another folder"
        )


def _left(folder: Path) -> list[Path]:
    """Temporary folders of processes that were killed while writing."""
    names = (RECIPE, ENVIRONMENT, IMAGES, METRICS, RESULT, BEST, LAST)
    return [path for name in names for path in leftovers(folder / name)]


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
    with writing(path, ADVICE), atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
