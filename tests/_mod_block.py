"""One Mixture-of-Depths block as surgery makes it, its options, and arguments of its operator."""

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


def arguments(channels=64, k=16, r=8, kind="bottleneck", logits=None, dtype=torch.float32):
    """Weights of the operator; with `logits`, the selector gives these to each image that is not 0."""
    m = k // 4 if kind == "bottleneck" else k

    def scaled(*shape):
        return torch.randn(*shape) / (shape[1] * shape[2] * shape[3]) ** 0.5

    down, up = torch.randn(channels, r) / channels**0.5, torch.randn(r, channels) / r**0.5
    if logits is not None:
        down = torch.zeros(channels, r)
        down[:, 0] = 1 / channels
        up = torch.zeros(r, channels)
        up[0] = logits
    if kind == "basic":
        core = [scaled(k, k, 3, 3), torch.randn(k), scaled(k, k, 3, 3), torch.randn(k), None, None]
    else:
        core = [scaled(m, k, 1, 1), torch.randn(m), scaled(m, m, 3, 3), torch.randn(m)]
        core += [scaled(k, m, 1, 1), torch.randn(k)]
    return [None if t is None else t.to(dtype) for t in (down, up, *core)]


def arguments_with(args, logits):
    up = torch.zeros_like(args[1])
    up[0] = logits
    return [args[0], up, *args[2:]]


def image(batch, channels, height, width, dtype=torch.float32):
    x = torch.randn(batch, channels, height, width).relu() + 0.1
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def error(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())
