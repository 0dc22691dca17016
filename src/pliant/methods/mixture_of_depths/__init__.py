"""CNN Mixture-of-Depths (arXiv 2409.17016): the method, its block, its networks and operators."""

from pliant.methods.mixture_of_depths import networks as networks
from pliant.methods.mixture_of_depths.block import MoDBlock, without_mod_blocks
from pliant.methods.mixture_of_depths.method import MixtureOfDepths, Selection
from pliant.methods.mixture_of_depths.selectors import ChannelSelector, Fusion, Order, RandomSelector

__all__ = [
    "ChannelSelector",
    "Fusion",
    "MixtureOfDepths",
    "MoDBlock",
    "Order",
    "RandomSelector",
    "Selection",
    "without_mod_blocks",
]
