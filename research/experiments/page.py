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
from research.experiments.cells import BORROWED, DEVICES, FAMILIES, cells_of, key_of, rivals_of
from research.experiments.claims import FEWEST, MISSING, answer, mean_and_spread, sentence
from research.experiments.evidence import Evidence, Setting, gather
from research.experiments.figure import plot_evidence
from research.experiments.tables import markdown
from research.experiments.variants import FIRST, SCORE_ORDER, VARIANTS
from research.experiments.variants_page import findings as findings_of_variants
from research.experiments.variants_page import how_to_go_on, planned
from research.experiments.walking import scores_in

_, INDEX_ORDER, FRESH, FIXED, _, _ = MOD_CONTROLS
LEARNED = (SCORE_ORDER, INDEX_ORDER)
# Questions, and the rivals that learned selection has to beat for a yes.
QUESTIONS = {
    "Does learned selection beat channels that are not learned?": (FRESH, FIXED, FIRST),
    "Does it beat no block at all?": (REMOVED,),
}
EQUAL_TIME = "Does it beat no block at all at equal measured time?"
EQUAL_TRAINING = "And at equal time of a training step?"
# Other families: each label, and what it is held against.
HELD_AGAINST: dict[str, Mapping[str, str]] = {
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

# Families whose tables have the two ends of the question too.
_BESIDE = ("variants", "sweep", "depth", "combinations")

_HEAD = """\
# {title}

Written by `pliant experiment {command} --page` from the rows in [results](../results/README.md), its
sentences too. {there} What is missing is said to be missing; {more}"""

_HOW_TO_READ = """\
## How to read it

{setting}

Accuracy is that of the best validation epoch, tested once, as mean ± standard deviation over seeds.
Two networks are compared seed by seed on one device, from {fewest} seeds on; the interval is Student's, of
the mean of these differences, at 95 %, and holds for these test images and this recipe. So few seeds show
large differences only: what is not shown is not shown to be nothing. Intervals are not corrected for their
number: of twenty independent comparisons without any true difference, one is expected to look decided.
A seed that was run on a CPU and on a GPU counts once, as the GPU's.

Latency is that of networks as deployed (norms folded, Mixture-of-Depths blocks in the portable form that
suits the engine: "optimized" in [Latency](latency.md)), as the ratio to the plain network in the same run,
the median of ratios within a round, its interquartile range in brackets. A training step is forward, loss,
backward and optimiser at the recipe's batch and precision. How long the runs took stands in their rows
only: they ran in the background of other work.

At equal time a network is held against plain networks of all depths, that without the blocks and the whole
one among them: against the straight line between the two that take a little less and a little more time. A
ratio of times is taken to be off by its interquartile range, by 1.5 points at least at batch 1 and by 3 at
larger batches. A network is called better if it beats the line at the longest time that this leaves, and
each plain network that is no slower; worse if it loses to the line at the shortest; what is slower than the
plain network is not better at equal time, whatever it reaches, and what is faster than all of them is not
worse."""


def write_evidence(
    name: str = "cifar10-controls",
    results: str | Path = "results",
    docs: str | Path = "docs",
    *,
    epochs: int | None = None,
) -> Path:
    """Write an experiment's page, and a figure for each network that has been run and timed.

    Args:
        name: of `research.experiments.EXPERIMENTS`.
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
    sources = [source for source in (BORROWED.get(name, ("",))[0], name) if source]
    short = f"-{epochs}-epochs" if epochs else ""
    trained = [results / f"{source}-{device}.csv" for source in sources for device in DEVICES]
    scores = [score for path in trained for score in scores_in(path)]
    timed = [results / f"{name}-latency-{device}.csv" for device in DEVICES]
    times = [row for path in timed if path.exists() for row in read_rows(path)]
    # A GPU's list has the networks of a CPU's, and more: told of only where they were run.
    everywhere = {cell.network for cell in cells_of(name, "cpu")}
    cells = [*rivals_of(name, "cuda", epochs=epochs), *cells_of(name, "cuda", epochs=epochs, gone=True)]
    for evidence in gather(cells, scores, times):
        if not evidence.scores and evidence.network not in everywhere:
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
    of_variants = name in BORROWED
    find = findings_of_variants if of_variants else _findings
    command = f"{name} --epochs {epochs}" if epochs else name
    more = how_to_go_on(command) if of_variants else "the same command without `--page` goes on running it."
    lines = [
        _HEAD.format(command=command, title=_title(name), there=_there(parts, of_variants), more=more),
        "",
    ]
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
    return "Variants" if name in BORROWED else "Evidence"


def _link(figure: Path, docs: Path) -> str:
    return Path(os.path.relpath(figure, docs)).as_posix()


def _there(parts: Sequence[Evidence], of_variants: bool) -> str:
    """How much of the experiment the rows have."""
    told = []
    for evidence in parts:
        there = {key_of(s) for s in evidence.scores}
        cells = planned(evidence) if of_variants else evidence.cells
        done, total = sum(there.issuperset(c.keys) for c in cells), len(cells)
        runs = f"all {total} runs" if done == total else f"**{done} of {total} runs**"
        told.append(f"{runs} of {evidence.network}")
    further = " Further seeds count for variants that have begun them." if of_variants else ""
    return f"There are rows of {' and of '.join(told)}.{further}"


def _setting(evidence: Evidence) -> str:
    """What was run, and where."""
    recipe = evidence.cells[0].recipe
    seeds: dict[str, set[int]] = {}
    for cell in evidence.cells:
        seeds.setdefault(cell.family, set()).add(cell.recipe.seed)
    single = [FAMILIES[family] for family, own in seeds.items() if len(own) == 1]
    told = [
        f"**{evidence.network} on {recipe.data}**: recipe `{recipe.name}`, {recipe.epochs} epochs, "
        f"{recipe.precision}, the same for all networks."
    ]
    if single:
        told.append(f"One seed is all that is planned under: {'; '.join(single)}.")
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
    """The questions, each with its short answer and what it rests on."""
    lines = []
    for question, rivals in QUESTIONS.items():
        pairs = [(one, other, evidence.against(one, other)) for other in rivals for one in LEARNED]
        lines += [f"**{question}** {answer([found.verdict for *_, found in pairs])}", ""]
        lines += [*(f"- {sentence(*pair)}" for pair in pairs), ""]
    lines += [
        *_equal_time(evidence, EQUAL_TIME, evidence.settings()),
        "",
        *_equal_time(evidence, EQUAL_TRAINING, evidence.settings(steps=True)),
        "",
    ]
    lines += _costs(evidence)
    return lines


def _equal_time(evidence: Evidence, question: str, settings: Iterable[Setting]) -> list[str]:
    """Learned selection against what its time buys in plain networks."""
    rows, verdicts, why = [], [], []
    for setting in settings:
        for label in LEARNED:
            found = evidence.at_equal_time(label, setting)
            if found is None:
                verdicts.append(MISSING)
                why += untimed(evidence, label, setting)
                continue
            verdicts.append(found.verdict)
            figures = (f"{found.time:.3f}", found.line, str(found.found), found.verdict)
            rows.append((str(setting), label, *figures))
    if not rows:
        return [f"**{question}** {'; '.join(dict.fromkeys(why)) or f'Its times have {MISSING}'}."]
    heading = (
        "setting",
        "network",
        "time ratio",
        "rival at this time",
        "difference, points (95 %)",
        "verdict",
    )
    return [f"**{question}** {answer(verdicts)}", "", *markdown(heading, rows)]


def untimed(evidence: Evidence, label: str, setting: Setting) -> list[str]:
    """Which of the networks that a comparison at equal time needs has no time, and why."""
    return [
        f"{name} has no time in {setting}{f' ({why})' if why else ''}"
        for name in (label, REMOVED, PLAIN)
        if evidence.time(name, setting) is None
        for why in [evidence.failure(name, setting)]
    ]


def _costs(evidence: Evidence) -> list[str]:
    """What the blocks cost in training, on each device that was timed."""
    told = []
    for setting in evidence.settings(steps=True):
        own, bare = evidence.step(SCORE_ORDER, setting), evidence.step(REMOVED, setting)
        if own is None or bare is None or own.time_ratio is None or bare.time_ratio is None:
            continue
        over = own.time_ratio - 1
        close = abs(over) <= evidence.margin(SCORE_ORDER, setting)
        word = "as long as" if close else "longer than" if over > 0 else "less long than"
        spreads = [f"{r.time_ratio:.2f} ({r.time_ratio_iqr or 0:.2f})" for r in (own, bare)]
        told.append(
            f"With {SCORE_ORDER} it takes {word} the plain network's: {spreads[0]} of its time; without "
            f"the blocks {spreads[1]} ({setting}, {own.dtype}, threads {own.threads})."
        )
    return [f"**What does a training step cost?** {' '.join(told) or f'Training steps: {MISSING}.'}"]


def _compared(evidence: Evidence, family: str) -> list[str]:
    """Sentences above a family's table."""
    pairs = [(a, b) for a, b in HELD_AGAINST.get(family, {}).items() if a in evidence.labels(family)]
    if family == "sweep":
        first = [label for label in evidence.labels(family) if "original" not in label]
        pairs = [(f"{label}, original", label) for label in first]
        widest = next(label for label in reversed(evidence.labels(family)) if "original" in label)
        pairs.append((widest, SCORE_ORDER))
    if family == "depth":
        pairs = [(label, SCORE_ORDER) for label in evidence.labels(family)]
    lines = [f"- {sentence(a, b, evidence.against(a, b))}" for a, b in pairs]
    return [*lines, ""] if lines else []


def _table(evidence: Evidence, family: str, labels: Sequence[str]) -> list[str]:
    """A family's rows, below the plain network's and those that they are held against."""
    others = [PLAIN, *([SCORE_ORDER, REMOVED] if family in _BESIDE else [])]
    held = (label for label in HELD_AGAINST.get(family, {}).values() if label not in labels)
    names = list(dict.fromkeys([*others, *held, *labels]))
    settings, steps = evidence.settings(), evidence.settings(steps=True)
    heading = ["network", "seeds", "test, %", f"against {PLAIN}, points (95 %)", "parameters", "MACs, M"]
    heading += [f"latency ratio, {setting}" for setting in settings]
    heading += [f"time ratio, {setting}" for setting in steps]
    body = []
    for label in names:
        rows = evidence.rows(label)
        accuracy = evidence.accuracy(label)
        cells = [label, str(len(rows)), mean_and_spread(accuracy.values()) if rows else MISSING]
        cells.append("" if label == PLAIN or not rows else str(evidence.against(label, PLAIN)))
        cells += [f"{rows[0].parameters:,}", f"{rows[0].macs / 1e6:.2f}"] if rows else ["", ""]
        for setting in settings:
            timed = evidence.time(label, setting)
            form = " plain form" if evidence.formless(label, setting) else ""
            cells.append(
                evidence.failure(label, setting) and "failed"
                if timed is None
                else f"{timed.time_ratio:.3f} ({timed.time_ratio_iqr or 0:.3f}){form}"
            )
        found = [evidence.step(label, setting) for setting in steps]
        cells += ["" if step is None else f"{step.time_ratio:.2f}" for step in found]
        body.append(cells)
    note = _chance(evidence, names)
    return [*markdown(heading, body), *(["", note] if note else [])]


def _chance(evidence: Evidence, names: Sequence[str]) -> str:
    """What to hold a difference of single runs against; empty where there are none, or nobody can say."""
    accuracies = [list(evidence.accuracy(name).values()) for name in names]
    several = [a for a in accuracies if len(a) >= FEWEST]
    freedom = sum(len(a) - 1 for a in several)
    if freedom < 4 or all(len(a) != 1 for a in accuracies):
        return ""
    pooled = math.sqrt(sum((len(a) - 1) * statistics.variance(a) for a in several) / freedom)
    return (
        f"Seeds of one network spread by {pooled:.2f} points here (standard deviation, pooled over "
        f"{len(several)} networks). So a difference of two single runs spreads by "
        f"{math.sqrt(2) * pooled:.2f} points by chance alone; hold it against that where there is one seed."
    )
