"""Which variants the first seed chooses, and the command that runs their further seeds."""

from __future__ import annotations

from dataclasses import replace

import pytest

from _evidence import NAME, VARIANTS, scores_of
from _experiment import run
from pliant.compare import write_scores
from research.experiments import cells_of
from research.experiments.choosing import chosen, deciding
from research.experiments.variants import VARIANTS as TRIED

CELLS = cells_of(VARIANTS, gone=True)
BUILT = ["c by stage", "index order, original", "inner shortcut", "all blocks"]


def rows_of(accuracies):
    """A row of each variant's first seed: validation accuracies as given, or 80 %."""
    rows = scores_of(dict.fromkeys(TRIED, (88.0,)), CELLS)
    return [replace(row, val_accuracy=accuracies.get(row.label, 80.0)) for row in rows]


def test_the_best_on_validation_images_are_chosen_and_controls_are_not():
    gone = {"gate of the map": 98.0, "static": 97.0}  # shown, and never trained again
    rows = rows_of({"inner shortcut": 81.0, "all blocks": 82.0, "c by stage, first k": 99.0, **gone})
    rows = [replace(row, test_accuracy=99.0) if row.label == "c by stage" else row for row in rows]
    assert chosen(rows, 2) == ["all blocks", "inner shortcut"]
    assert chosen(rows, 4)[2:] == ["c by stage", "index order, original"]


def test_other_seeds_lengths_and_experiments_choose_nothing():
    rows = rows_of({"inner shortcut": 81.0})
    further = [replace(row, seed=1, val_accuracy=99.0) for row in rows if row.label == "c by stage"]
    shorter = [replace(row, epochs=2, val_accuracy=99.0) for row in rows if row.label == "c by stage"]
    assert chosen([*rows, *further, *shorter, *scores_of({"plain": (99.0,)})], 1) == ["inner shortcut"]
    rehearsed = [replace(row, epochs=2) for row in rows_of({"all blocks": 81.0})]
    assert chosen([*rows, *rehearsed], 1, epochs=2) == ["all blocks"]


@pytest.mark.parametrize("flipped", [False, True])
def test_a_seed_of_both_devices_counts_as_the_gpus(flipped):
    gpu = [replace(row, gpu="a GPU") for row in rows_of({"inner shortcut": 81.0})]
    both = [*rows_of({"all blocks": 99.0}), *gpu]
    assert chosen(both[::-1] if flipped else both, 1) == ["inner shortcut"]


def test_it_says_what_is_missing_or_out_of_range():
    rows = [row for row in rows_of({}) if row.label not in ("inner shortcut", "all blocks")]
    with pytest.raises(ValueError, match="no row yet of inner shortcut and 1 more: run --seeds 1 first"):
        chosen(rows, 1)
    with pytest.raises(ValueError, match="has no row yet of inner shortcut: run --seeds 1 first"):
        chosen([row for row in rows_of({}) if row.label != "inner shortcut"], 1)
    for count in (0, len(BUILT) + 1):
        with pytest.raises(ValueError, match=f"between 1 and {len(BUILT)} variants can be chosen"):
            chosen(rows_of({}), count)


def test_the_seeds_that_decide_are_the_others():
    assert {cell.recipe.seed for cell in deciding(CELLS)} == {1, 2, 3}
    assert len(deciding(CELLS)) == len(CELLS) - len(TRIED)


def test_the_command_runs_further_seeds_of_those_that_either_device_chose(tmp_path):
    place = ("--results", tmp_path, "--folder", tmp_path / "runs")
    rows = rows_of({"inner shortcut": 81.0})
    write_scores(tmp_path / f"{VARIANTS}-cpu.csv", rows[:5])
    write_scores(tmp_path / f"{VARIANTS}-cuda.csv", [replace(row, gpu="a GPU") for row in rows[5:]])
    listed = run(VARIANTS, "--chosen", 1, "--list", *place)
    assert [line.split("seed")[0].strip() for line in listed.splitlines()] == [
        *["resnet20  inner shortcut"] * 3,
        f"0 of 3 done; rows in {tmp_path / f'{VARIANTS}-cpu.csv'}",
    ]
    assert "seed 0" not in listed
    assert "0 of 3 done" in run(VARIANTS, "--chosen", 1, "--network", "resnet20", "--list", *place)
    with pytest.raises(ValueError, match="run --seeds 1 first"):
        run(VARIANTS, "--chosen", 1, "--epochs", 2, "--list", *place)
    with pytest.raises(ValueError, match=f"--chosen is of {VARIANTS}, not of {NAME}"):
        run(NAME, "--chosen", 1, "--list", *place)
    for other in (["--only", "inner shortcut"], ["--seeds", 1], ["--measure"], ["--page"]):
        with pytest.raises(ValueError, match="--chosen says which labels and seeds run"):
            run(VARIANTS, "--chosen", 1, *other, *place)
