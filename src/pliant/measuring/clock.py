"""The one clock of pliant's latencies: PyTorch's, on images of its own."""

from __future__ import annotations

from collections.abc import Callable
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
