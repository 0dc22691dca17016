"""Sizes and launches of the Triton kernels, as operators that `torch.compile` looks into.

Shapes: those of `pliant.methods.mixture_of_depths.ops.mod_block`. Needs Triton, and inputs for which
`pliant.methods.mixture_of_depths.ops.triton_mod.unfit` is empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, sym_max, sym_min
from torch.library import triton_op
from torch.utils.flop_counter import register_flop_formula
from triton.runtime.jit import JITFunction

from pliant.methods.mixture_of_depths.ops._triton_kernels import basic, bottleneck, pool, rank
from pliant.methods.mixture_of_depths.ops.mod_block import flops

# Under TRITON_INTERPRET=1 kernels run as Python on the CPU, and there is nothing to capture;
# PyTorch's function of this name refuses them before 2.13.
INTERPRETED = not isinstance(pool, JITFunction)
wrap_triton: Any = (lambda kernel: kernel) if INTERPRETED else torch.library.wrap_triton

# Sizes follow from what one processor of a GPU can hold. None has been tuned on a GPU.
THREADS = 128  # of a program
PROGRAMS = 128  # that read a feature map between them; an H200 has 132 processors
TILE = 2048  # values of a feature map that a program holds at a time
SMALL_SELECTOR = 2**14  # weights of its second layer that every program can read for itself


@triton_op("pliant::mod_block_triton", mutates_args=())
def mod_block_triton(
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
    order: str,
) -> Tensor:
    """The block, out of place; its arguments are those of ``pliant::mod_block_``, without `fusion`.

    They stand here in full, because PyTorch 2.11 takes an operator's schema from nowhere else.
    """
    out = torch.empty_like(x)
    core = [weight1, bias1, weight2, bias2, weight3, bias3]
    _launch(x, out, down, up, core, dilation, order, inplace=False)
    return out


@triton_op("pliant::mod_block_triton_", mutates_args=("x",))
def mod_block_triton_(
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
    order: str,
) -> None:
    """The block, in place: only the first k channels are written."""
    batch, k, positions = x.shape[0], weight1.shape[1], x.shape[2] * x.shape[3]
    along = (1, k) if x.stride(1) == 1 else (positions, 1)  # as they lie in x
    kept = x.new_empty_strided((batch, k, positions), (k * positions, *along))
    core = [weight1, bias1, weight2, bias2, weight3, bias3]
    _launch(x, kept, down, up, core, dilation, order, inplace=True)


def position_step(x: Tensor) -> int:
    """Values from one position of `x` to the next, row after row; 0 where they are not even.

    Example:
        >>> x = torch.empty(1, 3, 4, 5)
        >>> position_step(x), position_step(x[..., :4]), position_step(x[..., :1])
        (1, 0, 5)
    """
    height, width = x.shape[2:]
    if width == 1:
        return x.stride(2)
    return x.stride(3) if height == 1 or x.stride(2) == width * x.stride(3) else 0


def _launch(
    x: Tensor,
    other: Tensor,
    down: Tensor,
    up: Tensor,
    core: Sequence[Tensor | None],
    dilation: int,
    order: str,
    inplace: bool,
) -> None:
    """Fill `other`: with the first k channels of `x` if `inplace`, else with the result."""
    batch, channels, height, width = x.shape
    hidden, positions = down.shape[1], height * width
    given = [t for t in core if t is not None]
    inner, k = given[0].shape[:2]
    x_strides = (x.stride(0), x.stride(1), position_step(x))
    step = other.stride(2) if inplace else position_step(other)
    other_strides = (other.stride(0), other.stride(1), step)
    up_strides = (up.stride(0), up.stride(1))

    # Tiles are long in the direction in which values lie side by side: channels or positions.
    block_c = min(64, power(channels))
    if x.stride(1) != 1:
        block_c = TILE // (power(min(positions, 256)) if isinstance(positions, int) else 256)
    blocks = -(-channels // block_c)
    splits = sym_max(1, sym_min(PROGRAMS // (blocks * batch), -(-positions // 16)))
    share = -(-positions // (16 * splits)) * 16  # in whole sixteens, which load in one go
    parts = blocks * -(-positions // share)
    partial = torch.empty((batch, parts, hidden), dtype=torch.float32, device=x.device)
    wrap_triton(pool)[(batch * parts,)](
        x, other, partial, down, channels, k, positions, share, hidden,
        *x_strides, *other_strides, down.stride(0), down.stride(1),
        INPLACE=inplace, BLOCK_C=block_c, BLOCK_P=TILE // block_c,
        BLOCK_H=min(power(hidden), TILE // block_c),
    )  # fmt: skip

    scores, ranked, block_c = partial, channels * hidden > SMALL_SELECTOR, max(16, power(channels))
    block_h = min(power(hidden), 64 if ranked else max(1, 4 * TILE // block_c))
    if ranked:
        scores = torch.empty((batch, channels), dtype=torch.float32, device=x.device)
        wrap_triton(rank)[(batch * -(-channels // 32),)](
            partial, up, scores, channels, hidden, parts, *up_strides,
            BLOCK_C=32, BLOCK_H=block_h, BLOCK_T=32,
        )  # fmt: skip

    block_k, block_p, warps = core_tile(batch, positions, k, inner)
    tiles = -(-positions // block_p)
    given = [_even(t) for t in given]
    taps = [n for t in given if t.dim() == 4 and t.shape[2] == 3 for n in (t.stride(1), t.stride(3))]
    sizes = (
        channels, k, hidden, parts, height, width, tiles, dilation, *up_strides, *x_strides, *other_strides
    )  # fmt: skip
    how: dict[str, Any] = {"INPLACE": inplace, "RANKED": ranked, "BY_INDEX": order == "index"}
    how |= {"BLOCK_C": block_c, "BLOCK_K": block_k, "BLOCK_P": block_p, "BLOCK_H": block_h, "BLOCK_T": 32}
    how |= {} if INTERPRETED else {"num_warps": warps}
    if len(given) == 6:
        wrap_triton(bottleneck)[(batch * tiles,)](
            x, other, scores, up, *given, *sizes, inner, *taps, BLOCK_W=power(inner), **how
        )
    else:
        wrap_triton(basic)[(batch * tiles,)](x, other, scores, up, *given, *sizes, *taps, **how)


def core_tile(batch: Any, positions: Any, k: int, inner: int) -> tuple[int, int, int]:
    """Channels and positions that a program of the core holds, and its warps of 32 threads.

    At least a position for each thread and inner channel, so that none has to wait for
    another's sum; more where there are more positions than programs are of use; and no more
    than its registers hold. Graphs for any batch or size get the least.

    Example:
        >>> core_tile(1, 56 * 56, 4, 1), core_tile(128, 56 * 56, 4, 1), core_tile(1, 7 * 7, 32, 8)
        ((4, 128, 4), (4, 128, 4), (32, 16, 4))
    """
    block_k = max(2, power(k))  # Triton before 3.7 makes a scalar of the best one
    values = block_k * power(inner)
    least = max(16, THREADS // power(inner))
    whole = isinstance(batch, int) and isinstance(positions, int)
    wanted = power(batch * positions // (2 * PROGRAMS)) if whole else least
    block_p = max(least, min(THREADS, wanted, 2 * TILE // values))
    if whole:
        block_p = max(16, min(block_p, power(positions)))
    return block_k, block_p, 4 if values * block_p <= 4 * TILE else 8


def power(n: int) -> int:
    """The next power of two.

    Example:
        >>> power(1), power(5), power(8)
        (1, 8, 8)
    """
    return 1 << max(0, n - 1).bit_length()


def _even(tensor: Tensor) -> Tensor:
    """`tensor` with its values side by side; a 3x3 may have them in either memory format."""
    last = tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last)
    return tensor if last else tensor.contiguous()


# Their arguments begin as those of the operator for the CPU, and so do their counts.
register_flop_formula(torch.ops.pliant.mod_block_triton)(flops)
register_flop_formula(torch.ops.pliant.mod_block_triton_)(flops)
