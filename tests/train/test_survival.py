"""Runs that survive: killed anywhere, on a full disk, beside another process, on damaged files."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from itertools import cycle
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from _cli import run as command
from _images import damage, folder_recipe, make_folder
from _runs import TINY, assert_same, equal, killed, last, stopped
from pliant._files import NotWrittenError
from pliant._lock import FolderInUseError, held
from pliant.train import fit, override, read_state
from pliant.train.saved import DamagedCheckpointError

RANDOM = override(TINY, ["model_args.selection=random", "model_args.drop_path_rate=0.2", "erasing=0.5"])
AVERAGED = override(
    TINY,
    ["ema=0.9", "mixup=0.2", "cutmix=1.0", "optimizer=adamw", "lr=0.01", "warmup=1", "decay_all=false"],
)
RECIPES = {"random": RANDOM, "averaged": AVERAGED}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """The run that nothing happened to, by name; trained once."""
    done = {}

    def get(name):
        if name not in done:
            done[name] = fit(RECIPES[name], tmp_path_factory.mktemp("runs") / name, progress=False)
        return done[name]

    return get


# --- killed ----------------------------------------------------------------------------------------

# Checkpoints are written after steps 3, 6, 8 (an epoch), 11, 14 and 16.
POINTS = {
    "mid-epoch": ("on_train_batch_start", 13),
    "mid-checkpoint": ("write_bytes", "last.ckpt", 2),
    "before run.json": ("replace", "run.json", 1),
}
MORE = {
    "before recipe.json": ("replace", "recipe.json", 1),
    "before environment.json": ("write_text", "environment.json", 1),
    "inside images.json": ("write_text", "images.json", 1),
    "before the first checkpoint": ("on_train_batch_start", 1),
    "inside the first checkpoint": ("write_bytes", "last.ckpt", 1),
    "in the first epoch": ("on_train_batch_start", 5),
    "in a step's backward": ("on_after_backward", 12),
    "between the two names": ("replace", "last.ckpt", 5),
    "inside an epoch's checkpoint": ("write_bytes", "last.ckpt", 3),
    "inside the last checkpoint": ("write_bytes", "last.ckpt", 6),
    "while validating": ("on_validation_batch_start", 16),
    "before the history is written": ("on_validation_end", 8),
    "inside metrics.csv": ("write_text", "metrics.csv", 2),
    "after metrics.csv": ("on_train_epoch_end", 8),
    "after the last epoch": ("on_train_end", 16),
    "inside run.json": ("write_text", "run.json", 1),
}


@pytest.fixture(scope="module")
def stopped_at(tmp_path_factory):
    """Recipe and folder of a run that was killed, by its point; one process begins all of `POINTS`."""
    recipes = dict(zip((*POINTS, *MORE), cycle(("averaged", "random")), strict=False))
    place, begun = tmp_path_factory.mktemp("killed"), set()

    def get(point):
        points = POINTS if point in POINTS else MORE
        if point not in begun:
            killed(*((place / each, RECIPES[recipes[each]], at) for each, at in points.items()))
            begun.update(points)
        return recipes[point], place / point

    return get


@pytest.mark.parametrize("point", [*POINTS, *(pytest.param(p, marks=pytest.mark.slow) for p in MORE)])
def test_a_killed_run_ends_in_the_same_bits(unbroken, stopped_at, point):
    name, folder = stopped_at(point)
    run = fit(RECIPES[name], folder, resume=(folder / "recipe.json").is_file(), progress=False)
    assert_same(run, unbroken(name))


@pytest.mark.slow
def test_a_run_killed_again_and_again_ends_in_the_same_bits(unbroken, tmp_path):
    folder = tmp_path / "run"
    killed(*((folder, AVERAGED, ("on_train_batch_start", step)) for step in (2, 4, 7, 12, 15)))
    assert_same(fit(AVERAGED, folder, resume=True, progress=False), unbroken("averaged"))


@pytest.mark.parametrize(
    "changes",
    [
        ["augmentation=rand-m9-mstd0.5", "workers=0", "model=resnet20_cifar"],
        ["model=resnet20_cifar_adn", "objective=specialize"],
        ["model=cc_resnet20_cifar", "model_args.layers=all", "model_args.drop_rate=0.2", "clip=1"],
    ],
    ids=["auto-augment", "both depths", "condconv"],
)
def test_a_run_goes_on_within_an_epoch(changes, tmp_path):
    recipe = override(TINY, ["epochs=1", *changes])
    whole = fit(recipe, tmp_path / "whole", progress=False)
    stopped(tmp_path / "run", recipe, 5)
    assert read_state(tmp_path / "run").step == 5
    assert_same(fit(recipe, tmp_path / "run", resume=True, progress=False), whole)


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_on_files_goes_on_within_an_epoch(tmp_path, workers):
    recipe = folder_recipe(
        make_folder(tmp_path / "a", 16), epochs=2, augmentation="rand-m9-mstd0.5", workers=workers
    )
    damage(tmp_path / "a" / "red" / "3.png")
    whole = fit(recipe, tmp_path / "whole", progress=False)
    steps = last(whole.folder)["global_step"]
    assert steps >= 6
    stopped(tmp_path / "run", recipe, steps - 1)
    resumed = fit(recipe, tmp_path / "run", resume=True, progress=False)
    assert_same(resumed, whole)
    assert resumed.unreadable == whole.unreadable == 1


def test_a_terminated_run_keeps_the_step_at_hand(unbroken, tmp_path):
    class Terminate(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 12:
                signal.raise_signal(signal.SIGTERM)

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match=r"pliant train command with --resume"):
        fit(RANDOM, tmp_path / "run", progress=False, callbacks=[Terminate()])
    assert signal.getsignal(signal.SIGTERM) is handler
    assert read_state(tmp_path / "run").step == 13
    assert_same(fit(RANDOM, tmp_path / "run", resume=True, progress=False), unbroken("random"))


def test_how_often_checkpoints_are_written_changes_nothing_else(unbroken, tmp_path):
    class Written(Callback):
        steps = ()

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            path = tmp_path / "run" / "checkpoints" / "last.ckpt"
            step = read_state(path).step if path.is_file() else 0
            self.steps = (*self.steps, (trainer.global_step, step))

    for minutes, expected in (("0", list(range(8))), ("none", [0] * 8)):
        written = Written()
        recipe = override(RANDOM, ["epochs=1", f"checkpoint_minutes={minutes}"])
        folder = tmp_path / "run"
        fit(recipe, folder, progress=False, callbacks=[written])
        assert written.steps == tuple(zip(range(8), expected, strict=True))
        first = last(folder)["state_dict"]
        folder.rename(tmp_path / minutes)
        if minutes == "0":
            kept = first
    assert equal(kept, first)
    with pytest.raises(
        ValueError, match="checkpoint_minutes must be greater than or equal to 0, or none, not '-1'"
    ):
        override(TINY, ["checkpoint_minutes=-1"])


# --- damaged ---------------------------------------------------------------------------------------


def truncated(data):
    return data[: len(data) // 2]


def flipped(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 1]) + data[middle + 1 :]


@pytest.mark.parametrize("harm", [truncated, flipped])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_taken(unbroken, tmp_path, caplog, harm):
    folder = tmp_path / "run"
    stopped(folder, RANDOM, 13)
    path = folder / "checkpoints" / "last.ckpt"
    path.write_bytes(harm(path.read_bytes()))
    assert read_state(folder).step == 12
    resumed = fit(RANDOM, folder, resume=True, progress=False)
    assert_same(resumed, unbroken("random"))
    (told,) = [r.getMessage() for r in caplog.records if "cannot be used" in r.getMessage()]
    assert f"{path} cannot be used (" in told
    assert "going on from the one before" in told
    assert "previous.ckpt, of epoch 1, step 12" in told
    assert (folder / "checkpoints" / "damaged.ckpt").is_file()


def test_damaged_checkpoints_without_another_are_refused(tmp_path):
    folder = tmp_path / "run"
    stopped(folder, TINY, 3)
    for name in ("last", "previous"):
        damage(folder / "checkpoints" / f"{name}.ckpt")
    before = sorted(p.name for p in (folder / "checkpoints").iterdir())
    for attempt in (lambda: fit(TINY, folder, resume=True, progress=False), lambda: read_state(folder)):
        with pytest.raises(DamagedCheckpointError, match=r"last.ckpt cannot .*previous.ckpt cannot"):
            attempt()
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == before


def test_a_damaged_recipe_is_named(tmp_path):
    stopped(tmp_path / "run", TINY, 1)
    (tmp_path / "run" / "recipe.json").write_text("{")
    with pytest.raises(ValueError, match=r"recipe.json cannot be read"):
        fit(TINY, tmp_path / "run", resume=True, progress=False)


# --- disks and folders -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "name", "times"),
    [
        ("write_bytes", "last.ckpt", 5),
        ("write_text", "metrics.csv", 1),
        ("write_text", "run.json", 1),
    ],
)
def test_a_full_disk_is_told_and_nothing_is_lost(unbroken, tmp_path, monkeypatch, method, name, times):
    real, seen = getattr(Path, method), []

    def full(self, value, *args, **options):
        seen.extend([name] if self.parent.name.startswith(f".{name}.") else [])
        if len(seen) == times:
            real(self, value[: len(value) // 2], *args, **options)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, value, *args, **options)

    recipe = override(RANDOM, ["checkpoint_minutes=0"])
    with monkeypatch.context() as patch:
        patch.setattr(Path, method, full)
        with pytest.raises(
            NotWrittenError, match=rf"{name} cannot be written \(No space left on device\).*resume"
        ) as caught:
            fit(recipe, tmp_path / "run", progress=False)
    assert caught.value.errno == errno.ENOSPC
    assert_same(fit(recipe, tmp_path / "run", resume=True, progress=False), unbroken("random"))


def test_a_folder_that_cannot_be_written_is_told(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("a file")
    with pytest.raises(NotWrittenError, match=r"file/run cannot be written \(Not a directory\); choose"):
        fit(TINY, tmp_path / "file" / "run", progress=False)

    made = Path.mkdir

    def refuse(self, *args, **options):
        if self == tmp_path / "run":
            raise PermissionError(errno.EACCES, "Permission denied", str(self))
        made(self, *args, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(NotWrittenError, match=r"run cannot be written \(Permission denied\); choose"):
        fit(TINY, tmp_path / "run", progress=False)


def test_two_runs_in_one_folder(tmp_path):
    folder = tmp_path / "run"
    stopped(folder, TINY, 3)
    holder = rf"{folder} is in use by process {os.getpid()} on "
    with held(folder / "run.lock"), pytest.raises(FolderInUseError, match=holder):
        fit(TINY, folder, resume=True, progress=False)
    (tmp_path / "new").mkdir()
    with held(tmp_path / "new" / "run.lock"), pytest.raises(FolderInUseError, match="is in use"):
        fit(TINY, tmp_path / "new", progress=False)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["run.lock"]
    fit(TINY, tmp_path / "new", progress=False)  # what a process that began nothing left does not matter


def test_a_resumption_by_another_recipe_is_refused(tmp_path):
    stopped(tmp_path / "run", TINY, 3)
    kept = (tmp_path / "run" / "checkpoints" / "last.ckpt").read_bytes()
    with pytest.raises(ValueError, match=r"another recipe: lr \(0.1 and 0.2\)"):
        fit(override(TINY, ["lr=0.2"]), tmp_path / "run", resume=True, progress=False)
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").read_bytes() == kept


# --- what a checkpoint says ------------------------------------------------------------------------


def test_a_checkpoint_tells_recipe_versions_and_commit(tmp_path):
    folder = tmp_path / "run"
    stopped(folder, TINY, 11)
    state = read_state(folder)
    assert override(state.recipe, ["checkpoint_minutes=5"]) == TINY
    assert (state.epoch, state.step, len(state.history)) == (1, 11, 1)
    written = json.loads((folder / "environment.json").read_text())
    of_the_moment = {"date", "load"}
    assert {k: state.environment[k] for k in written.keys() - of_the_moment} == {
        k: v for k, v in written.items() if k not in of_the_moment
    }
    assert state.environment["threads"] == 1
    previous = read_state(folder / "checkpoints" / "previous.ckpt")
    assert previous.step == 10
    told = command("inspect", folder)
    for part in ("last.ckpt", "epoch 1, step 11", "resnet20_cifar_mod", torch.__version__):
        assert part in told
    assert state.environment["commit"] in told
    with pytest.raises(FileNotFoundError, match="no checkpoint of a run"):
        read_state(tmp_path)


def test_going_on_under_other_versions_warns_and_names_both(tmp_path, caplog):
    folder = tmp_path / "run"
    stopped(folder, TINY, 11)
    path = folder / "checkpoints" / "last.ckpt"
    content = torch.load(path, weights_only=True)
    content["pliant"]["environment"] |= {"torch": "2.0.1", "commit": "abc"}
    torch.save(content, path)
    fit(TINY, folder, resume=True, progress=False)
    (told,) = [r.getMessage() for r in caplog.records if "an unbroken one" in r.getMessage()]
    assert f"torch 2.0.1 and {torch.__version__}" in told
    assert "commit abc and " in told


# --- two processes ---------------------------------------------------------------------------------

TWO = """
import sys
from pathlib import Path
from lightning.pytorch.callbacks import Callback
from pliant.train import Recipe, fit
import json, os, signal

