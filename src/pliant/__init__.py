"""Conditional and adaptive computation in vision networks: one set of weights, many budgets.

``import pliant`` is light, and registers pliant's networks with timm once timm is imported.
torch, timm and what stands behind each name below are imported when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from pliant._registering import register_networks
from pliant._version import __version__

if TYPE_CHECKING:
    from pliant.adaptive.manifest import export_depths
    from pliant.adaptive.profiling import DepthProfile, profile_depths, skip_of
    from pliant.adaptive.scores import evaluate_depths
    from pliant.checkpoint import load, save
    from pliant.deploy.export import export
    from pliant.deploy.loading import open_export
    from pliant.deploy.optimize import optimize
    from pliant.measuring.latency import measure
    from pliant.measuring.rows import Measurement
    from pliant.method import Method
    from pliant.methods.adaptive_depth.depth import (
        at_depth,
        compile_depths,
        depths,
        get_depth,
        set_depth,
        subnet,
    )
    from pliant.methods.adaptive_depth.method import AdaptiveDepth, Subnet
    from pliant.methods.condconv.method import CondConv
    from pliant.methods.mixture_of_depths.method import MixtureOfDepths
    from pliant.models import list_networks
    from pliant.recipes import get_recipe
    from pliant.surgery import Plan, convert, plan
    from pliant.train.evaluation import evaluate
    from pliant.train.fitting import fit
    from pliant.train.recipe import Recipe

__all__ = [
    "AdaptiveDepth",
    "CondConv",
    "DepthProfile",
    "Measurement",
    "Method",
    "MixtureOfDepths",
    "Plan",
    "Recipe",
    "Subnet",
    "__version__",
    "at_depth",
    "compile_depths",
    "convert",
    "depths",
    "evaluate",
    "evaluate_depths",
    "export",
    "export_depths",
    "fit",
    "get_depth",
    "get_recipe",
    "list_networks",
    "load",
    "measure",
    "open_export",
    "optimize",
    "plan",
    "profile_depths",
    "save",
    "set_depth",
    "skip_of",
    "subnet",
]

_MODULES = {
    "adaptive.manifest": "export_depths",
    "adaptive.profiling": "DepthProfile profile_depths skip_of",
    "adaptive.scores": "evaluate_depths",
    "checkpoint": "load save",
    "deploy.export": "export",
    "deploy.loading": "open_export",
    "deploy.optimize": "optimize",
    "measuring.latency": "measure",
    "measuring.rows": "Measurement",
    "method": "Method",
    "methods.adaptive_depth.depth": "at_depth compile_depths depths get_depth set_depth subnet",
    "methods.adaptive_depth.method": "AdaptiveDepth Subnet",
    "methods.condconv.method": "CondConv",
    "methods.mixture_of_depths.method": "MixtureOfDepths",
    "models": "list_networks",
    "recipes": "get_recipe",
    "surgery": "Plan convert plan",
    "train.evaluation": "evaluate",
    "train.fitting": "fit",
    "train.recipe": "Recipe",
}
_HOMES = {name: f"pliant.{module}" for module, names in _MODULES.items() for name in names.split()}

if not TYPE_CHECKING:  # a type checker knows the names from above, and is to miss others

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module 'pliant' has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
        return value


def __dir__() -> list[str]:
    return list(__all__)


register_networks()
