"""Recovery after a conversion: rows for each epoch, with a teacher and without, and the command."""

from __future__ import annotations

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

import _cli
from _runs import TINY
from pliant.recipes import get_recipe
from pliant.train import evaluate, fit, override, read_run
from research import recovery
from research.commands import app
from research.recovery import Recovery, read_recoveries, recover, write_recoveries


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A plain network that knows digits a little."""
    recipe = override(TINY, ["model=resnet20_cifar", "epochs=3"])
    return fit(recipe, tmp_path_factory.mktemp("plain") / "run", progress=False)


def recipe_of(plain, *changes):
    recipe = replace(TINY, teacher="plain", weights=plain.folder, lr=0.01)
    return override(recipe, ["model_args.zero_init_last=true", *changes])


def test_every_epoch_has_a_row_with_the_teacher_and_without(plain, tmp_path):
    recipe = recipe_of(plain)
    kept = []
    rows = recover(recipe, tmp_path / "runs", progress=False, finished=kept.extend)
    assert [(r.teacher, r.epoch) for r in rows] == [
        *(("logits", e) for e in range(3)),
        *(("none", e) for e in range(3)),
    ]
    assert kept == rows
    assert [r.plain_accuracy for r in rows] == pytest.approx([100 * plain.test_accuracy] * 6)
    # Both begin at the network without its second blocks, which is not the plain one.
    assert rows[0].test_accuracy == rows[3].test_accuracy < rows[0].plain_accuracy
    assert (rows[0].train_loss, rows[0].seconds) == (None, 0.0)
    # The last row of a run is what its weights give.
    run = read_run(tmp_path / "runs" / "resnet20_cifar_mod-logits-s0")
    best = rows[1 + run.best_epoch]
    assert best.test_accuracy == pytest.approx(100 * run.test_accuracy)
    assert best.val_accuracy == pytest.approx(100 * run.val_accuracy)
    assert evaluate(run.folder, "digits", device="cpu").top1 == pytest.approx(best.test_accuracy / 100)
    assert rows[1].train_loss != rows[4].train_loss
    assert {r.test_accuracy_base for r in rows} == {None}
    assert [(r.taught_by, r.teacher_sha256) for r in rows] == [
        *[("resnet20_cifar_mod before its conversion", rows[0].weights_sha256)] * 3,
        *[("", "")] * 3,
    ]

    # Again: finished runs are read, and rows are not written twice.
    again = recover(recipe, tmp_path / "runs", progress=False)
    assert again == rows
    for _ in range(2):
        write_recoveries(tmp_path / "rows.csv", rows, append=True)
    found = read_recoveries(tmp_path / "rows.csv")
    assert [(r.teacher, r.epoch, round(r.test_accuracy, 4)) for r in found] == [
        (r.teacher, r.epoch, round(r.test_accuracy, 4)) for r in rows
    ]
    only = recover(recipe, tmp_path / "runs", progress=False, teacher=False)
    assert only == rows[3:]
    shutil.rmtree(run.folder / "checkpoints")  # which knew the teacher
    bare = recover(recipe, tmp_path / "runs", progress=False, control=False)
    assert bare == [replace(r, taught_by="", teacher_sha256="") for r in rows[:3]]


@pytest.mark.slow
def test_a_run_that_was_cut_off_gives_the_same_rows(plain, tmp_path, monkeypatch):
    recipe = recipe_of(plain, "epochs=1")
    whole = recover(recipe, tmp_path / "whole", progress=False, control=False)
    from pliant.train import tasks

    real = tasks.Classification.on_validation_epoch_end

    def stop(self):
        raise KeyError("stopped")

    monkeypatch.setattr(tasks.Classification, "on_validation_epoch_end", stop)
    with pytest.raises(KeyError, match="stopped"):
        recover(override(recipe, ["checkpoint_minutes=0"]), tmp_path / "cut", progress=False, control=False)
    monkeypatch.setattr(tasks.Classification, "on_validation_epoch_end", real)
    rows = recover(recipe, tmp_path / "cut", progress=False, control=False)
    assert [(r.epoch, r.test_accuracy, r.train_loss) for r in rows] == [
        (r.epoch, r.test_accuracy, r.train_loss) for r in whole
    ]


def test_an_adaptive_network_begins_as_the_plain_one_and_has_its_base_beside(plain, tmp_path):
    recipe = override(
        replace(TINY, model="resnet20_cifar_adn", weights=plain.folder, teacher="plain", epochs=1),
        ["objective=specialize", "ema=0.9", "distill_args.features=1"],
    )
    begin, end = recover(recipe, tmp_path, progress=False, control=False)
    assert begin.teacher == end.teacher == "logits + features"
    assert begin.test_accuracy == begin.plain_accuracy
    assert begin.test_accuracy_base < begin.test_accuracy
    assert end.test_accuracy_base is not None
    assert all("/ " in cell for cell in recovery.recovery_table([begin, end])[1][0][3:])


def test_what_cannot_be_recovered_is_refused(plain, tmp_path):
    with pytest.raises(ValueError, match="tiny has no weights: recovery starts from weights"):
        recover(TINY, tmp_path)
    with pytest.raises(ValueError, match="tiny has no teacher"):
        recover(replace(TINY, weights="a"), tmp_path)
    with pytest.raises(ValueError, match="nothing is left to run"):
        recover(recipe_of(plain), tmp_path, teacher=False, control=False)
    assert not list(tmp_path.iterdir())


def test_recipes_by_name():
    for name, options in (
        ("resnet20_mod", {"zero_init_last": True}),
        ("cc_resnet20", {"upcycle": True}),
        ("resnet20_adn", {}),
        ("resnet20", {}),
    ):
        recipe = get_recipe(f"cifar10.{name}.recover")
        assert (recipe.model_args, recipe.teacher) == (options, "plain")
        assert recipe.weights == "runs/cifar10.resnet20-s0"
        assert recipe.lr < get_recipe(f"cifar10.{name}").lr / 5
    assert get_recipe("cifar10.resnet20_adn.recover").objective == "specialize"


ROW = Recovery(
    model="a", teacher="none", epoch=0, test_accuracy=50.0, test_accuracy_base=None, plain_accuracy=90.0,
    val_accuracy=51.0, train_loss=None, seconds=0.0, recipe="r", model_args="{}", distill_args="{}",
    weights="w", weights_sha256="0", data="cifar10", pixels=32, epochs=2, lr=0.1, seed=0,
)  # fmt: skip


def test_the_table_has_a_line_for_each_run():
    rows = [
        ROW,
        replace(ROW, epoch=1, test_accuracy=80.123),
        replace(ROW, teacher="logits"),
        replace(ROW, model="b", test_accuracy_base=12.5),
    ]
    assert recovery.recovery_table(rows) == (
        ("network", "teacher", "plain", "converted", "epoch 1"),
        [
            ("a", "none", "90.00", "50.00", "80.12"),
            ("a", "logits", "90.00", "50.00", "-"),
            ("b", "none", "90.00", "50.00 / 12.50", "-"),
        ],
    )
    args = ['{"c": 16}', '{"c": 16, "selection": "none"}', '{"c": 8}']
    told = recovery.recovery_table([replace(ROW, model_args=a) for a in args])[1]
    assert [line[0] for line in told] == [
        f"{ROW.model}{t}" for t in (", c=16", ", c=16, selection=none", ", c=8")
    ]
    same = recovery.recovery_table([replace(ROW, model_args=a) for a in args[:2]])[1]
    assert [line[0] for line in same] == [ROW.model, f"{ROW.model}, selection=none"]
    seeds = recovery.recovery_table([ROW, replace(ROW, seed=1)])[1]
    assert [line[0] for line in seeds] == ["a, seed 0", "a, seed 1"]
    with pytest.raises(ValueError, match="no rows to make a table of"):
        recovery.recovery_table([])


def test_teachers_and_images_are_told_apart(tmp_path):
    rows = [
        taught := replace(ROW, teacher="logits", taught_by="a before its conversion", teacher_sha256="0"),
        other := replace(taught, taught_by="resnet56_cifar", teacher_sha256="12" * 32),
        replace(other, teacher_sha256="34" * 32, epoch=1),
    ]
    lines = recovery.recovery_table(rows)[1]
    assert [(line[1], line[3], line[4]) for line in lines] == [
        ("logits", "50.00", "-"),
        ("logits of resnet56_cifar (12121212)", "50.00", "-"),
        ("logits of resnet56_cifar (34343434)", "-", "50.00"),
    ]
    others = [ROW, replace(ROW, pixels=64), replace(ROW, data="cifar100")]
    lines = recovery.recovery_table(others)[1]
    assert [line[0] for line in lines] == ["a, cifar10 32 px", "a, cifar10 64 px", "a, cifar100 32 px"]
    machines = [replace(ROW, cpu="A", cores=2, commit="f" * 40), replace(ROW, gpu="B", commit="e" * 40)]
    recovery.write_recovery_page(tmp_path / "page.md", [*machines, *machines, *others])
    text = (tmp_path / "page.md").read_text()
    assert text.count("- A, 2 cores; ") == text.count("- B, 0 cores; ") == 1
    assert f"commit {'f' * 12}\n- B" in text
    assert "Images: cifar10, 32 px; cifar10, 64 px; cifar100, 32 px; seeds: 0." in text


def test_rows_are_written_once_and_those_of_results_are_read(tmp_path):
    more = replace(ROW, teacher="logits", taught_by="b", teacher_sha256="1")
    write_recoveries(tmp_path / "rows.csv", [ROW])
    write_recoveries(tmp_path / "rows.csv", [ROW, more], append=True)
    assert read_recoveries(tmp_path / "rows.csv") == [ROW, more]
    assert read_recoveries(Path(__file__).parents[2] / "results" / "cifar10-recover.csv")


def test_rows_that_are_damaged_are_named(tmp_path):
    path = tmp_path / "rows.csv"
    write_recoveries(path, [ROW])
    text = path.read_text()
    path.write_text(text.replace("50.0000", "half"))
    with pytest.raises(ValueError, match=r"rows\.csv, line 2: .*half"):
        read_recoveries(path)
    for wrong in (text.rstrip("\n") + ",more\n", text.rpartition(",")[0] + "\n"):
        path.write_text(wrong)
        with pytest.raises(ValueError, match=r"rows\.csv, line 2: [0-9]+ cells, not [0-9]+"):
            read_recoveries(path)
    path.write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="the columns are not those of a Recovery"):
        read_recoveries(path)
    with pytest.raises(
        ValueError, match=r"has the columns \['a', 'b'\], which are not those of a Recovery"
    ):
        write_recoveries(path, [ROW], append=True)


def test_the_command(plain, tmp_path, monkeypatch, capsys):
    recipe = override(recipe_of(plain, "epochs=1"), [])
    monkeypatch.setattr("pliant.recipes.get_recipe", lambda name: replace(recipe, name=name))
    rows, page = tmp_path / "rows.csv", tmp_path / "page.md"
    options = ["--folder", tmp_path / "runs", "--rows", rows, "--page", page, "--no-progress"]
    printed = _cli.run("recover", "tiny", "lr=0.02", *options, "--no-control", app=app)
    assert "resnet20_cifar_mod" in printed
    assert "converted" in printed
    _cli.run("recover", "tiny", "lr=0.02", *options, "--no-teacher", app=app)
    with rows.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [(r["teacher"], r["epoch"], r["lr"]) for r in found] == [
        (teacher, epoch, "0.0200") for teacher in ("logits", "none") for epoch in ("0", "1")
    ]
    text = page.read_text()
    assert text.count("| resnet20_cifar_mod |") == 2
    assert "`tiny` (1 epochs, learning rate 0.02)" in text
    told = _cli.fails(monkeypatch, capsys, "recover", "tiny", "--page", page, app=app)
    assert "add --rows FILE" in told
