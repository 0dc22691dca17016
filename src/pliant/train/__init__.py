"""Training: recipes, and `fit`, which runs one by Lightning.

Lightning is imported when `fit` or `evaluate` is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pliant.train.recipe import Recipe, override
from pliant.train.run import Run, read_run
from pliant.train.saved import SavedState, read_state

if TYPE_CHECKING:
    from pliant.train.evaluation import Evaluation, evaluate
    from pliant.train.fitting import fit

__all__ = [
    "Evaluation",
    "Recipe",
    "Run",
    "SavedState",
    "evaluate",
    "fit",
    "override",
    "read_run",
    "read_state",
]

_HOME = {"Evaluation": "evaluation", "evaluate": "evaluation", "fit": "fitting"}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
