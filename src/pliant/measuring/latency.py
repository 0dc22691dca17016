"""Latency of networks, side by side: one run, interleaved rounds, paired ratios.

Absolute times of a shared machine drift by more than the effects that matter here. So
all networks of a run are timed in turn (A B C A B C ...), a ratio is taken within each
round, and the median over rounds is reported with its spread. A network is compared
with the same network at a lower resolution, and a Mixture-of-Depths network with itself
without its blocks: no block can be cheaper than none.

`torch.utils.benchmark.Timer` times (it waits for a GPU, and sets the threads).
Latency does not depend on the values of weights and images, as long as these are
ordinary numbers: neither denormal (slow on a CPU) nor zero (a GPU then draws less
power and clocks higher). Networks made here by name have random weights like that.
"""

from __future__ import annotations

import copy
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from pliant.measuring.engines import ENGINES, room_to_compile
from pliant.measuring.entrants import Entrant, Model, Size, add_baseline, attempt, by_name, variants
from pliant.measuring.macs import count_macs, count_parameters
from pliant.measuring.provenance import Provenance, provenance
from pliant.measuring.rows import AS_IS, NO_BLOCKS, Measurement

Progress = Callable[[int, int, str], None]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FEWEST_ROUNDS = 3  # that `max_run_time` leaves
NOT_FASTER = "operations fell, time did not"
PERHAPS_FASTER = "operations fell, time not beyond its spread"


@dataclass(frozen=True)
class _Setting:
    """What holds for all networks of a run."""

    batch: int
    device: torch.device
    dtype: torch.dtype
    channels_last: bool
    engine: str
    threads: int

    def place(self, x: Any) -> Any:
        """A network, or images, on the device, in dtype and memory format."""
        form = torch.channels_last if self.channels_last else torch.contiguous_format
        return x.to(device=self.device, dtype=self.dtype, memory_format=form)


