"""The page that says what the rows of an experiment show, made from the rows alone."""

from __future__ import annotations

import os
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from pliant._files import atomic_path
from pliant.compare import BASE_ALONE, MOD_CONTROLS, PLAIN, REMOVED
from pliant.experiments.cells import BORROWED, FAMILIES, cells_of, key_of, rivals_of
from pliant.experiments.claims import MISSING, answer, mean_and_spread, sentence
from pliant.experiments.evidence import Evidence, gather
from pliant.experiments.figure import plot_evidence
from pliant.experiments.tables import markdown
from pliant.experiments.variants import FIRST, SCORE_ORDER, VARIANTS
from pliant.experiments.variants_page import findings as findings_of_variants
from pliant.experiments.walking import scores_in
from pliant.measuring.rows import read_rows

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

Written by `pliant experiment {name} --page` from the rows in [results](../results/README.md), its
sentences too. What is missing is said to be missing; the same command without `--page` goes on
running it."""

_HOW_TO_READ = """\
## How to read it

{setting}

Accuracy is that of the best validation epoch, tested once, as mean ± standard deviation over seeds.
Two networks are compared seed by seed; the interval is Student's, of the mean of these differences, at
95 %, and holds for these test images and this recipe. Intervals are not corrected for their number: of
twenty comparisons without any true difference, one is expected to look decided.

