"""What rows of an experiment allow one to say: paired differences, in plain words.

Two networks are compared seed by seed, because runs of one seed see the same images in the same
order, and on one device, because nobody has shown that two devices train alike. The 95 % interval is
Student's, of the mean of these differences. A difference whose interval contains zero is not
significant; fewer than three seeds give no verdict.
"""

from __future__ import annotations

import math
import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from scipy.stats import t

BETTER, WORSE, UNDECIDED = "better", "worse", "not significant"
FEW, MISSING, SLOWER = "too few seeds", "not run yet", "slower than the plain network"
FEWEST = 3  # seeds for a verdict
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
        ('not significant', 'too few seeds', 'not run yet')
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
        low, high = t.interval(0.95, self.n - 1, loc=self.mean, scale=self.error)
        return float(low), float(high)

    @property
    def verdict(self) -> str:
        """`BETTER` or `WORSE` where the interval does not contain zero; otherwise why there is neither."""
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
    """The comparison of two networks, with its figures.

    Example:
        >>> sentence("A", "B", Paired((-0.4, -0.5, -0.6)))
        'A against B: worse, -0.50 points (95 % interval -0.75 to -0.25, paired over 3 seeds).'
        >>> sentence("MoD, score order", "B", Paired((0.4, -0.5, 0.6)))[:48]
        'MoD (score order) against B: no significant diff'
        >>> sentence("A", "B", Paired((0.3,)))
        'A against B: +0.30 points from 1 seed, too few for an interval.'
        >>> sentence("A", "B", Paired(()))
        'A against B: no seed ran with both networks on one device.'
    """
    pair = f"{spoken(one)} against {spoken(other)}"
    if found.verdict == MISSING:
        return f"{pair}: no seed ran with both networks on one device."
    if found.verdict == FEW:
        return f"{pair}: {found.mean:+.2f} points from {_seeds(found.n)}, too few for an interval."
    low, high = found.interval
    said = "no significant difference" if found.verdict == UNDECIDED else found.verdict
    interval = f"95 % interval {low:+.2f} to {high:+.2f}, paired over {found.n} seeds"
    return f"{pair}: {said}, {found.mean:+.2f} points ({interval})."


def spoken(label: str) -> str:
    """A label within a sentence: what follows its comma stands in brackets.

    Example:
        >>> spoken("MoD, c = 2, original"), spoken("MoD + ADN, base-net"), spoken("plain")
        ('MoD (c = 2, original)', 'MoD + ADN (base-net)', 'plain')
        >>> spoken("CondConv, 4 experts + ADN, base-net")
        'CondConv (4 experts) + ADN (base-net)'
    """
    parts = (part.partition(", ") for part in label.split(" + "))
    return " + ".join(f"{name} ({rest})" if rest else name for name, _, rest in parts)


def answer(verdicts: Sequence[str]) -> str:
    """The short answer to a question "is it better?" from several comparisons.

    A no needs all of them to have been made.

    Example:
        >>> answer(["better", "better"]), answer(["better", "worse"])
        ('Yes, in all 2 comparisons.', 'In part: better in 1 of 2 comparisons, worse in 1.')
        >>> answer(["not significant"]), answer(["not run yet"])
        ('Not shown: not significant in the one comparison.', 'Not run yet.')
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
        >>> any_of({"A": ["worse"], "B": ["not significant"], "C": ["too few seeds"]})
        'Not shown of any so far: not significant 1, worse 1, too few seeds 1.'
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
class Baseline:
    """A plain network of some depth, which takes some time and reaches some accuracy without any method.

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
    """A network compared with plain networks that take the same time.

    The baseline is the straight line between the two plain networks that take a little less and a
    little more time. The network is better if it is better than the line at the longest time that the
    margin allows, and better than each plain network that is no slower. It is worse if it is worse than
    the line at the shortest time. A network that is slower than all plain networks is not better at
    equal time, whatever it reaches; one that is faster than all of them is not worse.

    Attributes:
        time: of the network, over the plain one's.
        line: the baseline at that time, in words.
        found: the network minus the line, by seed.
        verdict: one of those of `Paired`, or `SLOWER`.
    """

    time: float
    line: str
    found: Paired
    verdict: str


def at_equal_time(
    accuracy: Accuracies, time: float, margin: float, baselines: Sequence[Baseline]
) -> AtEqualTime:
    """Compare at equal time; see `AtEqualTime`.

    Args:
        accuracy: of the network's runs.
        time: of the network, over the plain one's.
        margin: how much longer or shorter that may be.
        baselines: at least two, the plain network among them.

    Example:
        >>> runs = [(0, "cpu"), (1, "cpu"), (2, "cpu")]
        >>> bare, plain = (Baseline("bare", dict.fromkeys(runs, 87.0), 0.6),
        ...                Baseline("plain", dict.fromkeys(runs, 89.0), 1.0))
        >>> found = at_equal_time(dict.fromkeys(runs, 88.2), 0.8, 0.01, [bare, plain])
        >>> found.line, round(found.found.mean, 2), found.verdict
        ('0.50 bare + 0.50 plain', 0.2, 'better')
        >>> at_equal_time(dict.fromkeys(runs, 88.2), 0.8, 0.05, [bare, plain]).verdict
        'not significant'
        >>> at_equal_time(dict.fromkeys(runs, 90.0), 1.2, 0.05, [bare, plain]).verdict
        'slower than the plain network'
    """
    baselines = sorted(baselines, key=lambda r: r.time)

    def over(at: float) -> tuple[str, Paired]:
        """The line at a time, in words, and the network minus it."""
        low = max((r for r in baselines if r.time <= at), key=lambda r: r.time, default=baselines[0])
        high = min((r for r in baselines if r.time >= at), key=lambda r: r.time, default=baselines[-1])
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
        no_slower = [paired(accuracy, r.accuracy) for r in baselines if r.time <= time + margin]
        if over(time - margin)[1].verdict == WORSE:
            verdict = UNDECIDED if time + margin < baselines[0].time else WORSE
        elif any(p.verdict != BETTER for p in [over(time + margin)[1], *no_slower]):
            verdict = UNDECIDED
        else:
            verdict = SLOWER if time - margin > baselines[-1].time else BETTER
    return AtEqualTime(time, told, found, verdict)
