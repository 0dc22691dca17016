"""What switching the depth of a network costs, in microseconds: `run_switch_bench`.

No tensors here: a switch is timed without a forward.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import timm

from pliant import at_depth, get_depth, set_depth
from pliant.measuring.clock import clock, race
from pliant.measuring.latency import median, spread
from pliant.provenance import provenance
from pliant.records import Origin, write_records

NETWORK = "resnet50_adn"


@dataclass(frozen=True, kw_only=True)
class SwitchCost(Origin):
    """What one way to switch takes.

    Attributes:
        network: the network.
        call: ``set_depth``, ``get_depth``, or ``at_depth``: entering and leaving the ``with``.
        rounds: rounds that were timed, all calls in turn.
        median_us: median time of a call, in microseconds.
        iqr_us: interquartile range over the rounds, in microseconds.
    """

    network: str
    call: str
    rounds: int
    median_us: float | None
    iqr_us: float | None


def run_switch_bench(results: Path, quick: bool = False) -> Path:
    """Time the calls that switch the depth of ResNet-50, and write a row for each.

    Args:
        results: folder that gets ``depth-switch-cpu.csv``.
        quick: two rounds, to see that it works; the file then ends in ``-quick``.

    Returns:
        The file.
    """
    network = timm.create_model(NETWORK).eval()

    def hold() -> None:
        with at_depth(network, "TTFF"):
            pass

    calls = {
        "set_depth": lambda: set_depth(network, "TTFF"),
        "get_depth": lambda: get_depth(network),
        "at_depth": hold,
    }
    rounds = 2 if quick else 31
    clocks = {name: clock(call, 1) for name, call in calls.items()}
    found = race(clocks, rounds, 0.0 if quick else 0.05)
    rows = []
    for call, seconds in found.items():
        us = [1e6 * s for s in seconds]
        rows.append(
            SwitchCost(
                network=NETWORK,
                call=call,
                rounds=rounds,
                median_us=median(us),
                iqr_us=spread(us),
                **provenance(),
            )
        )
    path = results / f"depth-switch-cpu{'-quick' * quick}.csv"
    write_records(path, SwitchCost, rows)
    return path
