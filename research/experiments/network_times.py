"""Time the networks of an experiment: forwards as deployed, and training steps.

Latency is `pliant.measure`'s: all networks in turn, in each of several engines, as one would deploy
them. A training step is the recipe's own (batch, precision, objective, optimizer), in turn too.
Both go to one file of `Measurement` rows, replaced engine by engine.

Shapes: images [B, C, S, S]; classes int64 [B].
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from pliant.compare import PLAIN
from pliant.counting import count_macs, count_parameters
from pliant.deploy.engines import ENGINES, named
from pliant.measuring.candidates import fresh
from pliant.measuring.clock import clock, race
from pliant.measuring.latency import measure, median, spread
from pliant.measuring.rows import OPTIMIZED, PLAIN_FORM, Measurement, read_rows, write_rows
from pliant.methods.adaptive_depth import AdaptiveDepth
from pliant.methods.adaptive_depth.depth import get_depth, subnet
from pliant.models._build import methods_of
from pliant.provenance import provenance
from pliant.train.objectives import make_objective
from pliant.train.recipe import Recipe
from research.bench.steps import training_step
from research.experiments.plans import PlannedRun

STEP = "training step"  # in the place of an engine
BATCHES = {"cpu": (1, 16), "cuda": (1, 128)}
ENGINES_OF = {"cpu": ("eager", "onnxruntime"), "cuda": ("eager", "compile")}


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long networks are timed: rounds, and seconds of one network in one, at least."""

    rounds: int = 15
    min_run_time: float = 0.05


def name_of(network: str, label: str) -> str:
    """What a network is called in rows of times."""
    return f"{network}: {label}"


def time_networks(
    runs: Sequence[PlannedRun],
    path: str | Path,
    *,
    device: str = "cpu",
    threads: int | None = None,
    engines: Sequence[str] | None = None,
    batches: Sequence[int] | None = None,
    effort: Effort | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Measurement]:
    """Time each network of an experiment once, whatever its seeds; the rows replace their like.

    Args:
        runs: whose networks; the plain network, to which ratios are, is among them.
        path: CSV file, written after each engine; rows of other networks and engines stay.
        device: ``cpu`` or ``cuda``.
        threads: of PyTorch and of each engine.
        engines: names in `pliant.deploy.engines.ENGINES`; by default two for each device, of which a
            missing one is left out. Training steps are timed beside them.
        batches: images a forward.
        effort: how long.
        progress: called with steps done, steps in all, and what comes next.

    Returns:
        The rows of this call.

    Raises:
        ValueError: no plain network among the runs, no such engine, or an engine that was named, or
            the device, is missing.
    """
    effort = effort or Effort()
    kind = device.partition(":")[0]
    if kind not in BATCHES:
        raise ValueError(f"device must be cpu or cuda, not {device!r}")
    for wanted in named(engines) if engines else ():
        if wanted.missing:
            raise ValueError(f"engine {wanted.name} is not here: {wanted.missing}")
    found: list[Measurement] = []
    for network in dict.fromkeys(run.network for run in runs):
        own: dict[str, PlannedRun] = {}
        for run in runs:
            if run.network == network:
                own.setdefault(run.label, run)
        if PLAIN not in own:
            raise ValueError(f"ratios are to the plain {network}: --only needs {PLAIN!r} too")
        recipe = own[PLAIN].recipe
        with torch.random.fork_rng([]):
            torch.manual_seed(0)
            models = {
                name_of(network, label): model
                for run in own.values()
                for label, model in _networks(run).items()
            }
        for engine in engines or ENGINES_OF[kind]:
            if ENGINES[engine].missing:
                continue
            rows = measure(
                models,
                against=name_of(network, PLAIN),
                input_size=_size(recipe),
                batch=list(batches or BATCHES[kind]),
                device=device,
                engines=[engine],
                forms=(PLAIN_FORM, OPTIMIZED),
                threads=threads,
                tax=False,
                rounds=effort.rounds,
                min_run_time=effort.min_run_time,
                progress=progress,
            )
            found += rows
            _replace(path, rows)
        rows = time_steps(
            {name_of(network, run.label): run.recipe for run in own.values()},
            against=name_of(network, PLAIN),
            device=device,
            threads=threads,
            effort=effort,
            progress=progress,
        )
        found += rows
        _replace(path, rows)
    return found


def _networks(run: PlannedRun) -> dict[str, nn.Module]:
    """The networks of a run by label, with random weights; of an adaptive one its two ends."""
    r = run.recipe
    whole = fresh(r.model, **{"in_chans": r.in_chans, **r.model_args})
    if AdaptiveDepth not in methods_of(r.model):
        return {run.label: whole}
    flags = len(get_depth(whole))
    return {
        label: subnet(whole, (base,) * flags) for label, base in zip(run.labels, (False, True), strict=True)
    }


