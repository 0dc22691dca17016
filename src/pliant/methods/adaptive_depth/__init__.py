"""Adaptive Depth Networks (arXiv 2312.16392): the method, its switch, its networks."""

from pliant.methods.adaptive_depth import networks as networks
from pliant.methods.adaptive_depth.block import AdaptiveBlock, SwitchableNorm
from pliant.methods.adaptive_depth.depth import (
    at_depth,
    compile_depths,
    depths,
    get_depth,
    set_depth,
)
from pliant.methods.adaptive_depth.method import AdaptiveDepth, Subnet, subnet
from pliant.methods.adaptive_depth.objectives import Joint, Specialization

__all__ = [
    "AdaptiveBlock",
    "AdaptiveDepth",
    "Joint",
    "Specialization",
    "Subnet",
    "SwitchableNorm",
    "at_depth",
    "compile_depths",
    "depths",
    "get_depth",
    "set_depth",
    "subnet",
]