Latency is that of networks as deployed (norms folded, Mixture-of-Depths blocks in the form that suits
the engine), as the ratio to the plain network, the median of ratios within a round, its interquartile range
in brackets; differences under 1.5 points (batch 1) or 3 points (larger batches) mean nothing. A training
step is forward, loss, backward and optimiser at the recipe's batch and precision. How long the runs took
stands in their rows only: they ran in the background of other work."""


def write_evidence(
    name: str = "cifar10-controls",
    results: str | Path = "results",
    docs: str | Path = "docs",
    *,
    epochs: int | None = None,
) -> Path:
    """Write an experiment's page, and a figure for each network that has been run and timed.

    Args:
        name: of `pliant.experiments.EXPERIMENTS`.
        results: folder of the rows, ``NAME-DEVICE.csv`` and ``NAME-latency-DEVICE.csv``, which
            gets the figures.
        docs: folder that gets the page, ``evidence.md`` or ``variants.md``.
        epochs: of a rehearsal; by default the experiment's.

    Returns:
        Path of the page.

    Raises:
        ValueError: no such experiment, or a file holds other rows.
    """
    results, docs = Path(results), Path(docs)
    parts: list[Evidence] = []
    figures: dict[int, str] = {}
    # What borrows has one list of cells, for the CPU.
    for device in ("cpu",) if name in BORROWED else ("cpu", "cuda"):
        scores = [
            score
            for source in (BORROWED.get(name, ("",))[0], name)
            if source
            for score in scores_in(results / f"{source}-{device}.csv")
        ]
        timed = results / f"{name}-latency-{device}.csv"
        times = read_rows(timed) if timed.exists() else []
        cells = [*rivals_of(name, device, epochs=epochs), *cells_of(name, device, epochs=epochs)]
        for evidence in gather(cells, scores, times, device):
            if not evidence.scores and device == "cuda":
                continue  # a second device is told of only where it was used
            figure = results / f"{name}-{evidence.network}-{device}.svg"
            if plot_evidence(evidence, figure):
                figures[len(parts)] = _link(figure, docs)
            parts.append(evidence)
    text = page(name, parts, figures)
    path = docs / f"{_title(name).lower()}.md"
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return path


def page(name: str, parts: Sequence[Evidence], figures: Mapping[int, str] | None = None) -> str:
    """The page's text.

    Args:
        name: of the experiment.
        parts: what is known of each network.
        figures: links, by the number of the part.
    """
    find = findings_of_variants if name in BORROWED else _findings
    lines = [_HEAD.format(name=name, title=_title(name)), ""]
    titles = [f" ({e.network}, {e.device})" if len(parts) > 1 else "" for e in parts]
    for number, (evidence, title) in enumerate(zip(parts, titles, strict=True)):
        lines += [f"## What the rows show{title}", "", *find(evidence), ""]
        if link := (figures or {}).get(number):
            lines += [f"![Accuracy against latency]({link})", ""]
    lines += [_HOW_TO_READ.format(setting="\n\n".join(map(_setting, parts))), ""]
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


def _setting(evidence: Evidence) -> str:
    """What was run, how much of it is there, and where."""
    keys = [cell.keys for cell in evidence.cells]
    there = {key_of(s) for s in evidence.scores}
    done = sum(there.issuperset(k) for k in keys)
    recipe = evidence.cells[0].recipe
    machines = sorted({s.gpu or f"{s.cpu}, {s.cores} cores" for s in evidence.scores})
    commits = sorted(
        {s.commit[:12] + "-dirty" * s.commit.endswith("-dirty") for s in evidence.scores} - {""}
    )
    told = [
        f"**{evidence.network} on {recipe.data}**: recipe `{recipe.name}`, {recipe.epochs} epochs, "
        f"{recipe.precision}, the same for all networks; {done} of {len(keys)} runs are there."
    ]
    if machines:
        by = f", commit {', '.join(commits)}" if commits else ""
        told.append(f"Trained on {'; '.join(machines)}{by}.")
    return " ".join(told)


def _findings(evidence: Evidence) -> list[str]:
    """The questions, each with its short answer and what it rests on."""
    lines = []
    for question, rivals in QUESTIONS.items():
        pairs = [(one, other, evidence.against(one, other)) for other in rivals for one in LEARNED]
        lines += [f"**{question}** {answer([found.verdict for *_, found in pairs])}", ""]
        lines += [*(f"- {sentence(*pair)}" for pair in pairs), ""]
    lines += [
        "What a network's time buys without it is the straight line between the network without the "
        "blocks and the plain one: more blocks, more time.",
        "",
        *_equal_time(evidence, EQUAL_TIME, evidence.settings()),
        "",
        *_equal_time(evidence, EQUAL_TRAINING, evidence.settings(steps=True)),
        "",
    ]
    lines += _costs(evidence)
    return lines


def _equal_time(evidence: Evidence, question: str, settings: Iterable[tuple[str, int]]) -> list[str]:
    """Learned selection against the line between no block and the plain network."""
    rows, verdicts = [], []
    for engine, batch in settings:
        for label in LEARNED:
            found = evidence.at_equal_time(label, engine, batch)
            if found is None:
                continue
            if found.share == 0:
                rival = f"{REMOVED}, which is not faster"
            elif found.share == 1:
                rival = f"{PLAIN}, which is not slower"
            else:
                rival = f"{1 - found.share:.2f} {REMOVED} + {found.share:.2f} {PLAIN}"
            verdicts.append(found.found.verdict)
            rows.append((f"{engine}, batch {batch}", label, f"{found.time:.3f}", rival, str(found.found)))
    if not rows:
        return [f"**{question}** Its times have {MISSING}."]
    return [
        f"**{question}** {answer(verdicts)}",
        "",
        *markdown(
            ("setting", "network", "time ratio", "rival at this time", "difference, points (95 %)"), rows
        ),
    ]


def _costs(evidence: Evidence) -> list[str]:
    """What the blocks cost in training."""
    own, bare = evidence.step(SCORE_ORDER), evidence.step(REMOVED)
    if own is None or bare is None or own.time_ratio is None or bare.time_ratio is None:
        return [f"**What does a training step cost?** Training steps: {MISSING}."]
    word = "longer than" if own.time_ratio > 1 else "no longer than"
    return [
        f"**What does a training step cost?** With {SCORE_ORDER} it takes {word} the plain network's: "
        f"{own.time_ratio:.2f} of its time; without the blocks {bare.time_ratio:.2f} "
        f"(batch {own.batch}, {own.dtype}, {own.threads} threads)."
    ]


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
    settings = evidence.settings()
    heading = ["network", "seeds", "test, %", f"against {PLAIN}, points (95 %)", "parameters", "MACs, M"]
    heading += [f"latency ratio, {engine}, batch {batch}" for engine, batch in settings]
    heading += ["training step, ratio"]
    body = []
    for label in names:
        rows = evidence.rows(label)
        accuracy = evidence.accuracy(label)
        cells = [label, str(len(rows)), mean_and_spread(accuracy.values()) if rows else MISSING]
        cells.append("" if label == PLAIN or not rows else str(evidence.against(label, PLAIN)))
        cells += [f"{rows[0].parameters:,}", f"{rows[0].macs / 1e6:.2f}"] if rows else ["", ""]
        for engine, batch in settings:
            timed = evidence.time(label, engine, batch)
            cells.append(
                "" if timed is None else f"{timed.time_ratio:.3f} ({timed.time_ratio_iqr or 0:.3f})"
            )
        step = evidence.step(label)
        cells.append("" if step is None else f"{step.time_ratio:.2f}")
        body.append(cells)
    spreads = [statistics.stdev(a.values()) for n in names if len(a := evidence.accuracy(n)) > 1]
    if not spreads or all(len(evidence.rows(n)) != 1 for n in names):
        return markdown(heading, body)
    note = f"Seeds of one network spread by up to {max(spreads):.2f} points here (standard deviation)."
    return [
        *markdown(heading, body),
        "",
        f"{note} Where there is one seed, hold its difference against that.",
    ]
