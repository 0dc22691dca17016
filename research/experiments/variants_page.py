"""What the rows show of the variants: each against no block, at equal measured time."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from pliant.methods.mixture_of_depths.recipes import REMOVED
from research.experiments.cells import BORROWED, Cell, key_of
from research.experiments.choosing import CHOOSING, EXPERIMENT, ranked, validated
from research.experiments.claims import FEWEST, MISSING, any_of
from research.experiments.evidence import Evidence, Setting
from research.experiments.tables import markdown
from research.experiments.variants import VARIANTS

QUESTION = "Does a variant beat no block at all at equal measured time?"
TRAINING = "And at equal time of a training step?"
_LUCK = (
    "The best of many is partly luck. So the first seed, and its validation images, rank the variants "
    "(`--chosen N` runs further seeds of the first N), and only the seeds after it decide."
)
_PLAIN_FORM = (
    'Variants with `selector_bias`, `share_selection`, `selection="static"`, `core="separable"` or '
    "`inner_shortcut` had no native operators and ran in those of PyTorch, in a training step also those "
    "with `gate` or `straight_through`: their time in eager mode and in a training step is longer for it. "
    "Files of ONNX Runtime had all variants."
)
_GONE = (
    "The code of these variants was removed, because they were not shown to be better than no block. It is "
    "at the git tag `before-house`: {}."
)


def findings(evidence: Evidence) -> list[str]:
    """Question by question: a short answer, and a row for each variant."""
    return [
        *_at_equal_time(evidence, QUESTION, evidence.settings()),
        "",
        *_at_equal_time(evidence, TRAINING, evidence.settings(steps=True)),
        "",
        _PLAIN_FORM,
        "",
        *_seeds(evidence),
        "",
        *_choice(evidence),
        "",
        "What was tried, and why:",
        "",
        *(f"- **{label}** (`{_options(v.options)}`): {v.why}." for label, v in VARIANTS.items()),
        "",
        _GONE.format("; ".join(label for label, v in VARIANTS.items() if v.gone)),
    ]


def planned(evidence: Evidence) -> list[Cell]:
    """The cells that have run or are to be run.

    Of variants that have begun no further seed that is the first alone, and of those whose code is gone
    what has run.
    """
    rest = VARIANTS.keys() - set(_begun(evidence))
    there = {key_of(score) for score in evidence.scores}
    return [
        cell
        for cell in evidence.cells
        if there.issuperset(cell.keys)
        or (
            not (cell.label in VARIANTS and VARIANTS[cell.label].gone)
            and (cell.recipe.seed == CHOOSING or cell.label not in rest)
        )
    ]


def how_to_go_on(command: str) -> str:
    """Which commands run what is missing; `command` is that of the experiment."""
    rivals, _ = BORROWED[EXPERIMENT]
    return (
        f"`pliant experiment {command} --seeds 1` goes on running the first seeds, `--chosen N` further "
        f"ones, and `{rivals}` in its place the plain networks and controls."
    )


def _begun(evidence: Evidence) -> list[str]:
    """Variants that have rows of seeds that decide."""
    deciding = evidence.without(CHOOSING)
    return [label for label in VARIANTS if deciding.rows(label)]


def _seeds(evidence: Evidence) -> list[str]:
    """How many seeds the variants have been run with, and which have none that decides."""
    run = Counter(len(evidence.accuracy(label)) for label in VARIANTS)
    counts = (f"{many} with {seeds} seed{'s' * (seeds != 1)}" for seeds, many in sorted(run.items()))
    told = [f"Variants by the seeds that have rows: {', '.join(counts)}. {_LUCK}"]
    if begun := _begun(evidence):
        rest = [label for label in VARIANTS if label not in begun]
        told += ["", f"Without a seed that decides: {'; '.join(rest) or 'none'}."]
    return told


def _choice(evidence: Evidence) -> list[str]:
    """What chooses: the first seed, on validation images; what selects nothing is marked."""
    labels = (*evidence.depths, *VARIANTS)
    accuracies = validated(evidence)
    ranks = ranked(accuracies)
    rows = []
    for label in labels:
        own = label if label not in VARIANTS or VARIANTS[label].selects else f"{label} (selects nothing)"
        accuracy = f"{accuracies[label]:.2f}" if label in accuracies else MISSING
        rank = str(ranks.index(label) + 1) if label in ranks else ""
        rows.append((own, accuracy, rank, *(_ratio(evidence, label, s) for s in evidence.settings())))
    heading = (
        f"validation of seed {CHOOSING}, %",
        "rank",
        *(f"time, {setting}" for setting in evidence.settings()),
    )
    return markdown(("network", *heading), rows)


def _ratio(evidence: Evidence, label: str, setting: Setting) -> str:
    row = evidence.time(label, setting)
    return "" if row is None else f"{row.time_ratio:.3f}"


def _at_equal_time(evidence: Evidence, question: str, settings: list[Setting]) -> list[str]:
    """Each variant against plain networks of all depths, in each setting."""
    deciding = evidence.without(CHOOSING)
    rows = []
    verdicts: dict[str, list[str]] = {}
    for label in _begun(evidence):
        cells, own = [], []
        for setting in settings:
            found = deciding.at_equal_time(label, setting)
            said = f": {found.verdict}" if found and found.found.n >= FEWEST else ""
            cells.append(
                "" if found is None else f"{found.found} at {found.time:.3f} against {found.line}{said}"
            )
            own.append(MISSING if found is None else found.verdict)
        if VARIANTS[label].selects:
            verdicts[label] = own
        rows.append((label, str(deciding.against(label, REMOVED)), *cells))
    if all(verdict == MISSING for own in verdicts.values() for verdict in own):
        return [f"**{question}** {_nothing(deciding, settings)}"]
    headings = [str(setting) for setting in settings]
    return [
        f"**{question}** {any_of(verdicts)}",
        "",
        f"Variants that have seeds after seed {CHOOSING}; differences in points (95 %) of these seeds to "
        "the line between plain networks at the variant's ratio of time to the plain network's. Those that "
        "select nothing are not counted above.",
        "",
        *markdown(("variant", f"against {REMOVED}", *headings), rows),
    ]


def _nothing(deciding: Evidence, settings: list[Setting]) -> str:
    """Why there is no verdict at all."""
    timed = any(deciding.time(label, setting) for label in VARIANTS for setting in settings)
    seeds = f"The seeds that decide have {MISSING}."
    return seeds if timed else f"Its times have {MISSING}."


def _options(options: Mapping[str, Any]) -> str:
    """Options as keywords."""
    return ", ".join(f"{k}={tuple(v) if isinstance(v, list) else v!r}" for k, v in options.items())
