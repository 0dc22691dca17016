"""What rows of an experiment allow one to say: paired differences, in plain words.

Two networks are compared seed by seed, because runs of one seed see the same images in the same
order. The interval is Student's, of the mean of these differences, at 95 %; where it holds zero
nothing has been shown, and with one seed nothing can be.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom. Beyond the last one it
# is used on: the interval is then a little too wide, never too narrow.
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip

BETTER, WORSE, UNDECIDED, ONE_SEED, MISSING = "better", "worse", "undecided", "one seed", "not run yet"


@dataclass(frozen=True)
class Paired:
    """Differences of two networks' accuracies, in points, one for each seed that both have.

    Example:
        >>> found = Paired((0.4, 0.5, 0.6))
        >>> found.n, round(found.mean, 2), [round(end, 2) for end in found.interval], found.verdict
        (3, 0.5, [0.25, 0.75], 'better')
        >>> Paired((0.4, -0.5, 0.6)).verdict, Paired((0.4,)).verdict, Paired(()).verdict
        ('undecided', 'one seed', 'not run yet')
    """

    differences: tuple[float, ...]

    @property
    def n(self) -> int:
        """How many seeds."""
        return len(self.differences)

    @property
    def mean(self) -> float:
        """Of the differences; NaN of none."""
        return statistics.fmean(self.differences) if self.differences else math.nan

    @property
    def error(self) -> float:
        """Standard error of the mean; infinite for fewer than two seeds."""
        return statistics.stdev(self.differences) / math.sqrt(self.n) if self.n > 1 else math.inf

    @property
    def interval(self) -> tuple[float, float]:
        """Student's, at 95 %; infinite for fewer than two seeds."""
        if self.n < 2:
            return -math.inf, math.inf
        reach = T95[min(self.n - 1, len(T95)) - 1] * self.error
        return self.mean - reach, self.mean + reach

    @property
    def verdict(self) -> str:
        """`BETTER` or `WORSE` where the interval does not hold zero, or why neither can be said."""
        if self.n < 2:
            return ONE_SEED if self.n else MISSING
        low, high = self.interval
        return BETTER if low > 0 else WORSE if high < 0 else UNDECIDED

    def __str__(self) -> str:
        """The figures behind a verdict."""
        if self.n < 2:
            return f"{self.mean:+.2f}, 1 seed" if self.n else MISSING
        low, high = self.interval
        return f"{self.mean:+.2f} ({low:+.2f} to {high:+.2f}), n = {self.n}"


def paired(one: Mapping[int, float], other: Mapping[int, float]) -> Paired:
    """Differences of two networks' accuracies by seed: `one` minus `other`.

    Example:
        >>> paired({0: 88.0, 1: 89.0}, {1: 88.5, 2: 87.0}).differences
        (0.5,)
    """
    return Paired(tuple(one[seed] - other[seed] for seed in sorted(one.keys() & other.keys())))


def sentence(one: str, other: str, found: Paired) -> str:
    """What can be said of two networks, with the figures.

    Example:
        >>> sentence("A", "B", Paired((-0.4, -0.5, -0.6)))
        'A is worse than B: -0.50 points, 95 % interval -0.75 to -0.25, paired over 3 seeds.'
        >>> sentence("A", "B", Paired((0.3,)))
        'Whether A or B is better cannot be said from one seed: +0.30 points.'
        >>> sentence("A", "B", Paired(()))
        'A against B: not run yet.'
    """
    if found.verdict == MISSING:
        return f"{one} against {other}: {MISSING}."
    if found.verdict == ONE_SEED:
        return f"Whether {one} or {other} is better cannot be said from one seed: {found.mean:+.2f} points."
    low, high = found.interval
    figures = (
        f"{found.mean:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}, paired over {found.n} seeds"
    )
    if found.verdict == UNDECIDED:
        return f"Between {one} and {other} nothing is decided: {figures}; the interval holds zero."
    return f"{one} is {found.verdict} than {other}: {figures}."


def answer(verdicts: Sequence[str]) -> str:
    """The short answer to a question "is it better?" that several comparisons bear on.

    Example:
        >>> answer(["better", "better"]), answer(["undecided", "worse"])
        ('Yes, in all 2 comparisons.', 'No: better in 0 of 2 comparisons, worse in 1, undecided in 1.')
        >>> answer(["undecided"]), answer(["not run yet"])
        ('Not shown: undecided in the one comparison.', 'Not run yet.')
    """
    total = len(verdicts)
    said = {kind: list(verdicts).count(kind) for kind in (BETTER, WORSE, UNDECIDED, ONE_SEED, MISSING)}
    if said[MISSING] == total:
        return "Not run yet."
    if total == 1:
        short = {BETTER: "Yes.", WORSE: "No, it is worse."}
        return short.get(verdicts[0], f"Not shown: {verdicts[0]} in the one comparison.")
    if said[BETTER] == total:
        return f"Yes, in all {total} comparisons."
    if said[WORSE] == total:
        return f"No, it is worse in all {total} comparisons."
    rest = [f"{kind} in {n}" for kind, n in list(said.items())[1:] if n]
    word = "In part" if said[BETTER] else "No" if said[WORSE] else "Not shown"
    return f"{word}: better in {said[BETTER]} of {total} comparisons, {', '.join(rest)}."


def mean_and_spread(values: Iterable[float], digits: int = 2) -> str:
    """Mean and sample standard deviation; of one value it alone, of none a dash.

    Example:
        >>> mean_and_spread([88.0, 89.0]), mean_and_spread([88.0]), mean_and_spread([])
        ('88.50 ± 0.71', '88.00', '-')
    """
    values = list(values)
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else mean


@dataclass(frozen=True)
class AtEqualTime:
    """A network held against what its time buys without it.

    Between two networks that take `fast` and `slow` of the baseline's time, the rival is the
    straight line: the accuracy that goes with the network's own time on it. A network that takes no
    longer than the fast one is held against that, one that takes as long as the slow one or longer
    against that.

    Attributes:
        time: of the network, over the baseline's.
        share: of the slow rival in the line at that time, in [0, 1].
        found: the network minus the line, by seed.
    """

    time: float
    share: float
    found: Paired


def at_equal_time(
    accuracy: Mapping[int, float],
    time: float,
    fast: tuple[Mapping[int, float], float],
    slow: tuple[Mapping[int, float], float],
) -> AtEqualTime:
    """Compare at equal time; see `AtEqualTime`.

    Args:
        accuracy: of the network, by seed.
        time: of the network, over the baseline's.
        fast: accuracies and time of the rival that takes least.
        slow: likewise of the other one.

    Example:
        >>> found = at_equal_time({0: 88.0}, 0.8, ({0: 87.0}, 0.6), ({0: 89.0}, 1.0))
        >>> round(found.share, 2), round(found.found.mean, 2)
        (0.5, 0.0)
    """
    (low, least), (high, most) = fast, slow
    share = 1.0 if time >= most else 0.0 if time <= least else (time - least) / (most - least)
    line = {seed: (1 - share) * low[seed] + share * high[seed] for seed in low.keys() & high.keys()}
    rival = low if share == 0 else high if share == 1 else line
    return AtEqualTime(time, share, paired(accuracy, rival))
