"""Score a network on a data set: `evaluate`.

Shapes: x float32 [B, C, S, S], images; y int64 [B], classes; logits [B, classes].
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy, MulticlassStatScores

from pliant._config import some
from pliant.checkpoint import load
from pliant.deploy.loading import FileNetwork, is_export, open_export
from pliant.outside import input_size
from pliant.train.batches import Batches, make_batches
from pliant.train.data import Part, load_part, normalisation
from pliant.train.images import ImageSet, TensorImages
from pliant.train.recipe import Recipe
from pliant.train.run import network_folder, read_recipe


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """Scores of a network on a set of images.

    Attributes:
        top1: share of images whose class has the highest output, in [0, 1].
        top5: share whose class is among the five highest; None below ten classes.
        loss: mean cross entropy.
        per_class: class name to top-1 share; NaN for a class without an image.
        images: number of images scored.
        unreadable: number of further images, left out because they could not be read.
        unreadable_paths: paths of these images.
    """

    top1: float
    top5: float | None
    loss: float
    per_class: dict[str, float]
    images: int
    unreadable: int = 0
    unreadable_paths: tuple[str, ...] = ()

    def __str__(self) -> str:
        top5 = "" if self.top5 is None else f", top-5 {self.top5:.2%}"
        left_out = f", {self.unreadable} unreadable" if self.unreadable else ""
        lines = [f"top-1 {self.top1:.2%}{top5}, loss {self.loss:.4f} ({self.images} images{left_out})"]
        width = max(len(name) for name in self.per_class)
        seen = {name: share for name, share in self.per_class.items() if not math.isnan(share)}
        lines += [f"  {name:{width}}  {share:7.2%}" for name, share in seen.items()]
        return "\n".join(lines)


def evaluate(
    model: nn.Module | str | os.PathLike[str],
    data: str | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    part: Part = "test",
    batch: int = 256,
    device: str = "auto",
    workers: int = 2,
    pixels: int | None = None,
) -> Evaluation:
    """Score a network, or a saved one, in float32.

    A saved network gets images of the size, interpolation, crop, mean and standard deviation in its
    checkpoint; a network in memory gets those in its ``pretrained_cfg``, as far as it names them. The size
    need not be square.

    Args:
        model: a network, the folder of a saved one or of a run, or a file that `pliant.export` wrote, which
            runs in its own engine on the CPU.
        data: as `Recipe.data`. None: the data of the run in the folder `model`, divided in the same way,
            so that no training image is scored; else digits.
        path: as `Recipe.path`.
        part: ``"test"`` or ``"val"``. In a folder, ``"test"`` is ``test/``, else ``val/``, else all
            images.
        batch: images in a batch.
        device: ``"auto"`` (a GPU where there is one), ``"cpu"``, ``"cuda"``, ...
        workers: processes that read images from folders.
        pixels: side of the images, instead of the checkpoint's.

    Raises:
        ValueError: the network has another number of classes than the data, or the data has classes
            that the checkpoint does not name (fewer are fine).
        FileNotFoundError: no data, or no checkpoint.
    """
    given = prepare(
        model, data, path, part=part, batch=batch, device=device, workers=workers, pixels=pixels
    )
    result = score(given.network, given.batches, given.classes, device=given.device)
    paths = tuple(sorted(given.batches.unreadable))
    return replace(result, unreadable=len(paths), unreadable_paths=paths)


@dataclass(frozen=True)
class NetworkOnData:
    """A network, and images in the size and normalisation that it expects.

    Attributes:
        network: the network as it was given or saved.
        images: the set, not normalised.
        batches: batches of `images`, in order, normalised and of the network's size.
        classes: names, in the order of the labels.
        device: device of the batches; `network` is not moved there.
        recipe: describes the images.
    """

    network: nn.Module
    images: ImageSet
    batches: Batches
    classes: tuple[str, ...]
    device: torch.device
    recipe: Recipe


def prepare(
    model: nn.Module | str | os.PathLike[str],
    data: str | None = None,
    path: str | os.PathLike[str] | None = None,
    *,
    part: Part = "test",
    batch: int = 256,
    device: str = "auto",
    workers: int = 2,
    pixels: int | None = None,
) -> NetworkOnData:
    """Bring a network, or a saved one, and the images of a data set together.

    Arguments and errors are those of `evaluate`.
    """
    folder = None if isinstance(model, nn.Module) else Path(model)
    network = model if isinstance(model, nn.Module) else _read(Path(model))
    config = getattr(network, "pretrained_cfg", None) or {}
    # Of a saved network this is what its checkpoint says; timm's own knows nothing of in_chans.
    size = config.get("input_size") if folder else input_size(network) or (3, 224, 224)
    if size is None:
        raise ValueError(f"{folder} does not say its input size; save it again with input_size=")
    channels, *sides = (size[0], pixels, pixels) if pixels else size
    view = {k: config[k] for k in ("interpolation", "crop_pct", "crop_mode") if config.get(k)}
    place = None if path is None else os.fspath(path)
    own = read_recipe(folder) if folder else None
    if own is not None and (data not in (None, own.data) or place not in (None, own.path)):
        own = None  # other data than the run's
    held_out = () if own is None else ("val_fraction", "test_fraction", "split_seed")
    recipe = Recipe.from_dict(
        {
            **{name: getattr(own, name) for name in held_out},
            "name": "evaluate",
            "model": type(network).__name__,
            "model_args": {"in_chans": channels},
            "data": (data or "digits") if own is None else own.data,
            "path": place if own is None else own.path,
            "pixels": max(sides),
            "batch": batch,
            "workers": workers,
        }
    )
    images, classes = load_part(recipe, part, divided=own is not None)
    named = config.get("label_names") if folder else None
    if named is not None:
        images.labels, classes = _renumbered(images.labels, classes, named), named
    told = (config.get("mean") or (), config.get("std") or ())
    mean, std = (
        tuple(one) if len(one) in (1, channels) else data
        for one, data in zip(told, normalisation(recipe), strict=True)
    )
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    if isinstance(images, TensorImages) and images.images.shape[2:] != tuple(sides):
        fitted = F.interpolate(images.images.float(), tuple(sides), mode="bilinear")
        images = TensorImages(fitted.round().clamp(0, 255).byte(), images.labels)
    view["input_size"] = (channels, *sides)
    loader = make_batches(images, recipe, mean, std, device=where, view=view)
    return NetworkOnData(network, images, loader, classes, where, recipe)


@torch.no_grad()
def score(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    classes: tuple[str, ...],
    *,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Score a network on batches. The network stays on `device` and keeps its mode.

    Raises:
        ValueError: the network has not one output for each of `classes`, or there is no image.
    """
    scores = Scores(classes, device)
    mode = model.training
    model.to(device).eval()
    try:
        for x, y in loader:
            scores.update(model(x.to(device)), y.to(device))
    finally:
        model.train(mode)
    return scores.result()