def measure(
    models: Model | Sequence[Model] | Mapping[str, Model],
    *,
    against: Model | None = None,
    input_size: int | Size | None = None,
    batch: int = 1,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    channels_last: bool = False,
    engine: str = "eager",
    threads: int | None = None,
    rounds: int = 15,
    min_run_time: float = 0.1,
    max_run_time: float | None = None,
    max_prepare_time: float | None = None,
    tax: bool = True,
    lower_resolution: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[Measurement]:
    """Time networks side by side, in evaluation mode.

    All are timed in turn in each round; on a GPU, the calls of one network in one round
    are queued, and awaited together. A network that fails (it cannot be built or
    compiled, or runs out of memory) costs its own row, which says why, not the table.
    Compiling is not in the time. Networks that are passed in are copied, not changed.

    Args:
        models: names that ``timm.create_model`` knows (random weights), or networks,
            or a mapping of names to either.
        against: the baseline, in the same form, or the name of one of `models`; it is
            timed too. None: no ratios.
        input_size: channels, height and width, or pixels alone. By default each
            network's own; rows state it.
        batch: images a forward.
        device: ``cpu`` or ``cuda``.
        dtype: ``float32``, ``bfloat16`` or ``float16``, of weights and images.
        channels_last: memory format of weights and images.
        engine: ``eager``, or ``compiled`` (`torch.compile`; with CUDA graphs on a GPU).
        threads: of PyTorch's pool. By default `torch.get_num_threads`.
        rounds: how often each network is timed.
        min_run_time: seconds that one network runs in one round, at least.
        max_run_time: seconds after which no further round begins (three are always
            run). Building and compiling do not count.
        max_prepare_time: seconds after which no further network is compiled and warmed
            up: the rows of those that are left say so. The first always is.
        tax: time each Mixture-of-Depths network without its blocks too, for its tax.
        lower_resolution: pixels at which the baseline is timed too, as a rival.
        seed: of random weights and images; the caller's generators are left alone.
        progress: called with steps done, steps in all, and what comes next.

    Returns:
        A row for each network and variant; the baseline first unless it is among
        `models`, each variant after its network.

    Raises:
        ValueError: an unknown network, engine, dtype or device; a number that makes no
            sense; a network that does not say its input size, when none is given.

    Example:
        >>> rows = measure("resnet20_cifar_mod", against="resnet20_cifar", rounds=1, min_run_time=0)
        >>> [row.label for row in rows]
        ['resnet20_cifar', 'resnet20_cifar_mod', 'resnet20_cifar_mod without MoD blocks']
        >>> rows[0].time_ratio, round(rows[1].mac_ratio, 2)
        (1.0, 0.65)
    """
    setting = _setting(batch, device, dtype, channels_last, engine, threads)
    for name, number in {"rounds": rounds, "min_run_time": min_run_time}.items():
        if number < (least := 1 if name == "rounds" else 0):
            raise ValueError(f"{name} must be at least {least}, not {number}")
    named = by_name(models)
    base = None if against is None else add_baseline(named, against)
    if lower_resolution is not None and base is None:
        raise ValueError("lower_resolution is that of the baseline: name one with `against`")

    report = progress or (lambda _done, _total, _what: None)
    gpus = [setting.device] if setting.device.type == "cuda" else []
    with torch.random.fork_rng(gpus), room_to_compile():
        torch.manual_seed(seed)
        entrants: list[Entrant] = []
        for name, model in named.items():
            low = lower_resolution if name == base else None
            entrants += variants(name, model, input_size, low, tax)
        steps = len(entrants) * (1 + rounds)
        start = time.monotonic()
        for i, entrant in enumerate(entrants):
            report(i, steps, f"preparing {entrant.label}")
            if i and max_prepare_time is not None and time.monotonic() - start >= max_prepare_time:
                entrant.error = entrant.error or f"left out: preparing took over {max_prepare_time:g} s"
            attempt(entrant, partial(_prepare, setting=setting, min_run_time=min_run_time))
        # An engine that quietly compiled anew, or gave up, would spoil the times.
        with torch.compiler.set_stance("fail_on_recompile"):
            _race(entrants, rounds, max_run_time, report)
        report(steps, steps, "done")
    origin = provenance(setting.device)
    return [_row(e, entrants, base, setting, origin) for e in entrants]


def _setting(
    batch: int,
    device: str | torch.device,
    dtype: str | torch.dtype,
    channels_last: bool,
    engine: str,
    threads: int | None,
) -> _Setting:
    threads = torch.get_num_threads() if threads is None else threads
    for name, number in {"batch": batch, "threads": threads}.items():
        if number < 1:
            raise ValueError(f"{name} must be at least 1, not {number}")
    if engine not in ENGINES:
        raise ValueError(f"no engine {engine!r}; the engines are {', '.join(ENGINES)}")
    kind = DTYPES.get(str(dtype).removeprefix("torch."))
    if kind is None:
        raise ValueError(f"no dtype {dtype!r} here; the dtypes are {', '.join(DTYPES)}")
    try:
        place = torch.device(device)
    except RuntimeError as e:
        raise ValueError(f"no device {device!r}; give cpu or cuda") from e
    if place.type not in ("cpu", "cuda"):
        raise ValueError(f"device {str(device)!r} is not supported here; give cpu or cuda")
    if place.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} is not available: PyTorch sees no GPU; give cpu")
    return _Setting(batch, place, kind, channels_last, engine, threads)


def _prepare(entrant: Entrant, setting: _Setting, min_run_time: float) -> None:
    """Count, move and warm up: afterwards the timer is ready and `calls` is known."""
    from torch.utils.benchmark import Timer  # on use: it looks for compilers as it loads

    assert entrant.network is not None
    assert entrant.size is not None
    # Its own copy: the caller's network stays as it is, where it is.
    network = setting.place(copy.deepcopy(entrant.network)).eval()
    entrant.network = None
    entrant.parameters = count_parameters(network)
    entrant.macs = count_macs(network, entrant.size)
    images = setting.place(torch.randn(setting.batch, *entrant.size))
    run = ENGINES[setting.engine](network, setting.device)
    entrant.timer = Timer(
        "run(images)", globals={"run": run, "images": images}, num_threads=setting.threads
    )
    with torch.inference_mode():
        entrant.timer.timeit(1)  # two calls that warm up (and compile), then a third
        seconds = entrant.timer.timeit(1).mean
    entrant.calls = max(1, math.ceil(min_run_time / seconds))


