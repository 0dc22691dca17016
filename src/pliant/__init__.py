"""Conditional and adaptive computation in vision networks: one set of weights, many budgets.

``import pliant`` is light, and registers pliant's networks with timm once timm is imported.
torch, timm and what stands behind each name below are imported when they are used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from pliant._registering import register_networks
from pliant._version import __version__ as __version__

if TYPE_CHECKING:
    from pliant.adaptive.manifest import export_depths as export_depths
    from pliant.adaptive.profiling import DepthProfile as DepthProfile
    from pliant.adaptive.profiling import profile_depths as profile_depths
    from pliant.adaptive.profiling import skip_of as skip_of
    from pliant.adaptive.scores import evaluate_depths as evaluate_depths
    from pliant.checkpoint import load as load
    from pliant.checkpoint import save as save
    from pliant.deploy.export import export as export
    from pliant.deploy.loading import open_export as open_export
    from pliant.deploy.optimize import optimize as optimize
    from pliant.measuring.latency import measure as measure
    from pliant.measuring.rows import Measurement as Measurement
    from pliant.method import Method as Method
    from pliant.methods.adaptive_depth.depth import at_depth as at_depth
    from pliant.methods.adaptive_depth.depth import compile_depths as compile_depths
    from pliant.methods.adaptive_depth.depth import depths as depths
    from pliant.methods.adaptive_depth.depth import get_depth as get_depth
    from pliant.methods.adaptive_depth.depth import set_depth as set_depth
    from pliant.methods.adaptive_depth.depth import subnet as subnet
    from pliant.methods.adaptive_depth.method import AdaptiveDepth as AdaptiveDepth
    from pliant.methods.adaptive_depth.method import Subnet as Subnet
    from pliant.methods.condconv.method import CondConv as CondConv
    from pliant.methods.mixture_of_depths.method import MixtureOfDepths as MixtureOfDepths
    from pliant.models import list_networks as list_networks
    from pliant.recipes import get_recipe as get_recipe
    from pliant.surgery import Plan as Plan
    from pliant.surgery import convert as convert
    from pliant.surgery import plan as plan
    from pliant.train.evaluation import evaluate as evaluate
    from pliant.train.fitting import fit as fit
    from pliant.train.recipe import Recipe as Recipe

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
    __all__ = [*sorted(_HOMES), "__version__"]

    def __getattr__(name: str) -> object:
        if name not in _HOMES:
            raise AttributeError(f"module 'pliant' has no attribute {name!r}")
        value = globals()[name] = getattr(importlib.import_module(_HOMES[name]), name)
        return value

    def __dir__() -> list[str]:
        return __all__


register_networks()
