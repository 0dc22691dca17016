"""Which form of a mixed convolution is faster: the measurements behind ``form="auto"``.

Both forms of `pliant.methods.condconv.mixing` are timed in turn (A B A B ...) for shapes over batch,
spatial size, channels, experts and kind of kernel, in inference and in training. The
rows are ``results/condconv-forms-DEVICE.csv``; `pliant.methods.condconv.mixing.faster_form` is
fitted to them, and a test holds it to them.

Shapes: x [B, C, n, n], weight [E, C, C/g, k, k], routing [B, E]; strides of 1, the
output as large as the input. A 1x1 kernel at one position is a linear layer.
"""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from pliant.measuring.clock import clock, race
from pliant.measuring.latency import median, spread
from pliant.methods.condconv.mixing import (
    Form,
    Geometry,
    conditional_conv2d,
    conditional_linear,
    faster_form,
)
from pliant.provenance import provenance
from pliant.records import Origin, read_records, write_records

FORMS: tuple[Form, ...] = ("fused", "experts")
KINDS = ("1x1", "3x3", "depthwise")
BATCHES = (1, 2, 4, 8, 16, 32, 64)
EXPERTS = (2, 4, 8, 16, 32)
# Spatial sizes, and channels that networks have there.
WIDTHS = {1: (256, 1024), 4: (128, 512), 7: (128, 512), 14: (64, 256), 28: (32,), 56: (16,)}
# Shapes beyond these take too long, or too much memory, to be measured in minutes.
MOST_WORK = {"cpu": 4e8, "cuda": 200e9}
MOST_VALUES = {"cpu": 2**23, "cuda": 2**28}


@dataclass(frozen=True)
class Case:
    """A shape, and whether gradients are asked for."""

    kind: str
    size: int
    channels: int
    experts: int
    batch: int
    training: bool

    @property
    def weight(self) -> tuple[int, int, int, int, int]:
        """Shape of the experts' kernels.

        Example:
            >>> Case("depthwise", 7, 64, 4, 1, False).weight
            (4, 64, 1, 3, 3)
        """
        side = 1 if self.kind == "1x1" else 3
        inputs = 1 if self.kind == "depthwise" else self.channels
        return self.experts, self.channels, inputs, side, side

    @property
    def values(self) -> int:
        """Of the kernels that the fused form mixes."""
        return self.batch * math.prod(self.weight[1:])

    @property
    def work(self) -> int:
        """Multiply-accumulates of the experts form, those of slow kinds more than once."""
        slowness = (3 if self.training else 1) * (60 if self.kind == "depthwise" else 1)
        return self.values * self.experts * self.size**2 * slowness


@dataclass(frozen=True, kw_only=True)
class FormTimes(Origin):
    """One row: both forms of one case, milliseconds a call, medians over rounds.

    Attributes:
        kind: ``1x1``, ``3x3`` or ``depthwise`` (3x3).
        size: height and width, of input and output.
        channels: C, in and out.
        experts: E.
        batch: B.
        training: with the backward pass, to input, weights and routing.
        device: ``cpu`` or ``cuda``.
        threads: of PyTorch's pool.
        rounds: rounds that were timed.
        fused_ms: median time of the fused form.
        fused_iqr_ms: its interquartile range.
        experts_ms: median time of the experts form.
        experts_iqr_ms: its interquartile range.
        ratio: the experts form's time over the fused one's, in the same round; median.
        ratio_iqr: its interquartile range.
    """

    kind: str
    size: int
    channels: int
    experts: int
    batch: int
    training: bool
    device: str
    threads: int
    rounds: int
    fused_ms: float
    fused_iqr_ms: float
    experts_ms: float
    experts_iqr_ms: float
    ratio: float
    ratio_iqr: float

    @property
    def case(self) -> Case:
        """What was timed."""
        return Case(self.kind, self.size, self.channels, self.experts, self.batch, self.training)

    @property
    def slowdown(self) -> float:
        """Time of the form that `faster_form` says, over that of the faster one."""
        said = faster_form(self.size**2, self.case.weight, self.batch)
        return max(1.0, self.ratio if said == "experts" else 1 / self.ratio)


def cases(device: str = "cpu") -> list[Case]:
    """All shapes that are small enough for a device, in an order of no meaning.

    A run that is stopped early has thus seen something of everything.

    Example:
        >>> Case("3x3", 7, 128, 2, 1, True) in cases()
        True
    """
    widths = [(size, channels) for size, several in WIDTHS.items() for channels in several]
    product = itertools.product(KINDS, widths, EXPERTS, BATCHES, (False, True))
    every = [Case(k, size, channels, e, b, t) for k, (size, channels), e, b, t in product]
    # At one position, what a 3x3 kernel sees is padding but for its centre.
    every = [c for c in every if c.kind == "1x1" or c.size > 1]
    small = [c for c in every if c.work <= MOST_WORK[device] and c.values <= MOST_VALUES[device]]
    random.Random(0).shuffle(small)
    return small


