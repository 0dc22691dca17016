"""Which variants get the seeds that decide: those that the first seed's validation images choose.

The best of many is partly luck. So one seed chooses, by images that no verdict is taken from, and
has no part in what the next seeds decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pliant.compare import Score
from research.experiments.cells import Cell, cells_of
from research.experiments.evidence import Evidence, gather
from research.experiments.variants import VARIANTS

EXPERIMENT = "cifar10-variants"  # which one has a seed that chooses
CHOOSING = 0  # that seed
LEARNED = [label for label, variant in VARIANTS.items() if variant.selects]
BUILT = [label for label in LEARNED if not VARIANTS[label].gone]  # those that can still be trained


def validated(evidence: Evidence) -> dict[str, float]:
    """Accuracy of the seed that chooses, on validation images in percent, of each label that has it."""
    labels = dict.fromkeys(score.label for score in evidence.scores)
    return {
        label: row.val_accuracy for label in labels for row in evidence.rows(label) if row.seed == CHOOSING
    }


def ranked(accuracy: Mapping[str, float]) -> list[str]:
    """Labels of variants, the highest accuracy first. Those that select nothing are controls, without rank.

    Args:
        accuracy: of the seed that chooses, on validation images in percent, by label.

    Example:
        >>> ranked({"static": 86.5, "temperature": 86.9, "separable, first k": 87.0})
        ['temperature', 'static']
    """
    return sorted(accuracy.keys() & LEARNED, key=lambda label: (-accuracy[label], LEARNED.index(label)))


def chosen(scores: Iterable[Score], count: int, *, epochs: int | None = None) -> list[str]:
    """The first of `ranked`, by rows.

    Args:
        scores: rows of the experiment, of all devices; others are passed over.
        count: how many.
        epochs: of a rehearsal, whose rows choose; by default the experiment's.

    Raises:
        ValueError: `count` is below 1 or more than there are, a variant has no such row yet, or two
            rows of one run differ.

    Example:
        >>> chosen([], 1)
        Traceback (most recent call last):
        ...
        ValueError: seed 0 chooses, and has no row yet of c by stage and 3 more: run --seeds 1 first
    """
    if not 1 <= count <= len(BUILT):
        raise ValueError(f"between 1 and {len(BUILT)} variants can be chosen, not {count}")
    (evidence,) = gather(cells_of(EXPERIMENT, epochs=epochs), scores, [])
    accuracy = validated(evidence)
    if missing := [label for label in BUILT if label not in accuracy]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"seed {CHOOSING} chooses, and has no row yet of {missing[0]}{more}: run --seeds 1 first"
        )
    return [label for label in ranked(accuracy) if label in BUILT][:count]


def deciding(cells: Iterable[Cell]) -> list[Cell]:
    """Of some cells those of the seeds that decide."""
    return [cell for cell in cells if cell.recipe.seed != CHOOSING]
