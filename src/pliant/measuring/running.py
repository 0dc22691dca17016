"""One run of networks in one engine: prepared one after another, then timed in turn.

Shapes: images [B, C, H, W].
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pliant.counting import count_macs, count_parameters
from pliant.deploy.engines import PRECISIONS, Engine, FileEngine, named
from pliant.deploy.folding import fold_norms
from pliant.deploy.loading import open_export
from pliant.measuring.candidates import Candidate, EngineError, attempt
from pliant.measuring.clock import calls_within, clock, turns, warm
from pliant.measuring.isolation import Isolated
from pliant.measuring.rows import AS_BUILT, NATIVE, OPTIMIZED
from pliant.measuring.writing import Files, Writing
from pliant.parts import Operators, operators_of

CROWDED = 4  # times as long as alone, at most, a warm-up takes beside files being written


@dataclass(frozen=True)
class Setting:
    """What holds for all networks of a run; each as the argument of `pliant.measure`."""

    batch: int
    device: torch.device
    precision: str
    channels_last: bool
    engine: Engine
    threads: int

    @property
    def unfit(self) -> str:
        """Why the engine cannot run this; empty if it can."""
        return self.engine.unfit(self.device.type, self.precision)

    @property
    def has_native(self) -> bool:
        """Whether the engine runs parts as operators in a layout of its own."""
        return self.precision in self.engine.native_precisions

    @property
    def how(self) -> dict[str, Any]:
        """What the engine is told."""
        return {"precision": self.precision, "threads": self.threads}

    def place(self, x: Any) -> Any:
        """A network, or images, on the device, in memory format and, for PyTorch, in dtype."""
        form = torch.channels_last if self.channels_last else torch.contiguous_format
        dtype = PRECISIONS[self.precision] if self.engine.by_pytorch else torch.float32
        return x.to(device=self.device, dtype=dtype, memory_format=form)


def setting_of(
    batch: int,
    device: str | torch.device,
    dtype: str | torch.dtype,
    channels_last: bool,
    engine: str,
    threads: int | None,
) -> Setting:
    """A setting of what `pliant.measure` takes; an engine of its own layout has no other.

    Raises:
        ValueError: one of them does not exist, is not here, or makes no sense.

    Example:
        >>> setting_of(1, "cpu", "float32", True, "eager", 2).threads
        2
    """
    threads = torch.get_num_threads() if threads is None else threads
    for name, number in {"batch": batch, "threads": threads}.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}")
    (how,) = named([engine])
    precision = str(dtype).removeprefix("torch.")
    if precision not in PRECISIONS:
        raise ValueError(f"no dtype {dtype!r} here; the dtypes are {', '.join(PRECISIONS)}")
    try:
        place = torch.device(device)
    except RuntimeError as e:
        raise ValueError(f"no device {device!r}; give cpu or cuda") from e
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device {str(device)!r} is not supported here; give cpu or cuda")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} is not available: PyTorch sees no GPU; give cpu")
    return Setting(batch, place, precision, channels_last and how.by_pytorch, how, threads)


@dataclass(frozen=True)
class Limits:
    """How long a run takes; each as the argument of `pliant.measure`."""

    rounds: int
    min_run_time: float
    max_run_time: float | None
    max_prepare_time: float | None
    timeout: float
    write_timeout: float


def run(
    candidates: list[Candidate],
    setting: Setting,
    limits: Limits,
    files: Files,
    report: Callable[[int, str], None],
) -> None:
    """Prepare all candidates, then time them in turn, round after round; each keeps its times.

    Args:
        candidates: in their order; those with an error stay out.
        setting: what holds for all.
        limits: how long the run may take.
        files: files of the engines that run files; those that serve another run are kept.
        report: called with steps done and what comes next; a candidate is a step in the
            preparation, and in each round.
    """
    engine = setting.engine
    on_cpu = setting.device.type == "cpu"
    for candidate in candidates:
        candidate.error = candidate.error or setting.unfit
    # Building takes a minute or two the first time, which are no network's own.
    for native in _operators(candidates, OPTIMIZED) if on_cpu and engine.by_pytorch else ():
        native.ready()
    for native in _operators(candidates, NATIVE):
        with suppress(ValueError):  # the networks that need it will say so
            native.onnx_library()
    child = writing = None
    if isinstance(engine, FileEngine):
        child = Isolated(engine, limits.timeout)
        kind = setting.device.type
        writing = Writing(files, engine, child, candidates, setting.how, kind, limits.write_timeout)
    with child or nullcontext():
        _prepare(candidates, setting, limits, child, writing, report)
        # An engine that quietly compiled anew, or gave up, would spoil the times.
        with torch.compiler.set_stance("fail_on_recompile"):
            _time_in_turn(candidates, limits, report)


def _operators(candidates: list[Candidate], form: str) -> list[Operators]:
    """The native operators that candidates of this form need."""
    networks = [c.network for c in candidates if c.form == form and c.network is not None]
    return list({id(o): o for network in networks for o in operators_of(network)}.values())


def count(candidate: Candidate) -> None:
    """Note its parameters and multiply-accumulates, which are those of the network as built."""
    assert candidate.network is not None
    assert candidate.size is not None
    candidate.parameters = count_parameters(candidate.network)
    candidate.macs = count_macs(candidate.network, candidate.size)


def _prepare(
    candidates: list[Candidate],
    setting: Setting,
    limits: Limits,
    child: Isolated | None,
    writing: Writing | None,
    report: Callable[[int, str], None],
) -> None:
    """Bring all into form, move and warm them up, in their order: the clocks are ready then.

    Where files are written meanwhile, some are begun ahead. A warm-up beside them tells too long a
    time, and how often a network is called in a round is found anew when they are done.
    """
    ahead = writing.ahead if writing else 0
    least = limits.min_run_time * (CROWDED if ahead else 1)
    rest: dict[int, Callable[[], float]] = {}  # of the preparation of those that are begun

    def begin(candidate: Candidate) -> None:
        rest[id(candidate)] = _begin(candidate, setting, child, writing)

    def finish(candidate: Candidate) -> None:
        candidate.calls = calls_within(least, rest.pop(id(candidate))())

    def recount(candidate: Candidate) -> None:
        if candidate.calls > 1:
            assert candidate.clock is not None
            candidate.calls = calls_within(limits.min_run_time, candidate.clock(1))

    start, begun, most = time.monotonic(), 0, limits.max_prepare_time
    with writing or nullcontext():
        for i, candidate in enumerate(candidates):
            report(i, f"preparing {candidate.label}")
            for other in candidates[begun : i + 1 + ahead]:
                if begun and most is not None and time.monotonic() - start >= most:
                    other.error = other.error or f"left out: preparing took over {most:g} s"
                attempt(other, begin)
                begun += 1
            attempt(candidate, finish)
    for candidate in candidates if ahead else []:
        attempt(candidate, recount)


def _begin(
    candidate: Candidate, setting: Setting, child: Isolated | None, writing: Writing | None
) -> Callable[[], float]:
    """Bring into form and begin to write its file, if there is one.

    What comes back does the rest: it sets the clock, warms up, and gives the seconds of one call.
    """
    if candidate.file is not None:
        return partial(_open, candidate, candidate.file, setting)
    assert candidate.network is not None
    assert candidate.size is not None
    original, candidate.network = candidate.network, None
    engine = setting.engine
    images = engine.images(setting.place(torch.randn(setting.batch, *candidate.size)), setting.precision)
    formed = partial(_formed, original, candidate, setting, images)
    if child is None or writing is None:
        network = formed()

        def prepare() -> float:
            run = engine.prepare(network, images, **setting.how)
            candidate.clock = clock(partial(run, images), setting.threads)
            return warm(candidate.clock)

        return prepare
    written = writing.begin(candidate, formed, images)

    def load() -> float:
        number, seconds = child.load(written(), images, **setting.how)
        candidate.clock = partial(child.time, number)
        return seconds

    return load


def _open(candidate: Candidate, file: Path, setting: Setting) -> float:
    """An exported file, in its own engine."""
    if setting.device.type != "cpu":
        raise EngineError(f"an exported file runs on the CPU here, not on {setting.device.type}")
    opened = open_export(file, threads=setting.threads)
    candidate.clock = clock(partial(opened, opened.example(setting.batch)), setting.threads)
    return warm(candidate.clock)


def _formed(network: nn.Module, candidate: Candidate, setting: Setting, images: Tensor) -> nn.Module:
    """A copy of the network as the engine gets it: in its form, and in place.

    An engine that is not PyTorch's is told of the best blocks when it writes its file.
    """
    network = copy.deepcopy(network).eval()
    if candidate.form != AS_BUILT:
        like = next(network.parameters(), images)
        network = fold_norms(network, images[:1].to(like.device, like.dtype))
    network = setting.place(network)
    if candidate.form == OPTIMIZED and setting.engine.by_pytorch:
        from pliant.deploy.optimize import optimize, unfused

        network = optimize(network, images[:1], channels_last=setting.channels_last)
        native = operators_of(network) if setting.device.type == "cpu" else ()
        reasons = dict.fromkeys([*unfused(network).values(), *(o.why_not() for o in native)])
        if told := "; ".join(filter(None, reasons)):
            candidate.note = f"blocks run in PyTorch's operators: {told}"
    return network


def _time_in_turn(candidates: list[Candidate], limits: Limits, report: Callable[[int, str], None]) -> None:
    """Time all candidates in turn, round after round."""
    for number, one in turns(len(candidates), limits.rounds, limits.max_run_time):
        report(len(candidates) * (1 + number) + one, f"round {number + 1} of {limits.rounds}")
        attempt(candidates[one], _time)


def _time(candidate: Candidate) -> None:
    assert candidate.clock is not None
    candidate.seconds.append(candidate.clock(candidate.calls))