def measure_forms(
    shapes: Iterable[Case],
    *,
    device: str = "cpu",
    threads: int = 1,
    rounds: int = 5,
    min_run_time: float = 0.005,
    max_run_time: float | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[FormTimes]:
    """Time both forms of each case.

    Args:
        shapes: what to time.
        device: ``cpu`` or ``cuda``.
        threads: of PyTorch's pool.
        rounds: how often each form is timed, in turn.
        min_run_time: seconds of one form in one round, at least.
        max_run_time: seconds after which no further case begins.
        progress: called with cases done, cases in all, and what comes next.

    Returns:
        A row for each case that was timed.

    Example:
        >>> rows = measure_forms([Case("1x1", 7, 8, 2, 1, False)], rounds=1, min_run_time=0)
        >>> rows[0].case.channels, rows[0].ratio > 0
        (8, True)
    """
    shapes = list(shapes)
    origin = provenance(device)
    start = time.monotonic()
    found = []
    for done, case in enumerate(shapes):
        if max_run_time is not None and time.monotonic() - start >= max_run_time:
            break
        if progress is not None:
            progress(done, len(shapes), f"{case.kind}, {case.channels} channels")
        gpus = [torch.device(device)] if device == "cuda" else []
        with torch.random.fork_rng(gpus):
            torch.manual_seed(0)
            calls = {form: _call(case, form, device) for form in FORMS}
        clocks = {form: clock(call, threads, gradients=case.training) for form, call in calls.items()}
        times = race(clocks, rounds, min_run_time)
        fused, experts = times["fused"], times["experts"]
        ratios = [b / a for a, b in zip(fused, experts, strict=True)]
        found.append(
            FormTimes(
                kind=case.kind,
                size=case.size,
                channels=case.channels,
                experts=case.experts,
                batch=case.batch,
                training=case.training,
                device=device,
                threads=threads,
                rounds=rounds,
                fused_ms=1000 * (median(fused) or 0.0),
                fused_iqr_ms=1000 * (spread(fused) or 0.0),
                experts_ms=1000 * (median(experts) or 0.0),
                experts_iqr_ms=1000 * (spread(experts) or 0.0),
                ratio=median(ratios) or 0.0,
                ratio_iqr=spread(ratios) or 0.0,
                **origin,
            )
        )
    return found


def _call(case: Case, form: Form, device: str) -> Callable[[], object]:
    x = torch.randn(case.batch, case.channels, case.size, case.size, device=device)
    weight = torch.randn(case.weight, device=device)
    routing = torch.rand(case.batch, case.experts, device=device)
    side = case.weight[-1]
    depthwise = case.kind == "depthwise"
    padding = (side // 2, side // 2)
    geometry = Geometry(padding=padding, groups=case.channels if depthwise else 1)
    if case.size == 1:
        x, weight = x.flatten(1), weight.flatten(2)
    inputs = (x, weight, routing)

    def forward() -> Tensor:
        if case.size == 1:
            return conditional_linear(*inputs, None, form)
        return conditional_conv2d(*inputs, None, geometry, form)

    def train() -> None:
        y = forward()
        torch.autograd.grad(y, inputs, torch.ones_like(y))

    if not case.training:
        return forward
    for tensor in inputs:
        tensor.requires_grad_()
    return train


def write_forms(path: str | Path, rows: Sequence[FormTimes]) -> None:
    """Write rows to a CSV file, sorted; the file is replaced whole or not at all."""
    ordered = sorted(
        rows, key=lambda r: (r.threads, r.kind, r.training, r.size, r.channels, r.experts, r.batch)
    )
    write_records(path, FormTimes, ordered, number=".4g")


def read_forms(path: str | Path) -> list[FormTimes]:
    """Rows that `write_forms` wrote.

    Raises:
        ValueError: the file has other columns.
    """
    return read_records(path, FormTimes, called="times of both forms")


def run_forms(
    device: str = "cpu",
    results: str | Path = "results",
    quick: bool = False,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[FormTimes]:
    """Time both forms over all shapes; write ``condconv-forms-DEVICE.csv`` in `results`.

    On a CPU with 1 thread, and some of the shapes with 2. At most ten minutes; of cases that
    are not reached in that time, the rows that the file has stay, each with its own origin.

    Args:
        device: ``cpu`` or ``cuda``.
        results: folder of the file; made if missing.
        quick: a rehearsal of seconds; its file is ``condconv-forms-DEVICE-quick.csv``.
        progress: as for `measure_forms`.

    Returns:
        The rows of this run.

    Raises:
        ValueError: another device, or one that is missing.
    """
    if device not in MOST_WORK:
        raise ValueError(f"no benchmark for device {device!r}; there is one for {', '.join(MOST_WORK)}")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda' is not available: PyTorch sees no GPU; give cpu")
    shapes = cases(device)
    chosen = shapes[:20] if quick else shapes
    rows = measure_forms(chosen, device=device, max_run_time=540, progress=progress)
    if device == "cpu":
        some = chosen[::6]
        rows += measure_forms(some, device=device, threads=2, max_run_time=60, progress=progress)
    path = Path(results) / f"condconv-forms-{device}{'-quick' if quick else ''}.csv"
    timed = {(row.case, row.threads) for row in rows}
    before = read_forms(path) if path.exists() else []
    write_forms(path, [*rows, *(row for row in before if (row.case, row.threads) not in timed)])
    return rows
