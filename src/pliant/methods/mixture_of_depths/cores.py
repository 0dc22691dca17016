"""Cores: narrow copies of the blocks that Mixture-of-Depths replaces.

A core has the layers of the replaced block on k of C channels: stride 1, the block's padding,
dilation and activation, and fresh weights.

Shapes: a core takes and gives [B, k, H, W]; k is at most the block's C channels.
"""

from __future__ import annotations

import copy
from typing import Any

from timm.models import resnet
from torch import nn

from pliant.anatomy import BlockInfo, type_name
from pliant.parts import Part

# Another family: its layers in `narrow_core`, its shape in `anatomy`.
BLOCKS = (resnet.Bottleneck, resnet.BasicBlock)


def narrow_core(block: nn.Module, channels: int, k: int, *, zero_init_last: bool = False) -> nn.Sequential:
    """Return a copy of `block` on k of its channels, without its shortcut and what follows that.

    Args:
        block: a block that `unfit` has no objection to.
        channels: C, the block's width.
        k: the core's width.
        zero_init_last: start the core's last norm at zero.

    Example:
        >>> block = resnet.BasicBlock(64, 64)
        >>> list(dict(narrow_core(block, 64, 4).named_children()))
        ['conv1', 'bn1', 'act1', 'conv2', 'bn2']
    """
    last = "bn3" if isinstance(block, resnet.Bottleneck) else "bn2"
    core, inner, width = nn.Sequential(), core_width(block, channels, k), k
    layer: Any
    for name, layer in block.named_children():  # timm's blocks have them in the order in which they run
        if name.startswith("conv"):
            before, width = width, k if name[-1] == last[-1] else inner
            core.add_module(name, _narrow_conv(layer, before, width))
        elif name.startswith("bn"):
            core.add_module(name, _narrow_norm(layer, width, zero=zero_init_last and name == last))
        elif not isinstance(layer, nn.Identity):
            core.add_module(name, copy.deepcopy(layer))
        if name == last:
            break
    return core


def last_activation(block: nn.Module) -> nn.Module:
    """Return a copy of the activation that ends `block`, behind its shortcut."""
    last: nn.Module = block.get_submodule("act3" if isinstance(block, resnet.Bottleneck) else "act2")
    return copy.deepcopy(last)


def unfit(block: BlockInfo) -> str:
    """Say why no core can take the place of this block; empty when one can."""
    m: Any = block.module
    if type(m) not in BLOCKS:
        known = ", ".join(f"{cls.__module__.rsplit('.', 1)[-1]}.{cls.__name__}" for cls in BLOCKS)
        return f"no Mixture-of-Depths core for a {block.kind} (there is one for timm's {known})"
    if block.stride != 1 or block.in_channels != block.out_channels:
        return f"stride {block.stride}, {block.in_channels} to {block.out_channels} channels"
    if any(conv.groups != 1 for conv in m.modules() if isinstance(conv, nn.Conv2d)):
        return "grouped convolutions: a core of k channels cannot keep the groups"
    if m.se is not None:
        return f"channel attention ({type(m.se).__name__}) has no narrow form here"
    if not isinstance(m.aa, nn.Identity):
        return f"anti-aliasing ({type(m.aa).__name__}) has no narrow form here"
    named = [(n, layer) for n, layer in m.named_children() if n.startswith("conv")]
    for name, layer in named:  # what another method put there is refused as an overlap
        if not isinstance(layer, (nn.Conv2d, Part)):
            return f"{name} is a {type_name(layer)}: a core needs plain convolutions"
    if "Frozen" in type(m.bn1).__name__:
        return (
            f"{type(m.bn1).__name__}: a core needs batch norm that learns; convert first, freeze afterwards"
        )
    if not isinstance(m.bn1, (nn.BatchNorm2d, nn.SyncBatchNorm)):
        return f"{type(m.bn1).__name__}: a core needs batch norm"
    return ""


def core_width(block: nn.Module, channels: int, k: int) -> int:
    """Return the width inside the core: the block's own, shrunk with k (1x1 k -> k // 4)."""
    if isinstance(block, resnet.Bottleneck):
        return int(k * block.conv1.out_channels // channels)
    return k


def _narrow_conv(conv: nn.Conv2d, in_channels: int, out_channels: int) -> nn.Conv2d:
    """A convolution as `conv`, its padding and dilation kept, of other widths, fresh."""
    new = nn.Conv2d(
        in_channels,
        out_channels,
        conv.kernel_size,  # type: ignore[arg-type]
        padding=conv.padding,  # type: ignore[arg-type]
        dilation=conv.dilation,  # type: ignore[arg-type]
        bias=conv.bias is not None,
        padding_mode=conv.padding_mode,
        device=conv.weight.device,
        dtype=conv.weight.dtype,
    )
    nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")  # as timm's ResNet
    return new


def _narrow_norm(norm: nn.BatchNorm2d, channels: int, zero: bool = False) -> nn.BatchNorm2d:
    """A batch norm as `norm`, of another width, fresh."""
    new: Any = type(norm)(channels, norm.eps, norm.momentum, norm.affine, norm.track_running_stats)
    if isinstance(norm, nn.SyncBatchNorm):
        new.process_group = norm.process_group
    if zero and new.affine:
        nn.init.zeros_(new.weight)
    like = next(iter(norm.parameters()), None)
    moved: nn.BatchNorm2d = new if like is None else new.to(like.device, like.dtype)
    return moved
