"""Which variants get the seeds that decide: those that the first seed's validation images choose.

The best of many is partly luck. So one seed chooses, by images that no verdict is taken from, and
has no part in what the next seeds decide.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from pliant.compare import Score
from pliant.experiments.cells import Cell, cells_of, key_of
from pliant.experiments.evidence import trained_on
from pliant.experiments.variants import VARIANTS

EXPERIMENT = "cifar10-variants"  # which one has a seed that chooses
CHOOSING = 0  # that seed


def ranked(accuracy: Mapping[str, float]) -> list[str]:
    """Labels of variants, the highest accuracy first. Those that select nothing are controls, without rank.

    Args:
        accuracy: of the seed that chooses, on validation images, by label.

    Example:
        >>> ranked({"static": 86.5, "temperature": 86.9, "separable, first k": 87.0})
        ['temperature', 'static']
    """
    learned = (label for label, variant in VARIANTS.items() if variant.selects and label in accuracy)
    return sorted(learned, key=lambda label: -accuracy[label])


def chosen(scores: Iterable[Score], count: int, *, epochs: int | None = None) -> list[str]:
    """The first of `ranked`, by rows. A seed that was run on a CPU and on a GPU counts as the GPU's.

    Args:
        scores: rows of the experiment, of all devices; others are passed over.
        count: how many.
        epochs: of a rehearsal, whose rows choose; by default the experiment's.

    Raises:
        ValueError: `count` is below 1 or more than there are, or a variant has no such row yet.

    Example:
        >>> chosen([], 1)
        Traceback (most recent call last):
        ...
        ValueError: seed 0 chooses, and has no row yet of gate of the map and 14 more: run --seeds 1 first
    """
    learned = [label for label, variant in VARIANTS.items() if variant.selects]
    if not 1 <= count <= len(learned):
        raise ValueError(f"between 1 and {len(learned)} variants can be chosen, not {count}")
    known = {
        key: cell.label
        for cell in cells_of(EXPERIMENT, only=learned, seeds=1, epochs=epochs)
        for key in cell.keys
    }
    rows = sorted((row for row in scores if key_of(row) in known), key=trained_on)  # "cpu" before "cuda"
    accuracy = {known[key_of(row)]: row.val_accuracy for row in rows}
    if missing := [label for label in learned if label not in accuracy]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(
            f"seed {CHOOSING} chooses, and has no row yet of {missing[0]}{more}: run --seeds 1 first"
        )
    return ranked(accuracy)[:count]


def deciding(cells: Iterable[Cell]) -> list[Cell]:
    """Of some cells those of the seeds that decide."""
    return [cell for cell in cells if cell.recipe.seed != CHOOSING]
