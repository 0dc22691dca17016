"""What a training step at both depths costs, against training each depth by itself.

*Adaptive Depth Networks* (arXiv 2312.16392, section 3.3): "the total training time is no
greater than training two sub-networks individually". Here that is measured: a step of
Algorithm 1 beside a plain step of the whole network and one of the base network, in turn in
each round, and the ratio taken within a round.

Shapes: images [B, C, S, S]; classes int64 [B].
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pliant._files import atomic_path, write_csv
from pliant.depth import get_depth, subnet
from pliant.measuring.entrants import Model, Size, by_name, variants
from pliant.measuring.latency import median, spread
from pliant.measuring.provenance import provenance
from pliant.measuring.running import setting_of
from pliant.train.objectives import CrossEntropy, Joint, Specialization

if TYPE_CHECKING:
    from rich.console import Console

SUPER, BASE = "super alone", "base alone"


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """What one kind of training step takes: forward, loss, backward, SGD with momentum.

    Attributes:
        network: the adaptive network's name.
        step: ``super alone`` and ``base alone``: a plain step of a plain network of that
            depth; ``specialize`` and ``joint``: of the adaptive network, by that objective.
        batch: images of a step.
        input_size: channels, height, width, as ``3x32x32``.
        device: ``cpu`` or ``cuda``.
        threads: of PyTorch's pool.
        rounds: rounds that were timed.
        median_ms: median time of a step over rounds.
        iqr_ms: its spread, the interquartile range.
        ratio: time over that of both plain steps, the median of the ratios in each round.
        ratio_iqr: its spread.
        cpu: this and all that follows: as `pliant.measuring.provenance.Provenance`.
    """

    network: str
    step: str
    batch: int
    input_size: str
    device: str
    threads: int
    rounds: int
    median_ms: float | None
    iqr_ms: float | None
    ratio: float | None
    ratio_iqr: float | None
    cpu: str = ""
    cores: int = 0
    gpu: str = ""
    os: str = ""
    python: str = ""
    torch: str = ""
    timm: str = ""
    pliant: str = ""
    commit: str = ""
    date: str = ""


def measure_steps(
    model: Model,
    *,
    batch: int = 32,
    input_size: int | Size | None = None,
    device: str | torch.device = "cpu",
    threads: int | None = None,
    rounds: int = 9,
    min_run_time: float = 0.2,
    seed: int = 0,
) -> list[StepCost]:
    """Time training steps of an adaptive network and of its two ends by themselves.

    Args:
        model: a name that timm knows, or a network (which is copied).
        batch: images of a step.
        input_size: channels, height and width, or pixels alone; by default the network's own.
        device: ``cpu`` or ``cuda``.
        threads: of PyTorch's pool. By default `torch.get_num_threads`.
        rounds: how often each step is timed.
        min_run_time: seconds that one kind of step runs in one round, at least.
        seed: of random weights and images; the caller's generators are left alone.

    Returns:
        Rows of the plain steps of both ends, of specialization, and of joint training.

    Raises:
        ValueError: the network has no adaptive depth; an unknown network or device; or a
            number that makes no sense.

    Example:
        >>> rows = measure_steps("resnet20_cifar_adn", batch=2, rounds=1, min_run_time=0)
        >>> [row.step for row in rows]
        ['super alone', 'base alone', 'specialize', 'joint']
    """
    from torch.utils.benchmark import Timer  # on use: it looks for compilers as it loads

    setting = setting_of(batch, device, "float32", False, "eager", threads)
    for name, number, least in (("rounds", rounds, 1), ("min_run_time", min_run_time, 0)):
        if number < least:
            raise ValueError(f"{name} must be at least {least}, not {number}")
    gpus = [setting.device] if setting.device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        torch.manual_seed(seed)
        ((name, given),) = by_name(model).items()
        entrant = variants(name, given, input_size, None, tax=False)[0]
        if entrant.network is None or entrant.size is None:
            raise ValueError(f"{name} cannot be built: {entrant.error}")
        network, size = setting.place(copy.deepcopy(entrant.network)).train(), entrant.size
        flags = len(get_depth(network))
        x = setting.place(torch.randn(batch, *size))
        classes = network(x[:1].repeat(2, 1, 1, 1)).shape[1]
        y = torch.randint(classes, (batch,), device=setting.device)
        ends = {SUPER: (False,) * flags, BASE: (True,) * flags}
        steps = {key: _plain_step(subnet(network, skip), x, y) for key, skip in ends.items()}
        both: dict[str, Joint] = {"specialize": Specialization(), "joint": Joint()}
        for key, objective in both.items():
            steps[key] = _step_of_both(copy.deepcopy(network), objective, x, y)
        timers: dict[str, tuple[Timer, int]] = {}
        for key, step in steps.items():
            timer = Timer("step()", globals={"step": step}, num_threads=setting.threads)
            timer.timeit(1)  # two steps that warm up, then a third
            timers[key] = timer, max(1, math.ceil(min_run_time / timer.timeit(1).mean))
        times: dict[str, list[float]] = {key: [] for key in steps}
        for _ in range(rounds):
            for key, (timer, calls) in timers.items():
                times[key].append(1000 * timer.timeit(calls).mean)
    plain = [a + b for a, b in zip(times[SUPER], times[BASE], strict=True)]
    origin = provenance(setting.device)
    rows = []
    for key, ms in times.items():
        ratios = [a / b for a, b in zip(ms, plain, strict=True)]
        rows.append(
            StepCost(
                network=name,
                step=key,
                batch=batch,
                input_size="x".join(map(str, size)),
                device=setting.device.type,
                threads=setting.threads,
                rounds=rounds,
                median_ms=median(ms),
                iqr_ms=spread(ms),
                ratio=median(ratios),
                ratio_iqr=spread(ratios),
                **origin,
            )
        )
    return rows


def _plain_step(network: nn.Module, x: Tensor, y: Tensor) -> Callable[[], None]:
    def terms() -> dict[str, Tensor]:
        return CrossEntropy()(network(x), y)

    return partial(_step, _optimizer(network), terms)


def _step_of_both(network: nn.Module, objective: Joint, x: Tensor, y: Tensor) -> Callable[[], None]:
    def terms() -> dict[str, Tensor]:
        return objective(objective.run(network, x), y)

    return partial(_step, _optimizer(network), terms)


def _optimizer(network: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(network.parameters(), lr=1e-4, momentum=0.9)  # that nothing overflows


def _step(optimizer: torch.optim.Optimizer, terms: Callable[[], dict[str, Tensor]]) -> None:
    optimizer.zero_grad()
    loss: Any = torch.stack(list(terms().values())).sum()
    loss.backward()
    optimizer.step()


# Network and images of a step, by device; fewest first, which a rehearsal takes alone.
SUITES: dict[str, tuple[tuple[str, int], ...]] = {
    "cpu": (("resnet20_cifar_adn", 64), ("resnet56_cifar_adn", 64), ("resnet50_adn", 4)),
    "cuda": (("resnet56_cifar_adn", 256), ("resnet50_cifar_adn", 256), ("resnet50_adn", 64)),
}


def run_step_bench(
    device: str = "cpu",
    results: str | Path = "results",
    quick: bool = False,
    *,
    threads: int | None = None,
    console: Console | None = None,
) -> list[StepCost]:
    """Measure the steps of a device's suite; write rows and a table.

    Files: ``steps-DEVICE.csv`` and ``.md`` in `results`, replaced when the first network is
    done and completed after each further one; those of a rehearsal ``steps-DEVICE-quick.*``.

    Args:
        device: ``cpu`` or ``cuda``.
        results: folder of the files; made if missing.
        quick: a rehearsal: the first network, three rounds.
        threads: of PyTorch's pool.
        console: where rich prints the table.

    Raises:
        ValueError: no suite for `device`, or the device is missing.
    """
    from rich.console import Console

    kind = device.partition(":")[0]
    if kind not in SUITES:
        raise ValueError(f"no benchmark for device {device!r}; there is one for {', '.join(SUITES)}")
    stem = Path(results) / f"steps-{kind}{'-quick' if quick else ''}"
    options: dict[str, Any] = {"device": device, "threads": threads}
    options |= {"rounds": 3, "min_run_time": 0.0} if quick else {}
    rows: list[StepCost] = []
    for network, batch in SUITES[kind][:1] if quick else SUITES[kind]:
        rows += measure_steps(network, batch=batch, **options)
        write_steps(f"{stem}.csv", rows)
        with atomic_path(f"{stem}.md") as temporary:
            temporary.write_text(
                f"# Training steps\n\n{_PREFACE}\n\n{steps_markdown(rows)}\n", encoding="utf-8"
            )
    console = console or Console()
    console.print(steps_markdown(rows), markup=False)
    console.print(f"written: {stem}.csv, .md")
    return rows


_PREFACE = """\
Written by `python -m pliant bench --suite steps`, from the CSV file beside it. What a step of an adaptive
network (both depths) takes, over a plain step of the whole network and one of the base network together;
all are timed in turn in each round, and the ratio is taken within a round. In brackets: interquartile
range over rounds."""


def steps_markdown(rows: Sequence[StepCost]) -> str:
    """Rows as a Markdown table, under a line of where they were measured."""
    where = dict.fromkeys(
        f"{r.gpu or f'{r.cpu} ({r.cores} cores)'} · threads {r.threads} · torch {r.torch} · "
        f"commit {r.commit[:12]}{'-dirty' * r.commit.endswith('-dirty')} · measured {r.date[:10]}"
        for r in rows
    )
    lines = ["| network | step | batch | time, ms | over both plain steps |", "|---|---|---:|---:|---:|"]
    lines += [
        f"| {r.network} | {r.step} | {r.batch} | {_spreading(r.median_ms, r.iqr_ms, 1)} | "
        f"{_spreading(r.ratio, r.ratio_iqr, 2)} |"
        for r in rows
    ]
    return "\n".join([*where, "", *lines])


def _spreading(value: float | None, spread: float | None, digits: int) -> str:
    if value is None:
        return ""
    return f"{value:.{digits}f}" + ("" if spread is None else f" ({spread:.{digits}f})")


def write_steps(path: str | Path, rows: Iterable[StepCost], append: bool = False) -> None:
    """Write rows to a CSV file, whole or not at all; `append` keeps those it has.

    Raises:
        ValueError: `append` to a file with other columns.
    """
    cells = (["" if v is None else str(v) for v in asdict(row).values()] for row in rows)
    write_csv(path, [f.name for f in fields(StepCost)], cells, append, "training steps")