class Scores:
    """Scores of a network, collected batch by batch.

    Args:
        classes: names of the classes.
        device: device of the outputs and labels.
    """

    def __init__(self, classes: tuple[str, ...], device: torch.device | str = "cpu") -> None:
        n = len(classes)
        self.classes = classes
        self._each = MulticlassStatScores(n, average=None, validate_args=False).to(device)
        self._top5 = None
        if n >= 10:
            self._top5 = MulticlassAccuracy(n, top_k=5, average="micro", validate_args=False).to(device)
        self._loss = MeanMetric(nan_strategy="disable").to(device)

    def update(self, logits: Tensor, y: Tensor) -> None:
        """Count a batch: logits [B, classes], labels int64 [B].

        Raises:
            ValueError: the outputs are not one for each class.
        """
        logits, n = logits.float(), len(self.classes)
        if logits.shape != (len(y), n):
            raise ValueError(
                f"the network has {logits.shape[-1]} outputs and the data {n} classes; give the data that "
                f"it was trained on, or build it with num_classes={n}"
            )
        self._each.update(logits, y)
        if self._top5 is not None:
            self._top5.update(logits, y)
        self._loss.update(F.cross_entropy(logits, y, reduction="none"))

    def result(self) -> Evaluation:
        """The scores.

        Raises:
            ValueError: there was no image.
        """
        right, _, _, _, counts = self._each.compute().unbind(1)
        if not counts.sum():
            raise ValueError("no image could be read, so there is nothing to score")
        return Evaluation(
            top1=float(right.sum() / counts.sum()),
            top5=None if self._top5 is None else float(self._top5.compute()),
            loss=float(self._loss.compute()),
            per_class=dict(zip(self.classes, (right / counts).tolist(), strict=True)),  # 0 / 0 is NaN
            images=int(counts.sum()),
        )


def _read(path: Path) -> nn.Module:
    """The network in the folder of a run or of a saved network, or an exported file in its place."""
    return FileNetwork(open_export(path)) if is_export(path) else load(network_folder(path))


def _renumbered(labels: Tensor, names: tuple[str, ...], known: tuple[str, ...]) -> Tensor:
    """Labels by the checkpoint's order of classes."""
    if other := [name for name in names if name not in known]:
        raise ValueError(
            f"the data has classes that the checkpoint does not name: {some(other)}; "
            f"the checkpoint's are {some(known)}"
        )
    return torch.tensor([known.index(name) for name in names])[labels]
