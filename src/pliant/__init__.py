"""pliant: conditional and adaptive computation in vision networks.

One set of weights, many budgets, honest timing. Importing it registers the named
networks with timm; heavy parts (Lightning, plots, engines) load on use.
"""

from __future__ import annotations

from pliant import models
from pliant._version import __version__
from pliant.adaptive.profiling import DepthProfile, profile_depths, skip_of
from pliant.checkpoint import load, save
from pliant.deploy.export import export
from pliant.measuring.latency import measure
from pliant.measuring.rows import Measurement
from pliant.methods.adaptive_depth import AdaptiveDepth, Subnet
from pliant.methods.adaptive_depth.depth import (
    at_depth,
    compile_depths,
    depths,
    get_depth,
    set_depth,
    subnet,
)
from pliant.methods.condconv import CondConv
from pliant.methods.mixture_of_depths import MixtureOfDepths
from pliant.surgery import Method, Plan, convert, plan

__all__ = [
    "AdaptiveDepth",
    "CondConv",
    "DepthProfile",
    "Measurement",
    "Method",
    "MixtureOfDepths",
    "Plan",
    "Subnet",
    "__version__",
    "at_depth",
    "compile_depths",
    "convert",
    "depths",
    "export",
    "get_depth",
    "load",
    "measure",
    "models",
    "plan",
    "profile_depths",
    "save",
    "set_depth",
    "skip_of",
    "subnet",
]
