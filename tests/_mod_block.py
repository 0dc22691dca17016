"""One Mixture-of-Depths block as surgery makes it, and the values of its options."""

from __future__ import annotations

from typing import get_args

import torch
from timm.layers import DropPath
from timm.models.resnet import BasicBlock
from torch import nn

from pliant import MixtureOfDepths, convert
from pliant.methods.mixture_of_depths import Fusion, MoDBlock, Order, Selection

FUSIONS = get_args(Fusion)
ORDERS = get_args(Order)
DRAWN = tuple(s for s in get_args(Selection) if s != "none")


def mod_block(
    channels=16, k=4, block=BasicBlock, seed=0, double=True, drop_path=None, **options
) -> MoDBlock:
    """One block as surgery makes it, in evaluation, its norms with statistics of their own."""
    torch.manual_seed(seed)
    stage = nn.Sequential(*(block(channels, channels // block.expansion) for _ in range(2)))
    if drop_path is not None:
        stage[1].drop_path = DropPath(drop_path)
    if double:
        stage.double()
    made = convert(stage, MixtureOfDepths(c=channels // k, **options))[1].eval()
    assert isinstance(made, MoDBlock)
    assert made.k == k
    for norm in made.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return made
