"""Experiments: which runs there are, and a walk that goes on wherever it was stopped."""

from __future__ import annotations

import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

from _experiment import ADN, PLAIN, REMOVED, TINY, command, executed
from pliant.compare import read_scores, write_scores
from pliant.deploy.engines import ENGINES
from pliant.measuring.rows import read_rows
from pliant.models import list_networks
from pliant.models._build import create
from pliant.train.recipe import differences
from pliant.train.tasks import Classification, NonFiniteLossError
from research import experiments
from research.experiments import (
    EXPERIMENTS,
    execute,
    execution,
    planned_runs,
    states,
)
from research.experiments.network_times import STEP, Effort, time_networks
from research.experiments.plans import (
    BASELINES,
    cifar10_controls,
    cifar10_variants,
    key_of,
    variants_and_baselines,
)
from research.experiments.variants import VARIANTS


class Killed(BaseException):
    """What stands for the end of the process."""


# --- plans -------------------------------------------------------------------------------------


def test_seeds_of_all_controls_come_before_everything_else():
    runs = cifar10_controls()
    assert len({run.keys for run in runs}) == len(runs) == 55
    heads = [(run.family, run.recipe.seed) for run in runs]
    assert list(dict.fromkeys(heads)) == [
        *[(family, seed) for family in ("controls", "depth") for seed in range(3)],
        *[(family, 0) for family in ("sweep", "adn", "condconv", "combinations")],
        ("adn", 1),
        ("adn", 2),
        ("controls", 3),
        ("depth", 3),
    ]
    assert Counter(heads)["controls", 1] == 7
    assert [run.label for run in runs if run.recipe.seed == 3] == [
        *("plain", "MoD, score order", "first k channels", "blocks removed"),
        *("plain, 3-2-2 blocks", "plain, 3-3-2 blocks", "plain, 1-1-1 blocks"),
    ]
    on_gpu = cifar10_controls("cuda")
    assert [c.keys for c in on_gpu if c.network == "resnet20"] == [c.keys for c in runs]
    assert {c.network for c in on_gpu} == {"resnet20", "resnet18", "resnet50"}
    assert max(c.recipe.seed for c in on_gpu if c.network != "resnet20") == 2
    sweep = {run.label: run.recipe.model_args for run in runs if run.family == "sweep"}
    assert sweep["MoD, c = 2"] == {"c": 2}
    assert sweep["MoD, c = 16, original"] == {"c": 16, "fusion": "original"}
    assert len(sweep) == 7
    assert {"resnet20_cifar_mod_adn", "resnet20_cifar_mod_cc", "resnet20_cifar_cc_adn"} <= {
        run.recipe.model for run in runs
    }


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_all_runs_are_of_one_recipe_and_can_be_built(device):
    runs = cifar10_controls(device)
    network = ["name", "model", "model_args", "objective", "seed"]
    for run in runs:
        assert differences(runs[0].recipe, run.recipe, leaving_out=network) == []
        assert run.recipe.model in list_networks()
        assert run.recipe.accelerator == {"cpu": "cpu", "cuda": "gpu"}[device]
    built = {(c.recipe.model, str(c.recipe.model_args)): c.recipe for c in runs}
    for recipe in list(built.values())[:: 1 if device == "cpu" else 8]:
        assert create(recipe.model, "meta", **recipe.model_args).num_classes == 10
    labels = Counter((c.network, label, c.recipe.seed) for c in runs for label in c.labels)
    assert max(labels.values()) == 1


