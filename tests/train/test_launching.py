"""Runs started by torchrun and by SLURM: who they are, that they agree, stop together and go on."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import lightning.pytorch as pl
import pytest
import timm
from lightning.fabric.plugins.environments import SLURMEnvironment
from typer.testing import CliRunner

from _processes import HERE, OURS, clean, ended, free_port, start, torchrun
from _runs import assert_same
from pliant.cli import app
from pliant.train import Recipe, fit, fitting, override, read_run, read_state
from pliant.train.data import load_data
from pliant.train.launching import check_launch, environment_plugins, launched
from pliant.train.recipe import _MAPPINGS

TWO = Recipe(
    name="two",
    model="resnet20_cifar_mod",
    pixels=8,
    epochs=2,
    batch=64,
    augmentation="crop",
    accelerator="cpu",
    threads=1,
    devices=2,
    checkpoint_minutes=0,
)


def slurm(rank, world, port, nodes=2):
    """What srun tells a process: one task on each of `nodes` machines, which are all this one."""
    each = world // nodes
    return {
        "SLURM_JOB_ID": str(port - 15000 if port > 15000 else port),
        "SLURM_JOB_NAME": "train",
        "SLURM_NTASKS": str(world),
        "SLURM_NTASKS_PER_NODE": str(each),
        "SLURM_NNODES": str(nodes),
        "SLURM_PROCID": str(rank),
        "SLURM_LOCALID": str(rank % each),
        "SLURM_NODEID": str(rank // each),
        "SLURM_NODELIST": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


@pytest.fixture
def told(monkeypatch):
    """A process that no launcher started; a function that says one did."""
    for name in list(os.environ):
        if name in OURS or name.startswith(("SLURM_", "TORCHEL", "LOCAL_WORLD")):
            monkeypatch.delenv(name)

    def tell(values):
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return tell


def test_a_process_by_itself_is_of_no_launch(told):
    assert launched() is None
    assert environment_plugins() == []
    check_launch(TWO)  # Lightning starts the second
    with pytest.raises(ValueError, match="nodes=2 needs a launcher; start the run on each machine by"):
        check_launch(replace(TWO, nodes=2))


def test_torchrun_and_slurm_are_known(told):
    told(slurm(3, 4, 20000))
    assert launched() == ("srun", 4, 2)
    (plugin,) = environment_plugins()
    assert isinstance(plugin, SLURMEnvironment)
    assert not plugin.auto_requeue
    assert (plugin.world_size(), plugin.global_rank(), plugin.local_rank(), plugin.node_rank()) == (
        4,
        3,
        1,
        1,
    )
    told({**torchrun(1, 8, 20000), "LOCAL_WORLD_SIZE": "4"})  # srun torchrun: torchrun's word counts
    assert launched() == ("torchrun", 8, 2)
    assert environment_plugins() == []


@pytest.mark.parametrize("launcher", [torchrun, slurm])
def test_a_recipe_has_to_say_what_was_started(told, tmp_path, launcher):
    nodes = 2 if launcher is slurm else 1
    told(launcher(0, 4, 20000))
    check_launch(replace(TWO, devices=4 // nodes, nodes=nodes))
    for devices, other in ((1, 1), (4, 2), (4 // nodes, nodes + 1)):
        with pytest.raises(
            ValueError, match=rf"started 4 processes on {nodes} nodes.* set devices=\d nodes"
        ):
            fit(replace(TWO, devices=devices, nodes=other), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_finished_run_is_given_back_wherever_it_is_asked_for(told, tmp_path, monkeypatch):
    """Two machines have run it; one reads it."""
    recipe = replace(TWO, nodes=2)
    (tmp_path / "recipe.json").write_text(json.dumps(recipe.as_dict()))
    (tmp_path / "run.json").write_text("{}")
    monkeypatch.setattr(fitting, "read_run", lambda folder: folder)
    assert fit(recipe, tmp_path, resume=True, progress=False) == tmp_path


def test_ntasks_without_ntasks_per_node_is_refused(told):
    told(slurm(0, 4, 20000))
    del os.environ["SLURM_NTASKS_PER_NODE"]
    with pytest.raises(ValueError, match="srun was given --ntasks=4; give --ntasks-per-node"):
        check_launch(TWO)


def test_devices_and_nodes_reach_the_trainer(told, tmp_path, monkeypatch):
    told(slurm(0, 6, 20000))
    given = {}

    class ReachedError(Exception):
        pass

    def trainer(**options):
        given.update(options)
        raise ReachedError

    monkeypatch.setattr(pl, "Trainer", trainer)
    with pytest.raises(ReachedError):
        fit(override(TWO, ["devices=3", "nodes=2", "strategy=ddp"]), tmp_path / "run", progress=False)
    assert load_data(TWO).batches("train").steps(6) == 1131 // 6 // 64  # what the schedule is made for
    assert (given["devices"], given["num_nodes"], given["strategy"]) == (3, 2, "ddp")
    assert any(isinstance(plugin, SLURMEnvironment) for plugin in given["plugins"])


def test_the_command_ends_with_a_status_of_its_own_when_it_is_terminated(monkeypatch):
    def ends(*_, **__):
        raise fitting.Terminated("terminated; run can be continued with resume")

    monkeypatch.setattr(fitting, "fit", ends)
    done = CliRunner().invoke(app, ["train", "digits.resnet20"])
    assert done.exit_code == 128 + signal.SIGTERM
    assert "continued with resume" in done.output


# A run that stops itself: by a signal that one process gets, at a step; or goes on.
PROGRAM = """
import json, os, signal, sys
from lightning.pytorch.callbacks import Callback
from pliant.train import Recipe
from pliant.train.fitting import Terminated, fit
from pliant.train.processes import place

