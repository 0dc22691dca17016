"""What a recipe of a paper takes on several GPUs, computed from what one GPU and the loader measured.

Nothing here is measured: time, memory and cost follow by the formulas of `cost` from rows of
training steps (`pliant.measuring.steps`) and of the loader (`pliant.measuring.loader`). Where there
is no row, the table says that it was not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
import torch

from pliant._files import put_between
from pliant.measuring.loader import LoaderRate
from pliant.measuring.records import read_records
from pliant.measuring.step_rows import StepCost
from pliant.recipes import get_recipe
from pliant.train.recipe import Recipe

TRAIN, VALIDATION = 1_281_167, 50_000  # images of ImageNet-1k
BEGIN, END = "<!-- costs:begin -->", "<!-- costs:end -->"
NOT_MEASURED = "not measured"


@dataclass(frozen=True)
class Entry:
    """One recipe of the table, and whose steps its network takes.

    Attributes:
        recipe: its name.
        network: in rows of steps.
        steps: likewise; of several, what the recipe does takes no longer than the quickest.
    """

    recipe: str
    network: str
    steps: tuple[str, ...]


ENTRIES = (
    Entry("imagenet.resnet50_mod.paper", "resnet50_mod", ("network",)),
    Entry("imagenet.resnet50.paper", "resnet50_mod", ("plain",)),
    Entry("imagenet.cc_mobilenetv1_050.paper", "cc_mobilenetv1_050", ("fused", "experts")),
    Entry("imagenet.mobilenetv1_w050.condconv", "cc_mobilenetv1_050", ("plain",)),
    Entry("imagenet.resnet50_adn.paper", "resnet50_adn", ("specialize",)),
    Entry("imagenet.resnet50.adn", "resnet50_adn", ("super alone",)),
)
# Milliseconds of a step, for the table of the cores that one needs.
STEP_TIMES = (20, 40, 80, 160)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What training takes.

    Attributes:
        batch: images of a step on each GPU.
        step_ms: time of it.
        hours: of all epochs, validation included.
        gpu_hours: `hours` times GPUs.
        memory_gb: of each GPU, in 1e9 bytes.
        images_per_s: that the loader has to give, on all GPUs together.
        cores: that give them; None: the loader was not measured.
    """

    batch: int
    step_ms: float
    hours: float
    gpu_hours: float
    memory_gb: float
    images_per_s: float
    cores: float | None


def cost(recipe: Recipe, row: StepCost, parameters: int, core_rate: float | None, *, gpus: int = 8) -> Cost:
    """Compute what a recipe takes.

    With `b` images a GPU and `B` those of the measured step, and the step's time proportional to them:

    - step = measured time x b / B
    - epoch = (images // (GPUs x b)) x step + 2 x 50,000 / (GPUs x b) x step / 3. After each epoch the
      validation images are scored and as many of the training images; a forward is taken as a third
      of a step.
    - memory = (measured peak - gradients) x b / B + gradients + weights + momentum + DDP's copy of the
      gradients; each of these four takes 4 bytes a parameter.
    - images a second = GPUs x b / step; cores = that over the rate of one worker.

    What is left out: the exchange of gradients, which DDP overlaps with the backward pass; the memory of
    CUDA itself and of its libraries; the start; and checkpoints.

    Args:
        recipe: its `batch` is the paper's, of all GPUs together.
        row: of training steps, of its network.
        parameters: of its network.
        core_rate: images a second that one core loads.
        gpus: how many.

    Raises:
        ValueError: the batch cannot be shared evenly, or the row has no time.
    """
    b = _share(recipe, gpus)
    if row.median_ms is None or row.peak_mb is None:
        raise ValueError(f"the row of {row.network}, {row.step}, has no time or no memory")
    step = row.median_ms / 1000 * b / row.batch
    epoch = TRAIN // (gpus * b) * step + 2 * VALIDATION / (gpus * b) * step / 3
    each = 4e-9 * parameters
    hours = recipe.epochs * epoch / 3600
    needed = gpus * b / step
    return Cost(
        batch=b,
        step_ms=1000 * step,
        hours=hours,
        gpu_hours=gpus * hours,
        memory_gb=(row.peak_mb / 1000 - each) * b / row.batch + 4 * each,
        images_per_s=needed,
        cores=None if core_rate is None else needed / core_rate,
    )


def core_rate(rates: Sequence[LoaderRate]) -> LoaderRate | None:
    """The row that says what one core loads: shards, augmented, by one worker."""
    wanted = ("shards", "train", 1)
    return next((r for r in rates if (r.source, r.work, r.workers) == wanted), None)


def changes(recipe: Recipe, gpus: int = 8) -> str:
    """What of a recipe's place of run the command sets, as ``devices=8 batch=32``.

    Raises:
        ValueError: the batch cannot be shared evenly.
    """
    return f"devices={gpus} batch={_share(recipe, gpus)}"


