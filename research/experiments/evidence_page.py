"""The page that says what the rows of an experiment show, made from the rows alone."""

from __future__ import annotations

import math
import os
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pliant._files import atomic_path
from pliant.compare import PLAIN, Score
from pliant.measuring.rows import Measurement, read_rows
from pliant.methods.adaptive_depth.recipes import BASE_ALONE
from pliant.methods.mixture_of_depths.recipes import CONTROLS as MOD_CONTROLS
from pliant.methods.mixture_of_depths.recipes import REMOVED
from pliant.tables import MACHINE_BUSY, markdown, with_spread
from research.experiments.claims import FEWEST, MISSING, answer, mean_and_spread, sentence, spoken
from research.experiments.evidence import Evidence, Timing, gather
from research.experiments.evidence_figure import plot_evidence
from research.experiments.execution import scores_in
from research.experiments.plans import (
    CLOSED,
    CONTROLS,
    DEVICES,
    FAMILIES,
    key_of,
    planned_runs,
    variants_and_baselines,
)
from research.experiments.variants import FIRST, SCORE_ORDER, VARIANTS
from research.experiments.variants_page import ABOUT
from research.experiments.variants_page import findings as findings_of_variants

_, INDEX_ORDER, FRESH, FIXED, _, _ = MOD_CONTROLS
LEARNED = (SCORE_ORDER, INDEX_ORDER)
# Questions, and the controls that learned selection has to be better than for a yes.
QUESTIONS = {
    "Is learned selection better than channels that are not learned?": (FRESH, FIXED, FIRST),
    "Is it better than no block at all?": (REMOVED,),
}
EQUAL_TIME = "Is it better than plain networks of the same latency?"
EQUAL_TRAINING = "Is it better than plain networks of the same training time?"
# Other families: each label, and its baseline.
BASELINES_OF: dict[str, Mapping[str, str]] = {
    "variants": {label: variant.control for label, variant in VARIANTS.items()},
    "adn": {"ADN, super-net": PLAIN, "ADN, base-net": BASE_ALONE},
    "condconv": {"CondConv, 4 experts": PLAIN, "CondConv, 8 experts": PLAIN},
    "combinations": {
        "MoD + ADN, super-net": SCORE_ORDER,
        "MoD + ADN, base-net": "ADN, base-net",
        "MoD + CondConv, 4 experts": SCORE_ORDER,
        "CondConv, 4 experts + ADN, super-net": "CondConv, 4 experts",
        "CondConv, 4 experts + ADN, base-net": "ADN, base-net",
    },
}

# Families whose tables also have the network with blocks and the one without.
_BESIDE = ("variants", "sweep", "depth", "combinations")

_HEAD = """\
# {title}

{about} Written by `python -m research experiment {command} --page` from the rows in
[results](../results/README.md). {there}"""
_ABOUT = "CIFAR-10 accuracy, latency and training time of each method beside its controls."
_GO_ON = "The same command without `--page` runs what is missing."

_HOW_TO_READ = """\
## How to read it

{setting}

**Accuracy** is the test accuracy of the epoch with the best validation accuracy, as mean ± standard
deviation over seeds. Two networks are compared seed by seed on one device. From {fewest} seeds on, a 95 %
confidence interval of the mean difference (Student's t) is given; it holds for these test images and this
recipe. With so few seeds only large differences are significant, so "not significant" does not mean that
there is no difference. Intervals are not corrected for their number: of twenty independent comparisons
without any true difference, one is expected to look significant. A seed that ran on a CPU and on a GPU
counts once, with the GPU's accuracy.

**Latency** is that of networks as deployed: norms folded, Mixture-of-Depths blocks in the portable form
that suits the engine ("optimized" in [Latency](latency.md)). The ratio is to the plain network in the
same run, the median of ratios within a round, with the interquartile range in brackets. A **training
step** is forward, loss, backward and optimizer at the recipe's batch and precision. The duration of whole
runs stands in their rows only, because they ran in the background of other work.

**At equal time** the baseline is a straight line between two plain networks of different depth: the one
that takes a little less time and the one that takes a little more. The network without the blocks and the
plain network itself are among them. A ratio of times is uncertain by its interquartile range, at least by
1.5 points at batch 1 and by 3 points at larger batches. A network is better if it beats the line at the
longest time within this uncertainty, and beats each plain network that is no slower. It is worse if it
loses to the line at the shortest time. A network that is slower than the plain network is never better at
equal time; one that is faster than all plain networks is never worse."""


