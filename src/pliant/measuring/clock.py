"""The one clock of pliant's latencies: PyTorch's, on images of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Clock = Callable[[int], float]  # from calls to the mean seconds of one

WARM_UP = 2  # calls before each time, at most
WARM_ENOUGH = 0.25  # seconds that suffice: at a large batch one call is warm


def clock(run: Callable[[Tensor], Any], images: Tensor, threads: int) -> Clock:
    """What times `run` on `images`; so many calls are queued and, on a GPU, awaited together.

    Before each time two calls warm up, or one if it takes a quarter of a second: another network
    may have had the caches. Gradients are off, and PyTorch's pool has so many threads while it runs.

    Example:
        >>> clock(torch.sum, torch.ones(3), threads=1)(10) > 0
        True
    """
    from torch.utils import benchmark  # on use: it looks for compilers as it loads

    now = benchmark.timer  # waits for a GPU

    def seconds(calls: int) -> float:
        with torch.inference_mode(), benchmark.set_torch_threads(threads):
            start = now()
            for _ in range(WARM_UP):
                run(images)
                if now() - start >= WARM_ENOUGH:
                    break
            start = now()
            for _ in range(calls):
                run(images)
            return float(now() - start) / calls

    return seconds


def warm(timed: Clock) -> float:
    """Seconds of one call, after some that warm up (and compile)."""
    seconds = timed(1)
    return seconds if seconds >= WARM_ENOUGH else timed(1)


def calls_within(least: float, seconds: float) -> int:
    """How many calls, of so many seconds each, take the least time.

    Example:
        >>> calls_within(0.1, 0.03), calls_within(0.1, 2.0)
        (4, 1)
    """
    return max(1, math.ceil(least / seconds))


def race(clocks: Sequence[Clock], rounds: int, min_run_time: float) -> list[list[float]]:
    """Seconds of one call by each clock, all in turn, round after round (A B C A B C ...).

    Args:
        clocks: what times each.
        rounds: how often each is timed; 0: not at all.
        min_run_time: seconds that one runs in one round, at least.

    Example:
        >>> race([lambda calls: 1.0, lambda calls: 2.0], rounds=3, min_run_time=0)
        [[1.0, 1.0, 1.0], [2.0, 2.0, 2.0]]
    """
    calls = [calls_within(min_run_time, warm(timed)) for timed in clocks if rounds]
    turns = [[timed(n) for timed, n in zip(clocks, calls, strict=True)] for _ in range(rounds)]
    return [[turn[i] for turn in turns] for i in range(len(clocks))]
