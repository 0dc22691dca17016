"""The Triton kernels of the Mixture-of-Depths block; `triton_mod` launches them.

Nothing waits for another program, nothing is added atomically, and all sizes follow from
shapes: results repeat to the bit, and CUDA graphs can hold the launches.

Shapes in this file, and a core's layers as `cores` builds them, norms folded::

    B  batch               x        [B, C, P]  feature map, its positions strided evenly
    C  channels            partial  [B, T, h]  shares of the selector's hidden layer, float32
    P  positions, H * W    logits   [B, C]     the channels' relevance, float32
    k  processed channels  kept     [B, k, P]  the first k channels of x, before they change
    w  core's width        down     [C, h]     the selector's first layer
    h  hidden units        up       [h, C]     its second
    T  programs a sample   BLOCK_*  size of a tile, a power of two
"""

# Triton reads the bodies; its types are not Python's.
# mypy: disallow-untyped-defs=False, disallow-incomplete-defs=False
# mypy: disallow-untyped-decorators=False, disallow-untyped-calls=False

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pool(
    x, kept, partial, down,
    channels, k, positions, share, hidden,
    x_sample, x_channel, x_position, kept_sample, kept_channel, kept_position, down_channel, down_unit,
    INPLACE: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Read x once: pool it, apply the selector's first layer, and copy channels.

    A program takes BLOCK_C channels at `share` positions of one sample. The first layer is
    linear in the means, so each program can add up its own part of every hidden unit.
    The first k channels are copied to `kept`; unless INPLACE all are, and it is the result.
    """
    blocks = tl.cdiv(channels, BLOCK_C)
    parts = tl.cdiv(positions, share) * blocks
    program = tl.program_id(0)
    sample = (program // parts).to(tl.int64)
    part = program % parts
    lowest = (part % blocks) * BLOCK_C
    channel = lowest + tl.arange(0, BLOCK_C)
    begin = (part // blocks) * share
    end = tl.minimum(begin + share, positions)
    x += sample * x_sample
    kept += sample * kept_sample
    total = tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for first in range(begin, end, BLOCK_P):
        position = first + tl.arange(0, BLOCK_P)
        inside = (position < end)[:, None] & (channel < channels)[None, :]
        value = tl.load(x + position[:, None] * x_position + channel[None, :] * x_channel, inside, 0.0)
        there = kept + position[:, None] * kept_position + channel[None, :] * kept_channel
        if not INPLACE:
            tl.store(there, value, inside)
        elif lowest < k:
            tl.store(there, value, inside & (channel < k)[None, :])
        total += value.to(tl.float32)
    mean = tl.sum(total, 0) / positions
    partial += program.to(tl.int64) * hidden
    for first in range(0, hidden, BLOCK_H):
        unit = first + tl.arange(0, BLOCK_H)
        inside = (unit < hidden)[:, None] & (channel < channels)[None, :]
        at = down + unit[:, None] * down_unit + channel[None, :] * down_channel
        weight = tl.load(at, inside, 0.0).to(tl.float32)
        tl.store(partial + unit, tl.sum(weight * mean[None, :], 1), unit < hidden)


@triton.jit
def rank(
    partial, up, logits,
    channels, hidden, parts, up_unit, up_channel,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The logits of BLOCK_C channels of one sample, where one program for all would take long."""
    blocks = tl.cdiv(channels, BLOCK_C)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    channel = (tl.program_id(0) % blocks) * BLOCK_C + tl.arange(0, BLOCK_C)
    partial += sample * parts * hidden
    value = _logits(
        partial, up, channel, channels, hidden, parts, up_unit, up_channel, BLOCK_C, BLOCK_H, BLOCK_T
    )
    tl.store(logits + sample * channels + channel, value, channel < channels)


@triton.jit
def bottleneck(
    x, other, scores, up, weight1, bias1, weight2, bias2, weight3, bias3,
    channels, k, hidden, parts, height, columns, tiles, dilation, up_unit, up_channel,
    x_sample, x_channel, x_position, other_sample, other_channel, other_position,
    width, weight2_channel, weight2_tap,
    INPLACE: tl.constexpr, RANKED: tl.constexpr, BY_INDEX: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Choose k channels, take them through 1x1, 3x3 and 1x1, weigh them, add them to the first k.

    A program takes BLOCK_P positions of one sample. Each recomputes the choice, which is
    cheaper than a launch, and the 1x1 at all nine taps, which is cheaper than passing
    it between threads: cores are narrow.

    With INPLACE `other` is `kept`, read in place of channels below k, which other programs write;
    without, `other` is the result. `scores` are `logits` if RANKED, else `partial`.
    """
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    position = (tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    x += sample * x_sample
    other += sample * other_sample
    index, score = _choose(
        scores, up, sample, channels, k, hidden, parts, up_unit, up_channel,
        RANKED, BY_INDEX, BLOCK_C, BLOCK_K, BLOCK_H, BLOCK_T,
    )  # fmt: skip
    place = tl.arange(0, BLOCK_K)
    source, step = _source(
        x, other, index, k, x_channel, x_position, other_channel, other_position, INPLACE
    )
    inner = tl.arange(0, BLOCK_W)
    to_inner = (place < k)[:, None] & (inner < width)[None, :]
    first = tl.load(weight1 + inner[None, :] * k + place[:, None], to_inner, 0.0).to(tl.float32)
    shift1 = tl.load(bias1 + inner, inner < width, 0.0).to(tl.float32)
    hidden2 = tl.zeros([BLOCK_W, BLOCK_P], tl.float32)
    for tap in tl.static_range(9):
        row = position // columns + (tap // 3 - 1) * dilation
        column = position % columns + (tap % 3 - 1) * dilation
        inside = (row >= 0) & (row < height) & (column >= 0) & (column < columns)
        at = source[:, None] + (row * columns + column)[None, :] * step[:, None]
        value = tl.load(at, (place < k)[:, None] & inside[None, :], 0.0).to(tl.float32)
        value = _relu(_product(first, value) + shift1[:, None])
        value = tl.where(inside[None, :], value, 0.0)  # the padding is of zeros, not of relu(bias)
        square = (inner < width)[:, None] & (inner < width)[None, :]
        at = weight2 + inner[None, :] * (width * 9) + inner[:, None] * weight2_channel
        hidden2 += _product(tl.load(at + tap * weight2_tap, square, 0.0).to(tl.float32), value)
    shift2 = tl.load(bias2 + inner, inner < width, 0.0).to(tl.float32)
    hidden2 = _relu(hidden2 + shift2[:, None])
    from_inner = (inner < width)[:, None] & (place < k)[None, :]
    last = tl.load(weight3 + place[None, :] * width + inner[:, None], from_inner, 0.0).to(tl.float32)
    shift3 = tl.load(bias3 + place, place < k, 0.0).to(tl.float32)
    y = _product(last, hidden2) + shift3[:, None]
    _fuse(
        x, other, y * score[:, None], place, position, k, height * columns,
        x_channel, x_position, other_channel, other_position, INPLACE,
    )  # fmt: skip


@triton.jit
def basic(
    x, other, scores, up, weight1, bias1, weight2, bias2,
    channels, k, hidden, parts, height, columns, tiles, dilation, up_unit, up_channel,
    x_sample, x_channel, x_position, other_sample, other_channel, other_position,
    weight1_channel, weight1_tap, weight2_channel, weight2_tap,
    INPLACE: tl.constexpr, RANKED: tl.constexpr, BY_INDEX: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr,
    BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """As `bottleneck`, with two 3x3 for a core; the first is recomputed at the nine taps of the second."""
    sample = (tl.program_id(0) // tiles).to(tl.int64)
    position = (tl.program_id(0) % tiles) * BLOCK_P + tl.arange(0, BLOCK_P)
    x += sample * x_sample
    other += sample * other_sample
    index, score = _choose(
        scores, up, sample, channels, k, hidden, parts, up_unit, up_channel,
        RANKED, BY_INDEX, BLOCK_C, BLOCK_K, BLOCK_H, BLOCK_T,
    )  # fmt: skip
    place = tl.arange(0, BLOCK_K)
    source, step = _source(
        x, other, index, k, x_channel, x_position, other_channel, other_position, INPLACE
    )
    square = (place < k)[:, None] & (place < k)[None, :]
    at1 = weight1 + place[None, :] * (k * 9) + place[:, None] * weight1_channel
    at2 = weight2 + place[None, :] * (k * 9) + place[:, None] * weight2_channel
    shift1 = tl.load(bias1 + place, place < k, 0.0).to(tl.float32)
    y = tl.zeros([BLOCK_K, BLOCK_P], tl.float32)
    for outer in range(9):
        row = position // columns + (outer // 3 - 1) * dilation
        column = position % columns + (outer % 3 - 1) * dilation
        used = (row >= 0) & (row < height) & (column >= 0) & (column < columns)
        between = tl.zeros([BLOCK_K, BLOCK_P], tl.float32)
        for tap in tl.static_range(9):
            row1 = row + (tap // 3 - 1) * dilation
            column1 = column + (tap % 3 - 1) * dilation
            inside = used & (row1 >= 0) & (row1 < height) & (column1 >= 0) & (column1 < columns)
            at = source[:, None] + (row1 * columns + column1)[None, :] * step[:, None]
            value = tl.load(at, (place < k)[:, None] & inside[None, :], 0.0)
            weight = tl.load(at1 + tap * weight1_tap, square, 0.0)
            between += _product(weight.to(tl.float32), value.to(tl.float32))
        between = tl.where(used[None, :], _relu(between + shift1[:, None]), 0.0)
        weight = tl.load(at2 + outer * weight2_tap, square, 0.0)
        y += _product(weight.to(tl.float32), between)
    y += tl.load(bias2 + place, place < k, 0.0).to(tl.float32)[:, None]
    _fuse(
        x, other, y * score[:, None], place, position, k, height * columns,
        x_channel, x_position, other_channel, other_position, INPLACE,
    )  # fmt: skip


@triton.jit
def _logits(
    partial, up, channel, channels, hidden, parts, up_unit, up_channel,
    BLOCK_C: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """The hidden layer's parts summed, its ReLU, and the second layer's logits of some channels."""
    value = tl.zeros([BLOCK_C], tl.float32)
    for first in range(0, hidden, BLOCK_H):
        unit = first + tl.arange(0, BLOCK_H)
        shares = tl.zeros([BLOCK_T, BLOCK_H], tl.float32)
        for begin in range(0, parts, BLOCK_T):
            part = begin + tl.arange(0, BLOCK_T)
            inside = (part < parts)[:, None] & (unit < hidden)[None, :]
            shares += tl.load(partial + part[:, None] * hidden + unit[None, :], inside, 0.0)
        inside = (channel < channels)[:, None] & (unit < hidden)[None, :]
        at = up + channel[:, None] * up_channel + unit[None, :] * up_unit
        weight = tl.load(at, inside, 0.0).to(tl.float32)
        value += tl.sum(weight * _relu(tl.sum(shares, 0))[None, :], 1)
    return value


@triton.jit
def _choose(
    scores, up, sample, channels, k, hidden, parts, up_unit, up_channel,
    RANKED: tl.constexpr, BY_INDEX: tl.constexpr,
    BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_T: tl.constexpr,
):  # fmt: skip
    """Index and sigmoid score of the k best channels; zeros behind them.

    A logit and its channel travel as one number, so that a sort moves both: above, the
    logit's bits, turned so that they order as floats do and NaN comes first, as in torch.topk;
    below, the channel, so that of equal logits the one of the lower channel is taken.
    """
    channel = tl.arange(0, BLOCK_C)
    if RANKED:
        value = tl.load(scores + sample * channels + channel, channel < channels, 0.0)
    else:
        scores += sample * parts * hidden
        value = _logits(
            scores, up, channel, channels, hidden, parts, up_unit, up_channel, BLOCK_C, BLOCK_H, BLOCK_T
        )
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(value == 0.0, 0, bits)  # -0.0 ties with 0.0
    bits = tl.where(value != value, 0x7FC00000, bits)
    key = (_turned(bits).to(tl.int64) << 32) | (BLOCK_C - 1 - channel)
    key = tl.topk(tl.where(channel < channels, key, -0x8000000000000000), BLOCK_K)
    index = BLOCK_C - 1 - (key & 0xFFFFFFFF)
    bits = _turned((key >> 32).to(tl.int32))
    place = tl.arange(0, BLOCK_K)
    if BY_INDEX:
        key = (index << 32) | (bits.to(tl.int64) & 0xFFFFFFFF)
        key = tl.sort(tl.where(place < k, key, 0x7FFFFFFFFFFFFFFF))
        index = key >> 32
        bits = key.to(tl.int32)
    index = tl.where(place < k, index, 0).to(tl.int32)
    score = tl.sigmoid(bits.to(tl.float32, bitcast=True))
    return index, tl.where(place < k, score, 0.0)


@triton.jit
def _turned(bits):
    """Bits of a float as an integer of the same order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _source(
    x, other, index, k, x_channel, x_position, other_channel, other_position, INPLACE: tl.constexpr
):  # fmt: skip
    """Where each chosen channel begins, and the step between its positions."""
    source = x + index * x_channel
    step = tl.zeros_like(index) + x_position
    if INPLACE:
        source = tl.where(index < k, other + index * other_channel, source)
        step = tl.where(index < k, other_position, step)
    return source, step


@triton.jit
def _fuse(
    x, other, y, place, position, k, positions,
    x_channel, x_position, other_channel, other_position, INPLACE: tl.constexpr,
):  # fmt: skip
    """Add `y` to the first k channels, in float32, and round once."""
    inside = (place < k)[:, None] & (position < positions)[None, :]
    at = x + place[:, None] * x_channel + position[None, :] * x_position
    y += tl.load(at, inside, 0.0).to(tl.float32)
    if not INPLACE:
        at = other + place[:, None] * other_channel + position[None, :] * other_position
    tl.store(at, y.to(x.dtype.element_ty), inside)


@triton.jit
def _relu(value):
    """ReLU that keeps NaN, as PyTorch's does."""
    return tl.where(value < 0.0, 0.0, value)


@triton.jit
def _product(left, right):
    """Matrix product in float32, the left side transposed: [K, M] and [K, N] give [M, N].

    Summed along the first axis, which Triton spreads over threads last: a thread adds up on its own.
    """
    return tl.sum(left[:, :, None] * right[:, None, :], 0)
