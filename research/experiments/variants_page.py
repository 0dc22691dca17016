"""What the rows show of the variants: each against plain networks of the same time.

The best of many is partly luck. So the first seed chose, by images that no verdict is taken from, and
has no part in what the next seeds decide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from pliant.methods.mixture_of_depths.recipes import REMOVED
from pliant.records import percent
from pliant.tables import markdown
from research.experiments.claims import FEWEST, MISSING, any_of
from research.experiments.evidence import Evidence, Timing
from research.experiments.variants import VARIANTS

ABOUT = (
    "Variants of the Mixture-of-Depths block, a closed study: which were tried, and whether one is better "
    "than plain networks of the same latency."
)
QUESTION = "Is a variant better than plain networks of the same latency?"
TRAINING = "Is a variant better than plain networks of the same training time?"
CHOOSING = 0  # the seed that chose
_LUCK = (
    "The best of many is partly luck. So the validation images of the first seed ranked the variants, and "
    "only further seeds, which the first ranks got, give verdicts."
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
        *_at_equal_time(evidence, QUESTION, evidence.timings()),
        "",
        *_at_equal_time(evidence, TRAINING, evidence.timings(steps=True)),
        "",
        _PLAIN_FORM,
        "",
        _seeds(evidence),
        "",
        _choice(evidence),
        "",
        "What was tried, and why:",
        "",
        *(f"- **{label}** (`{_options(v.options)}`): {v.why}." for label, v in VARIANTS.items()),
        "",
        _GONE.format("; ".join(label for label, v in VARIANTS.items() if v.gone)),
    ]


def ranked(accuracy: Mapping[str, float]) -> list[str]:
    """Labels of variants, the highest accuracy first. Those that select nothing are controls, without rank.

    Args:
        accuracy: of the seed that chose, on validation images in percent, by label.

    Example:
        >>> ranked({"static": 86.5, "temperature": 86.9, "separable, first k": 87.0})
        ['temperature', 'static']
    """
    learned = [label for label, variant in VARIANTS.items() if variant.selects and label in accuracy]
    return sorted(learned, key=lambda label: -accuracy[label])


def _decided(evidence: Evidence) -> list[str]:
    """Variants that have rows of seeds after the first."""
    deciding = evidence.without(CHOOSING)
    return [label for label in VARIANTS if deciding.rows(label)]


def _seeds(evidence: Evidence) -> str:
    """How many seeds the variants have, and which have the first alone."""
    run = Counter(len(evidence.accuracy(label)) for label in VARIANTS)
    counts = (f"{many} with {seeds} seed{'s' * (seeds != 1)}" for seeds, many in sorted(run.items()))
    decided = _decided(evidence)
    rest = [label for label in VARIANTS if label not in decided]
    told = f"Variants by their number of seeds: {', '.join(counts)}. {_LUCK}"
    return f"{told} The first seed alone have: {'; '.join(rest)}." if decided and rest else told


def _choice(evidence: Evidence) -> str:
    """The validation accuracy that chose, as a table; variants that select nothing are marked."""
    labels = (*evidence.depths, *VARIANTS)
    accuracies = {
        label: percent(row.val_accuracy)
        for label in labels
        for row in evidence.rows(label)
        if row.seed == CHOOSING
    }
    ranks = ranked(accuracies)
    rows = []
    for label in labels:
        own = label if label not in VARIANTS or VARIANTS[label].selects else f"{label} (selects nothing)"
        accuracy = f"{accuracies[label]:.2f}" if label in accuracies else MISSING
        rank = str(ranks.index(label) + 1) if label in ranks else ""
        rows.append((own, accuracy, rank, *(_ratio(evidence, label, t) for t in evidence.timings())))
    heading = (
        f"validation of seed {CHOOSING}, %",
        "rank",
        *(f"time ratio, {timing}" for timing in evidence.timings()),
    )
    return markdown(("network", *heading), rows)


def _ratio(evidence: Evidence, label: str, timing: Timing) -> str:
    row = evidence.time(label, timing)
    return "" if row is None else f"{row.time_ratio:.3f}"


def _at_equal_time(evidence: Evidence, question: str, timings: list[Timing]) -> list[str]:
    """Each variant against plain networks of all depths, in each timing."""
    deciding = evidence.without(CHOOSING)
    rows = []
    verdicts: dict[str, list[str]] = {}
    for label in _decided(evidence):
        cells, own = [], []
        for timing in timings:
            found = deciding.at_equal_time(label, timing)
            said = f": {found.verdict}" if found and found.found.n >= FEWEST else ""
            cells.append(
                "" if found is None else f"{found.found} at {found.time:.3f} against {found.line}{said}"
            )
            own.append(MISSING if found is None else found.verdict)
        if VARIANTS[label].selects:
            verdicts[label] = own
        rows.append((label, str(deciding.against(label, REMOVED)), *cells))
    if all(verdict == MISSING for own in verdicts.values() for verdict in own):
        return [f"**{question}** {_nothing(deciding, timings)}"]
    headings = [str(timing) for timing in timings]
    return [
        f"**{question}** {any_of(verdicts)}",
        "",
        f"Variants with seeds after seed {CHOOSING}, and differences of these seeds in points (95 %). The "
        "baseline is the line between plain networks at the variant's time ratio. Variants that select "
        "nothing are not counted above.",
        "",
        markdown(("variant", f"against {REMOVED}", *headings), rows),
    ]


def _nothing(deciding: Evidence, timings: list[Timing]) -> str:
    """Why there is no verdict at all."""
    timed = any(deciding.time(label, timing) for label in VARIANTS for timing in timings)
    seeds = f"The seeds that decide have {MISSING}."
    return seeds if timed else f"Its times have {MISSING}."


def _options(options: Mapping[str, Any]) -> str:
    """Options as keywords."""
    return ", ".join(f"{k}={tuple(v) if isinstance(v, list) else v!r}" for k, v in options.items())