def _size(recipe: Recipe) -> tuple[int, int, int]:
    return recipe.in_chans, recipe.pixels, recipe.pixels


def _replace(path: str | Path, rows: Iterable[Measurement]) -> None:
    """Write rows in the place of those of the same networks in the same engines and batches."""
    rows = list(rows)
    new = {(r.model, r.engine, r.batch, r.form) for r in rows}
    old = read_rows(path) if Path(path).exists() else []
    write_rows(path, [r for r in old if (r.model, r.engine, r.batch, r.form) not in new] + rows)


def time_steps(
    recipes: dict[str, Recipe],
    *,
    against: str,
    device: str = "cpu",
    threads: int | None = None,
    effort: Effort | None = None,
    progress: Callable[[int, int, str], None] | None = None,
) -> list[Measurement]:
    """Time a training step of each recipe, in turn in each round.

    Forward, loss, backward and optimiser, at the recipe's batch and precision; images are
    at hand. What an epoch has besides (augmentation, the moving average of the weights, validation)
    is not in it, and is the same for all but for the forwards of validation.

    Args:
        recipes: by name.
        against: which one ratios are to.
        device: ``cpu`` or ``cuda``.
        threads: of PyTorch's pool.
        effort: how long.
        progress: called with steps done, steps in all, and what comes next.

    Returns:
        A row for each, whose engine is `STEP`.

    Example:
        >>> tiny = Recipe(name="tiny", model="resnet20_cifar", pixels=8, batch=2)
        >>> row, = time_steps({"a": tiny}, against="a", effort=Effort(rounds=1, min_run_time=0))
        >>> row.engine, row.batch, row.time_ratio
        ('training step', 2, 1.0)
    """
    effort = effort or Effort()
    threads = threads or torch.get_num_threads()
    place = torch.device(device)
    report = progress or (lambda _done, _total, _what: None)
    models: dict[str, nn.Module] = {}
    steps = {}
    with torch.random.fork_rng([place] if place.type == "cuda" else []):
        torch.manual_seed(0)
        for name, recipe in recipes.items():
            model = fresh(recipe.model, **{"in_chans": recipe.in_chans, **recipe.model_args})
            models[name] = model.to(place).train()
            steps[name] = _step(models[name], recipe, place)
        seconds = race(
            {name: clock(step, threads, gradients=True) for name, step in steps.items()},
            effort.rounds,
            effort.min_run_time,
            report=lambda number: report(number, effort.rounds, f"{STEP}s, round {number + 1}"),
        )
    plain = count_macs(models[against].eval(), _size(recipes[against]))
    found = []
    for name, model in models.items():
        recipe, ms = recipes[name], [1000 * s for s in seconds[name]]
        ratios = [a / b for a, b in zip(seconds[name], seconds[against], strict=True)]
        macs = count_macs(model.eval(), _size(recipe))
        found.append(
            Measurement(
                model=name,
                parameters=count_parameters(model),
                macs=macs,
                input_size=_size(recipe),
                batch=recipe.batch,
                device=place.type,
                engine=STEP,
                dtype=_dtype(recipe),
                channels_last=recipe.channels_last,
                threads=threads,
                rounds=effort.rounds,
                median_ms=median(ms),
                iqr_ms=spread(ms),
                min_ms=median([min(ms)]),
                max_ms=median([max(ms)]),
                against=against,
                time_ratio=median(ratios),
                time_ratio_iqr=spread(ratios),
                mac_ratio=median([macs / plain]),
                **provenance(place),
            )
        )
    return found


def _dtype(recipe: Recipe) -> str:
    return "bfloat16" if recipe.precision == "bf16" else "float32"


def _step(model: nn.Module, recipe: Recipe, device: torch.device) -> Callable[[], None]:
    """One step of training by a recipe, on random images."""
    from pliant.train.optimizing import make_optimizer

    layout = torch.channels_last if recipe.channels_last else torch.contiguous_format
    x = torch.randn(recipe.batch, *_size(recipe), device=device).to(memory_format=layout)
    model.to(memory_format=layout)
    y = torch.randint(10, (recipe.batch,), device=device)
    objective = make_objective(recipe.objective, recipe.objective_args, recipe.smoothing)
    # So small a rate that the loss stays a number on images that mean nothing.
    optimizer = make_optimizer(model, replace(recipe, lr=1e-4))
    return training_step(model, x, y, objective, optimizer, _dtype(recipe))
