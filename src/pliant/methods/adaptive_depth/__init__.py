"""Adaptive Depth Networks (arXiv 2312.16392): the method, its switch, its networks."""

from pliant.methods.adaptive_depth import networks as networks
from pliant.methods.adaptive_depth.depth import (
    at_depth,
    compile_depths,
    depths,
    get_depth,
    set_depth,
    subnet,
)
from pliant.methods.adaptive_depth.method import AdaptiveBlock, AdaptiveDepth, Subnet, SwitchableNorm

__all__ = [
    "AdaptiveBlock",
    "AdaptiveDepth",
    "Subnet",
    "SwitchableNorm",
    "at_depth",
    "compile_depths",
    "depths",
    "get_depth",
    "set_depth",
    "subnet",
]