def test_runs_can_be_chosen_and_shortened():
    name = "cifar10-controls"
    chosen = planned_runs(name, only=["plain", "ADN"], seeds=2, epochs=2, where=["path=there", "threads=1"])
    assert [(c.label, c.recipe.seed) for c in chosen] == [
        ("plain", 0),
        ("plain", 1),
        ("ADN", 0),
        ("ADN", 1),
    ]
    assert {(c.recipe.epochs, c.recipe.warmup, c.recipe.path) for c in chosen} == {(2, 0.5, "there")}
    assert chosen[2].labels == ("ADN, super-net", "ADN, base-net")
    networks = ["resnet18", "resnet50"]
    of = planned_runs(name, "cuda", only=["plain"], networks=networks, seeds=1)
    assert [c.network for c in of] == networks
    for wrong, message in (
        ({"where": ["lr=1"]}, "lr belongs to the experiment, whose rows do not say it"),
        ({"only": ["snow"]}, "no label 'snow'; the labels are plain; MoD, score order"),
        ({"networks": ["snow"]}, "no network 'snow'; the networks are resnet20"),
        ({"seeds": 0}, "seeds must be at least 1, not 0"),
        ({"epochs": 0}, "epochs must be at least 1, not 0"),
        ({"device": "tpu"}, "no runs are planned for device 'tpu'; take one of cpu, cuda"),
    ):
        with pytest.raises(ValueError, match=message):
            planned_runs(name, **wrong)
    with pytest.raises(
        ValueError, match=r"no run of resnet18 has the label MoD \+ ADN; its labels are plain;"
    ):
        planned_runs(name, "cuda", only=["MoD + ADN"], networks=["resnet18"])
    with pytest.raises(ValueError, match="no experiment 'snow'; there are cifar10-controls"):
        planned_runs("snow")


def test_variants_are_of_the_controls_recipe_and_closed():
    runs = cifar10_variants()
    assert [run.recipe.seed for run in runs] == [seed for seed in range(4) for _ in VARIANTS]
    assert [run.label for run in runs[: len(VARIANTS)]] == list(VARIANTS)
    plain = cifar10_controls()[0].recipe
    network = ["name", "model", "model_args", "seed"]
    for run in runs[: len(VARIANTS)]:
        assert differences(plain, run.recipe, leaving_out=network) == []
        assert run.recipe.name == "cifar10.resnet20_mod.controls"
        if not VARIANTS[run.label].gone:
            assert create(run.recipe.model, "meta", **run.recipe.model_args).num_classes == 10
    controls = cifar10_controls()
    known = {*VARIANTS, *(run.label for run in controls)}
    assert all(variant.control in known for variant in VARIANTS.values())
    assert not set(VARIANTS) & {run.label for run in controls}
    baselines = variants_and_baselines()[: -len(runs)]
    assert {run.label for run in baselines} == set(BASELINES)
    keys = {key for run in controls for key in run.keys}
    assert keys.issuperset(key for run in baselines for key in run.keys)
    assert {run.recipe.seed for run in baselines} == {run.recipe.seed for run in runs}
    on_gpu = variants_and_baselines("cuda")  # where the controls have other networks too
    assert [run.keys for run in on_gpu] == [run.keys for run in variants_and_baselines()]
    with pytest.raises(ValueError, match="cifar10-variants is a closed study: its code is at the git tag"):
        planned_runs("cifar10-variants")


# --- execution -----------------------------------------------------------------------------------


def test_a_row_is_there_as_soon_as_its_run_has_finished_and_is_not_run_again(tmp_path):
    runs = [PLAIN, ADN]
    assert [s.kind for s in states(runs, [], tmp_path / "runs")] == ["not begun", "not begun"]

    def stop(line):
        if line.startswith("2 of 2"):
            raise Killed

    with pytest.raises(Killed):
        execute(runs, tmp_path / "rows.csv", tmp_path / "runs", tell=stop)
    (row,) = read_scores(tmp_path / "rows.csv")
    assert key_of(row) == PLAIN.keys[0]
    shutil.rmtree(tmp_path / "runs")  # another machine has the rows alone
    found = states(runs, [row], tmp_path / "runs")
    assert [str(s) for s in found] == ["done", "not begun"]

    added, told = executed(runs, tmp_path)
    assert added == ["ADN, super-net", "ADN, base-net"]
    assert told[0] == "2 of 2: resnet20, ADN, seed 0"
    assert "s an epoch" in told[1]
    before = (tmp_path / "rows.csv").read_bytes()
    assert executed(runs, tmp_path) == ([], [])
    assert (tmp_path / "rows.csv").read_bytes() == before
    # Another seed, length or option is another run.
    for other in (
        replace(TINY, seed=1),
        replace(TINY, epochs=2),
        replace(TINY, model_args={"drop_rate": 0.1}),
    ):
        (state,) = states([replace(PLAIN, recipe=other)], read_scores(tmp_path / "rows.csv"), tmp_path)
        assert state.kind == "not begun"


