"""The command line: each command once, and errors without a traceback."""

from __future__ import annotations

import csv
import re
import signal
import subprocess
import sys
import time
from functools import partial

import pytest
import timm
import typer

import pliant
from _cli import fails, run
from pliant import cli, load, save
from pliant.measuring.rows import read_rows
from pliant.train.fitting import Terminated

COMMANDS = ["models", "plan", "export", "measure", "depths", "shards", "recipes", "train", "evaluate"]
COMMANDS += ["inspect", "compare"]


def test_models_lists_counts():
    printed = run("models", "resnet50_mod")
    assert "18,105,949" in printed
    assert "2.562" in printed


def test_plan_prints_coverage_and_saves(tmp_path):
    printed = run("plan", "resnet18", "c=16", "order=index", "--save-to", tmp_path / "net")
    assert "layer1.1: BasicBlock -> MoDBlock (C=64, c=16, k=4, hidden=4)" in printed
    assert load(tmp_path / "net").layer1[1].selector.order == "index"


def test_plan_of_a_saved_network_and_for_other_classes(tmp_path):
    save(timm.create_model("resnet20_cifar", num_classes=3), tmp_path / "net")
    counts = {}
    for name, classes in (("resnet20_cifar", 7), (tmp_path / "net", 7), (tmp_path / "net", None)):
        chosen = () if classes is None else ("--num-classes", classes)
        printed = run("plan", name, *chosen, "--save-to", tmp_path / f"{len(counts)}")
        assert load(tmp_path / f"{len(counts)}").num_classes == (classes or 3)
        counts[name, classes] = printed[printed.index("parameters:") :].splitlines()[0]
    whole, saved, own = counts.values()
    assert whole == saved != own


def test_measure_writes_rows_and_a_figure_and_takes_saved_networks(tmp_path):
    save(timm.create_model("resnet20_cifar_mod"), tmp_path / "mine")
    rows, figure = tmp_path / "rows.csv", tmp_path / "f.svg"
    common = ("--rounds", 1, "--threads", 1, "--pixels", 8, "--rows", rows)
    printed = run("measure", tmp_path / "mine", "--against", "resnet20_cifar", *common, "--plot", figure)
    assert "resnet20_cifar" in printed
    assert len(read_rows(rows)) == 3
    assert figure.exists()
    table = run("measure", "resnet20_cifar", "--no-tax", "--markdown", *common)
    assert "| resnet20_cifar |" in table
    assert len(read_rows(rows)) == 4


def test_recipes_train_evaluate(tmp_path):
    listed = run("recipes").splitlines()
    assert any(line.split()[0] == "digits.resnet18_mod" for line in listed)
    assert max(map(len, listed)) < 100  # of a note, the source alone
    small = ("epochs=1", "pixels=8", "batch=256", "threads=1")
    printed = run("train", "digits.resnet20_mod", *small, "--folder", tmp_path / "run", "--no-progress")
    assert "test " in printed
    scored = run("evaluate", tmp_path / "run", "--device", "cpu")
    test = next(line for line in printed.splitlines() if line.startswith("test "))
    assert f"top-1 {test.split()[1]}%" in scored
    assert "(540 images)" in scored


def test_compare_appends_scores(tmp_path):
    rows = tmp_path / "scores.csv"
    small = ("epochs=1", "pixels=8", "batch=256", "threads=1")
    chosen = ("--only", "plain", "--only", "blocks removed")
    where = ("--folder", tmp_path / "runs", "--rows", rows, "--seeds", 2)
    printed = run("compare", "digits.resnet20", *small, *chosen, *where)
    assert "±" in printed
    found = [(row["label"], row["seed"]) for row in csv.DictReader(rows.open())]
    assert found == [("plain", "0"), ("blocks removed", "0"), ("plain", "1"), ("blocks removed", "1")]