def _race(entrants: list[Entrant], rounds: int, max_run_time: float | None, report: Progress) -> None:
    """Time all entrants in turn, round after round."""
    start = time.monotonic()
    steps = len(entrants) * (1 + rounds)
    for i in range(rounds):
        for j, entrant in enumerate(entrants):
            report(len(entrants) * (1 + i) + j, steps, f"round {i + 1} of {rounds}")
            attempt(entrant, _time)
        spent = time.monotonic() - start
        if max_run_time is not None and spent >= max_run_time and i + 1 >= FEWEST_ROUNDS:
            return


def _time(entrant: Entrant) -> None:
    assert entrant.timer is not None
    with torch.inference_mode():
        entrant.seconds.append(entrant.timer.timeit(entrant.calls).mean)


def _row(
    entrant: Entrant, entrants: list[Entrant], base: str | None, setting: _Setting, origin: Provenance
) -> Measurement:
    """All that is known of one entrant beside the others."""
    baseline = next((e for e in entrants if (e.model, e.variant) == (base, AS_IS)), None)
    stripped = next((e for e in entrants if (e.model, e.variant) == (entrant.model, NO_BLOCKS)), None)
    ms = [1000 * s for s in entrant.seconds]
    ratios = _paired(entrant, baseline)
    taxes = [r - 1 for r in _paired(entrant, stripped)] if entrant.variant == AS_IS else []
    macs = entrant.macs / baseline.macs if baseline and baseline.macs and entrant.macs else None
    notes = []
    if macs is not None and macs < 1 and ratios:
        _, middle, high = _quartiles(ratios)
        notes += [NOT_FASTER] if middle >= 1 else [PERHAPS_FASTER] if high >= 1 else []
    if baseline and baseline.error and not entrant.error:
        notes.append("the baseline failed: no ratio")
    return Measurement(
        model=entrant.model,
        variant=entrant.variant,
        parameters=entrant.parameters,
        macs=entrant.macs,
        input_size=entrant.size,
        batch=setting.batch,
        device=setting.device.type,
        engine=setting.engine,
        dtype=str(setting.dtype).removeprefix("torch."),
        channels_last=setting.channels_last,
        threads=setting.threads,
        rounds=len(ms),
        median_ms=_median(ms),
        iqr_ms=_spread(ms),
        min_ms=_rounded(min(ms)) if ms else None,
        max_ms=_rounded(max(ms)) if ms else None,
        against=base or "",
        time_ratio=_median(ratios),
        time_ratio_iqr=_spread(ratios),
        mac_ratio=None if macs is None else _rounded(macs),
        tax=_median(taxes),
        tax_iqr=_spread(taxes),
        note="; ".join(notes),
        error=entrant.error,
        **origin,
    )


def _paired(entrant: Entrant, other: Entrant | None) -> list[float]:
    """Times over the other's in the same round; empty if one of the two has none."""
    if other is None or not entrant.seconds or not other.seconds:
        return []
    return [a / b for a, b in zip(entrant.seconds, other.seconds, strict=True)]


def _quartiles(values: list[float]) -> tuple[float, float, float]:
    if len(values) == 1:
        return values[0], values[0], values[0]
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, middle, high


def _median(values: list[float]) -> float | None:
    return _rounded(_quartiles(values)[1]) if values else None


def _spread(values: list[float]) -> float | None:
    """The interquartile range; one round has none."""
    if len(values) < 2:
        return None
    low, _, high = _quartiles(values)
    return _rounded(high - low)


def _rounded(value: float) -> float:
    return float(f"{value:.6g}")  # a clock gives no more