def test_a_run_that_was_interrupted_goes_on_from_its_last_epoch(tmp_path, monkeypatch):
    run = replace(PLAIN, recipe=replace(TINY, epochs=3))
    executed([run], tmp_path / "whole")
    (whole,) = read_scores(tmp_path / "whole" / "rows.csv")
    begun = []
    start = Classification.on_train_epoch_start

    def watched(task, *, fatal=None):
        begun.append(task.current_epoch)
        if task.current_epoch == fatal:
            raise Killed
        start(task)

    monkeypatch.setattr(Classification, "on_train_epoch_start", lambda task: watched(task, fatal=2))
    with pytest.raises(Killed):
        executed([run], tmp_path)
    assert not (tmp_path / "rows.csv").exists()
    (state,) = states([run], [], tmp_path / "runs")
    assert str(state) == "interrupted after 2 epochs"
    begun.clear()
    monkeypatch.setattr(Classification, "on_train_epoch_start", watched)
    assert executed([run], tmp_path)[0] == ["plain"]
    assert begun == [2]
    (row,) = read_scores(tmp_path / "rows.csv")
    assert (row.test_accuracy, row.train_ce) == (whole.test_accuracy, whole.train_ce)
    (state,) = states([run], [], tmp_path / "runs")
    assert str(state) == "trained, not scored"
    (tmp_path / "rows.csv").unlink()  # killed before the row was written: it is read from the run
    begun.clear()
    assert executed([run], tmp_path)[0] == ["plain"]
    assert begun == []
    assert read_scores(tmp_path / "rows.csv") == [row]