def test_what_cannot_be_written_is_refused_before_the_timing(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("pliant.measuring.latency.measure", lambda *_, **__: pytest.fail("was timed"))
    (tmp_path / "foreign.csv").write_text("a,b\n1,2\n")
    for options, message in [
        (("--plot", "x.doc"), "the suffix must be one of"),
        (("--plot", "x.svg", "--plot-y", "height"), "y is 'height'"),
        (("--rows", tmp_path / "foreign.csv"), "line 1: the columns are not those"),
    ]:
        assert message in fails(monkeypatch, capsys, "measure", "resnet20_cifar", *options)


def test_a_run_can_be_measured_and_be_the_baseline(tmp_path):
    save(timm.create_model("resnet20_cifar"), tmp_path / "run" / "best")  # as `train` leaves it
    rows, folder = tmp_path / "rows.csv", str(tmp_path / "run")
    quick = ("--rounds", 1, "--threads", 1, "--pixels", 8, "--rows", rows)
    run("measure", "resnet20_cifar", "--against", folder, *quick)
    assert [(r.model, r.against) for r in read_rows(rows)] == [(folder, folder), ("resnet20_cifar", folder)]


@pytest.mark.parametrize("error", [ValueError, OSError, ImportError, RuntimeError])
def test_what_a_user_can_mend_is_one_sentence(monkeypatch, capsys, error):
    def refused(*_, **__):
        raise error("its package cannot be loaded; mend or uninstall it")

    monkeypatch.setattr("pliant.surgery.plan", refused)
    told = "pliant: its package cannot be loaded; mend or uninstall it\n"
    assert fails(monkeypatch, capsys, "plan", "resnet18", "c=16") == told


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt("interrupted; runs/x can be continued with resume")

    monkeypatch.setattr("pliant.train.fit", interrupted)
    assert "runs/x can be continued" in fails(monkeypatch, capsys, "train", "digits.resnet20")


def test_stopped_comparisons_say_how_to_go_on(monkeypatch, capsys, tmp_path):
    def stopped(*_, **__):
        raise Terminated("terminated; runs/x can be continued with resume")

    monkeypatch.setattr("pliant.compare.compare", stopped)
    command = ("compare", "digits.resnet20", "--folder", tmp_path)
    assert "run the same command again to go on" in fails(monkeypatch, capsys, *command)
    run(*command, code=143)


@pytest.mark.slow  # two processes; the two tests above say it without
def test_ctrl_c_while_a_comparison_trains_and_the_same_command_goes_on(tmp_path):
    # A shell's background job ignores Ctrl-C, and so would these processes there.
    program = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += "from pliant.cli import main; main()"
    small = ("epochs=4", "pixels=8", "batch=256", "threads=1")
    command = ("compare", "digits.resnet20", *small, "--only", "plain", "--folder", str(tmp_path))
    start = partial(
        subprocess.Popen, [sys.executable, "-c", program, *command], stderr=subprocess.PIPE, text=True
    )
    with start() as running:
        while not (kept := list(tmp_path.rglob("checkpoints/last.ckpt"))):
            assert running.poll() is None
            time.sleep(0.05)
        running.send_signal(signal.SIGINT)
        said = running.communicate(timeout=120)[1]
    assert running.returncode == 130
    assert said.splitlines()[-1] == (
        "pliant: stopped; run the same command again to go on: finished runs are kept"
    )
    assert "Traceback" not in said
    metrics = kept[0].parents[1] / "metrics.csv"
    first = metrics.read_text().splitlines()[1]
    assert not metrics.with_name("run.json").exists()
    with start() as running:
        running.communicate(timeout=300)
    assert running.returncode == 0
    after = metrics.read_text().splitlines()
    assert len(after) == 1 + 4
    assert after[1] == first, "with its seconds: this epoch was not trained again"


def test_mistyped_names_are_answered_by_those_that_are_near(monkeypatch, capsys):
    assert "'mesure'. Did you mean 'measure'?" in fails(monkeypatch, capsys, "mesure")
    assert "--batch" in fails(monkeypatch, capsys, "measure", "--batsh", 1)
    for command in ("plan", "depths"):
        assert "did you mean resnet50" in fails(monkeypatch, capsys, command, "resnet5O")
    told = fails(monkeypatch, capsys, "export", "xyzzyx", "x.onnx")
    assert "there is no such folder; timm.list_models() lists the networks" in told


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_every_command_has_help(option):
    listed = run(option).partition("Commands:")[2].strip().splitlines()
    assert [line.split()[0] for line in listed] == COMMANDS
    assert all(line.endswith(".") for line in listed), "cut off"
    for name in COMMANDS:
        assert run(name, option).startswith("Usage: ")


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_described(name):
    """By what it takes, or by the values that it takes."""
    command = typer.main.get_command(cli.app).commands[name]
    first = command.help.splitlines()[0]
    assert first.endswith("."), "the first line is its whole first sentence"
    assert command.get_short_help_str() == first, "the site's list of commands cuts it off"
    assert len(first) <= 60
    for parameter in command.params:
        assert re.match("[A-Z]|(cpu|auto|float32|digits|test|onnx)\\b", parameter.help), parameter.name
        assert not parameter.help.endswith("."), parameter.name


def test_version():
    assert run("--version") == f"pliant {pliant.__version__}\n"


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("plan resnet_none", "timm has no network 'resnet_none'"),
        ("plan resnet18 cc=4", "has no option 'cc'"),
        ("plan resnet18 c", "'c' is no option of the method; write key=value"),
        ("plan resnet18 --method Mod", "there is no method 'Mod'; the methods are MixtureOfDepths"),
        ("plan resnet18 c=65", "c = 65"),
        ("train digits.resnet19", "no recipe 'digits.resnet19'"),
        ("train digits.resnet20 epoch=3", "epoch"),
        ("evaluate missing", "missing"),
        ("measure resnet20_cifar --engine fast", "no engine 'fast'"),
        ("models xyz", "no network of pliant has 'xyz'"),
        ("compare digits.resnet20 --seeds 0", "'--seeds'"),
        ("compare digits.resnet20 --only x", "there is no label 'x'; the labels are plain, MoD"),
        ("export resnet20_cifar x.onnx --threads 2", "--threads 2 is for the latencies of --depths"),
        ("export resnet20_cifar x.onnx --depth T --depths T", "exclude each other"),
        ("export resnet20_cifar x.onnx --resize-from 3", "--resize-from is '3'; write HEIGHTxWIDTH"),
        ("export resnet20_cifar_adn x.onnx --depth TTX", "skip is 'TTX'; give one flag"),
    ],
)
def test_errors_are_one_sentence(monkeypatch, capsys, tmp_path, command, message):
    monkeypatch.chdir(tmp_path)
    assert message in fails(monkeypatch, capsys, *command.split())
    assert list(tmp_path.iterdir()) == []