def write_evidence(
    name: str = "cifar10-controls",
    results: str | Path = "results",
    docs: str | Path = "docs",
    *,
    epochs: int | None = None,
) -> Path:
    """Write an experiment's page, and a figure for each network that has been run and timed.

    Args:
        name: of `research.experiments.EXPERIMENTS`, or ``cifar10-variants``.
        results: folder of the rows, ``NAME-DEVICE.csv`` and ``NAME-latency-DEVICE.csv``, which
            gets the figures.
        docs: folder that gets the page, ``evidence.md`` or ``variants.md``.
        epochs: of a rehearsal, whose page is ``evidence-N-epochs.md``; by default the experiment's.

    Returns:
        Path of the page.

    Raises:
        ValueError: no such experiment, no rows of it, two rows of one run, or a file holds other rows.
    """
    results, docs = Path(results), Path(docs)
    parts: list[Evidence] = []
    figures: dict[int, str] = {}
    sources = [CONTROLS, CLOSED] if name == CLOSED else [name]
    short = f"-{epochs}-epochs" if epochs else ""
    trained = [results / f"{source}-{device}.csv" for source in sources for device in DEVICES]
    scores = [score for path in trained for score in scores_in(path)]
    timed = [results / f"{name}-latency-{device}.csv" for device in DEVICES]
    times = [row for path in timed if path.exists() for row in read_rows(path)]
    if name == CLOSED:
        runs = everywhere = variants_and_baselines("cuda")
    else:
        # A GPU's plan has the networks of a CPU's, and more, which are told of only where they were run.
        everywhere, runs = (planned_runs(name, device, epochs=epochs) for device in DEVICES)
    for evidence in gather(runs, scores, times):
        if not evidence.scores and evidence.network not in {run.network for run in everywhere}:
            continue
        figure = results / f"{name}-{evidence.network}{short}.svg"
        if plot_evidence(evidence, figure):
            figures[len(parts)] = _link(figure, docs)
        parts.append(evidence)
    if not any(part.scores for part in parts):
        # An empty page in the place of a full one is a mistake in a folder's name.
        raise ValueError(
            f"no rows of {' or '.join(sources)} in {str(results)!r}; run it, or name their folder"
        )
    text = page(name, parts, figures, epochs=epochs)
    path = docs / f"{_title(name).lower()}{short}.md"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def page(
    name: str,
    parts: Sequence[Evidence],
    figures: Mapping[int, str] | None = None,
    epochs: int | None = None,
) -> str:
    """The page's text.

    Args:
        name: of the experiment.
        parts: what is known of each network.
        figures: links, by the number of the part.
        epochs: of a rehearsal.
    """
    closed = name == CLOSED
    find = findings_of_variants if closed else _findings
    command = f"{name} --epochs {epochs}" if epochs else name
    head = _HEAD.format(
        title=_title(name), about=ABOUT if closed else _ABOUT, command=command, there=_there(parts, closed)
    )
    lines = [head, ""]
    titles = [f" ({e.network})" if len(parts) > 1 else "" for e in parts]
    for number, (evidence, title) in enumerate(zip(parts, titles, strict=True)):
        lines += [f"## What the rows show{title}", "", *find(evidence), ""]
        if link := (figures or {}).get(number):
            lines += [f"![Accuracy against latency]({link})", ""]
    lines += [_HOW_TO_READ.format(setting="\n\n".join(map(_setting, parts)), fewest=FEWEST), ""]
    for evidence, title in zip(parts, titles, strict=True):
        for family, heading in FAMILIES.items():
            if labels := evidence.labels(family):
                lines += [f"## {heading}{title}", "", *_compared(evidence, family)]
                lines += [*_table(evidence, family, labels), ""]
    return "\n".join(lines).rstrip() + "\n"


def _title(name: str) -> str:
    return "Variants" if name == CLOSED else "Evidence"


def _link(figure: Path, docs: Path) -> str:
    return Path(os.path.relpath(figure, docs)).as_posix()