def test_no_run_is_begun_when_the_time_is_up(tmp_path, monkeypatch):
    clock = iter([0.0, 0.0, 61.0])
    monkeypatch.setattr(execution, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    added, told = executed([PLAIN, REMOVED], tmp_path, limit=60)
    assert added == ["plain"]
    assert told[-1].endswith("not begun, the time is up; the same command goes on from here")


def test_a_loss_that_is_no_number_costs_its_own_run(tmp_path, monkeypatch):
    compare = execution.compare

    def diverging(recipes, *arguments, **options):
        if "plain" in recipes:
            raise NonFiniteLossError("the loss is NaN")
        return compare(recipes, *arguments, **options)

    monkeypatch.setattr(execution, "compare", diverging)
    with pytest.raises(RuntimeError, match="the loss of plain, seed 0 became NaN or infinite"):
        executed([PLAIN, REMOVED], tmp_path)
    assert [s.label for s in read_scores(tmp_path / "rows.csv")] == ["blocks removed"]


def test_scores_are_read_as_they_were_written(tmp_path):
    executed([PLAIN], tmp_path)
    rows = read_scores(tmp_path / "rows.csv")
    write_scores(tmp_path / "again.csv", [*rows, replace(rows[0], seed=1, test_accuracy=None)])
    assert read_scores(tmp_path / "again.csv") == [*rows, replace(rows[0], seed=1, test_accuracy=None)]
    text = (tmp_path / "again.csv").read_text()
    cells = ",{},{},".format
    damaged = text.replace(cells(1, rows[0].parameters), cells("one", rows[0].parameters))
    (tmp_path / "again.csv").write_text(damaged)
    with pytest.raises(ValueError, match=r"again\.csv, line 3: .*the line is damaged"):
        read_scores(tmp_path / "again.csv")
    (tmp_path / "again.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="the columns are not those of scores"):
        read_scores(tmp_path / "again.csv")


# --- times -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_networks_and_training_steps_are_timed_against_the_plain_network(tmp_path, monkeypatch):
    path, quick = tmp_path / "times.csv", Effort(rounds=1, min_run_time=0)
    options = {"threads": 1, "engines": ["eager"], "batches": [1], "effort": quick}
    runs = [PLAIN, REMOVED, replace(PLAIN, recipe=replace(TINY, seed=1)), ADN]
    rows = time_networks(runs, path, **options)
    assert read_rows(path) == rows
    names = [f"resnet20: {n}" for n in ("plain", "blocks removed", "ADN, super-net", "ADN, base-net")]
    assert [r.model for r in rows if r.engine == "eager"] == names
    assert all(r.form == "plain" and r.batch == 1 for r in rows if r.engine == "eager")
    steps = [r for r in rows if r.engine == STEP]
    assert [r.model for r in steps] == [names[0], names[1], "resnet20: ADN"]
    assert {(r.batch, r.dtype, r.input_size) for r in steps} == {(256, "float32", (1, 8, 8))}
    assert steps[0].time_ratio == steps[0].mac_ratio == 1
    assert all(r.time_ratio is not None and r.against == names[0] for r in rows)
    time_networks([PLAIN, REMOVED], path, **options)
    again = read_rows(path)
    assert sorted(r.model for r in again) == sorted(r.model for r in rows)
    with pytest.raises(ValueError, match="ratios are to the plain resnet20"):
        time_networks([REMOVED], path, **options)
    with pytest.raises(ValueError, match="no engine 'fast'; the engines are eager, "):
        time_networks(runs, path, **(options | {"engines": ["fast"]}))
    monkeypatch.setitem(ENGINES, "slow", SimpleNamespace(name="slow", missing="pip install slow"))
    with pytest.raises(ValueError, match="engine slow is not here: pip install slow"):
        time_networks(runs, path, **(options | {"engines": ["slow"]}))


# --- the command -------------------------------------------------------------------------------


def test_the_command_lists_runs_and_times(tmp_path, monkeypatch):
    monkeypatch.setitem(
        EXPERIMENTS, "tiny", lambda device: [PLAIN, replace(REMOVED, recipe=REMOVED.recipe)]
    )
    place = ("--results", tmp_path / "results", "--folder", tmp_path / "runs")
    assert "0 of 2 done" in command("tiny", "--list", *place)
    printed = command("tiny", "workers=0", "--only", "plain", *place)
    assert "1 rows added" in printed
    rows = tmp_path / "results" / "tiny-cpu.csv"
    assert [s.label for s in read_scores(rows)] == ["plain"]
    listed = command("tiny", "--list", *place)
    assert "1 of 2 done" in listed
    assert [line.split("seed 0")[1].strip() for line in listed.splitlines()[:2]] == ["done", "not begun"]
    assert "not begun, the time is up" in command("tiny", "--limit-minutes", 0, *place)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(experiments, "execute", interrupted)
    assert "repeat the command to go on from here" in command("tiny", *place, code=130)
    timed = []
    monkeypatch.setattr(
        "research.experiments.network_times.time_networks",
        lambda runs, path, **_: timed.append(path) or [1],
    )
    command("tiny", "--measure", *place)
    assert timed == [tmp_path / "results" / "tiny-latency-cpu.csv"]
    with pytest.raises(ValueError, match="exclude each other"):
        command("tiny", "--measure", "--list", *place)
    with pytest.raises(ValueError, match="--engine has no effect on training"):
        command("tiny", "--engine", "eager", *place)
    for what in ("--measure", "--list", "--page"):
        with pytest.raises(ValueError, match="--processes is for training"):
            command("tiny", what, "--processes", 2, *place)
    monkeypatch.setattr(
        "research.experiments.network_times.time_networks",
        lambda runs, path, **options: timed.append((runs, options["engines"])) or [1],
    )
    command(
        "cifar10-controls",
        "--measure",
        "--device",
        "cuda",
        "--network",
        "resnet18",
        "--engine",
        "eager",
        *place,
    )
    runs, engines = timed[-1]
    assert ({run.network for run in runs}, engines) == ({"resnet18"}, ["eager"])
    command("tiny", "--measure", *place)
    assert timed[-1][1] is None
