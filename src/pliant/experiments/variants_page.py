"""What the rows show of the variants: each against no block, at equal measured time."""

from __future__ import annotations

from collections import Counter

from pliant.compare import REMOVED
from pliant.experiments.claims import MISSING, answer
from pliant.experiments.evidence import Evidence
from pliant.experiments.tables import markdown
from pliant.experiments.variants import VARIANTS

QUESTION = "Does a variant beat no block at all at equal measured time?"
TRAINING = "And at equal time of a training step?"
_LUCK = (
    "The best of many is partly luck: where its first seed chose a variant for further ones, what those "
    "say of it weighs more."
)


def findings(evidence: Evidence) -> list[str]:
    """Question by question: a short answer, and a row for each variant."""
    return [
        *_at_equal_time(evidence, QUESTION, evidence.settings()),
        "",
        *_at_equal_time(evidence, TRAINING, evidence.settings(steps=True)),
        "",
        _seeds(evidence),
        "",
        "What was tried, and why:",
        "",
        *(f"- **{label}** (`{_options(v.options)}`): {v.why}." for label, v in VARIANTS.items()),
    ]


def _seeds(evidence: Evidence) -> str:
    """How many seeds the variants have been run with."""
    run = Counter(len(evidence.accuracy(label)) for label in VARIANTS)
    counts = (f"{many} with {seeds} seed{'s' * (seeds != 1)}" for seeds, many in sorted(run.items()))
    return f"Variants by the seeds that have rows: {', '.join(counts)}. {_LUCK}"


def _at_equal_time(evidence: Evidence, question: str, settings: list[tuple[str, int]]) -> list[str]:
    """Each variant against the line between no block and the plain network, in each setting."""
    rows, verdicts = [], []
    for label, variant in VARIANTS.items():
        cells = []
        for engine, batch in settings:
            found = evidence.at_equal_time(label, engine, batch)
            cells.append("" if found is None else f"{found.found} at {found.time:.3f}")
            if found is not None and variant.selects:
                verdicts.append(found.found.verdict)
        rows.append((label, str(evidence.against(label, REMOVED)), *cells))
    if not verdicts:
        return [f"**{question}** Its times have {MISSING}."]
    headings = [f"{engine}, batch {batch}" for engine, batch in settings]
    return [
        f"**{question}** {answer(verdicts)}",
        "",
        "Differences in points (95 %) to the line between no block and the plain network, at the variant's "
        "ratio of time to the plain network's. Those that select nothing are not counted above.",
        "",
        *markdown(("variant", f"against {REMOVED}", *headings), rows),
    ]


def _options(options: object) -> str:
    """Options as keywords."""
    assert isinstance(options, dict)
    return ", ".join(f"{k}={tuple(v) if isinstance(v, list) else v!r}" for k, v in options.items())
