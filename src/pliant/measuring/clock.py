"""The one clock of pliant's times, and the one loop that asks several clocks in turn.

Engines keep threads of their own, which spin on after a call: ONNX Runtime's for tens of
milliseconds. They take the cores from the network that is called next. So a clock begins and ends only
when its process computes nothing any more (`settle`), and throws the first calls away. What was timed
before does not show.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch

Clock = Callable[[int], float]  # from calls to the mean seconds of one
Name = TypeVar("Name")

WARM_UP = 2  # calls before each time, at most
WARM_ENOUGH = 0.25  # seconds that suffice: at a large batch one call is warm
STILL = 0.005  # seconds in which a process that computes nothing uses next to no processor time
LOOKS = 100  # at most: an engine whose threads never sleep is timed all the same
FEWEST_ROUNDS = 3  # that a limit of time leaves


def settle() -> None:
    """Wait until no thread of this process computes, at most half a second.

    Example:
        >>> settle()
    """
    for _ in range(LOOKS):
        before = time.process_time()
        time.sleep(STILL)
        if time.process_time() - before < STILL / 5:
            return


def clock(call: Callable[[], object], threads: int, *, gradients: bool = False) -> Clock:
    """Make the clock of one function; its calls are queued and, on a GPU, awaited together.

    Before each time the clock waits for the threads of other networks (`settle`), and calls the
    function twice, or once if that takes a quarter of a second: another network may have had the caches.
    After it the clock waits for the function's own threads, because the next network may run in another
    process.

    Args:
        call: what is timed, for example a network with its images.
        threads: threads of PyTorch's pool while it runs.
        gradients: whether autograd records, as in training.

    Example:
        >>> clock(lambda: torch.ones(3).sum(), threads=1)(10) > 0
        True
    """
    from torch.utils import benchmark  # on use: it looks for compilers as it loads

    now = benchmark.timer  # waits for a GPU

    def seconds(calls: int) -> float:
        settle()
        with torch.inference_mode(not gradients), benchmark.set_torch_threads(threads):
            start = now()
            for _ in range(WARM_UP):
                call()
                if now() - start >= WARM_ENOUGH:
                    break
            start = now()
            for _ in range(calls):
                call()
            mean = float(now() - start) / calls
        settle()
        return mean

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


def turns(several: int, rounds: int, max_run_time: float | None = None) -> Iterator[tuple[int, int]]:
    """Take several in turn, round after round, so that a drift of the machine meets all alike.

    Args:
        several: how many there are.
        rounds: how often each has its turn.
        max_run_time: seconds after which no further round begins, if there have been three.

    Yields:
        The number of the round, and whose turn it is, both from 0.

    Example:
        >>> list(turns(2, rounds=2))
        [(0, 0), (0, 1), (1, 0), (1, 1)]
    """
    start = time.monotonic()
    for number in range(rounds):
        for one in range(several):
            yield number, one
        spent = time.monotonic() - start
        if max_run_time is not None and spent >= max_run_time and number + 1 >= FEWEST_ROUNDS:
            return


def race(
    clocks: Mapping[Name, Clock],
    rounds: int,
    min_run_time: float,
    *,
    max_run_time: float | None = None,
    report: Callable[[int], object] | None = None,
) -> dict[Name, list[float]]:
    """Seconds of one call by each clock, all in turn, round after round (A B C A B C ...).

    Args:
        clocks: what times each, by name.
        rounds: how often each is timed; 0: not at all.
        min_run_time: seconds that one runs in one round, at least.
        max_run_time: seconds after which no further round begins, if there have been three.
        report: called with the number of each round before it begins.

    Example:
        >>> race({"a": lambda calls: 1.0, "b": lambda calls: 2.0}, rounds=3, min_run_time=0)
        {'a': [1.0, 1.0, 1.0], 'b': [2.0, 2.0, 2.0]}
    """
    calls = {name: calls_within(min_run_time, warm(timed)) for name, timed in clocks.items() if rounds}
    found: dict[Name, list[float]] = {name: [] for name in clocks}
    names = list(clocks)
    for number, one in turns(len(names), rounds, max_run_time):
        if one == 0 and report is not None:
            report(number)
        name = names[one]
        found[name].append(clocks[name](calls[name]))
    return found
