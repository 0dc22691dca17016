"""Timing in rounds: everything in turn in each round, so that a drift of the machine meets all alike."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping

from pliant.measuring.running import FEWEST_ROUNDS


def in_turn(
    calls: Mapping[str, Callable[[], object]],
    *,
    threads: int,
    rounds: int,
    min_run_time: float,
    max_run_time: float | None = None,
    report: Callable[[int], None] | None = None,
) -> dict[str, list[float]]:
    """Seconds of one call of each function, by round.

    Args:
        calls: functions by name; each is called twice before it is timed.
        threads: of PyTorch's pool.
        rounds: how often each is timed.
        min_run_time: seconds that one function runs in one round, at least.
        max_run_time: seconds after which no further round begins, if there have been three.
        report: called with the number of each round before it begins.

    Example:
        >>> times = in_turn({"a": list, "b": dict}, threads=1, rounds=2, min_run_time=0)
        >>> {name: len(seconds) for name, seconds in times.items()}
        {'a': 2, 'b': 2}
    """
    from torch.utils.benchmark import Timer  # on use: it looks for compilers as it loads

    timers: dict[str, tuple[Timer, int]] = {}
    for name, call in calls.items():
        timer = Timer("call()", globals={"call": call}, num_threads=threads)
        timer.timeit(1)  # which is two calls
        timers[name] = timer, max(1, math.ceil(min_run_time / timer.timeit(1).mean))
    found: dict[str, list[float]] = {name: [] for name in calls}
    start = time.monotonic()
    for number in range(rounds):
        spent = time.monotonic() - start
        if max_run_time is not None and spent >= max_run_time and number >= FEWEST_ROUNDS:
            break
        if report is not None:
            report(number)
        for name, (timer, often) in timers.items():
            found[name].append(timer.timeit(often).mean)
    return found