folder, recipe, resume, rank, step, number = sys.argv[1], *map(json.loads, sys.argv[2:])

class Stop(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if (place()[0], trainer.global_step) == (rank, step):
            signal.raise_signal(number)
    def on_train_start(self, trainer, pl_module):
        print("environment", type(trainer.strategy.cluster_environment).__name__, trainer.world_size,
              trainer.num_nodes, trainer.global_rank, flush=True)

try:
    fit(Recipe.from_dict(recipe), folder, resume=resume, progress=False, callbacks=[Stop()])
except Terminated as stop:
    sys.exit(128 + 15)
"""


def pair(launcher, recipe, folder, *, resume=False, rank=-1, step=-1, number=0):
    port = free_port()
    arguments = [str(folder), *map(json.dumps, (recipe.as_dict(), resume, rank, step, int(number)))]
    return ended(
        start([sys.executable, "-c", PROGRAM, *arguments], [launcher(r, 2, port) for r in range(2)]),
        timeout=200,
    )


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    """A run of two processes that nothing happened to."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    for text, status in pair(torchrun, TWO, folder):
        assert status == 0, text
        assert "environment TorchElasticEnvironment 2 1" in text
    return read_run(folder)


@pytest.mark.slow
@pytest.mark.parametrize(("number", "rank"), [(signal.SIGTERM, 1), (signal.SIGUSR1, 0)])
def test_both_processes_of_slurm_stop_after_the_same_step_and_go_on(unbroken, tmp_path, number, rank):
    """Two machines of one device each, as far as SLURM's variables say; one gets the signal."""
    recipe = replace(TWO, devices=1, nodes=2, checkpoint_minutes=None)
    for text, status in pair(slurm, recipe, tmp_path / "run", rank=rank, step=11, number=number):
        assert status == 143, text
        assert "environment SLURMEnvironment 2 2" in text
    assert read_state(tmp_path / "run").step == 12
    assert not list((tmp_path / "run").glob("hpc_ckpt*"))
    for text, status in pair(slurm, recipe, tmp_path / "run", resume=True):
        assert status == 0, text
    run = read_run(tmp_path / "run")
    one, two = run.model.state_dict(), unbroken.model.state_dict()
    assert all((one[name] == two[name]).all() for name in two)
    assert [row["train_loss"] for row in run.history] == [row["train_loss"] for row in unbroken.history]


@pytest.mark.slow
def test_a_run_in_shares_stops_and_goes_on_to_the_same_bits(tmp_path):
    recipe = replace(TWO, strategy="fsdp", clip=1.0, optimizer="adamw", lr=0.01, decay_all=False)
    for text, status in pair(torchrun, recipe, tmp_path / "whole"):
        assert status == 0, text
    done = pair(torchrun, recipe, tmp_path / "run", rank=1, step=11, number=signal.SIGTERM)
    assert [status for _, status in done] == [143, 143], done
    for text, status in pair(torchrun, recipe, tmp_path / "run", resume=True):
        assert status == 0, text
    assert_same(read_run(tmp_path / "run"), read_run(tmp_path / "whole"))


def test_where_shares_do_not_fit_is_told(told, tmp_path):
    told({})
    with pytest.raises(ValueError, match=r"ema=0\.9 averages whole weights, which strategy=fsdp"):
        replace(TWO, strategy="fsdp", ema=0.9)
    with pytest.raises(ValueError, match="strategy=fsdp has not been tried with a teacher"):
        replace(TWO, strategy="fsdp", teacher="resnet20_cifar")
    with pytest.raises(ValueError, match="strategy=fsdp shares a network out over several devices"):
        fit(replace(TWO, strategy="fsdp", devices=1), tmp_path / "run", progress=False)
    with pytest.raises(ValueError, match="strategy=fsdp cannot train a network or teacher that is given"):
        fit(
            replace(TWO, strategy="fsdp"),
            tmp_path / "run",
            progress=False,
            model=timm.create_model("resnet20_cifar"),
        )
    with pytest.raises(ValueError, match="strategy must be 'auto', 'ddp' or 'fsdp', not 'deepspeed'"):
        replace(TWO, strategy="deepspeed")
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_folder_that_machines_do_not_share_is_told(tmp_path):
    """One process goes on, the other finds nothing to go on from."""
    folders = [tmp_path / "a", tmp_path / "b"]
    assert all(s == 143 for _, s in pair(torchrun, TWO, folders[0], rank=0, step=3, number=signal.SIGTERM))
    folders[1].mkdir()
    port = free_port()
    running = []
    for rank, folder in enumerate(folders):
        arguments = [str(folder), *map(json.dumps, (TWO.as_dict(), True, -1, -1, 0))]
        running += start([sys.executable, "-c", PROGRAM, *arguments], [torchrun(rank, 2, port)])
    for text, status in ended(running, timeout=100):
        assert status != 0
        assert "continue from different steps, [4, 0]; put its folder on a disk" in text


@pytest.mark.slow
def test_the_command_runs_under_torchrun_is_terminated_and_goes_on(unbroken, tmp_path):
    """As docs/training.md says it; SIGTERM goes to torchrun, as from a scheduler."""
    options = {k: v for k, v in TWO.as_dict().items() if k not in ("name", *_MAPPINGS)}
    changes = [f"{k}={'none' if v is None else v}" for k, v in options.items()]
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "pliant", "train", "digits.resnet20_mod", *changes, "name=two"),
        *("--no-progress", "--folder", str(tmp_path / "run")),
    ]
    running = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=clean(), cwd=HERE
    )
    try:
        until = time.monotonic() + 120
        while not (tmp_path / "run" / "checkpoints" / "previous.ckpt").is_file():
            assert running.poll() is None, running.stdout.read()
            assert time.monotonic() < until
            time.sleep(0.05)
        running.terminate()
        text, _ = running.communicate(timeout=100)
    finally:
        running.kill()
    assert running.returncode != 0, text
    assert 2 <= read_state(tmp_path / "run").step < 16
    assert not (tmp_path / "run" / "run.json").exists()
    done = subprocess.run(
        [*command, "--resume"],
        capture_output=True, text=True, env=clean(), cwd=HERE, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("saved in") == 2
    assert_same(read_run(tmp_path / "run"), unbroken)
