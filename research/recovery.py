"""Recovery: convert a trained network, train a little, and say what each epoch gives back.

`recover` trains the converted network with its teacher and, as the control, by the same recipe
without one, and gives a row for each epoch, beside the plain network's own accuracy. Epoch 0 is
the converted network before its first step.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

from pliant import tables
from pliant._files import atomic_path
from pliant.methods.adaptive_depth.depth import at_depth, get_depth
from pliant.methods.adaptive_depth.switch import Depth
from pliant.records import Origin, read_records, write_records
from pliant.train.recipe import Recipe

if TYPE_CHECKING:
    from torch import nn

    from pliant.train import Run
    from pliant.train.data import Data

NO_TEACHER = "none"
TEXT = ("network", "teacher")  # columns of the table that are no figures


@dataclass(frozen=True, kw_only=True)
class Recovery(Origin):
    """What a converted network reaches after an epoch.

    Attributes:
        model: the converted network.
        teacher: what it learned from: ``none``, ``logits``, ``features``, ``logits + features``.
        epoch: passes over the training images; 0: converted, not trained.
        test_accuracy: in percent, of the averaged weights if there are such. Nothing was chosen
            by it, the epoch neither.
        test_accuracy_base: of an adaptive network's base network; None of others.
        plain_accuracy: of the network before its conversion, on the same images, in percent.
        val_accuracy: in percent. Where the plain network had seen the validation images in its
            own training, it says little.
        train_loss: of the epoch, the teacher's terms included; None before training.
        seconds: of the epoch; 0 before training.
        recipe: its name.
        model_args: JSON.
        distill_args: JSON.
        weights: name of the file or folder that the plain network came from.
        weights_sha256: a hash of the plain network's state (`pliant.train.distillation.digest`).
        taught_by: name of the teacher, as checkpoints have it; empty: none, or no longer known.
        teacher_sha256: a hash of the teacher's state: `weights_sha256`, where it is the plain
            network.
        data: name of the data set.
        pixels: height and width of the images.
        epochs: of the whole run.
        lr: highest learning rate.
        seed: of new parts, order and augmentation.
    """

    model: str
    teacher: str
    epoch: int
    test_accuracy: float
    test_accuracy_base: float | None
    plain_accuracy: float
    val_accuracy: float
    train_loss: float | None
    seconds: float
    recipe: str
    model_args: str
    distill_args: str
    weights: str
    weights_sha256: str
    taught_by: str = ""
    teacher_sha256: str = ""
    data: str
    pixels: int
    epochs: int
    lr: float
    seed: int


def recover(
    recipe: Recipe,
    folder: str | Path,
    *,
    teacher: bool = True,
    control: bool = True,
    progress: bool = True,
    finished: Callable[[list[Recovery]], None] | None = None,
) -> list[Recovery]:
    """Train a converted network with its teacher, and without, and score every epoch.

    Runs that are finished are read, and those that were cut off go on.

    Args:
        recipe: with `weights` and a teacher, such as ``cifar10.resnet20_mod.recover``; the test
            images are scored after each epoch whether or not it says so.
        folder: gets a run's folder for each of the two.
        teacher: train with the teacher.
        control: train without it, too.
        progress: show `fit`'s progress bar.
        finished: called with the rows of each run as it ends.

    Returns:
        A row for each epoch, epoch 0 first; those with the teacher first.

    Raises:
        ValueError: the recipe has no weights or no teacher, its data no test images, or what
            `pliant.train.fit` refuses.

    Example:
        >>> import tempfile, timm, pliant
        >>> short = {"layers": [2, 1, 1]}
        >>> plain = timm.create_model("resnet20_cifar", in_chans=1, **short)
        >>> with tempfile.TemporaryDirectory() as place:
        ...     recipe = Recipe(
        ...         name="tiny", model="resnet20_cifar_adn", model_args=short, objective="specialize",
        ...         pixels=8, epochs=1, batch=256, accelerator="cpu", teacher="plain",
        ...         weights=pliant.save(plain, f"{place}/a"),
        ...     )
        ...     rows = recover(recipe, place, control=False, progress=False)
        >>> [(row.teacher, row.epoch) for row in rows], rows[0].test_accuracy == rows[0].plain_accuracy
        ([('logits', 0), ('logits', 1)], True)
    """
    from pliant.train import fit
    from pliant.train.data import load_data

    if recipe.teacher is None or recipe.weights is None:
        raise ValueError(
            f"{recipe.name} has no {'teacher' if recipe.weights else 'weights'}: recovery starts from "
            f"weights and learns from a teacher (weights=PATH teacher=plain)"
        )
    if not (teacher or control):
        raise ValueError("neither with the teacher nor without: nothing is left to run")
    recipe = replace(recipe, test_each=True)
    without = replace(recipe, teacher=None, teacher_args={}, teacher_weights=None, distill_args={})
    data = load_data(recipe)
    data.batches("test")  # refuses data without test images before anything is trained
    begin = _begin(recipe, data)
    rows: list[Recovery] = []
    for chosen in (recipe,) * teacher + (without,) * control:
        told = _told(chosen)
        place = Path(folder, f"{recipe.model}-{told.replace(' + ', '-')}-s{recipe.seed}")
        run = fit(chosen, place, resume=(place / "recipe.json").is_file(), progress=progress)
        own = _rows(run, told, begin)
        rows += own
        if finished:
            finished(own)
    return rows


def _begin(recipe: Recipe, data: Data) -> dict[str, Any]:
    """What is known before training: the plain network's accuracy, and the converted one's."""
    from pliant.train.distillation import digest
    from pliant.train.networks import before_conversion, begun
    from pliant.train.seeds import seeded

    with seeded(recipe.seed, "weights"):  # as `fit` begins
        network = begun(recipe, data)
        plain = before_conversion(
            replace(recipe, teacher=None, teacher_weights=None, teacher_args={}), data
        )
    found: dict[str, Any] = {"weights_sha256": digest(plain), "test_accuracy_base": None}
    with seeded(recipe.seed, "test"):  # a network may draw
        found["plain_accuracy"] = _accuracy(plain, data, recipe, "test")
        found["test_accuracy"] = _accuracy(network, data, recipe, "test")
        found["val_accuracy"] = _accuracy(network, data, recipe, "val")
        if any(isinstance(m, Depth) for m in network.modules()):
            with at_depth(network, (True,) * len(get_depth(network))):
                found["test_accuracy_base"] = _accuracy(network, data, recipe, "test")
    return found


def _accuracy(network: nn.Module, data: Data, recipe: Recipe, part: Literal["test", "val"]) -> float:
    """Accuracy in percent, in the precision of the epochs to come."""
    import torch

    from pliant.train.evaluation import score
    from pliant.train.processes import device_of

    device = device_of(recipe)
    if recipe.channels_last:
        network.to(memory_format=torch.channels_last)
    loader = data.batches(part, device)
    with (
        torch.inference_mode(),
        torch.autocast(device.type, torch.bfloat16, enabled=recipe.precision == "bf16"),
    ):
        return 100 * score(network, loader, data.classes, device=device).top1


def _told(recipe: Recipe) -> str:
    """What a run learns from, in words."""
    from pliant.train.distillation import make_distillation

    if recipe.teacher is None:
        return NO_TEACHER
    rule = make_distillation(recipe.distill_args)
    return " + ".join(name for name, on in (("logits", rule.alpha), ("features", rule.features)) if on)


def _rows(run: Run, told: str, begin: dict[str, Any]) -> list[Recovery]:
    from pliant.train.run import ENVIRONMENT
    from pliant.train.saved import read_state

    recipe = run.recipe
    origin = json.loads((run.folder / ENVIRONMENT).read_text(encoding="utf-8"))
    try:  # of a run that is read, this is what it had, wherever teacher_weights points now
        teacher = read_state(run.folder).teacher or {}
    except FileNotFoundError:  # somebody made room
        teacher = {}
    shared = {
        "model": recipe.model,
        "teacher": told,
        "plain_accuracy": begin["plain_accuracy"],
        "recipe": recipe.name,
        "model_args": json.dumps(dict(recipe.model_args)),
        "distill_args": json.dumps(dict(recipe.distill_args)),
        "weights": Path(cast("str", recipe.weights)).name,
        "weights_sha256": begin["weights_sha256"],
        "taught_by": teacher.get("network", ""),
        "teacher_sha256": teacher.get("sha256", ""),
        **{name: getattr(recipe, name) for name in ("data", "pixels", "epochs", "lr", "seed")},
        **origin,
    }
    scores = ("test_accuracy", "test_accuracy_base", "val_accuracy")
    rows = [Recovery(epoch=0, train_loss=None, seconds=0.0, **{k: begin[k] for k in scores}, **shared)]
    for row in run.history:
        reached: dict[str, Any] = {k: 100 * row[k] if k in row else None for k in scores}
        number = int(row["epoch"]) + 1
        rows.append(
            Recovery(
                epoch=number, train_loss=row["train_loss"], seconds=row["seconds"], **reached, **shared
            )
        )
    return rows


def write_recoveries(path: str | Path, rows: Iterable[Recovery], append: bool = False) -> None:
    """Write rows to a CSV file, whole or not at all.

    Args:
        path: the file; its folder is made if it is missing.
        rows: what to write.
        append: keep the rows that the file has and add these, but none twice.

    Raises:
        ValueError: `append` to a file with other columns.
    """
    write_records(path, Recovery, rows, append=append, number=".4f")


def read_recoveries(path: str | Path) -> list[Recovery]:
    """Rows that `write_recoveries` wrote.

    Raises:
        ValueError: the file has other columns, or a value that is none of its column.
        FileNotFoundError: no such file.
    """
    return read_records(path, Recovery)


def recovery_table(rows: Sequence[Recovery]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headings and cells of a table: a line for each run, test accuracy of each epoch in percent.

    Of an adaptive network the base network's stands behind a slash. Where networks of one name have
    different arguments, those that differ are told. A teacher that is not the plain network is named, with
    the beginning of its hash.

    Raises:
        ValueError: there is no row.
    """
    if not rows:
        raise ValueError(
            "there are no rows to make a table of; run `python -m research recover RECIPE` first"
        )
    epochs = sorted({row.epoch for row in rows})
    headings = ("network", "teacher", "plain", *("converted" if e == 0 else f"epoch {e}" for e in epochs))
    runs: dict[tuple[Any, ...], dict[int, Recovery]] = {}
    for row in rows:
        known = (row.model, row.model_args, row.recipe, row.epochs, row.lr, row.weights_sha256)
        teacher = (row.teacher, row.distill_args, row.taught_by, row.teacher_sha256)
        runs.setdefault((*known, *teacher, row.data, row.pixels, row.seed), {})[row.epoch] = row
    seeds = len({row.seed for row in rows}) > 1
    images = len({(row.data, row.pixels) for row in rows}) > 1
    lines = []
    for own in runs.values():
        first = next(iter(own.values()))
        alike = [json.loads(row.model_args) for row in rows if row.model == first.model]
        own_args = json.loads(first.model_args)
        differ = {k: v for k, v in own_args.items() if any(args.get(k, ...) != v for args in alike)}
        name = ", ".join([first.model, *(f"{k}={v}" for k, v in differ.items())])
        name += f", seed {first.seed}" if seeds else ""
        if images:
            name += f", {first.data} {first.pixels} px"
        reached = [_reached(own[e]) if e in own else "-" for e in epochs]
        lines.append((name, _taught(first), f"{first.plain_accuracy:.2f}", *reached))
    return headings, lines