def costs_markdown(
    steps: Sequence[StepCost], rates: Sequence[LoaderRate], *, gpus: int = 8, price: float | None = None
) -> str:
    """The page's generated part: what was measured, commands, and what they take.

    Args:
        steps: rows of training steps on a GPU; may be none.
        rates: rows of the loader; may be none.
        gpus: how many.
        price: of an hour of one GPU, in whatever currency; None: no column of money.

    Raises:
        ValueError: the batch of a recipe cannot be shared evenly.
    """
    core = core_rate(rates)
    blocks = [_loader(core, gpus), "```", *_commands(gpus), "```", "", _measured(steps)]
    money = "" if price is None else f" price at {price:g} an hour |"
    blocks += [
        "| recipe | epochs | dtype | images of a step | its ms | hours | GPU-hours |"
        f"{money} GB a GPU | images/s | cores |",
        f"|---|---:|---|---:|---:|---:|---:|{'---:|' * (price is not None)}---:|---:|---:|",
    ]
    larger = False
    for entry in ENTRIES:
        recipe = get_recipe(entry.recipe)
        batch = _share(recipe, gpus)
        for dtype in ("float32", "bfloat16"):
            row = _row(steps, entry, dtype, batch)
            cells = [entry.recipe, str(recipe.epochs), dtype, str(batch)]
            if row is None:
                cells += [NOT_MEASURED] + [""] * (5 + (price is not None))
            else:
                larger |= row.batch > batch
                found = cost(
                    recipe, row, _parameters(recipe.model), core.images_per_s if core else None, gpus=gpus
                )
                cells[-1] += f" of {row.batch}" if row.batch > batch else ""
                cells += [f"{found.step_ms:.1f}", f"{found.hours:.1f}", f"{found.gpu_hours:.0f}"]
                cells += [] if price is None else [f"{price * found.gpu_hours:.0f}"]
                cells += [f"{found.memory_gb:.1f}", f"{found.images_per_s:.0f}"]
                cells += [NOT_MEASURED if found.cores is None else f"{found.cores:.0f}"]
            blocks.append(f"| {' | '.join(cells)} |")
    if larger:
        blocks += [
            "",
            'Images "of" more: steps of so many were measured. One of fewer takes its share of their time '
            "here, which is too little where launching kernels, and not work, takes the time: compare it "
            "with no step of fewer images that was measured.",
        ]
    return "\n".join(blocks)


def write_costs(
    page: str | Path, results: str | Path = "results", *, gpus: int = 8, price: float | None = None
) -> str:
    """Fill the page's part between its marks from ``steps-cuda.csv`` and ``loader-cpu.csv``.

    Returns:
        What was written.

    Raises:
        ValueError: the page has no marks; a file of rows cannot be read; or the batch of a recipe
            cannot be shared evenly.
    """
    results = Path(results)
    steps, rates = results / "steps-cuda.csv", results / "loader-cpu.csv"
    text = costs_markdown(
        read_records(steps, StepCost) if steps.is_file() else [],
        read_records(rates, LoaderRate) if rates.is_file() else [],
        gpus=gpus,
        price=price,
    )
    put_between(page, BEGIN, END, text)
    return text


def _share(recipe: Recipe, gpus: int) -> int:
    """Images of a step on each GPU."""
    if recipe.batch % gpus:
        raise ValueError(f"{gpus} GPUs cannot share {recipe.name}'s batch of {recipe.batch} evenly")
    return recipe.batch // gpus


def _loader(core: LoaderRate | None, gpus: int) -> str:
    if core is None:
        return f"The loader: {NOT_MEASURED}.\n"
    start = ""
    if core.index_us is not None:
        start = (
            f" Each process finds ImageNet's images in their shards at its start, in "
            f"{core.index_us * TRAIN / 1e6:.0f} seconds."
        )
    lines = [
        f"One core of {core.cpu} loads {core.images_per_s:.0f} images a second ({core.data}: "
        f"{core.kilobytes:g} kB and {core.megapixels:g} megapixels in the median; from shards, random "
        f"resized crop and flip at {core.pixels} pixels, one worker; commit {core.short_commit}).{start} "
        f"{gpus} GPUs need:",
        "",
        f"| a step of 32 images takes, ms | images/s of {gpus} GPUs | cores of that kind |",
        "|---:|---:|---:|",
    ]
    for ms in STEP_TIMES:
        needed = gpus * 32 / (ms / 1000)
        lines.append(f"| {ms} | {needed:.0f} | {needed / core.images_per_s:.0f} |")
    return "\n".join([*lines, ""])


def _commands(gpus: int) -> list[str]:
    return [
        f"torchrun --nproc-per-node {gpus} -m pliant train {entry.recipe} data=shards path=SHARDS "
        f"{changes(get_recipe(entry.recipe), gpus)}"
        for entry in ENTRIES
    ]


def _measured(steps: Sequence[StepCost]) -> str:
    where = dict.fromkeys(f"{r.gpu}, torch {r.torch}, commit {r.short_commit}" for r in steps)
    said = "; ".join(where) or f"{NOT_MEASURED}: there is no `results/steps-cuda.csv` yet"
    return f"Steps: {said}.\n"


def _row(steps: Sequence[StepCost], entry: Entry, dtype: str, batch: int) -> StepCost | None:
    """The quickest row of an entry's steps, at the batch that is nearest."""
    found = [
        (abs(r.batch - batch), r.median_ms, r)
        for r in steps
        if r.network == entry.network
        and r.step in entry.steps
        and r.dtype == dtype
        and r.median_ms is not None
    ]
    return min(found, key=lambda one: one[:2])[2] if found else None


def _parameters(network: str) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in timm.create_model(network).parameters())
