"""Rows of one network's experiment, joined: accuracies by seed and device, times by setting."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from pliant.compare import PLAIN, Score
from pliant.measuring.rows import AS_IS, OPTIMIZED, Measurement
from pliant.methods.mixture_of_depths.recipes import REMOVED
from research.experiments.cells import Cell, Key, key_of
from research.experiments.claims import Accuracies, AtEqualTime, Paired, Rival, at_equal_time, once, paired
from research.experiments.timing import STEP, name_of

# A ratio of times is known no better than this, at one image and at more: 1.5 and 3 points.
FINEST = {True: 0.015, False: 0.03}


class Setting(NamedTuple):
    """In what networks were timed.

    Attributes:
        engine: or `STEP`.
        batch: images.
        device: ``cpu`` or ``cuda``.

    Example:
        >>> print(Setting("eager", 1), Setting("eager", 1, "cuda"), sep="; ")
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
    """What is known of the cells of one network.

    Attributes:
        network: short name of the plain network.
        cells: of the experiment, run or not.
        scores: rows of these cells, and of no others.
        times: rows of times of these networks.
    """

    network: str
    cells: tuple[Cell, ...]
    scores: tuple[Score, ...]
    times: tuple[Measurement, ...]

    def labels(self, family: str) -> list[str]:
        """Labels of a family's rows, in order."""
        cells = [cell for cell in self.cells if cell.family == family]
        return list(dict.fromkeys(label for cell in cells for label in cell.labels))

    def rows(self, label: str) -> list[Score]:
        """Rows of a label, each seed once and in order: what was run on both devices, as the GPU's."""
        return list(once({(s.seed, trained_on(s)): s for s in self.scores if s.label == label}).values())

    def runs(self, label: str) -> Accuracies:
        """Test accuracy in percent, by seed and device."""
        return {
            (s.seed, trained_on(s)): s.test_accuracy
            for s in self.scores
            if s.label == label and s.test_accuracy is not None
        }

    def accuracy(self, label: str) -> dict[int, float]:
        """Test accuracy in percent, by seed."""
        return once(self.runs(label))

    def against(self, one: str, other: str) -> Paired:
        """Difference of two labels' accuracies."""
        return paired(self.runs(one), self.runs(other))

    def settings(self, *, steps: bool = False) -> list[Setting]:
        """In what latency was timed, or training steps."""
        found = (Setting(r.engine, r.batch, r.device) for r in self.times if (r.engine == STEP) == steps)
        return list(dict.fromkeys(found))

    def time(self, label: str, setting: Setting) -> Measurement | None:
        """The row of a label's time, of the run that timed the plain network last.

        A Mixture-of-Depths network is taken with its blocks in the form that suits the engine; in the
        plain one where that could not be made, which `formless` says.
        """
        rows = self._of(label, setting)
        return min(
            (r for r in rows if r.time_ratio is not None), key=lambda r: r.form != OPTIMIZED, default=None
        )

    def formless(self, label: str, setting: Setting) -> bool:
        """Whether a label's blocks should have had the engine's form, and could not."""
        return any(r.form == OPTIMIZED and r.error for r in self._of(label, setting))

    def failure(self, label: str, setting: Setting) -> str:
        """Why a label has no time; empty if it has one, or was not in the run."""
        if self.time(label, setting) is not None:
            return ""
        return next((r.error for r in self._of(label, setting) if r.error), "")

    def _of(self, label: str, setting: Setting) -> list[Measurement]:
        """All rows of a label in a setting: of one run, for ratios of two runs are no pair."""

        def rows(name: str) -> list[Measurement]:
            known = (name_of(self.network, name), AS_IS, *setting)
            return [r for r in self.times if (r.model, r.variant, r.engine, r.batch, r.device) == known]

        runs = {r.date for r in rows(PLAIN)}
        return [r for r in rows(label) if not runs or r.date in runs]

    def margin(self, label: str, setting: Setting) -> float:
        """How far a label's ratio of times may be from the true one: its spread over rounds, at least."""
        row = self.time(label, setting)
        return max(FINEST[setting.batch == 1], (row.time_ratio_iqr or 0.0) if row else 0.0)

    def step(self, label: str, setting: Setting) -> Measurement | None:
        """The row of the training step that a label comes from."""
        return self.time(next((c.label for c in self.cells if label in c.labels), label), setting)

    def without(self, seed: int) -> Evidence:
        """The same without the rows of a seed."""
        return replace(self, scores=tuple(s for s in self.scores if s.seed != seed))

    @property
    def depths(self) -> list[str]:
        """Labels of plain networks of all depths."""
        return [REMOVED, *self.labels("depth"), PLAIN]

    def at_equal_time(self, label: str, setting: Setting) -> AtEqualTime | None:
        """A label against plain networks of all depths.

        None if it, the network without the blocks or the plain one has no time. Other depths count if they
        have all runs that these three share.
        """
        times = {name: self.time(name, setting) for name in (label, *self.depths)}
        if any(times[name] is None for name in (label, REMOVED, PLAIN)):
            return None
        shared = self.runs(label).keys() & self.runs(REMOVED).keys() & self.runs(PLAIN).keys()
        rivals = [
            Rival(name, self.runs(name), float(row.time_ratio or 0))
            for name in self.depths
            if (row := times[name]) is not None
            and (name in (REMOVED, PLAIN) or shared <= self.runs(name).keys())
        ]
        own = times[label]
        assert own is not None
        margin = max(self.margin(name, setting) for name in (label, *(r.label for r in rivals)))
        return at_equal_time(self.runs(label), float(own.time_ratio or 0), margin, rivals)


def trained_on(score: Score) -> str:
    """Where a row was trained: ``cpu`` or ``cuda``."""
    return "cuda" if score.gpu else "cpu"


def gather(cells: Iterable[Cell], scores: Iterable[Score], times: Sequence[Measurement]) -> list[Evidence]:
    """Evidence for each network among the cells; rows that belong to none of them are left out.

    Args:
        cells: of the experiment.
        scores: rows of all devices.
        times: likewise.

    Raises:
        ValueError: two rows of one device say different things of one run.
    """
    cells = list(cells)
    by_run: dict[tuple[Key, str], Score] = {}
    for score in scores:
        known = by_run.setdefault((key_of(score), trained_on(score)), score)
        if known.test_accuracy != score.test_accuracy:
            raise ValueError(
                f"two rows of {score.label}, seed {score.seed}, have test accuracies of "
                f"{known.test_accuracy} and {score.test_accuracy} %; delete one of them"
            )
    found = []
    for network in dict.fromkeys(cell.network for cell in cells):
        own = tuple(cell for cell in cells if cell.network == network)
        keys = {key for cell in own for key in cell.keys}
        names = {name_of(network, label) for cell in own for label in (cell.label, *cell.labels)}
        found.append(
            Evidence(
                network=network,
                cells=own,
                scores=tuple(s for (key, _), s in by_run.items() if key in keys),
                times=tuple(r for r in times if r.model in names),
            )
        )
    return found
