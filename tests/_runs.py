"""A small run, ways to stop one, and whether one that went on is the run that never stopped."""

from __future__ import annotations

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from pliant.train import Recipe, fit, override

# Two blocks a stage of the three that `resnet20_cifar` has, and narrower: a step takes a third of the time.
NARROW = {"channels": [8, 16, 16]}
SMALL = {"layers": [2, 2, 2], **NARROW}

# Two epochs of eight steps.
TINY = Recipe(
    name="tiny",
    model="resnet20_cifar_mod",
    model_args=SMALL,
    pixels=8,
    epochs=2,
    batch=128,
    augmentation="crop",
    accelerator="cpu",
    threads=1,
)


class StopAfter(Callback):
    """A run that is killed after some epochs, its checkpoint written."""

    def __init__(self, epochs):
        self.epochs = epochs

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epochs:
            raise KeyError("killed")


class Stop(Callback):
    """Raise at one step: quicker than a process, and as sudden for what lies on the disk."""

    def __init__(self, step):
        self.step = step

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == self.step:
            raise KeyError("stopped")


def stopped(folder, recipe, step, minutes=0):
    with pytest.raises(KeyError, match="stopped"):
        fit(
            override(recipe, [f"checkpoint_minutes={minutes}"]),
            folder,
            progress=False,
            callbacks=[Stop(step)],
        )


def killed(*runs):
    """Train in other processes until each is killed; runs are triples of folder, recipe and point.

    See `_killed`: one process imports PyTorch for all.
    """
    script = Path(__file__).with_name("_killed.py")
    told = [(str(folder), recipe.as_dict(), point) for folder, recipe, point in runs]
    done = subprocess.run(
        [sys.executable, str(script), json.dumps(told)],
        capture_output=True,
        text=True,
        timeout=60 + 60 * len(runs),
        check=False,
    )
    assert done.stdout.split() == [str(-signal.SIGKILL)] * len(runs), done.stderr
    assert not any((folder / "run.json").exists() for folder, _, _ in runs)


def assert_same(run, whole):
    """Weights, averages, optimiser, schedule, history and files are those of the unbroken run."""
    assert equal(run.model.state_dict(), whole.model.state_dict())
    one, two = last(run.folder), last(whole.folder)
    for part in ("state_dict", "optimizer_states", "lr_schedulers", "global_step"):
        assert equal(one[part], two[part]), part
    assert equal(one.get("current_model_state", {}), two.get("current_model_state", {}))
    assert equal(one.get("averaging_state", {}), two.get("averaging_state", {}))
    assert equal(one["pliant"]["best"], two["pliant"]["best"])
    names = ("run.json", "metrics.csv")
    for first, second in zip(*([f.folder / n for n in names] for f in (run, whole)), strict=True):
        assert timeless(read(first)) == timeless(read(second))
    left = [p.name for p in run.folder.rglob(".*")]
    assert left == []


def equal(a, b):
    """Whether two nested values are the same, tensors bit by bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def timeless(value):
    """Without what says how long something took."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k != "seconds"}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def last(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def read(path):
    with path.open(newline="") as file:
        if path.suffix == ".csv":
            return list(csv.DictReader(file))
        content = json.load(file)
        content["recipe"].pop("checkpoint_minutes")
        return content
