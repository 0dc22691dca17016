"""What rows of an experiment allow one to say: paired differences, in plain words.

Two networks are compared seed by seed, because runs of one seed see the same images in the same
order, and on one device, because nobody has shown that two devices train alike. The interval is
Student's, of the mean of these differences, at 95 %; where it holds zero nothing has been shown, and
with fewer than three seeds nothing can be.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom. Beyond the last one it
# is used on: the interval is then a little too wide, never too narrow.
T95 = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
)  # fmt: skip

BETTER, WORSE, UNDECIDED = "better", "worse", "undecided"
FEW, MISSING, SLOWER = "too few seeds", "not run yet", "slower than the plain network"
FEWEST = 3  # seeds that a verdict takes
RESOLUTION = 0.01  # points: one of the 10,000 test images; no deviation is known more finely

T = TypeVar("T")
# Accuracies of a network in percent, by seed and device, ``cpu`` or ``cuda``.
Accuracies = Mapping[tuple[int, str], float]


@dataclass(frozen=True)
class Paired:
    """Differences of two networks' accuracies, in points, one for each seed that both have.

    Example:
        >>> found = Paired((0.4, 0.5, 0.6))
        >>> found.n, round(found.mean, 2), [round(end, 2) for end in found.interval], found.verdict
        (3, 0.5, [0.25, 0.75], 'better')
        >>> Paired((0.4, -0.5, 0.6)).verdict, Paired((0.4, 0.4)).verdict, Paired(()).verdict
        ('undecided', 'too few seeds', 'not run yet')
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
        if self.n < 2:
            return math.inf
        return max(statistics.stdev(self.differences), RESOLUTION) / math.sqrt(self.n)

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
        if self.n < FEWEST:
            return FEW if self.n else MISSING
        low, high = self.interval
        return BETTER if low > 0 else WORSE if high < 0 else UNDECIDED

    def __str__(self) -> str:
        """The figures behind a verdict."""
        if self.n < FEWEST:
            return f"{self.mean:+.2f}, {_seeds(self.n)}" if self.n else MISSING
        low, high = self.interval
        return f"{self.mean:+.2f} ({low:+.2f} to {high:+.2f}), n = {self.n}"


def paired(one: Accuracies, other: Accuracies) -> Paired:
    """Differences of two networks' accuracies on one device, by seed: `one` minus `other`.

    Example:
        >>> one = {(0, "cpu"): 88.0, (1, "cpu"): 89.0, (2, "cpu"): 88.0}
        >>> paired(one, {(1, "cpu"): 88.5, (2, "cuda"): 87.0}).differences
        (0.5,)
    """
    return Paired(tuple(once({run: one[run] - other[run] for run in one.keys() & other.keys()}).values()))


def once(runs: Mapping[tuple[int, str], T]) -> dict[int, T]:
    """Each seed once, in order: what was run on both devices, as the GPU's.

    Example:
        >>> once({(1, "cuda"): 88.5, (1, "cpu"): 88.0, (0, "cpu"): 87.0})
        {0: 87.0, 1: 88.5}
    """
    return {seed: runs[seed, device] for seed, device in sorted(runs)}  # "cpu" before "cuda"


def sentence(one: str, other: str, found: Paired) -> str:
    """What can be said of two networks, with the figures.

    Example:
        >>> sentence("A", "B", Paired((-0.4, -0.5, -0.6)))
        'A is worse than B: -0.50 points, 95 % interval -0.75 to -0.25, paired over 3 seeds.'
        >>> sentence("A", "B", Paired((0.3,)))
        'Whether A or B is better cannot be said from 1 seed: +0.30 points.'
        >>> sentence("A", "B", Paired(()))
        'A against B: no seed of both on one device yet.'
    """
    if found.verdict == MISSING:
        return f"{one} against {other}: no seed of both on one device yet."
    if found.verdict == FEW:
        told = f"cannot be said from {_seeds(found.n)}: {found.mean:+.2f} points"
        return f"Whether {one} or {other} is better {told}."
    low, high = found.interval
    figures = (
        f"{found.mean:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}, paired over {found.n} seeds"
    )
    if found.verdict == UNDECIDED:
        return f"Between {one} and {other} nothing is decided: {figures}; the interval holds zero."
    return f"{one} is {found.verdict} than {other}: {figures}."


def answer(verdicts: Sequence[str]) -> str:
    """The short answer to a question "is it better?" that several comparisons bear on.

    A no needs all of them to have been made.

    Example:
        >>> answer(["better", "better"]), answer(["undecided", "worse"])
        ('Yes, in all 2 comparisons.', 'No: better in 0 of 2 comparisons, worse in 1, undecided in 1.')
        >>> answer(["undecided"]), answer(["not run yet"])
        ('Not shown: undecided in the one comparison.', 'Not run yet.')
        >>> answer(["worse", "not run yet"])
        'Not shown yet: better in 0 of 2 comparisons, worse in 1, not run yet in 1.'
    """
    total, said = len(verdicts), Counter(verdicts)
    if said[MISSING] == total:
        return "Not run yet."
    if total == 1:
        short = {BETTER: "Yes.", WORSE: "No, it is worse."}
        return short.get(verdicts[0], f"Not shown: {verdicts[0]} in the one comparison.")
    if said[BETTER] == total:
        return f"Yes, in all {total} comparisons."
    if said[WORSE] == total:
        return f"No, it is worse in all {total} comparisons."
    rest = [f"{kind} in {said[kind]}" for kind in (WORSE, UNDECIDED, SLOWER, FEW, MISSING) if said[kind]]
    if said[BETTER]:
        word = "In part"
    elif said[FEW] or said[MISSING]:
        word = "Not shown yet"
    else:
        word = "No" if said[WORSE] or said[SLOWER] else "Not shown"
    return f"{word}: better in {said[BETTER]} of {total} comparisons, {', '.join(rest)}."


