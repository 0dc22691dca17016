"""Rows of training steps: `StepCost`, and as a table to read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pliant.records import Origin
from pliant.tables import UNDECIDED, WHY_UNDECIDED, markdown, with_spread


@dataclass(frozen=True, kw_only=True)
class StepCost(Origin):
    """What one kind of training step takes: forward, loss, backward, SGD with momentum.

    Times are medians over rounds; a spread (``_iqr``) is the interquartile range. Ratios and the
    tax are taken within each round, then their median. None: does not apply.

    Attributes:
        network: the network that is looked at: with Mixture-of-Depths blocks, conditional
            convolutions, or adaptive depth.
        step: what trains. ``plain``: the network without the method; ``network``: it, as it is;
            ``blocks removed``: without its Mixture-of-Depths blocks; ``first k``: those blocks
            without selection; ``network, as written``: the network in plain operators, without
            the gradients in fewer passes; ``network, fewer passes``: those gradients, where
            ``network`` had native operators (rows of commits up to the tag ``before-house``);
            ``fused`` and ``experts``: the two forms of a conditional convolution;
            ``super alone`` and ``base alone``: a plain network of either depth;
            ``specialize`` and ``joint``: the adaptive network at both depths, by that objective.
        batch: images of a step.
        input_size: channels, height, width, as ``3x32x32``.
        device: ``cpu`` or ``cuda``.
        dtype: ``float32``, or ``bfloat16`` by autocast, as recipes train.
        channels_last: memory format of network and images.
        threads: of PyTorch's pool.
        rounds: rounds that were timed.
        median_ms: time of a step.
        iqr_ms: its spread.
        ratio: time over that of ``plain``, or of ``super alone``.
        ratio_iqr: its spread.
        tax: of a Mixture-of-Depths network: time over that of ``blocks removed``, minus one.
        tax_iqr: its spread.
        both_ratio: of an adaptive network: time over that of ``super alone`` and ``base alone``
            together.
        both_ratio_iqr: its spread.
        peak_mb: most memory of tensors that a step adds, in 1e6 bytes
            (`research.bench.memory.peak_memory`).
    """

    network: str
    step: str
    batch: int
    input_size: str
    device: str
    dtype: str = "float32"
    channels_last: bool = False
    threads: int = 1
    rounds: int = 0
    median_ms: float | None = None
    iqr_ms: float | None = None
    ratio: float | None = None
    ratio_iqr: float | None = None
    tax: float | None = None
    tax_iqr: float | None = None
    both_ratio: float | None = None
    both_ratio_iqr: float | None = None
    peak_mb: float | None = None


_TEXT = ("network", "step")
_HEADINGS = (
    *(*_TEXT, "batch", "dtype", "time, ms", "over plain"),
    *("MoD tax", "over both depths alone", "peak, MB"),
)


def steps_markdown(rows: Sequence[StepCost]) -> str:
    """Rows as a Markdown table, under a line of where they were measured."""
    where = dict.fromkeys(
        f"{r.hardware} · threads {r.threads} · torch {r.torch} · "
        f"commit {r.short_commit} · measured {r.date[:10]}"
        for r in rows
    )
    lines = [
        (
            *(r.network, r.step, str(r.batch), r.dtype),
            with_spread(r.median_ms, r.iqr_ms),
            with_spread(r.ratio, r.ratio_iqr, 2),
            with_spread(_percent(r.tax), _percent(r.tax_iqr), unit=" %", over=100),
            with_spread(r.both_ratio, r.both_ratio_iqr, 2),
            with_spread(r.peak_mb, None),
        )
        for r in rows
    ]
    doubt = [WHY_UNDECIDED] * any(UNDECIDED in line for line in lines)
    return "\n".join([*where, *doubt, "", markdown(_HEADINGS, lines, (*_TEXT, "dtype"))])


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share
