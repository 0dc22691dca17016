"""The page of an experiment: what it says of rows that were made by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from pliant import cli
from pliant.compare import PLAIN, REMOVED, Score, write_scores
from pliant.experiments.cells import cells_of
from pliant.experiments.claims import Paired, answer, at_equal_time, paired
from pliant.experiments.evidence import gather
from pliant.experiments.page import FIRST, FIXED, FRESH, INDEX_ORDER, SCORE_ORDER, page, write_evidence
from pliant.experiments.timing import STEP
from pliant.measuring.rows import Measurement, write_rows

NAME = "cifar10-controls"
CELLS = cells_of(NAME)
VARIANTS = "cifar10-variants"


def scores_of(accuracies, cells=CELLS):
    """Rows for {label: accuracies of seeds 0, 1, ...}."""
    found = []
    for cell in cells:
        recipe = cell.recipe
        for label in cell.labels:
            if recipe.seed < len(accuracies.get(label, ())):
                found.append(
                    Score(
                        label=label,
                        recipe=recipe.name,
                        model=recipe.model,
                        model_args=json.dumps(dict(recipe.model_args)),
                        data="cifar10",
                        pixels=32,
                        epochs=recipe.epochs,
                        seed=recipe.seed,
                        parameters=1000,
                        macs=2_000_000,
                        train_accuracy=90.0,
                        train_ce=0.3,
                        val_accuracy=88.0,
                        gap=2.0,
                        test_accuracy=accuracies[label][recipe.seed],
                        seconds=600.0,
                        cpu="a CPU",
                        cores=2,
                    )
                )
    return found


def times_of(ratios, engine="eager", batch=1):
    """Rows for {label: time ratio}."""
    return [
        Measurement(
            model=f"resnet20: {label}",
            engine=engine,
            batch=batch,
            median_ms=10 * ratio,
            time_ratio=ratio,
            time_ratio_iqr=0.01,
            against="resnet20: plain",
        )
        for label, ratio in ratios.items()
    ]


def text_of(accuracies, times=()):
    return page(NAME, gather(CELLS, scores_of(accuracies), list(times), "cpu"))


def lines_of(text):
    return text.splitlines()


def test_learned_selection_that_beats_no_block_is_said_to():
    text = text_of(
        {SCORE_ORDER: (88.0, 88.1, 88.3), INDEX_ORDER: (88.2, 88.3, 88.4), REMOVED: (87.0, 87.1, 87.2)}
    )
    assert "**Does it beat no block at all?** Yes, in all 2 comparisons." in lines_of(text)
    # Differences 1.0, 1.0, 1.1: standard error 0.0333, times 4.303.
    assert (
        "- MoD, score order is better than blocks removed: +1.03 points, 95 % interval +0.89 to +1.18, "
        "paired over 3 seeds."
    ) in lines_of(text)
    assert "better than random" not in text


def test_learned_selection_that_loses_is_said_to():
    text = text_of(
        {SCORE_ORDER: (86.0, 86.1, 86.2), INDEX_ORDER: (86.0, 86.1, 86.3), REMOVED: (87.0, 87.1, 87.2)}
    )
    assert "**Does it beat no block at all?** No, it is worse in all 2 comparisons." in lines_of(text)
    assert "- MoD, score order is worse than blocks removed: -1.00 points" in text
    assert "better than" not in text


def test_what_is_undecided_is_never_called_better():
    text = text_of(
        {
            SCORE_ORDER: (87.0, 87.4, 86.9),
            INDEX_ORDER: (87.9, 87.0, 87.2),
            REMOVED: (87.1, 87.1, 87.0),
            FRESH: (86.0, 86.4, 85.9),
            FIXED: (87.0, 87.0, 87.4),
        }
    )
    assert (
        "**Does it beat no block at all?** Not shown: better in 0 of 2 comparisons, undecided in 2." in text
    )
    assert "- Between MoD, score order and blocks removed nothing is decided: +0.03 points" in text
    assert "the interval holds zero." in text
    assert "MoD, score order is better than random channels, fresh" in text
    assert "- MoD, score order against first k channels: not run yet." in lines_of(text)
    asked = next(line for line in lines_of(text) if "channels that are not learned?" in line)
    assert asked.endswith("In part: better in 1 of 6 comparisons, undecided in 3, not run yet in 2.")


def test_one_seed_decides_nothing_and_nothing_is_not_run_yet():
    one = text_of(
        {SCORE_ORDER: (88.0,), REMOVED: (87.0,), "MoD, c = 2": (85.0,), "MoD, c = 2, original": (70.0,)}
    )
    assert (
        "- Whether MoD, score order or blocks removed is better cannot be said from one seed: +1.00 points."
        in lines_of(one)
    )
    assert "better in 0 of 2 comparisons, one seed in 1, not run yet in 1." in one
    assert (
        "Whether MoD, c = 2, original or MoD, c = 2 is better cannot be said from one seed: -15.00" in one
    )
    none = text_of({})
    assert none.count("Not run yet.") == 2
    assert none.count("Its times have not run yet.") == 2
    assert "0 of 41 runs are there." in none
    assert "| plain | 0 | not run yet |" in none
    assert "better than" not in none + one
    # Another seed of one of two is no pair.
    half = text_of({SCORE_ORDER: (88.0, 88.0, 88.0), REMOVED: (87.0,)})
    assert "cannot be said from one seed: +1.00" in half


def test_equal_time_is_the_line_between_no_block_and_the_plain_network():
    accuracies = {
        PLAIN: (89.0, 89.2, 89.1),
        REMOVED: (87.0, 87.2, 87.1),
        SCORE_ORDER: (87.5, 87.7, 87.7),
        INDEX_ORDER: (89.5, 89.7, 89.6),
    }
    ratios = {PLAIN: 1.0, REMOVED: 0.6, SCORE_ORDER: 0.8, INDEX_ORDER: 1.1}
    text = text_of(accuracies, times_of(ratios))
    # At 0.8 the line is half of each: 88.0, 88.2, 88.1.
    assert (
        "| eager, batch 1 | MoD, score order | 0.800 | 0.50 blocks removed + 0.50 plain | -0.47 (" in text
    )
    # Slower than plain: held against plain.
    assert "| eager, batch 1 | MoD, index order | 1.100 | plain, which is not slower | +0.50 (+" in text
    asked = next(line for line in lines_of(text) if "equal measured time" in line)
    assert asked.endswith("In part: better in 1 of 2 comparisons, worse in 1.")
    # No slower than without blocks: held against that.
    fast = text_of(accuracies, times_of(ratios | {SCORE_ORDER: 0.6}))
    assert "| MoD, score order | 0.600 | blocks removed, which is not faster | +0.53 (" in fast
    # A line needs all three times.
    part = text_of(accuracies, times_of({PLAIN: 1.0, SCORE_ORDER: 0.8}))
    assert "**Does it beat no block at all at equal measured time?** Its times have not run yet." in part
    # Likewise for the time of a training step.
    trained = text_of(accuracies, times_of(ratios, STEP, 128))
    asked = next(line for line in lines_of(trained) if "equal time of a training step" in line)
    assert asked.endswith("In part: better in 1 of 2 comparisons, worse in 1.")
    assert (
        "| training step, batch 128 | MoD, score order | 0.800 | 0.50 blocks removed + 0.50 plain |"
        in trained
    )


def test_the_form_that_suits_the_engine_is_the_one_that_counts():
    (own,) = gather(
        CELLS,
        [],
        [
            Measurement(model="resnet20: plain", time_ratio=1.0, form="plain"),
            Measurement(model=f"resnet20: {SCORE_ORDER}", time_ratio=1.3, form="plain"),
            Measurement(model=f"resnet20: {SCORE_ORDER}", time_ratio=0.9, form="optimized"),
            Measurement(model=f"resnet20: {FIRST}", time_ratio=0.7, form="plain"),
            Measurement(model=f"resnet20: {FIRST}", form="optimized", error="none"),
            Measurement(model="resnet20: ADN", engine=STEP, time_ratio=2.0),
            Measurement(model="resnet18: plain", time_ratio=1.0),
        ],
        "cpu",
    )
    assert [own.time(n, "eager", 1).time_ratio for n in (PLAIN, SCORE_ORDER, FIRST)] == [1.0, 0.9, 0.7]
    assert own.settings() == [("eager", 1)]
    assert own.step("ADN, base-net").time_ratio == 2.0
    assert len(own.times) == 6


def test_tables_have_means_spreads_and_costs():
    times = times_of({PLAIN: 1.0, REMOVED: 0.6, SCORE_ORDER: 0.9})
    times += times_of({PLAIN: 1.0, REMOVED: 0.7, SCORE_ORDER: 1.05, "ADN": 1.9}, STEP, 128)
    text = text_of({PLAIN: (88.0, 89.0), SCORE_ORDER: (87.0,), "ADN, base-net": (86.0,)}, times)
    assert "| plain | 2 | 88.50 ± 0.71 |  | 1,000 | 2.00 | 1.000 (0.010) | 1.00 |" in lines_of(text)
    assert (
        "| MoD, score order | 1 | 87.00 | -1.00, 1 seed | 1,000 | 2.00 | 0.900 (0.010) | 1.05 |"
        in lines_of(text)
    )
    assert "it takes longer than the plain network's: 1.05 of its time; without the blocks 0.70" in text
    assert "| ADN, base-net | 1 | 86.00 | -2.00, 1 seed | 1,000 | 2.00 |  | 1.90 |" in lines_of(text)
    assert "Seeds of one network spread by up to 0.71 points" in text


def test_rows_of_other_experiments_are_left_out():
    (row,) = scores_of({PLAIN: (88.0,)})
    others = [replace(row, epochs=1), replace(row, recipe="cifar10.resnet20"), replace(row, seed=9)]
    (own,) = gather(CELLS, [row, *others], [], "cpu")
    assert own.scores == (row,)


def test_page_and_figure_are_written_from_files(tmp_path):
    results, docs = tmp_path / "results", tmp_path / "docs"
    place = ("--results", str(results), "--docs", str(docs))
    done = CliRunner().invoke(cli.app, ["experiment", NAME, "--page", *place])
    assert done.exit_code == 0, done.output
    assert "Not run yet." in (docs / "evidence.md").read_text()
    assert "![" not in (docs / "evidence.md").read_text()

    write_scores(results / f"{NAME}-cpu.csv", scores_of({PLAIN: (88.0, 89.0), REMOVED: (87.0,)}))
    write_rows(results / f"{NAME}-latency-cpu.csv", times_of({PLAIN: 1.0, REMOVED: 0.6}))
    path = write_evidence(NAME, results, docs)
    text = path.read_text()
    assert f"![Accuracy against latency](../results/{NAME}-resnet20-cpu.svg)" in text
    assert "resnet18" not in text  # nothing was run on a GPU
    figure = (results / f"{NAME}-resnet20-cpu.svg").read_text()
    assert ">blocks removed<" in figure
    assert ">resnet20, eager, batch 1<" in figure
    again = (
        write_evidence(NAME, results, docs).read_text(),
        (results / f"{NAME}-resnet20-cpu.svg").read_text(),
    )
    assert again == (text, figure)

    first = {(c.network, c.label): c for c in cells_of(NAME, "cuda")}["resnet50", "plain"]
    (row,) = scores_of({PLAIN: (88.0,)})
    gpu = replace(row, recipe=first.recipe.name, model=first.recipe.model, gpu="a GPU")
    write_scores(results / f"{NAME}-cuda.csv", [gpu])
    text = write_evidence(NAME, results, docs).read_text()
    assert "## What the rows show (resnet20, cpu)" in text
    assert "## What the rows show (resnet50, cuda)" in text
    assert "Trained on a GPU." in text


def test_variants_have_a_page_with_their_rivals_rows(tmp_path):
    results, docs = tmp_path / "results", tmp_path / "docs"
    text = write_evidence(VARIANTS, results, docs).read_text()
    assert text.startswith("# Variants\n\nWritten by `pliant experiment cifar10-variants --page`")
    assert "beat no block at all at equal measured time?** Its times have not run yet." in text
    assert "- gate of the map against gate of the map, first k: not run yet." in lines_of(text)
    assert "Variants by the seeds that have rows: 16 with 0 seeds. " in text

    ends = {PLAIN: (89.0, 89.2, 89.1), REMOVED: (87.0, 87.2, 87.1)}
    write_scores(results / f"{NAME}-cpu.csv", scores_of(ends))
    own = {"gate of the map": (88.6, 88.8, 88.8), "static": (87.0,), "gate of the map, first k": (88.0,)}
    write_scores(results / f"{VARIANTS}-cpu.csv", scores_of(own, cells_of(VARIANTS)))
    ratios = {
        PLAIN: 1.0,
        REMOVED: 0.6,
        "gate of the map": 0.8,
        "static": 0.6,
        "gate of the map, first k": 0.7,
    }
    write_rows(results / f"{VARIANTS}-latency-cpu.csv", times_of(ratios))
    text = write_evidence(VARIANTS, results, docs).read_text()
    assert "that have rows: 13 with 0 seeds, 2 with 1 seed, 1 with 3 seeds. " in text
    asked = next(line for line in lines_of(text) if "no block at all at equal measured time" in line)
    # The line is 88.0, 88.2, 88.1 at 0.8; what selects nothing is not counted.
    assert asked.endswith("In part: better in 1 of 2 comparisons, one seed in 1.")
    row = next(line for line in lines_of(text) if line.startswith("| gate of the map | +"))
    assert row.startswith("| gate of the map | +1.63 (")
    assert "| +0.63 (" in row
    assert row.endswith("n = 3 at 0.800 |")
    assert "| static | +0.00, 1 seed | +0.00, 1 seed at 0.600 |" in lines_of(text)
    assert (
        "- **static** (`selection='static', temperature=0.1, straight_through=True, order='index'," in text
    )
    assert "| plain | 3 | 89.10 ± 0.10 |" in text
    figure = (results / f"{VARIANTS}-resnet20-cpu.svg").read_text()
    assert ">gate of the map<" in figure


def test_student_and_pairs():
    found = paired({0: 1.0, 1: 3.0, 5: 9.0}, {0: 0.0, 1: 1.0, 2: 7.0})
    assert found == Paired((1.0, 2.0))
    low, high = found.interval  # t = 12.706 for one degree of freedom, standard error 0.5
    assert (low, high) == pytest.approx((1.5 - 6.353, 1.5 + 6.353))
    assert found.verdict == "undecided"
    assert Paired((1.0,)).interval == (-math.inf, math.inf)
    many = Paired(tuple([1.0, 2.0] * 30))
    assert many.interval[1] - many.mean == pytest.approx(2.086 * many.error)
    assert answer(["worse"]) == "No, it is worse."
    assert at_equal_time({0: 1.0}, 0.5, ({0: 0.5}, 0.6), ({0: 2.0}, 1.0)).found.differences == (0.5,)