def _there(parts: Sequence[Evidence], closed: bool) -> str:
    """How much of the experiment the rows have."""
    told = []
    for evidence in parts:
        there = {key_of(s) for s in evidence.scores}
        done, total = sum(there.issuperset(run.keys) for run in evidence.planned), len(evidence.planned)
        some = f"{done} runs" if closed else f"**{done} of {total} runs**"
        told.append(f"{f'all {total} runs' if done == total else some} of {evidence.network}")
    more = "" if closed else f" {_GO_ON}"
    return f"There are rows of {' and of '.join(told)}. Missing runs are marked.{more}"


def _setting(evidence: Evidence) -> str:
    """What was run, and where."""
    recipe = evidence.planned[0].recipe
    seeds: dict[str, set[int]] = {}
    for run in evidence.planned:
        seeds.setdefault(run.family, set()).add(run.recipe.seed)
    single = [FAMILIES[family] for family, own in seeds.items() if len(own) == 1]
    told = [
        f"**{evidence.network} on {recipe.data}**: recipe `{recipe.name}`, {recipe.epochs} epochs, "
        f"{recipe.precision}, the same for all networks."
    ]
    if single:
        told.append(f"One seed is planned for: {'; '.join(single)}.")
    if trained := _origins(evidence.scores):
        told.append(f"Trained on {trained}.")
    if timed := _origins(evidence.times):
        threads = ", ".join(sorted({str(row.threads) for row in evidence.times if row.threads}))
        told.append(f"Timed on {timed}{f', threads {threads}' if threads else ''}.")
    return " ".join(told)


def _origins(rows: Iterable[Score | Measurement]) -> str:
    """Machines, versions and commits of rows, and how many rows each has."""
    found = Counter(
        ", ".join(
            filter(
                None,
                (
                    r.gpu or f"{r.cpu}, {r.cores} cores",
                    r.instructions,
                    f"torch {r.torch}" if r.torch else "",
                    f"commit {r.short_commit}" if r.commit else "",
                ),
            )
        )
        for r in rows
        if r.gpu or r.cpu
    )
    return "; ".join(f"{where} ({rows} row{'s' * (rows != 1)})" for where, rows in found.most_common())


def _findings(evidence: Evidence) -> list[str]:
    """The questions, each with its short answer and the comparisons behind it."""
    lines = []
    for question, controls in QUESTIONS.items():
        pairs = [(one, other, evidence.against(one, other)) for other in controls for one in LEARNED]
        lines += [f"**{question}** {answer([found.verdict for *_, found in pairs])}", ""]
        lines += [*(f"- {sentence(*pair)}" for pair in pairs), ""]
    lines += [
        *_equal_time(evidence, EQUAL_TIME, evidence.timings()),
        "",
        *_equal_time(evidence, EQUAL_TRAINING, evidence.timings(steps=True)),
        "",
    ]
    lines += _costs(evidence)
    return lines


def _equal_time(evidence: Evidence, question: str, timings: Iterable[Timing]) -> list[str]:
    """Learned selection against plain networks that take the same time."""
    rows, verdicts, why = [], [], []
    for timing in timings:
        for label in LEARNED:
            found = evidence.at_equal_time(label, timing)
            if found is None:
                verdicts.append(MISSING)
                why += untimed(evidence, label, timing)
                continue
            verdicts.append(found.verdict)
            figures = (f"{found.time:.3f}", found.line, str(found.found), found.verdict)
            rows.append((str(timing), label, *figures))
    if not rows:
        return [f"**{question}** {'; '.join(dict.fromkeys(why)) or f'Its times have {MISSING}'}."]
    text = ("engine and batch", "network", "baseline at this time", "verdict")
    engine, network, baseline, verdict = text
    headings = (engine, network, "time ratio", baseline, "difference, points (95 %)", verdict)
    return [f"**{question}** {answer(verdicts)}", "", markdown(headings, rows, text)]


def untimed(evidence: Evidence, label: str, timing: Timing) -> list[str]:
    """Which of the networks that a comparison at equal time needs has no time, and why."""
    return [
        f"{name} has no time in {timing}{f' ({why})' if why else ''}"
        for name in (label, REMOVED, PLAIN)
        if evidence.time(name, timing) is None
        for why in [evidence.failure(name, timing)]
    ]


