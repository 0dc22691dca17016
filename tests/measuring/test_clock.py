"""The clock: what it waits for and throws away before a time, and the loop that asks several in turn."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.utils.benchmark
from torch import Tensor, nn

from _measure import SMALL, conv
from pliant.deploy.engines import ENGINES, Engine
from pliant.measuring import clock as clocks
from pliant.measuring.clock import clock, race, settle, turns, warm
from pliant.measuring.latency import measure


class Machine:
    """A machine of its own time, and an engine's networks on it.

    Threads of a network spin on for `spin` seconds after each call, and slow down calls of all others.
    """

    def __init__(self, spin: float = 0.04) -> None:
        self.now = self.worked = 0.0
        self.spin = spin
        self.awake: dict[int, float] = {}  # until when

    def process_time(self) -> float:
        return self.worked

    def sleep(self, seconds: float) -> None:
        self.worked += sum(min(seconds, max(0.0, end - self.now)) for end in self.awake.values())
        self.now += seconds

    def call(self, network: int, seconds: float = 0.002) -> None:
        others = sum(end > self.now for other, end in self.awake.items() if other != network)
        self.sleep(seconds * (1 + others))
        self.awake[network] = self.now + self.spin


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """The time of every clock is this machine's, and ``engine="stand-in"`` runs on it."""
    made = Machine()

    class StandIn(Engine):
        name = "stand-in"

        def _prepare(
            self, model: nn.Module, example: Tensor, precision: str, threads: int
        ) -> Callable[[Tensor], None]:
            number = len(made.awake)
            made.awake[number] = 0.0
            return lambda images: made.call(number)

    monkeypatch.setitem(ENGINES, "stand-in", StandIn())
    monkeypatch.setattr(torch.utils.benchmark, "timer", lambda: made.now)
    monkeypatch.setattr(
        clocks,
        "time",
        SimpleNamespace(process_time=made.process_time, sleep=made.sleep, monotonic=lambda: 0.0),
    )
    return made


def times(names: str) -> list[tuple[float, float]]:
    """Median and spread, in ms, of networks of these names in the stand-in engine, timed in one run."""
    models = {name: conv() for name in names}
    rows = measure(models, input_size=SMALL, engine="stand-in", rounds=3, min_run_time=0.01)
    return [(round(row.median_ms or 0.0, 6), round(row.iqr_ms or 0.0, 6)) for row in rows]


def test_what_was_timed_before_does_not_show(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    assert times("a") == [(2.0, 0.0)]
    assert times("abcd") == [(2.0, 0.0)] * 4
    # Without waiting for the threads of the others it would.
    monkeypatch.setattr(clocks, "settle", lambda: None)
    assert min(times("abcd"))[0] > 3.0


def test_a_clock_leaves_no_thread_awake(machine: Machine) -> None:
    # The next network may run in another process, whose clock cannot see these threads.
    clock(partial(machine.call, 0), threads=1)(3)
    assert machine.now >= machine.awake[0]


def test_an_engine_whose_threads_never_sleep_is_timed_all_the_same(machine: Machine) -> None:
    machine.spin = 1e9
    assert clock(partial(machine.call, 0), threads=1)(3) == pytest.approx(0.002)


def test_an_idle_process_is_not_waited_for(machine: Machine) -> None:
    settle()
    assert machine.now == clocks.STILL


def test_a_clock_warms_up_with_two_calls_or_one_long_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # A call takes `each` seconds of a clock that stands still otherwise.
    time, each, threads = [0.0], 0.1, set()

    def call() -> None:
        time[0] += each
        threads.add(torch.get_num_threads())
        assert torch.is_inference_mode_enabled()

    monkeypatch.setattr(torch.utils.benchmark, "timer", lambda: time[0])
    before = torch.get_num_threads()
    timed = clock(call, threads=before + 1)
    assert timed(3) == pytest.approx(0.1)
    assert time[0] == pytest.approx(0.5)  # two calls, and three
    each, time[0] = 0.25, 0.0
    assert timed(1) == pytest.approx(0.25)
    assert time[0] == pytest.approx(0.5)  # one call, and one
    assert (threads, torch.get_num_threads()) == ({before + 1}, before)
    # Before all, two times, of which the first may hold a compilation; a long one is enough.
    for some, seconds in (([0.2, 0.1], 0.1), ([0.3], 0.3)):
        assert warm(lambda _, left=some: left.pop(0)) == seconds


def test_a_step_of_training_is_timed_with_gradients() -> None:
    weight = torch.ones(3, requires_grad=True)
    clock(lambda: (weight * 2).sum().backward(), threads=1, gradients=True)(1)
    assert weight.grad is not None


def test_a_limit_of_time_leaves_three_rounds(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter(range(0, 1000, 10))
    monkeypatch.setattr(clocks, "time", SimpleNamespace(monotonic=lambda: next(seconds)))
    assert list(turns(1, 50, max_run_time=45)) == [(n, 0) for n in range(5)]
    assert len(list(turns(2, 50, max_run_time=1))) == 2 * clocks.FEWEST_ROUNDS


def test_a_race_tells_of_each_round_and_fills_the_least_time() -> None:
    asked: list[tuple[str, int]] = []
    told: list[int] = []

    def timed(name: str, calls: int) -> float:
        asked.append((name, calls))
        return 0.03

    race({name: partial(timed, name) for name in "ab"}, 2, 0.1, report=told.append)
    assert told == [0, 1]
    assert asked[-4:] == [("a", 4), ("b", 4)] * 2
    assert race({"a": partial(timed, "a")}, 0, 0.1) == {"a": []}
