"""Rows of one network's experiment, joined: accuracies by seed and device, times by engine and batch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from pliant.compare import PLAIN, Score
from pliant.measuring.rows import AS_IS, OPTIMIZED, Measurement
from pliant.methods.mixture_of_depths.recipes import REMOVED
from pliant.records import percent
from research.experiments.claims import (
    Accuracies,
    AtEqualTime,
    Baseline,
    Paired,
    at_equal_time,
    once,
    paired,
)
from research.experiments.network_times import STEP, name_of
from research.experiments.plans import Key, PlannedRun, key_of

# A ratio of times is known no better than this, at one image and at more: 1.5 and 3 points.
FINEST = {True: 0.015, False: 0.03}


class Timing(NamedTuple):
    """What was timed, and where.

    Attributes:
        engine: or `STEP`.
        batch: images.
        device: ``cpu`` or ``cuda``.

    Example:
        >>> print(Timing("eager", 1), Timing("eager", 1, "cuda"), sep="; ")
        eager, batch 1; eager, batch 1, cuda
    """

    engine: str
    batch: int
    device: str = "cpu"

    def __str__(self) -> str:
        place = "" if self.device == "cpu" else f", {self.device}"
        return f"{self.engine}, batch {self.batch}{place}"


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of the runs of one network.

    Attributes:
        network: short name of the plain network.
        planned: runs of the experiment, finished or not.
        scores: rows of these runs, and of no others.
        times: rows of times of these networks.
    """

    network: str
    planned: tuple[PlannedRun, ...]
    scores: tuple[Score, ...]
    times: tuple[Measurement, ...]

    def labels(self, family: str) -> list[str]:
        """Labels of a family's rows, in order."""
        return list(dict.fromkeys(x for run in self.planned if run.family == family for x in run.labels))

    def rows(self, label: str) -> list[Score]:
        """Rows of a label, each seed once and in order: what was run on both devices, as the GPU's."""
        return list(once({(s.seed, trained_on(s)): s for s in self.scores if s.label == label}).values())

    def runs(self, label: str) -> Accuracies:
        """Test accuracy in percent, by seed and device."""
        return {
            (s.seed, trained_on(s)): percent(s.test_accuracy)
            for s in self.scores
            if s.label == label and s.test_accuracy is not None
        }

    def accuracy(self, label: str) -> dict[int, float]:
        """Test accuracy in percent, by seed."""
        return once(self.runs(label))

    def against(self, one: str, other: str) -> Paired:
        """Difference of two labels' accuracies."""
        return paired(self.runs(one), self.runs(other))

    def timings(self, *, steps: bool = False) -> list[Timing]:
        """What was timed: forwards, or training steps."""
        found = (Timing(r.engine, r.batch, r.device) for r in self.times if (r.engine == STEP) == steps)
        return list(dict.fromkeys(found))

    def time(self, label: str, timing: Timing) -> Measurement | None:
        """The row of a label's time, of the run that timed the plain network last.

        A Mixture-of-Depths network is taken with its blocks in the form that suits the engine; in the
        plain one where that could not be made, which `lacks_form` says.
        """
        rows = self._of(label, timing)
        return min(
            (r for r in rows if r.time_ratio is not None), key=lambda r: r.form != OPTIMIZED, default=None
        )

    def lacks_form(self, label: str, timing: Timing) -> bool:
        """Whether a label's blocks should have had the engine's form, and could not."""
        return any(r.form == OPTIMIZED and r.error for r in self._of(label, timing))

    def failure(self, label: str, timing: Timing) -> str:
        """Why a label has no time; empty if it has one, or was not in the run."""
        if self.time(label, timing) is not None:
            return ""
        return next((r.error for r in self._of(label, timing) if r.error), "")

    def _of(self, label: str, timing: Timing) -> list[Measurement]:
        """All rows of a label, of one timing run: ratios of two runs are no pair."""

        def rows(name: str) -> list[Measurement]:
            known = (name_of(self.network, name), AS_IS, *timing)
            return [r for r in self.times if (r.model, r.variant, r.engine, r.batch, r.device) == known]

        runs = {r.date for r in rows(PLAIN)}
        return [r for r in rows(label) if not runs or r.date in runs]

    def margin(self, label: str, timing: Timing) -> float:
        """How far a label's ratio of times may be from the true one: its spread over rounds, at least."""
        row = self.time(label, timing)
        return max(FINEST[timing.batch == 1], (row.time_ratio_iqr or 0.0) if row else 0.0)

    def step(self, label: str, timing: Timing) -> Measurement | None:
        """The row of the training step that a label comes from."""
        return self.time(next((run.label for run in self.planned if label in run.labels), label), timing)

    def without(self, seed: int) -> Evidence:
        """The same without the rows of a seed."""
        return replace(self, scores=tuple(s for s in self.scores if s.seed != seed))

    @property
    def depths(self) -> list[str]:
        """Labels of plain networks of all depths."""
        return [REMOVED, *self.labels("depth"), PLAIN]

    def at_equal_time(self, label: str, timing: Timing) -> AtEqualTime | None:
        """A label against plain networks of all depths.

        None if it, the network without the blocks or the plain one has no time. Other depths count if they
        have all runs that these three share.
        """
        times = {name: self.time(name, timing) for name in (label, *self.depths)}
        if any(times[name] is None for name in (label, REMOVED, PLAIN)):
            return None
        shared = self.runs(label).keys() & self.runs(REMOVED).keys() & self.runs(PLAIN).keys()
        baselines = [
            Baseline(name, self.runs(name), float(row.time_ratio or 0))
            for name in self.depths
            if (row := times[name]) is not None
            and (name in (REMOVED, PLAIN) or shared <= self.runs(name).keys())
        ]
        own = times[label]
        assert own is not None
        margin = max(self.margin(name, timing) for name in (label, *(r.label for r in baselines)))
        return at_equal_time(self.runs(label), float(own.time_ratio or 0), margin, baselines)


def trained_on(score: Score) -> str:
    """Where a row was trained: ``cpu`` or ``cuda``."""
    return "cuda" if score.gpu else "cpu"


def gather(
    planned: Iterable[PlannedRun], scores: Iterable[Score], times: Sequence[Measurement]
) -> list[Evidence]:
    """Evidence for each network of some runs; rows of other runs are left out.

    Args:
        planned: runs of the experiment.
        scores: rows of all devices.
        times: rows of times of all devices.

    Raises:
        ValueError: two rows of one device say different things of one run.
    """
    planned = list(planned)
    by_run: dict[tuple[Key, str], Score] = {}
    for score in scores:
        known = by_run.setdefault((key_of(score), trained_on(score)), score)
        if known.test_accuracy != score.test_accuracy:
            raise ValueError(
                f"two rows of {score.label}, seed {score.seed}, have test accuracies of "
                f"{known.test_accuracy} and {score.test_accuracy}; delete one of them"
            )
    found = []
    for network in dict.fromkeys(run.network for run in planned):
        own = tuple(run for run in planned if run.network == network)
        keys = {key for run in own for key in run.keys}
        names = {name_of(network, label) for run in own for label in (run.label, *run.labels)}
        found.append(
            Evidence(
                network=network,
                planned=own,
                scores=tuple(s for (key, _), s in by_run.items() if key in keys),
                times=tuple(r for r in times if r.model in names),
            )
        )
    return found
