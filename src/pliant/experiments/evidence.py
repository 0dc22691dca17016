"""Rows of one network's experiment, joined: accuracies by seed, times by setting."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from pliant.compare import PLAIN, REMOVED, Score
from pliant.experiments.cells import Cell, key_of
from pliant.experiments.claims import AtEqualTime, Paired, at_equal_time, paired
from pliant.experiments.timing import STEP, name_of
from pliant.measuring.rows import AS_IS, OPTIMIZED, Measurement


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """What is known of the cells of one network on one kind of device.

    Attributes:
        network: short name of the plain network.
        device: ``cpu`` or ``cuda``.
        cells: of the experiment, run or not.
        scores: rows of these cells, and of no others.
        times: rows of times of these networks.
    """

    network: str
    device: str
    cells: tuple[Cell, ...]
    scores: tuple[Score, ...]
    times: tuple[Measurement, ...]

    def labels(self, family: str) -> list[str]:
        """Labels of a family's rows, in order."""
        cells = [cell for cell in self.cells if cell.family == family]
        return list(dict.fromkeys(label for cell in cells for label in cell.labels))

    def rows(self, label: str) -> list[Score]:
        """Rows of a label, by seed."""
        return sorted((s for s in self.scores if s.label == label), key=lambda s: s.seed)

    def accuracy(self, label: str) -> dict[int, float]:
        """Test accuracy in percent, by seed."""
        return {s.seed: s.test_accuracy for s in self.rows(label) if s.test_accuracy is not None}

    def against(self, one: str, other: str) -> Paired:
        """Difference of two labels' accuracies."""
        return paired(self.accuracy(one), self.accuracy(other))

    def settings(self, *, steps: bool = False) -> list[tuple[str, int]]:
        """Engines and batches in which latency was timed, or batches of training steps."""
        return list(dict.fromkeys((r.engine, r.batch) for r in self.times if (r.engine == STEP) == steps))

    def time(self, label: str, engine: str, batch: int) -> Measurement | None:
        """The row of a label's time: in the form that suits the engine, where it has one."""
        name = name_of(self.network, label)
        rows = [
            r
            for r in self.times
            if (r.model, r.variant, r.engine, r.batch) == (name, AS_IS, engine, batch)
            and r.time_ratio is not None
        ]
        return min(rows, key=lambda r: r.form != OPTIMIZED, default=None)

    def step(self, label: str) -> Measurement | None:
        """The row of the training step that a label comes from."""
        cell = next((c.label for c in self.cells if label in c.labels), label)
        name = name_of(self.network, cell)
        return next((r for r in self.times if (r.model, r.engine) == (name, STEP)), None)

    def at_equal_time(self, label: str, engine: str, batch: int) -> AtEqualTime | None:
        """A label against the plain network and that without its blocks; None without times."""
        own, fast, slow = (self.time(name, engine, batch) for name in (label, REMOVED, PLAIN))
        ratios = [row.time_ratio for row in (own, fast, slow) if row is not None]
        if len(ratios) < 3:
            return None
        time, least, most = (float(ratio or 0) for ratio in ratios)
        return at_equal_time(
            self.accuracy(label), time, (self.accuracy(REMOVED), least), (self.accuracy(PLAIN), most)
        )


def gather(
    cells: Iterable[Cell], scores: Sequence[Score], times: Sequence[Measurement], device: str
) -> list[Evidence]:
    """Evidence for each network among the cells; rows that belong to none of them are left out."""
    cells = list(cells)
    found = []
    for network in dict.fromkeys(cell.network for cell in cells):
        own = tuple(cell for cell in cells if cell.network == network)
        keys = {key for cell in own for key in cell.keys}
        names = {name_of(network, label) for cell in own for label in (cell.label, *cell.labels)}
        found.append(
            Evidence(
                network=network,
                device=device,
                cells=own,
                scores=tuple(s for s in scores if key_of(s) in keys),
                times=tuple(r for r in times if r.model in names),
            )
        )
    return found
