"""The command line: each command once, and errors without a traceback."""

from __future__ import annotations

import csv

import pytest
import timm

from _cli import fails, run
from pliant import load, save
from pliant.measuring.rows import read_rows


def test_models_lists_counts():
    printed = run("models", "resnet50_mod")
    assert "18,105,949" in printed
    assert "2.562 G" in printed


def test_plan_prints_coverage_and_saves(tmp_path):
    printed = run("plan", "resnet18", "c=16", "order=index", "--save-to", tmp_path / "net")
    assert "layer1.1: BasicBlock -> MoDBlock (C=64, c=16, k=4, hidden=4)" in printed
    assert load(tmp_path / "net").layer1[1].selector.order == "index"


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
        (("--rows", tmp_path / "foreign.csv"), "not a file of pliant's measurements"),
    ]:
        assert message in fails(monkeypatch, capsys, "measure", "resnet20_cifar", *options)


def test_a_run_can_be_measured_and_be_the_baseline(tmp_path):
    save(timm.create_model("resnet20_cifar"), tmp_path / "run" / "best")  # as `train` leaves it
    rows, folder = tmp_path / "rows.csv", str(tmp_path / "run")
    quick = ("--rounds", 1, "--threads", 1, "--pixels", 8, "--rows", rows)
    run("measure", "resnet20_cifar", "--against", folder, *quick)
    assert [(r.model, r.against) for r in read_rows(rows)] == [(folder, folder), ("resnet20_cifar", folder)]


def test_ctrl_c_says_how_to_go_on(monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt("interrupted; runs/x can be continued with resume")

    monkeypatch.setattr("pliant.train.fit", interrupted)
    assert "runs/x can be continued" in fails(monkeypatch, capsys, "train", "digits.resnet20")


def test_errors_are_one_sentence(monkeypatch, capsys, tmp_path):
    assert "timm has no model named 'resnet_none'" in fails(monkeypatch, capsys, "plan", "resnet_none")
    assert "has no option 'cc'" in fails(monkeypatch, capsys, "plan", "resnet18", "cc=4")
    assert "not of the form key=value" in fails(monkeypatch, capsys, "plan", "resnet18", "c")
    assert "no method 'Mod'" in fails(monkeypatch, capsys, "plan", "resnet18", "--method", "Mod")
    assert "c = 65" in fails(monkeypatch, capsys, "plan", "resnet18", "c=65")
    assert "no recipe 'digits.resnet19'" in fails(monkeypatch, capsys, "train", "digits.resnet19")
    assert "epoch" in fails(monkeypatch, capsys, "train", "digits.resnet20", "epoch=3")
    assert "missing" in fails(monkeypatch, capsys, "evaluate", tmp_path / "missing")
    assert "no engine 'fast'" in fails(monkeypatch, capsys, "measure", "resnet20_cifar", "--engine", "fast")
    assert "no network of pliant has 'xyz'" in fails(monkeypatch, capsys, "models", "xyz")
    assert "'--seeds'" in fails(monkeypatch, capsys, "compare", "digits.resnet20", "--seeds", 0)
    assert "no label 'x'" in fails(monkeypatch, capsys, "compare", "digits.resnet20", "--only", "x")
