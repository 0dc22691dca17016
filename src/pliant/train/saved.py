"""The checkpoints of a training run, read without Lightning.

A run's folder has two: ``checkpoints/last.ckpt``, and ``checkpoints/previous.ckpt`` before it. Both are
Lightning checkpoints, written by `torch.save` and read with ``weights_only``. The key ``"pliant"`` holds
the recipe, the environment, the history, the weights of the best epoch, and the sums of the epoch so far.
"""

from __future__ import annotations

import logging
import os
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from pliant.provenance import provenance
from pliant.train.processes import device_of
from pliant.train.recipe import Recipe

LAST = Path("checkpoints", "last.ckpt")
PREVIOUS = LAST.with_name("previous.ckpt")
DAMAGED = LAST.with_name("damaged.ckpt")
OURS = "pliant"
# How a run is continued, from Python and from the command line.
AGAIN = "call pliant.fit again with resume=True, or repeat the pliant train command with --resume"
ADVICE = f"the checkpoints written so far are kept; mend the cause, then {AGAIN}"

# Facts of the environment that may change the last bits of a result.
_WATCHED = (
    *("python", "torch", "timm", "lightning", "pliant", "commit"),
    *("cpu", "instructions", "gpu", "threads"),
)


class DamagedCheckpointError(ValueError):
    """A checkpoint of a run is damaged; the message names it."""


@dataclass(frozen=True, kw_only=True)
class SavedState:
    """Contents of a run's checkpoint, without tensors.

    Attributes:
        path: the file.
        recipe: recipe of the run.
        environment: machine, versions, commit and threads of the process that wrote it.
        epoch: epoch in which training continues, from 0.
        step: optimiser steps so far in the whole run.
        history: one row for each epoch that has ended.
        teacher: name of the teacher and hash of its weights; None without a teacher.
    """

    path: Path
    recipe: Recipe
    environment: Mapping[str, Any]
    epoch: int
    step: int
    history: list[dict[str, float]]
    teacher: Mapping[str, str] | None = None


def read_state(place: str | os.PathLike[str]) -> SavedState:
    """Read the newest whole checkpoint of a run: recipe, versions, commit, progress.

    Args:
        place: folder of a run, or one of its ``.ckpt`` files. Nothing in it is executed.

    Raises:
        FileNotFoundError: there is no checkpoint.
        DamagedCheckpointError: a ``ValueError``: none is whole.

    Example:
        >>> import tempfile
        >>> from pliant.train import Recipe, fit
        >>> recipe = Recipe(
        ...     name="tiny", model="resnet20_cifar", model_args={"layers": [1, 1, 1]}, pixels=8, epochs=1,
        ...     batch=512,
        ... )
        >>> with tempfile.TemporaryDirectory() as place:
        ...     run = fit(recipe, f"{place}/run", progress=False)
        ...     state = read_state(f"{place}/run")
        >>> state.recipe == recipe, state.step, state.environment["torch"] == torch.__version__
        (True, 2, True)
    """
    place = Path(place)
    path = newest(place, quiet=True) if place.is_dir() else place
    if path is None or not path.is_file():
        raise FileNotFoundError(f"{place} holds no checkpoint of a run")
    content = _read(path)
    ours = content[OURS]
    done = len(ours["history"])
    return SavedState(
        path=path,
        recipe=Recipe.from_dict(ours["recipe"]),
        environment=ours["environment"],
        epoch=done,
        step=content["global_step"],
        history=ours["history"],
        teacher=ours.get("teacher"),
    )


def newest(folder: Path, *, quiet: bool = False) -> Path | None:
    """The newest whole checkpoint in a run's folder; None if it has none yet.

    Every byte is read and compared with its checksum. If the last checkpoint is damaged, a warning
    names it (not with `quiet`) and the one before is taken.

    Raises:
        DamagedCheckpointError: there are checkpoints, and none is whole.
    """
    problems = []
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.is_file():
            continue
        try:
            state = _read(path)
        except DamagedCheckpointError as error:
            problems.append(str(error))
            continue
        if problems and not quiet:
            logging.getLogger(__name__).warning(
                "%s; going on from the one before, %s, of epoch %d, step %d",
                "; ".join(problems), path, len(state[OURS]["history"]), state["global_step"],
            )  # fmt: skip
        return path
    if problems:
        raise DamagedCheckpointError(
            f"{'; '.join(problems)}; no other checkpoint is left: restore a copy, or start again in "
            f"another folder"
        )
    return None


def environment(recipe: Recipe) -> dict[str, Any]:
    """Machine, versions, commit and threads of this process, for a run of `recipe`."""
    about = {**provenance(device_of(recipe)), "lightning": version("lightning")}
    # torch's version is no plain str, which weights_only needs.
    return {k: str(v) if isinstance(v, str) else v for k, v in about.items()} | {
        "threads": torch.get_num_threads()
    }


def check_teacher(ours: Mapping[str, Any], now: Mapping[str, str] | None) -> None:
    """Refuse to continue a run with another teacher than it began with.

    Args:
        ours: pliant's part of the run's checkpoint.
        now: identity of the teacher now (`pliant.train.distillation.Teaching`); None: no teacher.

    Raises:
        ValueError: the weights differ; the message names both teachers.
    """
    before = ours.get("teacher")
    if (before or {}).get("sha256") != (now or {}).get("sha256"):
        one, two = (f"{t['network']} ({t['sha256'][:12]})" if t else "none" for t in (before, now))
        raise ValueError(
            f"the run began with another teacher: then {one}, now {two} (in brackets, the hash of its "
            f"weights); give the same teacher, or choose another folder"
        )


def warn_of_changes(
    before: Mapping[str, Any], now: Mapping[str, Any], where: str | os.PathLike[str] | None
) -> None:
    """Log a warning that names what changed, where a run continues in another environment."""
    changed = [
        f"{name} {before[name] or 'none'} and {now.get(name) or 'none'}"
        for name in _WATCHED
        if name in before and before[name] != now.get(name)  # older checkpoints say less
    ]
    if changed:
        logging.getLogger(__name__).warning(
            "%s was written in another environment (then and now: %s); from here on the run may differ "
            "from an unbroken one",
            where, ", ".join(changed),
        )  # fmt: skip


def _read(path: Path) -> dict[str, Any]:
    """The content of a checkpoint that is whole, tensors on the CPU."""
    try:
        with zipfile.ZipFile(path) as archive:  # torch itself does not look at the checksums
            broken = archive.testzip()
        if broken is not None:
            raise ValueError(f"the checksum of {broken} is wrong")
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        if "recipe" not in content.get(OURS, {}):
            raise ValueError("no run of this version of pliant wrote it")
    except Exception as error:  # zipfile, pickle and torch raise many kinds for damaged files
        reason = str(error).partition("\n")[0]
        raise DamagedCheckpointError(f"{path} cannot be used ({reason})") from error
    return content
