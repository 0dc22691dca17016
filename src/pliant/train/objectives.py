"""Objectives by name: cross entropy, and those that the methods bring."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from pliant._options import refuse_unknown
from pliant.methods import METHODS
from pliant.objectives import CrossEntropy, Objective


def objectives() -> dict[str, type[Any]]:
    """Class of each objective by the name that recipes use.

    Example:
        >>> list(objectives())
        ['cross_entropy', 'joint', 'specialize']
    """
    found: dict[str, type[Any]] = {"cross_entropy": CrossEntropy}
    for method in METHODS.values():
        found |= method.objectives
    return found


def make_objective(name: str, options: Mapping[str, Any], smoothing: float = 0.0) -> Objective:
    """The objective that a recipe names.

    Args:
        name: of `objectives`.
        options: its fields, without ``smoothing``.
        smoothing: of labels, in [0, 1).

    Raises:
        ValueError: no objective of this name; an option that it does not have, or whose value
            is wrong.

    Example:
        >>> make_objective("specialize", {"alpha": 0.7, "stages": [2, 3]}).stages
        (2, 3)
    """
    known = objectives()
    if name not in known:
        raise ValueError(f"no objective {name!r}; there are {', '.join(known)}")
    names = [f.name for f in fields(known[name]) if f.name != "smoothing"]
    refuse_unknown(options, names, f"objective {name!r}")
    made: Objective = known[name](**options, smoothing=smoothing)
    return made
