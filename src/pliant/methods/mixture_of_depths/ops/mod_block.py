"""The operator ``pliant::mod_block_``: a whole Mixture-of-Depths block, in place.

This file has the operator's schema, its form in PyTorch, and what PyTorch's tools need: a fake
form, the FLOPs, and that it has no gradient. The native form for the CPU is ``mod_block.cpp``; once
`pliant.methods.mixture_of_depths.ops.building` has built it, it takes the place of the PyTorch form.

Shapes in this file::

    B  batch            x        [B, C, H, W]  feature map, changed in place
    C  channels         down     [C, r]        selector: hidden = relu(mean(x) @ down)
    k  processed        up       [r, C]        selector: logits = hidden @ up
    r  hidden units     weight1  [m, k, 1, 1] or, without weight3, [k, k, 3, 3]
    m  inside the core  weight2  [m, m, 3, 3] or [k, k, 3, 3]
                        weight3  [k, m, 1, 1] or None; each with its bias
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pliant.methods.mixture_of_depths.selectors import Fusion, Order, best
from pliant.methods.mixture_of_depths.training import everywhere
from pliant.precision import full_precision, pooled

_LIBRARY = cast("Any", torch.library).Library("pliant", "FRAGMENT")
_LIBRARY.define(
    "mod_block_(Tensor(a!) x, Tensor down, Tensor up, Tensor weight1, Tensor bias1, Tensor weight2, "
    "Tensor bias2, Tensor? weight3, Tensor? bias3, int dilation, str order, str fusion) -> ()",
    tags=(torch.Tag.pt2_compliant_tag,),
)
mod_block_: Any = torch.ops.pliant.mod_block_.default


def in_pytorch(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    weight3: Tensor | None,
    bias3: Tensor | None,
    dilation: int,
    order: Order,
    fusion: Fusion,
) -> None:
    """The block in PyTorch's own operators, on any device: what the fused forms compute.

    Select the k channels of `x` whose logits are highest, take them through the core (1x1,
    3x3, 1x1, or 3x3 twice, with ReLU between), times their scores, and fuse with `x`. Has
    gradients, if `x` is no leaf.

    Args:
        x: feature map [B, C, H, W], changed in place.
        down: first layer of the selector [C, r].
        up: second layer of the selector [r, C].
        weight1: the core's first convolution, its batch norm folded into it, as in the others.
        bias1: its bias.
        weight2: the 3x3 convolution.
        bias2: its bias.
        weight3: the last 1x1 convolution of a bottleneck; None: two 3x3 are all.
        bias3: its bias.
        dilation: of the 3x3 convolutions, and their padding.
        order: ``"score"`` or ``"index"``, as for `MixtureOfDepths`.
        fusion: ``"first"``, ``"last"``, ``"original"`` or ``"replace"``, as for `MixtureOfDepths`.

    Example:
        >>> x = torch.zeros(1, 2, 4, 4)
        >>> one, no = torch.ones(1, 1, 1, 1), torch.zeros(1)
        >>> middle = torch.zeros(1, 1, 3, 3)
        >>> in_pytorch(x, one[0, 0].expand(2, 1), one[0, 0].expand(1, 2), one, no, middle, no + 3,
        ...            one, no, 1, "score", "first")
        >>> x[0, :, 0, 0]
        tensor([1.5000, 0.0000])
    """
    k = weight1.shape[1]
    with full_precision(x):
        mean = pooled(x)
        logits = F.relu(mean @ down.to(mean.dtype)) @ up.to(mean.dtype)
    top, index = best(logits, k, order)
    where = everywhere(index, x)
    # Autograd keeps what it gathers from, and x changes below.
    source = x.clone() if torch.is_grad_enabled() and x.requires_grad else x
    picked = source.gather(1, where)
    three = {"padding": dilation, "dilation": dilation}
    y = F.relu(F.conv2d(picked, weight1, bias1, **({} if weight3 is not None else three)))
    y = F.conv2d(y, weight2, bias2, **three)
    if weight3 is not None:
        y = F.conv2d(F.relu(y), weight3, bias3)
    y = (y * top.sigmoid().to(y.dtype)[:, :, None, None]).to(x.dtype)
    if fusion == "first":
        x[:, :k] += y
    elif fusion == "last":
        x[:, -k:] += y
    elif fusion == "original":
        x.scatter_add_(1, where, y)
    else:
        x.scatter_(1, where, y)


def _autograd(keyset: Any, x: Tensor, *args: Any) -> None:
    """Refuse to be differentiated, or go on below autograd."""
    tensors = (t for t in (x, *args) if isinstance(t, Tensor))
    if torch.is_grad_enabled() and any(t.requires_grad for t in tensors):
        raise RuntimeError(
            "pliant::mod_block_ has no gradient: call it under torch.no_grad(), or use the plain form"
        )
    with torch._C._AutoDispatchBelowADInplaceOrView():
        mod_block_.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, x, *args)
    if not x.is_inference():
        torch.autograd.graph.increment_version(x)


_LIBRARY.impl("mod_block_", in_pytorch, "CompositeExplicitAutograd")
_LIBRARY.impl("mod_block_", _autograd, "Autograd", with_keyset=True)
# It works in place and returns nothing, so it has no shape to tell.
torch.library.register_fake("pliant::mod_block_", lambda *_: None, lib=_LIBRARY)


def flops(x: Sequence[int], down: Sequence[int], _up: Sequence[int], *rest: Any, **_named: Any) -> int:
    """Return the operations, twice the multiply-accumulates: as many as the plain form's.

    The arguments are the shapes of the operator's arguments.
    """
    batch, channels, height, width = x
    kernels: list[int] = [math.prod(weight) for weight in rest[:6:2] if weight is not None]
    return 2 * batch * (height * width * sum(kernels) + 2 * channels * down[1])


register_flop_formula(torch.ops.pliant.mod_block_)(flops)
