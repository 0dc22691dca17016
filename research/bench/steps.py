"""What a training step costs: each method beside the plain network, in turn in each round.

A step is forward, loss, backward and SGD with momentum.

*CNN Mixture-of-Depths* (arXiv 2409.17016) claims faster training, so its baselines are the plain
network and the network with its blocks removed, which is a lower bound. *CondConv* (arXiv 1904.04971)
has two forms of one function. *Adaptive Depth Networks* (arXiv 2312.16392, section 3.3): "the total
training time is no greater than training two sub-networks individually", so the baseline of a step of
Algorithm 1 is one step of each depth by itself.

Shapes: images [B, C, S, S]; classes int64 [B].
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pliant._files import atomic_path
from pliant.measuring.candidates import Model, Size, by_name, variants
from pliant.measuring.clock import clock, race
from pliant.measuring.latency import median, spread
from pliant.measuring.running import setting_of
from pliant.methods.adaptive_depth import Joint, Specialization
from pliant.methods.adaptive_depth.depth import get_depth, subnet
from pliant.methods.condconv.layers import CondConv2d, CondLinear
from pliant.methods.condconv.mixing import Form
from pliant.methods.mixture_of_depths import MoDBlock, without_mod_blocks
from pliant.objectives import CrossEntropy, ManyPasses, Objective
from pliant.provenance import provenance
from pliant.records import write_records
from research.bench.memory import peak_memory
from research.bench.step_rows import StepCost, steps_markdown

if TYPE_CHECKING:
    from rich.console import Console

PLAIN, NETWORK, REMOVED, FIRST = "plain", "network", "blocks removed", "first k"
WRITTEN = "network, as written"
SUPER, BASE = "super alone", "base alone"
FORMS: tuple[Form, ...] = ("fused", "experts")
DTYPES = ("float32", "bfloat16")


def measure_steps(
    model: Model,
    *,
    against: Model | None = None,
    batch: int = 32,
    input_size: int | Size | None = None,
    device: str | torch.device = "cpu",
    dtype: str = "float32",
    channels_last: bool = False,
    threads: int | None = None,
    rounds: int = 9,
    min_run_time: float = 0.2,
    max_run_time: float | None = None,
    seed: int = 0,
) -> list[StepCost]:
    """Time training steps of a network of one method, and of its baselines and controls.

    Args:
        model: a name that timm knows, or a network (which is copied), with one method applied.
        against: the plain network, a name or a network. Not for adaptive networks, which contain theirs.
        batch: images of a step.
        input_size: channels, height and width, or pixels alone; by default the network's own.
        device: ``cpu`` or ``cuda``.
        dtype: ``float32``, or ``bfloat16``: by autocast, weights in float32.
        channels_last: memory format of networks and images.
        threads: of PyTorch's pool. By default `torch.get_num_threads`.
        rounds: how often each step is timed.
        min_run_time: seconds that one kind of step runs in one round, at least.
        max_run_time: seconds after which no further round begins, if there have been three.
        seed: of random weights and images; the caller's generators are left alone.

    Returns:
        Of a Mixture-of-Depths network: rows of the plain network, of it, of it without its
        blocks, with the first k channels in place of selected ones, and as written, without the
        gradients in fewer passes. Of a CondConv network:
        plain, and both forms. Of an adaptive one: the plain steps of both ends,
        specialization, and joint training.

    Raises:
        ValueError: the network has none of the methods, or `against` is missing or too much;
            an unknown network, device or dtype; or a number that makes no sense.

    Example:
        >>> rows = measure_steps("resnet20_cifar_adn", batch=2, input_size=8, rounds=1, min_run_time=0)
        >>> [row.step for row in rows]
        ['super alone', 'base alone', 'specialize', 'joint']
    """
    setting = setting_of(batch, device, "float32", channels_last, "eager", threads)
    if dtype not in DTYPES:
        raise ValueError(f"no dtype {dtype!r} for training steps; the dtypes are {', '.join(DTYPES)}")
    for name, number, least in (("rounds", rounds, 1), ("min_run_time", min_run_time, 0)):
        if number < least:
            raise ValueError(f"{name} must be at least {least}, not {number}")
    gpus = [setting.device] if setting.device.type == "cuda" else []
    with torch.random.fork_rng(gpus):
        torch.manual_seed(seed)
        ((name, given),) = by_name(model).items()
        network, size = _built(name, given, input_size)
        x = setting.place(torch.randn(batch, *size))
        networks = _networks(name, network, against, size)
        networks = {key: setting.place(copy.deepcopy(n)).train() for key, n in networks.items()}
        with torch.no_grad():
            # A copy: norms keep statistics of what they see.
            classes = copy.deepcopy(next(iter(networks.values())))(x[:1].repeat(2, 1, 1, 1)).shape[1]
        y = torch.randint(classes, (batch,), device=setting.device)
        steps = {}
        for key, n in networks.items():
            objective: Any = {"specialize": Specialization, "joint": Joint}.get(key, CrossEntropy)()
            # So small a rate that nothing overflows on images that mean nothing.
            optimizer = torch.optim.SGD(n.parameters(), lr=1e-4, momentum=0.9)
            steps[key] = training_step(n, x, y, objective, optimizer, dtype)
        peaks = {key: _peak(step, networks[key], setting.device) for key, step in steps.items()}
        clocks = {key: clock(step, setting.threads, gradients=True) for key, step in steps.items()}
        seconds = race(clocks, rounds, min_run_time, max_run_time=max_run_time)
    return _rows(
        {key: [1000 * s for s in own] for key, own in seconds.items()},
        peaks,
        network=name,
        batch=batch,
        input_size="x".join(map(str, size)),
        device=setting.device.type,
        dtype=dtype,
        channels_last=channels_last,
        threads=setting.threads,
        **provenance(setting.device),
    )


def _built(name: str, model: Model, input_size: int | Size | None) -> tuple[nn.Module, Size]:
    candidate = variants(name, model, input_size, None, tax=False)[0]
    if candidate.network is None or candidate.size is None:
        raise ValueError(f"{name} cannot be built: {candidate.error}")
    return candidate.network, candidate.size


def _networks(name: str, network: nn.Module, against: Model | None, size: Size) -> dict[str, nn.Module]:
    """The networks that train, by kind of step."""
    mod, conditional = (
        any(isinstance(m, kinds) for m in network.modules())
        for kinds in ((MoDBlock,), (CondConv2d, CondLinear))
    )
    if mod or conditional:
        if against is None:
            raise ValueError(f"{name} needs its plain network as the baseline; add against=NAME")
        ((plain_name, plain),) = by_name(against).items()
        networks = {PLAIN: _built(plain_name, plain, size)[0]}
        if mod:
            return networks | {
                NETWORK: network,
                REMOVED: without_mod_blocks(network),
                FIRST: _first_channels(network),
                WRITTEN: _as_written(network),
            }
        return networks | {form: _in_form(network, form) for form in FORMS}
    flags = len(get_depth(network))  # refuses a network without adaptive depth
    if against is not None:
        raise ValueError(f"{name} is adaptive and contains its plain networks; remove against=")
    ends = {SUPER: (False,) * flags, BASE: (True,) * flags}
    networks = {key: subnet(network, skip) for key, skip in ends.items()}
    return networks | {"specialize": network, "joint": network}


def _first_channels(network: nn.Module) -> nn.Module:
    """A copy whose Mixture-of-Depths blocks take the first k channels, without a selector."""
    network = copy.deepcopy(network)
    for block in network.modules():
        if isinstance(block, MoDBlock):
            block.selector = None
    return network


class _Written(MoDBlock):
    """Plain operators, and the gradients that autograd makes of them."""

    def forward(self, x: Tensor) -> Tensor:
        return self.written(x)


def _as_written(network: nn.Module) -> nn.Module:
    """A copy whose Mixture-of-Depths blocks have plain operators and their gradients."""
    network = copy.deepcopy(network)
    for block in network.modules():
        if isinstance(block, MoDBlock):
            block.__class__ = _Written
    return network


def _in_form(network: nn.Module, form: Form) -> nn.Module:
    network = copy.deepcopy(network)
    for layer in network.modules():
        if isinstance(layer, (CondConv2d, CondLinear)):
            layer.form = form
    return network


def training_step(
    network: nn.Module,
    x: Tensor,
    y: Tensor,
    objective: Objective | ManyPasses,
    optimizer: torch.optim.Optimizer,
    dtype: str,
) -> Callable[[], None]:
    """A step of training, on the same images each time: forward, loss, backward, optimizer.

    Args:
        network: what is trained.
        x: images [B, C, S, S].
        y: classes int64 [B].
        objective: what is minimised.
        optimizer: of the network's parameters.
        dtype: ``float32``, or ``bfloat16``: by autocast.
    """

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
            outputs = objective.run(network, x) if isinstance(objective, ManyPasses) else network(x)
            loss: Any = torch.stack(list(objective(outputs, y).values())).sum()
        loss.backward()
        optimizer.step()

    return step


def _peak(step: Callable[[], None], network: nn.Module, device: torch.device) -> int:
    """Bytes that a step adds, once the optimizer has its momentum."""
    step()
    network.zero_grad()  # gradients are part of what a step adds
    return peak_memory(step, device)


def _rows(times: dict[str, list[float]], peaks: dict[str, int], **shared: Any) -> list[StepCost]:
    """A row for each kind of step, with its ratios within rounds."""
    plain = times.get(PLAIN) or times[SUPER]
    removed = times.get(REMOVED, [])
    both = [a + b for a, b in zip(times[SUPER], times[BASE], strict=True)] if SUPER in times else []
    rows = []
    for key, ms in times.items():
        ratios, taxes, of_both = (
            [a / b for a, b in zip(ms, other, strict=bool(other))]  # none of none
            for other in (plain, [] if key in (PLAIN, REMOVED) else removed, both)
        )
        over_removed = median(taxes)
        rows.append(
            StepCost(
                step=key,
                rounds=len(ms),
                median_ms=median(ms),
                iqr_ms=spread(ms),
                ratio=median(ratios),
                ratio_iqr=spread(ratios),
                tax=None if over_removed is None else over_removed - 1,
                tax_iqr=spread(taxes),
                both_ratio=median(of_both),
                both_ratio_iqr=spread(of_both),
                peak_mb=round(peaks[key] / 1e6, 3),
                **shared,
            )
        )
    return rows


@dataclass(frozen=True)
class Case:
    """One interleaved run of a suite: network, plain network, images of a step, dtypes."""

    network: str
    against: str | None
    batch: int
    dtypes: tuple[str, ...] = ("float32",)


# Fewest first: a rehearsal takes the first, in one dtype. channels_last all, as recipes train.
SUITES: dict[str, tuple[Case, ...]] = {
    "cpu": (
        Case("resnet20_cifar_mod", "resnet20_cifar", 64, DTYPES),
        Case("resnet56_cifar_mod", "resnet56_cifar", 64, DTYPES),
        Case("resnet50_mod", "resnet50", 4, DTYPES),
        Case("cc_mobilenetv1_025_cifar", "mobilenetv1_w025_cifar", 64),
        Case("cc_resnet20_cifar", "resnet20_cifar", 64),
        Case("resnet20_cifar_adn", None, 64),
        Case("resnet56_cifar_adn", None, 64),
        Case("resnet50_adn", None, 4),
    ),
    "cuda": (
        Case("resnet56_cifar_mod", "resnet56_cifar", 256, DTYPES),
        Case("resnet50_cifar_mod", "resnet50_cifar", 256, DTYPES),
        # 32 images: what each of 8 GPUs has of the papers' batches of 256.
        Case("resnet50_mod", "resnet50", 32, DTYPES),
        Case("cc_mobilenetv1_050", "mobilenetv1_w050", 32, DTYPES),
        Case("resnet56_cifar_adn", None, 256, DTYPES),
        Case("resnet50_cifar_adn", None, 256, DTYPES),
        Case("resnet50_adn", None, 32, DTYPES),
    ),
}
# Seconds of the rounds of one case in one dtype: the suite takes three minutes on a CPU, one on a GPU.
MOST_SECONDS = {"cpu": 7.0, "cuda": 3.0}


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
    options: dict[str, Any] = {"device": device, "threads": threads, "channels_last": True}
    options |= {"rounds": 3, "min_run_time": 0.0} if quick else {"max_run_time": MOST_SECONDS[kind]}
    rows: list[StepCost] = []
    runs = [(case, dtype) for case in SUITES[kind] for dtype in case.dtypes]
    for case, dtype in runs[:1] if quick else runs:
        rows += measure_steps(case.network, against=case.against, batch=case.batch, dtype=dtype, **options)
        write_records(f"{stem}.csv", StepCost, rows)
        with atomic_path(f"{stem}.md") as temporary:
            temporary.write_text(
                f"# Training steps\n\n{_PREFACE}\n\n{steps_markdown(rows)}\n", encoding="utf-8"
            )
    console = console or Console()
    console.print(steps_markdown(rows), markup=False)
    console.print(f"written: {stem}.csv, .md")
    return rows


_PREFACE = """\
Written by `python -m research bench --suite steps`, from the CSV file beside it. A step is forward, loss,
backward and SGD with momentum, channels_last; bfloat16 is by autocast. All kinds of step of a network are
timed in turn in each round, and ratios are taken within a round. The MoD tax is time over that of the same
network without its MoD blocks, minus one. The baseline of an adaptive network (both depths) is a plain
step of the full-depth network and one of the base network together. Peak is the most memory of tensors
that a step adds at a time. In brackets: interquartile range over rounds."""