def _taught(row: Recovery) -> str:
    """What was learned from; of another network than the plain one, whose."""
    if row.teacher_sha256 in ("", row.weights_sha256):
        return row.teacher
    return f"{row.teacher} of {row.taught_by} ({row.teacher_sha256[:8]})"


def _reached(row: Recovery) -> str:
    base = "" if row.test_accuracy_base is None else f" / {row.test_accuracy_base:.2f}"
    return f"{row.test_accuracy:.2f}{base}"


def write_recovery_page(path: str | Path, rows: Sequence[Recovery]) -> None:
    """Write rows as a page of Markdown: the table, and how it came about.

    Raises:
        ValueError: there is no row.
    """
    table = tables.markdown(*recovery_table(rows), TEXT)
    recipes = sorted({f"`{row.recipe}` ({row.epochs} epochs, learning rate {row.lr:g})" for row in rows})
    seeds = ", ".join(map(str, sorted({row.seed for row in rows})))
    images = dict.fromkeys(f"{row.data}, {row.pixels} px" for row in rows)
    where = dict.fromkeys(
        f"- {row.gpu or row.cpu}, {row.cores} cores; torch {row.torch}, timm {row.timm}, pliant "
        f"{row.pliant}, commit {row.short_commit}"
        for row in rows
    )
    text = f"""# Recovery after a conversion

Test accuracy in percent after each epoch; "plain" is the network before its conversion, "converted"
the network before its first step, and behind a slash stands the base network of an adaptive one.
"none" is the same recipe without a teacher. No epoch was chosen by the test images.

{table}

Recipes: {"; ".join(recipes)}.

Images: {"; ".join(images)}; seeds: {seeds}. Machines:

{chr(10).join(where)}

Written by `python -m research recover`.
"""
    with atomic_path(Path(path)) as temporary:
        temporary.write_text(text, encoding="utf-8")
