"""CondConv (arXiv 1904.04971): the method, its layers and its networks."""

from pliant.methods.condconv import networks as networks
from pliant.methods.condconv.block import CondConvBlock
from pliant.methods.condconv.layers import CondConv2d, CondLinear
from pliant.methods.condconv.method import CondConv

__all__ = ["CondConv", "CondConv2d", "CondConvBlock", "CondLinear"]
