"""The Mixture-of-Depths block on a GPU: two or three Triton kernels in place of a dozen.

At batch 1 a bottleneck takes about as long as launching the plain form's kernels, so what
counts is how few there are. The first reads the feature map once: it pools it, applies the
selector's first layer, and sets the first k channels aside, so that they can still be read
when they are overwritten. The last chooses the channels, gathers them, runs the core, and
adds. Between them, where the selector is large, one spreads its second layer over programs.
`torch.compile` sees the kernels and CUDA graphs can hold them: nothing is read back, and
every size follows from shapes.

Shapes in this file::

    B  batch                x     [B, C, H, W]  feature map
    C  channels             fc1   [h, C]        the selector's layers
    k  processed channels   fc2   [C, h]
    w  core's width         core  weights and biases of its convolutions, norms folded:
    h  hidden units               [w, k, 1, 1], [w], [w, w, 3, 3], [w], [k, w, 1, 1], [k]
                                  or [k, k, 3, 3], [k], [k, k, 3, 3], [k]
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import has_static_value

from pliant.methods.mixture_of_depths import Order
from pliant.methods.precision import full_precision, pooled

INSTALLED = find_spec("triton") is not None
if INSTALLED:
    from pliant.ops import _triton_launch

# A program ranks all channels of a sample, and holds a core's weights and a few positions.
MOST_CHANNELS = 4096
MOST_PROCESSED = 64


def mod_block(
    x: Tensor,
    fc1: Tensor,
    fc2: Tensor,
    core: Sequence[Tensor],
    *,
    order: Order = "score",
    dilation: int = 1,
    inplace: bool = False,
) -> Tensor:
    """A Mixture-of-Depths block for inference, as fast as this device can.

    What `MoDBlock.forward` computes with ``fusion="first"`` and a learned selector: pool,
    rank, gather the k best channels, core, times their scores, added to the first k (section
    3 of arXiv 2409.17016). Half precision is computed in float32 and rounded once, so it is
    closer to float32 than the plain form. Of channels whose logits are equal the lower is
    taken; `torch.topk` leaves that open. Where the kernels do not fit (`unfit`), and
    where a gradient is wanted, PyTorch's operators run instead.

    Args:
        x: [B, C, H, W], in any memory format.
        fc1: the selector's first weight, [h, C].
        fc2: its second, [C, h].
        core: weight and bias of each convolution: 1x1, 3x3, 1x1, or 3x3 twice, with ReLU
            between them and no padding but what keeps the size.
        order: ``"score"`` or ``"index"``: how the channels reach the core.
        dilation: of the 3x3.
        inplace: write into `x` and return it: k of C channels instead of all are written.

    Returns:
        [B, C, H, W].

    Raises:
        ValueError: the core is neither of the two, or `order` is unknown.

    Example:
        >>> x, fc1, fc2 = torch.rand(2, 8, 5, 5), torch.randn(4, 8), torch.randn(8, 4)
        >>> core = [torch.randn(2, 2, 3, 3), torch.zeros(2), torch.randn(2, 2, 3, 3), torch.zeros(2)]
        >>> y = mod_block(x, fc1, fc2, core)
        >>> y.shape, bool((y[:, 2:] == x[:, 2:]).all())
        (torch.Size([2, 8, 5, 5]), True)
    """
    core = list(core)
    if len(core) not in (4, 6):
        raise ValueError(
            f"core holds {len(core)} tensors; it takes 6 (1x1, 3x3, 1x1) or 4 (3x3 twice), weight and bias each"
        )
    if order not in ("score", "index"):
        raise ValueError(f"order must be 'score' or 'index', not {order!r}")
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (x, fc1, fc2, *core))
    if wanted or unfit(x, core):
        y = _plain(x, fc1, fc2, core, order, dilation)
        k = y.shape[1]
        if not inplace:
            return torch.cat((x[:, :k] + y, x[:, k:]), 1)
        x[:, :k] += y
        return x
    by_index = order == "index"
    if inplace:
        torch.ops.pliant.mod_block_triton_(x, fc1, fc2, core, by_index, dilation)
        return x
    out: Tensor = torch.ops.pliant.mod_block_triton(x, fc1, fc2, core, by_index, dilation)
    return out


def unfit(x: Tensor, core: Sequence[Tensor]) -> str:
    """Why the kernels cannot take this block; empty when they can.

    Example:
        >>> core = [torch.randn(2, 2, 3, 3), torch.zeros(2), torch.randn(2, 2, 3, 3), torch.zeros(2)]
        >>> unfit(torch.rand(2, 8, 5, 5, device="meta"), core)
        'the input is on meta, the kernels are for cuda'
    """
    if not INSTALLED:
        return "Triton is not installed"
    where = "cpu" if _triton_launch.INTERPRETED else "cuda"
    if x.device.type != where:
        return f"the input is on {x.device.type}, the kernels are for {where}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{str(x.dtype).removeprefix('torch.')}: the kernels compute in float32"
    channels, k, width = x.shape[1], core[-1].shape[0], core[0].shape[0]
    if channels > MOST_CHANNELS or max(k, width) > MOST_PROCESSED:
        return (
            f"C = {channels}, k = {k} and a core of {width}: a program holds at most "
            f"{MOST_CHANNELS}, {MOST_PROCESSED} and {MOST_PROCESSED}"
        )
    if has_static_value(x.numel()) and x.numel() == 0:
        return "the input is empty"
    overlaps = any(step == 0 and size > 1 for step, size in zip(x.stride(), x.shape, strict=True))
    if overlaps or not _triton_launch.position_step(x):
        return f"the strides of the input, {x.stride()}: they skip values or repeat them"
    return ""


def _plain(
    x: Tensor, fc1: Tensor, fc2: Tensor, core: Sequence[Tensor], order: Order, dilation: int
) -> Tensor:
    """What is added to the first k channels, by PyTorch's operators."""
    k, last = core[-1].shape[0], len(core) - 2
    with full_precision(x):
        mean = pooled(x)
        logits = F.linear(F.relu(F.linear(mean, fc1.to(mean.dtype))), fc2.to(mean.dtype))
    top, index = logits.topk(k, dim=1, sorted=True)
    if order == "index":
        index, rank = index.sort(dim=1)
        top = top.gather(1, rank)
    y = x.gather(1, index[:, :, None, None].expand(-1, -1, *x.shape[2:]))
    for i in range(0, len(core), 2):
        around = dilation if core[i].shape[2] == 3 else 0
        y = F.conv2d(y, core[i], core[i + 1], padding=around, dilation=max(1, around))
        y = y if i == last else F.relu(y)
    return y.to(x.dtype) * top.sigmoid().to(x.dtype)[:, :, None, None]
