"""The Mixture-of-Depths block on a GPU: two or three Triton kernels in place of a dozen.

At batch 1 a bottleneck takes about as long as launching the plain form's kernels, so what
counts is how few there are. The first reads the feature map once: it pools it, applies the
selector's first layer, and sets the first k channels aside, so that they can still be read
while they are overwritten. The last chooses the channels, gathers them, runs the core, and
adds. Between them, where the selector is large, one spreads its second layer over programs.
`torch.compile` sees the kernels and CUDA graphs can hold them: nothing is read back, and
every size follows from shapes. Tested in Triton's interpreter, compiled for GPUs, and run on
an H200 (``docs/mod-tax.md``).

Shapes in this file: those of `pliant.methods.mixture_of_depths.ops.mod_block`.
"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

from pliant.methods.mixture_of_depths.ops.mod_block import in_pytorch
from pliant.methods.mixture_of_depths.selectors import Fusion, Order

INSTALLED = find_spec("triton") is not None
if INSTALLED:
    from pliant.methods.mixture_of_depths.ops import _triton_launch

# A program ranks all channels of a sample, and holds products of k by the core's width.
MOST_CHANNELS = 4096
MOST_PRODUCTS = 1024


def mod_block(
    x: Tensor,
    *weights: Any,
    dilation: int = 1,
    order: Order = "score",
    fusion: Fusion = "first",
    inplace: bool = False,
) -> Tensor:
    """A Mixture-of-Depths block for inference, by the Triton kernels where they can run.

    The function of `mod_block.in_pytorch`, and of `MoDBlock.forward`. Half
    precision is computed in float32 and rounded once, so it is closer to float32 than the
    plain form. Of channels whose logits are equal the lower is chosen; `torch.topk` leaves
    that open. Where the kernels do not fit (`unfit`), or a gradient is wanted, PyTorch's
    operators run instead.

    Args:
        x: feature map [B, C, H, W], contiguous or channels_last.
        weights: from `down` to `bias3`, as for `in_pytorch`, which explains the next three too.
        dilation: of the 3x3 convolutions, and their padding.
        order: in which order the channels reach the core.
        fusion: where the core's output goes; the kernels know ``"first"``.
        inplace: write into `x` and return it: k channels are written instead of all C.

    Returns:
        [B, C, H, W], laid out as `x`.

    Example:
        >>> x, down, up = torch.rand(2, 8, 5, 5), torch.rand(8, 4), torch.randn(4, 8)
        >>> weight, bias = torch.randn(2, 2, 3, 3), torch.zeros(2)
        >>> y = mod_block(x, down, up, weight, bias, weight, bias, None, None)
        >>> y.shape, bool((y[:, 2:] == x[:, 2:]).all()), bool((y[:, :2] == x[:, :2]).all())
        (torch.Size([2, 8, 5, 5]), True, False)
    """
    differentiable = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x, *weights)
    )
    if differentiable or unfit(x, weights[2], fusion):
        out = x if inplace else x.clone()
        arguments: Any = (*weights, dilation, order, fusion)
        in_pytorch(out, *arguments)
        return out
    if inplace:
        torch.ops.pliant.mod_block_triton_(x, *weights, dilation, order)
        return x
    result: Tensor = torch.ops.pliant.mod_block_triton(x, *weights, dilation, order)
    return result


def unfit(x: Tensor, weight1: Tensor, fusion: Fusion = "first") -> str:
    """Why the kernels cannot take this block; empty when they can.

    Args:
        x: its input [B, C, H, W].
        weight1: the core's first convolution.
        fusion: where the core's output goes.

    Example:
        >>> unfit(torch.empty(2, 8, 5, 5, device="meta"), torch.empty(2, 2, 3, 3), "last")
        "fusion is 'last', the kernels know 'first'"
    """
    if fusion != "first":
        return f"fusion is {fusion!r}, the kernels know 'first'"
    if not INSTALLED:
        return "Triton is not installed"
    where = "cpu" if _triton_launch.INTERPRETED else "cuda"
    if x.device.type != where:
        return f"the input is on {x.device.type}, the kernels are for {where}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{str(x.dtype).removeprefix('torch.')}: the kernels compute in float32"
    channels, (inner, k) = x.shape[1], weight1.shape[:2]
    held = _triton_launch.power(k) * _triton_launch.power(inner)
    if channels > MOST_CHANNELS or held > MOST_PRODUCTS:
        return (
            f"C = {channels}, and k = {k} by {inner} inside the core: a program holds "
            f"{MOST_CHANNELS} channels and {MOST_PRODUCTS} products"
        )
    if has_static_value(x.numel()) and x.numel() == 0:
        return "the input is empty"
    repeats = any(step == 0 and size > 1 for step, size in zip(x.stride(), x.shape, strict=True))
    if repeats or not _triton_launch.position_step(x):
        return f"the input's strides {x.stride()} repeat values or skip some between rows"
    return ""
