"""The page of an experiment: what it says of rows that were made by hand."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from _evidence import NAME, RUNS, VARIANTS, scores_of, times_of
from pliant.compare import PLAIN, write_scores
from pliant.measuring.rows import Measurement, write_rows
from pliant.methods.mixture_of_depths.recipes import REMOVED
from research.commands import app
from research.experiments.claims import Baseline, Paired, answer, any_of, at_equal_time, paired, sentence
from research.experiments.evidence import Timing, gather
from research.experiments.evidence_page import (
    FIRST,
    FIXED,
    FRESH,
    INDEX_ORDER,
    SCORE_ORDER,
    page,
    write_evidence,
)
from research.experiments.network_times import STEP
from research.experiments.plans import cifar10_variants, planned_runs

EAGER = Timing("eager", 1)


def text_of(accuracies, times=()):
    return page(NAME, gather(RUNS, scores_of(accuracies), list(times)))


def lines_of(text):
    return text.splitlines()


def test_learned_selection_that_beats_no_block_is_said_to():
    text = text_of(
        {SCORE_ORDER: (88.0, 88.1, 88.3), INDEX_ORDER: (88.2, 88.3, 88.4), REMOVED: (87.0, 87.1, 87.2)}
    )
    assert "**Is it better than no block at all?** Yes, in all 2 comparisons." in lines_of(text)
    # Differences 1.0, 1.0, 1.1: standard error 0.0333, times 4.303.
    assert (
        "- MoD (score order) against blocks removed: better, +1.03 points (95 % interval +0.89 to +1.18, "
        "paired over 3 seeds)."
    ) in lines_of(text)
    assert text.count(": better, ") == 2


def test_learned_selection_that_loses_is_said_to():
    text = text_of(
        {SCORE_ORDER: (86.0, 86.1, 86.2), INDEX_ORDER: (86.0, 86.1, 86.3), REMOVED: (87.0, 87.1, 87.2)}
    )
    assert "**Is it better than no block at all?** No, it is worse in all 2 comparisons." in lines_of(text)
    assert "- MoD (score order) against blocks removed: worse, -1.00 points" in text
    assert ": better, " not in text


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
    said = "Not shown: better in 0 of 2 comparisons, not significant in 2."
    assert f"**Is it better than no block at all?** {said}" in text
    assert "- MoD (score order) against blocks removed: no significant difference, +0.03 points" in text
    assert "MoD (score order) against random channels (fresh): better, " in text
    missing = "- MoD (score order) against first k channels: no seed ran with both networks on one device."
    assert missing in lines_of(text)
    asked = next(line for line in lines_of(text) if "channels that are not learned?" in line)
    assert asked.endswith("In part: better in 1 of 6 comparisons, not significant in 3, not run yet in 2.")


def test_too_few_seeds_decide_nothing_and_nothing_is_not_run_yet():
    one = text_of(
        {SCORE_ORDER: (88.0,), REMOVED: (87.0,), "MoD, c = 2": (85.0,), "MoD, c = 2, original": (70.0,)}
    )
    assert (
        "- MoD (score order) against blocks removed: +1.00 points from 1 seed, too few for an interval."
        in lines_of(one)
    )
    assert "Not shown yet: better in 0 of 2 comparisons, too few seeds in 1, not run yet in 1." in one
    assert "MoD (c = 2, original) against MoD (c = 2): -15.00 points from 1 seed" in one
    none = text_of({})
    assert none.count("Not run yet.") == 2
    assert none.count("Its times have not run yet.") == 2
    assert "There are rows of **0 of 55 runs** of resnet20." in none
    assert "One seed is planned for: Width of the block" in none
    assert "| plain | 0 | not run yet |" in none
    assert ": better, " not in none + one
    # Another seed of one of two is no pair, and two are no more than luck.
    half = text_of({SCORE_ORDER: (88.0, 88.0, 88.0), REMOVED: (87.0,)})
    assert "+1.00 points from 1 seed, too few" in half
    two = text_of({SCORE_ORDER: (88.41, 88.41), REMOVED: (88.4, 88.4)})
    assert "+0.01 points from 2 seeds, too few" in two
    assert ": better, " not in two
    # Worse where it was run is not the whole answer while the rest is missing.
    part = text_of({SCORE_ORDER: (86.0, 86.1, 86.2), REMOVED: (87.0, 87.1, 87.2)})
    asked = next(line for line in lines_of(part) if "no block at all?**" in line)
    assert asked.endswith("Not shown yet: better in 0 of 2 comparisons, worse in 1, not run yet in 1.")


ENDS = {PLAIN: (89.0, 89.2, 89.1), REMOVED: (87.0, 87.2, 87.1)}
AT_ENDS = {PLAIN: 1.0, REMOVED: 0.6}


def verdicts_of(accuracies, ratios, **kwargs):
    """Verdicts at equal time, by network, of the first setting."""
    lines = lines_of(text_of(ENDS | accuracies, times_of(AT_ENDS | ratios, **kwargs)))
    found = [line.split(" | ") for line in lines if line.startswith("| eager, batch 1 | MoD")]
    return {cells[1]: cells[-1].removesuffix(" |") for cells in found}


def test_equal_time_is_the_line_between_no_block_and_the_plain_network():
    accuracies = ENDS | {SCORE_ORDER: (87.5, 87.7, 87.7), INDEX_ORDER: (88.9, 89.1, 89.0)}
    ratios = AT_ENDS | {SCORE_ORDER: 0.8, INDEX_ORDER: 0.7}
    text = text_of(accuracies, times_of(ratios))
    # At 0.8 the line is half of each: 88.0, 88.2, 88.1.
    assert (
        "| eager, batch 1 | MoD, score order | 0.800 | 0.50 blocks removed + 0.50 plain | -0.47 (" in text
    )
    assert verdicts_of(accuracies, ratios) == {SCORE_ORDER: "worse", INDEX_ORDER: "better"}
    asked = next(line for line in lines_of(text) if "of the same latency" in line)
    assert asked.endswith("In part: better in 1 of 2 comparisons, worse in 1.")
    # No slower than without blocks: compared with that.
    fast = text_of(accuracies, times_of(ratios | {SCORE_ORDER: 0.6}))
    assert "| MoD, score order | 0.600 | blocks removed | +0.53 (" in fast
    # A line needs all three times, and what lacks one is named.
    part = text_of(accuracies, times_of({PLAIN: 1.0, SCORE_ORDER: 0.8}))
    asked = next(line for line in lines_of(part) if "of the same latency" in line)
    assert "blocks removed has no time in eager, batch 1" in asked
    assert "MoD, index order has no time in eager, batch 1" in asked
    # Likewise for the time of a training step.
    trained = text_of(accuracies, times_of(ratios, STEP, 128))
    asked = next(line for line in lines_of(trained) if "of the same training time" in line)
    assert asked.endswith("In part: better in 1 of 2 comparisons, worse in 1.")
    assert (
        "| training step, batch 128 | MoD, score order | 0.800 | 0.50 blocks removed + 0.50 plain |"
        in trained
    )


def test_what_is_slower_than_the_plain_network_is_not_better_at_equal_time():
    both = {SCORE_ORDER: (89.5, 89.7, 89.6), INDEX_ORDER: (88.0, 88.2, 88.1)}
    found = verdicts_of(both, {SCORE_ORDER: 1.1, INDEX_ORDER: 1.1})
    assert found == {SCORE_ORDER: "slower than the plain network", INDEX_ORDER: "worse"}
    # As slow, as far as the clock can tell: it has to beat the plain network.
    assert verdicts_of(both, {SCORE_ORDER: 1.01})[SCORE_ORDER] == "better"


def test_a_verdict_at_equal_time_holds_for_all_times_that_the_clock_allows():
    # 0.1 above the line at 0.8, which rises by 0.05 points for each hundredth of time.
    near = {SCORE_ORDER: (88.1, 88.3, 88.2), INDEX_ORDER: (87.9, 88.1, 88.0)}
    at = {SCORE_ORDER: 0.8, INDEX_ORDER: 0.8}
    assert verdicts_of(near, at) == {SCORE_ORDER: "better", INDEX_ORDER: "worse"}  # to 1.5 hundredths
    assert verdicts_of(near, at, spread=0.025) == {
        SCORE_ORDER: "not significant",
        INDEX_ORDER: "not significant",
    }
    # Where both ends take nearly the same time there is no line to speak of.
    close = verdicts_of({SCORE_ORDER: (88.0, 88.2, 88.1)}, {REMOVED: 0.98, SCORE_ORDER: 0.985})
    assert close[SCORE_ORDER] == "not significant"


def test_a_plain_network_of_another_depth_is_a_baseline():
    own = {SCORE_ORDER: (88.5, 88.7, 88.6)}
    assert verdicts_of(own, {SCORE_ORDER: 0.8})[SCORE_ORDER] == "better"
    depth = {"plain, 3-2-2 blocks": (88.9, 89.1, 89.0)}
    times = {SCORE_ORDER: 0.8, "plain, 3-2-2 blocks": 0.75}
    assert verdicts_of(own | depth, times)[SCORE_ORDER] == "worse"
    # One seed of it is no baseline yet.
    assert verdicts_of(own | {"plain, 3-2-2 blocks": (88.9,)}, times)[SCORE_ORDER] == "better"
    # Where fewer blocks reach more, more time alone is no merit.
    falling = {REMOVED: (88.0, 88.2, 88.1), PLAIN: (87.0, 87.2, 87.1), SCORE_ORDER: (87.6, 87.8, 87.7)}
    assert verdicts_of(falling, {SCORE_ORDER: 0.9})[SCORE_ORDER] == "not significant"


def test_times_of_another_run_are_no_pair():
    rows = times_of(AT_ENDS | {SCORE_ORDER: 0.8})
    rows = [
        replace(r, date="yesterday") if SCORE_ORDER in r.model else replace(r, date="now") for r in rows
    ]
    (own,) = gather(RUNS, [], rows)
    assert own.time(REMOVED, EAGER).time_ratio == 0.6
    assert own.time(SCORE_ORDER, EAGER) is None


def test_the_form_that_suits_the_engine_is_the_one_that_counts():
    (own,) = gather(
        RUNS,
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
    )
    assert [own.time(n, EAGER).time_ratio for n in (PLAIN, SCORE_ORDER, FIRST)] == [1.0, 0.9, 0.7]
    assert [own.lacks_form(n, EAGER) for n in (PLAIN, SCORE_ORDER, FIRST)] == [False, False, True]
    assert own.timings() == [EAGER]
    assert own.timings(steps=True) == [Timing(STEP, 1)]
    assert own.step("ADN, base-net", Timing(STEP, 1)).time_ratio == 2.0
    assert len(own.times) == 6


def test_tables_have_means_spreads_and_costs():
    times = times_of({PLAIN: 1.0, REMOVED: 0.6, SCORE_ORDER: 0.9})
    times += times_of({PLAIN: 1.0, REMOVED: 0.7, SCORE_ORDER: 1.05, "ADN": 1.9}, STEP, 128)
    times += [Measurement(model=f"resnet20: {FIRST}", engine="eager", batch=1, error="it broke")]
    several = {PLAIN: (88.0, 89.0, 90.0), INDEX_ORDER: (88.0, 88.0, 91.0)}
    text = text_of({**several, SCORE_ORDER: (87.0,), "ADN, base-net": (86.0,)}, times)
    assert "| plain | 3 | 89.00 ± 1.00 |  | 1,000 | 2.00 | 1.000 (0.010) | 1.00 |" in lines_of(text)
    assert "| first k channels | 0 | not run yet |  |  |  | failed |  |" in lines_of(text)
    assert (
        "| MoD, score order | 1 | 87.00 | -1.00, 1 seed | 1,000 | 2.00 | 0.900 (0.010) | 1.05 |"
        in lines_of(text)
    )
    took = "it takes 1.05 (0.01) of the plain network's time, with the blocks removed 0.70 (0.01)"
    assert took in text
    assert "| ADN, base-net | 1 | 86.00 | -2.00, 1 seed | 1,000 | 2.00 |  | 1.90 |" in lines_of(text)
    # Variances 1 and 3, with two degrees of freedom each.
    assert "The standard deviation over seeds is 1.41 points (pooled over 2 networks)" in text
    assert "difference of two single runs has a standard deviation of 2.00 points by chance alone" in text
    assert "by chance alone" not in text_of({PLAIN: (88.0, 88.0), SCORE_ORDER: (87.0,)})


def test_rows_of_other_experiments_are_left_out():
    (row,) = scores_of({PLAIN: (88.0,)})
    others = [replace(row, epochs=1), replace(row, recipe="cifar10.resnet20"), replace(row, seed=9)]
    (own,) = gather(RUNS, [row, *others], [])
    assert own.scores == (row,)
    assert gather(RUNS, [row, row], [])[0].scores == (row,)
    with pytest.raises(
        ValueError, match=r"two rows of plain, seed 0, have test accuracies of 0\.88 and 0\.8;"
    ):
        gather(RUNS, [row, replace(row, test_accuracy=0.8)], [])


def test_networks_are_compared_on_one_device_and_a_seed_counts_once(tmp_path):
    on_cpu = scores_of({PLAIN: (88.0, 89.0, 90.0), REMOVED: (87.0, 87.0), SCORE_ORDER: (0.0, 0.0, 87.5)})
    on_gpu = [
        replace(row, gpu="a GPU", test_accuracy=accuracy)
        for row in scores_of({PLAIN: (0.0,), REMOVED: (0.0, 0.0, 0.0)})
        for accuracy in [0.885 if row.label == PLAIN else 0.86]
    ]
    times = times_of({PLAIN: 1.0, REMOVED: 0.6, SCORE_ORDER: 0.8})
    times += [replace(row, device="cuda", time_ratio=row.time_ratio / 2) for row in times]
    (own,) = gather(RUNS, [*on_cpu, *on_gpu], times)
    # The GPU's row of the first seed; seed 2 of the one was run on a CPU, of the other on a GPU.
    assert own.accuracy(PLAIN) == {0: 88.5, 1: 89.0, 2: 90.0}
    assert own.accuracy(REMOVED) == {0: 86.0, 1: 86.0, 2: 86.0}
    assert own.against(PLAIN, REMOVED).differences == (2.5, 2.0)
    assert own.against(SCORE_ORDER, REMOVED).n == 2
    (apart,) = gather(RUNS, [on_cpu[1], *on_gpu[1:]], [])  # both were run, and nowhere together
    assert sentence("a", "b", apart.against(SCORE_ORDER, REMOVED)) == (
        "a against b: no seed ran with both networks on one device."
    )
    assert own.at_equal_time(SCORE_ORDER, EAGER).found.n == 2
    cuda = Timing("eager", 1, "cuda")
    assert own.timings() == [EAGER, cuda]
    assert [own.time(REMOVED, timing).time_ratio for timing in own.timings()] == [0.6, 0.3]

    # The same from files, whatever their order.
    write_scores(tmp_path / f"{NAME}-cpu.csv", on_cpu)
    write_scores(tmp_path / f"{NAME}-cuda.csv", on_gpu)
    for device in ("cpu", "cuda"):
        write_rows(tmp_path / f"{NAME}-latency-{device}.csv", [r for r in times if r.device == device])
    text = write_evidence(NAME, tmp_path, tmp_path).read_text()
    assert "| plain | 3 | 89.17 ± 0.76 |" in text
    assert "Trained on a CPU, 2 cores (8 rows); a GPU (4 rows)." in text
    assert "| latency ratio, eager, batch 1 | latency ratio, eager, batch 1, cuda |" in text


def test_a_training_step_is_told_of_each_device():
    times = times_of({PLAIN: 1.0, REMOVED: 0.7, SCORE_ORDER: 0.8, "ADN": 1.9}, STEP, 128)
    times += [replace(row, device="cuda", time_ratio=2 * row.time_ratio) for row in times]
    text = text_of({PLAIN: (88.0,), "ADN, base-net": (86.0,)}, times)
    assert "| time ratio, training step, batch 128 | time ratio, training step, batch 128, cuda |" in text
    assert "| ADN, base-net | 1 | 86.00 | -2.00, 1 seed | 1,000 | 2.00 | 1.90 | 3.80 |" in text
    asked = next(line for line in lines_of(text) if "does a training step take?" in line)
    assert "it takes 0.80 (0.01) of the plain network's time" in asked
    assert "it takes 1.60 (0.01) of the plain network's time" in asked
    # One end on a device alone says nothing there.
    part = text_of({}, [row for row in times if row.device == "cpu" or REMOVED not in row.model])
    asked = next(line for line in lines_of(part) if "does a training step take?" in line)
    assert "0.80 (0.01)" in asked
    assert "cuda" not in asked
    assert "Training steps: not run yet." in text_of({})


@pytest.mark.slow
def test_page_and_figure_are_written_from_files(tmp_path):
    results, docs = tmp_path / "results", tmp_path / "docs"
    place = ("--results", str(results), "--docs", str(docs))
    # Nothing in the place of a page that may be there.
    docs.mkdir()
    (docs / "evidence.md").write_text("full")
    done = CliRunner().invoke(app, ["experiment", NAME, "--page", *place])
    assert "no rows of cifar10-controls in" in str(done.exception)
    assert (docs / "evidence.md").read_text() == "full"
    done = CliRunner().invoke(app, ["experiment", NAME, "--page", "--seeds", "1", *place])
    assert "remove --only, --network and --seeds" in str(done.exception)
    done = CliRunner().invoke(app, ["experiment", NAME, "--page", "--network", "resnet20", *place])
    assert "remove --only, --network and --seeds" in str(done.exception)

    write_scores(results / f"{NAME}-cpu.csv", scores_of({PLAIN: (88.0, 89.0), REMOVED: (87.0,)}))
    done = CliRunner().invoke(app, ["experiment", NAME, "--page", *place])
    assert done.exit_code == 0, done.output
    assert "![" not in (docs / "evidence.md").read_text()
    write_rows(results / f"{NAME}-latency-cpu.csv", times_of({PLAIN: 1.0, REMOVED: 0.6}))
    path = write_evidence(NAME, results, docs)
    text = path.read_text()
    assert f"![Accuracy against latency](../results/{NAME}-resnet20.svg)" in text
    assert "resnet18" not in text  # nothing was run on a GPU
    figure = (results / f"{NAME}-resnet20.svg").read_text()
    assert ">blocks removed<" in figure
    assert ">resnet20, eager, batch 1<" in figure
    rehearsed = [replace(row, epochs=2) for row in scores_of({PLAIN: (50.0,)})]
    write_scores(results / f"{NAME}-cpu.csv", rehearsed, append=True)
    short = write_evidence(NAME, results, docs, epochs=2)
    assert short.name == "evidence-2-epochs.md"
    assert "`python -m research experiment cifar10-controls --epochs 2 --page`" in short.read_text()
    again = (
        write_evidence(NAME, results, docs).read_text(),
        (results / f"{NAME}-resnet20.svg").read_text(),
    )
    assert again == (text, figure)

    first = {(run.network, run.label): run for run in planned_runs(NAME, "cuda")}["resnet50", "plain"]
    (row,) = scores_of({PLAIN: (88.0,)})
    gpu = replace(row, recipe=first.recipe.name, model=first.recipe.model, gpu="a GPU")
    write_scores(results / f"{NAME}-cuda.csv", [gpu])
    text = write_evidence(NAME, results, docs).read_text()
    assert "## What the rows show (resnet20)" in text
    assert "## What the rows show (resnet50)" in text
    assert "Trained on a GPU (1 row)." in text


def test_variants_have_a_page_with_the_rows_of_their_baselines(tmp_path):
    results, docs = tmp_path / "results", tmp_path / "docs"
    # Seed 0 chose, and would make a winner of "static"; the other three decide.
    ends = {PLAIN: (80.0, 89.0, 89.2, 89.1), REMOVED: (80.0, 87.0, 87.2, 87.1)}
    write_scores(results / f"{NAME}-cpu.csv", scores_of(ends))
    text = write_evidence(VARIANTS, results, docs).read_text()
    assert text.startswith("# Variants\n\nVariants of the Mixture-of-Depths block, a closed study")
    assert "`python -m research experiment cifar10-variants --page`" in text
    assert "than plain networks of the same latency?** Its times have not run yet." in text
    pair = "- gate of the map against gate of the map (first k)"
    assert f"{pair}: no seed ran with both networks on one device." in lines_of(text)
    assert "Variants by their number of seeds: 20 with 0 seeds. " in text
    assert "There are rows of 8 runs of resnet20. Missing runs are marked." in text

    own = {
        "gate of the map": (70.0, 88.6, 88.8, 88.8),
        "static": (99.0,),
        "gate of the map, first k": (88.0, 99.0, 99.1, 99.2),
    }
    write_scores(results / f"{VARIANTS}-cpu.csv", scores_of(own, cifar10_variants()))
    ratios = AT_ENDS | {"gate of the map": 0.8, "static": 0.6, "gate of the map, first k": 0.7}
    write_rows(results / f"{VARIANTS}-latency-cpu.csv", times_of(ratios))
    text = write_evidence(VARIANTS, results, docs).read_text()
    assert "number of seeds: 17 with 0 seeds, 1 with 1 seed, 2 with 4 seeds. " in text
    assert "There are rows of 17 runs of resnet20." in text
    (gone,) = [line for line in lines_of(text) if "at the git tag `before-house`" in line]
    assert "`before-house`: gate of the map; " in gone
    assert "; static; " in gone
    assert "all blocks;" not in gone
    asked = next(line for line in lines_of(text) if "of the same latency?" in line)
    # The line is 88.0, 88.2, 88.1 at 0.8; what selects nothing is not counted.
    assert asked.endswith("Yes: gate of the map.")
    row = next(line for line in lines_of(text) if line.startswith("| gate of the map | +"))
    assert row.startswith("| gate of the map | +1.63 (")
    assert "| +0.63 (" in row
    assert row.endswith("n = 3 at 0.800 against 0.50 blocks removed + 0.50 plain: better |")
    (rest,) = [line for line in lines_of(text) if "The first seed alone have: " in line]
    assert "; static; " in rest
    assert ": separable; " in rest  # the third; the first two have seeds that decide
    assert not any(line.startswith("| static | not run yet") for line in lines_of(text))
    assert "| static | 88.00 | 2 | 0.600 |" in lines_of(text)  # what chose: validation images
    assert "| gate of the map, first k (selects nothing) | 88.00 |  | 0.700 |" in lines_of(text)
    assert (
        "- **static** (`selection='static', temperature=0.1, straight_through=True, order='index'," in text
    )
    assert "| plain | 4 | 86.83 ± 4.55 |" in text
    figure = (results / f"{VARIANTS}-resnet20.svg").read_text()
    assert ">gate of the map<" in figure

    # Without the seeds that decide nothing is decided, whatever the first says.
    write_scores(results / f"{VARIANTS}-cpu.csv", scores_of({"static": (99.0,)}, cifar10_variants()))
    text = write_evidence(VARIANTS, results, docs).read_text()
    assert "of the same latency?** The seeds that decide have not run yet." in text


def runs(*values):
    """Accuracies on one device from seeds and values in turn."""
    return {(seed, "cpu"): value for seed, value in zip(values[::2], values[1::2], strict=True)}


def test_student_and_pairs():
    found = paired(runs(0, 1.0, 1, 3.0, 5, 9.0), runs(0, 0.0, 1, 1.0, 2, 7.0))
    assert found == Paired((1.0, 2.0))
    low, high = found.interval  # t = 12.706 for one degree of freedom, standard error 0.5
    assert (low, high) == pytest.approx((1.5 - 6.353, 1.5 + 6.353), abs=1e-3)
    assert found.verdict == "too few seeds"
    assert Paired((0.1, 0.1, 0.1)).error == pytest.approx(0.01 / 3**0.5)  # no finer than one image
    assert Paired((1.0,)).interval == (-math.inf, math.inf)
    many = Paired(tuple([1.0, 2.0] * 30))
    assert many.interval[1] - many.mean == pytest.approx(2.001 * many.error, rel=1e-4)
    assert answer(["worse"]) == "No, it is worse."
    ends = [Baseline("slow", runs(0, 2.0), 1.0), Baseline("fast", runs(0, 0.5), 0.6)]
    assert at_equal_time(runs(0, 1.0), 0.5, 0.0, ends).found.differences == (0.5,)
    far = [
        Baseline("slow", runs(0, 9.0, 1, 9.1, 2, 9.2), 1.0),
        Baseline("fast", runs(0, 8.0, 1, 8.1, 2, 8.2), 0.6),
    ]
    least = runs(0, 1.0, 1, 1.1, 2, 1.2)
    assert [at_equal_time(least, time, 0.01, far).verdict for time in (0.5, 0.595, 0.7)] == [
        *("not significant", "worse", "worse"),  # what is faster than each of them has no equal
    ]
    assert any_of({"A": ["not run yet"], "B": []}) == "Not run yet."
    assert any_of({"A": ["worse", "not significant"]}) == "Not shown of any so far: not significant 1."