def any_of(verdicts: Mapping[str, Sequence[str]]) -> str:
    """The short answer to "is any of these better?", each of which has a verdict for each setting.

    Example:
        >>> any_of({"A": ["better", "better"], "B": ["better", "worse"], "C": ["worse", "worse"]})
        'Yes: A; B in 1 of 2 settings.'
        >>> any_of({"A": ["worse"], "B": ["undecided"], "C": ["too few seeds"]})
        'Not shown of any so far: undecided 1, worse 1, too few seeds 1.'
        >>> any_of({"A": ["worse"], "B": ["worse", "slower than the plain network"]})
        'No, not one of 2.'
    """
    better = {name: list(found).count(BETTER) for name, found in verdicts.items()}
    if any(better.values()):
        told = [
            name if n == len(verdicts[name]) else f"{name} in {n} of {len(verdicts[name])} settings"
            for name, n in better.items()
            if n
        ]
        return f"Yes: {'; '.join(told)}."
    # The verdict that leaves most open stands for each of them.
    order = (MISSING, FEW, UNDECIDED, SLOWER, WORSE)
    said = Counter(
        next(kind for kind in order if kind in (found or [MISSING])) for found in verdicts.values()
    )
    if said[MISSING] == len(verdicts):
        return "Not run yet."
    if not (said[MISSING] or said[FEW] or said[UNDECIDED]):
        return f"No, not one of {len(verdicts)}."
    counts = ", ".join(
        f"{kind} {said[kind]}" for kind in (UNDECIDED, WORSE, SLOWER, FEW, MISSING) if said[kind]
    )
    return f"Not shown of any so far: {counts}."


def _seeds(n: int) -> str:
    return f"{n} seed{'s' * (n != 1)}"


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
class Rival:
    """A plain network of some depth: what time buys without any method.

    Attributes:
        label: its.
        accuracy: of its runs, in percent.
        time: over the plain network's.
    """

    label: str
    accuracy: Accuracies
    time: float


@dataclass(frozen=True)
class AtEqualTime:
    """A network held against what its time buys without it.

    That is the straight line between the two plain networks of some depth that take a little less
    time and a little more. It is better if it is better than the line at the longest that its time may
    be, and than each of them that is no slower; worse if it is worse than the line at the shortest; and
    where it is slower than all of them it is not better at equal time, whatever it reaches, and where
    it is faster than all of them it is not worse.

    Attributes:
        time: of the network, over the plain one's.
        line: the rival at that time, in words.
        found: the network minus the line, by seed.
        verdict: one of those of `Paired`, or `SLOWER`.
    """

    time: float
    line: str
    found: Paired
    verdict: str


def at_equal_time(accuracy: Accuracies, time: float, margin: float, rivals: Sequence[Rival]) -> AtEqualTime:
    """Compare at equal time; see `AtEqualTime`.

    Args:
        accuracy: of the network's runs.
        time: of the network, over the plain one's.
        margin: how much longer or shorter that may be.
        rivals: at least two, the plain network among them.

    Example:
        >>> runs = [(0, "cpu"), (1, "cpu"), (2, "cpu")]
        >>> bare, plain = (Rival("bare", dict.fromkeys(runs, 87.0), 0.6),
        ...                Rival("plain", dict.fromkeys(runs, 89.0), 1.0))
        >>> found = at_equal_time(dict.fromkeys(runs, 88.2), 0.8, 0.01, [bare, plain])
        >>> found.line, round(found.found.mean, 2), found.verdict
        ('0.50 bare + 0.50 plain', 0.2, 'better')
        >>> at_equal_time(dict.fromkeys(runs, 88.2), 0.8, 0.05, [bare, plain]).verdict
        'undecided'
        >>> at_equal_time(dict.fromkeys(runs, 90.0), 1.2, 0.05, [bare, plain]).verdict
        'slower than the plain network'
    """
    rivals = sorted(rivals, key=lambda r: r.time)

    def over(at: float) -> tuple[str, Paired]:
        """The line at a time, in words, and the network minus it."""
        low = max((r for r in rivals if r.time <= at), key=lambda r: r.time, default=rivals[0])
        high = min((r for r in rivals if r.time >= at), key=lambda r: r.time, default=rivals[-1])
        if low.time >= high.time:  # at one of them, or beyond the last
            return low.label, paired(accuracy, low.accuracy)
        share = (at - low.time) / (high.time - low.time)
        line = {
            run: (1 - share) * low.accuracy[run] + share * high.accuracy[run]
            for run in low.accuracy.keys() & high.accuracy.keys()
        }
        return f"{1 - share:.2f} {low.label} + {share:.2f} {high.label}", paired(accuracy, line)

    told, found = over(time)
    verdict = found.verdict
    if verdict not in (FEW, MISSING):
        no_slower = [paired(accuracy, r.accuracy) for r in rivals if r.time <= time + margin]
        if over(time - margin)[1].verdict == WORSE:
            verdict = UNDECIDED if time + margin < rivals[0].time else WORSE
        elif any(p.verdict != BETTER for p in [over(time + margin)[1], *no_slower]):
            verdict = UNDECIDED
        else:
            verdict = SLOWER if time - margin > rivals[-1].time else BETTER
    return AtEqualTime(time, told, found, verdict)
