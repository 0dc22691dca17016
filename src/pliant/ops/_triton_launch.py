"""Sizes and launches of the Triton kernels, as operators that `torch.compile` looks into.

Shapes: those of `pliant.ops.triton_mod`. Needs Triton, and inputs that `unfit` there passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import SymInt, Tensor, sym_max, sym_min
from torch.library import triton_op
from torch.utils.flop_counter import register_flop_formula
from triton.runtime.jit import JITFunction

from pliant.ops._triton_kernels import basic, bottleneck, pool, rank

Number = int | SymInt

# Under TRITON_INTERPRET=1 kernels run as Python on the CPU, and there is nothing to capture.
INTERPRETED = not isinstance(pool, JITFunction)

if INTERPRETED:

    def wrap_triton(kernel: Any) -> Any:  # torch before 2.13 refuses such kernels
        """The kernel itself."""
        return kernel

else:
    from torch.library import wrap_triton

# None of these was tuned on a GPU: they follow from the sizes of one of its processors.
PROGRAMS = 128  # that read a feature map between them; an H200 has 132 processors
TILE = 2048  # values that a program of 128 threads holds at a time
SMALL_SELECTOR = 2**14  # weights of its second layer that every program can read for itself


@triton_op("pliant::mod_block_triton", mutates_args=())
def mod_block_triton(
    x: Tensor, fc1: Tensor, fc2: Tensor, core: Sequence[Tensor], by_index: bool, dilation: int
) -> Tensor:
    """The block, out of place."""
    out = torch.empty_like(x)
    _launch(x, out, (fc1, fc2), core, by_index, dilation, inplace=False)
    return out


@triton_op("pliant::mod_block_triton_", mutates_args=("x",))
def mod_block_triton_(
    x: Tensor, fc1: Tensor, fc2: Tensor, core: Sequence[Tensor], by_index: bool, dilation: int
) -> None:
    """The block, in place: only the first k channels are written."""
    batch, _, height, width = x.shape
    k, positions = core[-1].shape[0], height * width
    strides = (k * positions, 1, k) if x.stride(1) == 1 else (k * positions, positions, 1)
    kept = torch.empty_strided((batch, k, positions), strides, dtype=x.dtype, device=x.device)
    _launch(x, kept, (fc1, fc2), core, by_index, dilation, inplace=True)



def position_step(x: Tensor) -> int:
    """Values from one position of `x` to the next, rows read one after the other; 0: not even.

    Example:
        >>> position_step(torch.empty(1, 3, 4, 5)), position_step(torch.empty(1, 3, 4, 5)[..., :4])
        (1, 0)
    """
    height, width = x.shape[2:]
    if width == 1:
        return x.stride(2)
    even = height == 1 or x.stride(2) == width * x.stride(3)
    return x.stride(3) if even else 0


def _launch(
    x: Tensor,
    other: Tensor,
    selector: tuple[Tensor, Tensor],
    core: Sequence[Tensor],
    by_index: bool,
    dilation: int,
    inplace: bool,
) -> None:
    """Fill `other`: with the first k channels of `x` if `inplace`, else with the result."""
    x_strides = (x.stride(0), x.stride(1), position_step(x))
    step = other.stride(2) if inplace else position_step(other)
    other_strides = (other.stride(0), other.stride(1), step)
    fc1, fc2 = (weight.contiguous() for weight in selector)
    (hidden, channels), k = fc1.shape, core[-1].shape[0]
    batch, height, width = x.shape[0], x.shape[2], x.shape[3]
    positions = height * width

    # Tiles are long in the direction in which values lie side by side: of channels or positions.
    block_c = min(64, _power(channels))
    if x_strides[1] != 1:
        block_c = max(TILE // 256, TILE // _power(_known(positions, 256)))
    blocks = -(-channels // block_c)
    splits = sym_max(1, sym_min(PROGRAMS // (blocks * batch), -(-positions // 16)))
    share = -(-positions // (16 * splits)) * 16  # in whole sixteens: those load in one go
    parts = blocks * -(-positions // share)
    partial = torch.empty((batch, parts, hidden), dtype=torch.float32, device=x.device)
    wrap_triton(pool)[(batch * parts,)](
        x, other, partial, fc1,
        channels, positions, share, hidden, 0 if inplace else k, k if inplace else channels,
        *x_strides, *other_strides,
        BLOCK_C=block_c, BLOCK_P=TILE // block_c, BLOCK_H=min(_power(hidden), TILE // block_c),
    )  # fmt: skip

    scores, ranked, block_c = partial, channels * hidden > SMALL_SELECTOR, max(16, _power(channels))
    block_h = min(_power(hidden), 64 if ranked else max(1, 4 * TILE // block_c))
    if ranked:
        scores = torch.empty((batch, channels), dtype=torch.float32, device=x.device)
        wrap_triton(rank)[(batch * -(-channels // 32),)](
            partial, fc2, scores, channels, hidden, parts, BLOCK_C=32, BLOCK_H=block_h, BLOCK_T=32
        )

    block_k, inner = max(2, _power(k)), core[0].shape[0]
    wanted = max(16, _power(_known(positions * batch, 1) // (2 * PROGRAMS)))
    by_dot = block_k >= 16 and inner > 8
    most = 32 if by_dot else max(1, 2 * TILE // (block_k * _power(inner)))
    block_p = min(128, wanted, most)
    tiles = -(-positions // block_p)
    sizes = (channels, k, hidden, parts, height, width, tiles, dilation, *x_strides, *other_strides)
    how = {"INPLACE": inplace, "RANKED": ranked, "BY_INDEX": by_index, "BLOCK_C": block_c}
    how |= {"BLOCK_K": block_k, "BLOCK_P": block_p, "BLOCK_H": block_h, "BLOCK_T": 32}
    core = [_taps(t) if t.dim() == 4 else t.contiguous() for t in core]
    taps = [n for t in core if t.dim() == 4 and t.shape[2] == 3 for n in (t.stride(1), t.stride(3))]
    if len(core) == 6:
        wrap_triton(bottleneck)[(batch * tiles,)](
            x, other, scores, fc2, *core, *sizes, inner, *taps, **how, BLOCK_W=_power(inner)
        )
    else:
        wrap_triton(basic)[(batch * tiles,)](x, other, scores, fc2, *core, *sizes, *taps, **how)


def _taps(weight: Tensor) -> Tensor:
    """A 3x3 kernel whose taps are evenly strided, as they are in both memory formats."""
    dense = weight.is_contiguous() or weight.is_contiguous(memory_format=torch.channels_last)
    return weight if dense else weight.contiguous()


def _power(n: int) -> int:
    """The next power of two."""
    return 1 << max(0, n - 1).bit_length()


def _known(n: Number, otherwise: int) -> int:
    """A size that the tiles may depend on: that of a graph for any batch may not."""
    return n if isinstance(n, int) else otherwise


def _flops(
    x: Sequence[int], fc1: Sequence[int], fc2: Sequence[int], core: Sequence[Sequence[int]], *_: Any, **__: Any
) -> int:
    """Twice the multiply-accumulates of the selector and the core, as of the plain form's layers."""
    batch, _, height, width = x
    selector = prod(fc1) + prod(fc2)
    return 2 * batch * (selector + height * width * sum(prod(s) for s in core if len(s) == 4))


register_flop_formula(torch.ops.pliant.mod_block_triton)(_flops)
register_flop_formula(torch.ops.pliant.mod_block_triton_)(_flops)
