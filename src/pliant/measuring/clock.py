"""The one clock of pliant's latencies: `torch.utils.benchmark.Timer`, on images of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Clock = Callable[[int], float]  # from calls to the mean seconds of one


def clock(run: Callable[[Tensor], Any], images: Tensor, threads: int) -> Clock:
    """What times `run` on `images`; so many calls are queued and, on a GPU, awaited together.

    Before each time two calls or more warm up. Gradients are off, and PyTorch's pool has
    so many threads while it runs.

    Example:
        >>> clock(torch.sum, torch.ones(3), threads=1)(10) > 0
        True
    """
    from torch.utils.benchmark import Timer  # on use: it looks for compilers as it loads

    timer = Timer("run(images)", globals={"run": run, "images": images}, num_threads=threads)

    def seconds(calls: int) -> float:
        with torch.inference_mode():
            return float(timer.timeit(calls).mean)

    return seconds


def warm(timed: Clock) -> float:
    """Seconds of one call, after some that warm up (and compile)."""
    timed(1)
    return timed(1)