def _costs(evidence: Evidence) -> list[str]:
    """Time of a training step with the blocks, on each device that was timed."""
    told = []
    for timing in evidence.timings(steps=True):
        own, bare = evidence.step(SCORE_ORDER, timing), evidence.step(REMOVED, timing)
        if own is None or bare is None or own.time_ratio is None or bare.time_ratio is None:
            continue
        if own.undecided or bare.undecided:
            told.append(f"{str(timing).capitalize()}: {MACHINE_BUSY}.")
            continue
        ratios = [with_spread(r.time_ratio, r.time_ratio_iqr or 0.0, 2) for r in (own, bare)]
        told.append(
            f"With {spoken(SCORE_ORDER)} it takes {ratios[0]} of the plain network's time, with the blocks "
            f"removed {ratios[1]} ({timing}, {own.dtype}, threads {own.threads})."
        )
    return [f"**How long does a training step take?** {' '.join(told) or f'Training steps: {MISSING}.'}"]


def _compared(evidence: Evidence, family: str) -> list[str]:
    """Sentences above a family's table."""
    pairs = [(a, b) for a, b in BASELINES_OF.get(family, {}).items() if a in evidence.labels(family)]
    if family == "sweep":
        first = [label for label in evidence.labels(family) if "original" not in label]
        pairs = [(f"{label}, original", label) for label in first]
        widest = next(label for label in reversed(evidence.labels(family)) if "original" in label)
        pairs.append((widest, SCORE_ORDER))
    if family == "depth":
        pairs = [(label, SCORE_ORDER) for label in evidence.labels(family)]
    lines = [f"- {sentence(a, b, evidence.against(a, b))}" for a, b in pairs]
    return [*lines, ""] if lines else []


def _alone(row: Measurement) -> str:
    """A ratio without its spread."""
    return with_spread(row.time_ratio, row.time_ratio_iqr, 2).partition(" (")[0]


def _table(evidence: Evidence, family: str, labels: Sequence[str]) -> list[str]:
    """A family's rows, below those of the plain network and of their baselines."""
    others = [PLAIN, *([SCORE_ORDER, REMOVED] if family in _BESIDE else [])]
    baselines = (label for label in BASELINES_OF.get(family, {}).values() if label not in labels)
    names = list(dict.fromkeys([*others, *baselines, *labels]))
    timings, steps = evidence.timings(), evidence.timings(steps=True)
    heading = ["network", "seeds", "test, %", f"against {PLAIN}, points (95 %)", "parameters", "MACs, M"]
    heading += [f"latency ratio, {timing}" for timing in timings]
    heading += [f"time ratio, {timing}" for timing in steps]
    body = []
    for label in names:
        rows = evidence.rows(label)
        accuracy = evidence.accuracy(label)
        cells = [label, str(len(rows)), mean_and_spread(accuracy.values()) if rows else MISSING]
        cells.append("" if label == PLAIN or not rows else str(evidence.against(label, PLAIN)))
        cells += [f"{rows[0].parameters:,}", f"{rows[0].macs / 1e6:.2f}"] if rows else ["", ""]
        for timing in timings:
            timed = evidence.time(label, timing)
            form = " plain form" if evidence.lacks_form(label, timing) else ""
            cells.append(
                evidence.failure(label, timing) and "failed"
                if timed is None
                else f"{with_spread(timed.time_ratio, timed.time_ratio_iqr or 0.0, 3)}{form}"
            )
        found = [evidence.step(label, timing) for timing in steps]
        cells += ["" if step is None else _alone(step) for step in found]
        body.append(cells)
    note = _chance(evidence, names)
    return [markdown(heading, body), *(["", note] if note else [])]


def _chance(evidence: Evidence, names: Sequence[str]) -> str:
    """By how much single runs differ by chance; empty where there are none, or nobody can say."""
    accuracies = [list(evidence.accuracy(name).values()) for name in names]
    several = [a for a in accuracies if len(a) >= FEWEST]
    freedom = sum(len(a) - 1 for a in several)
    if freedom < 4 or all(len(a) != 1 for a in accuracies):
        return ""
    pooled = math.sqrt(sum((len(a) - 1) * statistics.variance(a) for a in several) / freedom)
    return (
        f"The standard deviation over seeds is {pooled:.2f} points (pooled over {len(several)} networks). "
        f"So the difference of two single runs has a standard deviation of {math.sqrt(2) * pooled:.2f} "
        f"points by chance alone."
    )