class Die(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if trainer.global_step == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)

if __name__ == "__main__":
    recipe = Recipe.from_dict(json.loads(sys.argv[2]))
    resume = len(sys.argv) > 4
    fit(recipe, sys.argv[1], resume=resume, progress=False, callbacks=[Die()])
"""


@pytest.mark.slow
def test_two_processes_of_one_run_are_killed_and_go_on(tmp_path):
    """The folder is theirs together; what either could not read is counted once."""
    (tmp_path / "two.py").write_text(TWO)
    make_folder(tmp_path / "a" / "train", 16)
    make_folder(tmp_path / "a" / "val", 4)
    names = ["train/red/1", "train/red/2", "train/blue/1", "train/blue/2", "val/green/0", "val/green/1"]
    bad = {damage(tmp_path / "a" / f"{name}.png") for name in names}  # some in either process
    changes = ["devices=2", "strategy=ddp", "checkpoint_minutes=0", "threads=1", "workers=0", "ema=0.9"]
    recipe = override(
        folder_recipe(tmp_path / "a", val_fraction=None, epochs=2, batch=4, augmentation="flip_crop"),
        changes,
    )

    def train(folder, *more):
        command = [sys.executable, str(tmp_path / "two.py"), str(tmp_path / folder)]
        return subprocess.run(
            [*command, json.dumps(recipe.as_dict()), *more],
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )

    assert (done := train("whole", "-1")).returncode == 0, done.stderr
    assert train("run", "9").returncode == -signal.SIGKILL
    assert read_state(tmp_path / "run").step == 9
    assert (done := train("run", "-1", "resume")).returncode == 0, done.stderr
    from pliant.train import read_run

    whole, run = read_run(tmp_path / "whole"), read_run(tmp_path / "run")
    assert set(whole.unreadable_paths) == bad
    assert whole.history[-1]["unreadable"] == len(bad)
    assert_same(run, whole)
