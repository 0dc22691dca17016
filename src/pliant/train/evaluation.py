"""Score a network on a data set: `evaluate`.

Shapes: x float32 [B, C, S, S], images; y int64 [B], classes; logits [B, classes].
"""

from __future__ import annotations

import copy
import logging
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
from pliant.evaluating import evaluating
from pliant.outside import input_size
from pliant.train.batches import Batches, make_batches
from pliant.train.data import Part, load_part, normalisation
from pliant.train.division import Division, resolved
from pliant.train.images import ImageSet, TensorImages
from pliant.train.recipe import Recipe
from pliant.train.run import network_folder, read_division, read_recipe, run_of


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
    """Score a network, or a saved one, in float32 (a copy, if its weights are in another precision).

    A saved network gets images of the size, interpolation, crop, mean and standard deviation in its
    checkpoint; a network in memory gets those in its ``pretrained_cfg``, as far as it names them. The size
    need not be square.

    Args:
        model: a network, the folder of a saved one or of a run, or a file that `pliant.export` wrote, which
            runs in its own engine on the CPU.
        data: as `Recipe.data`. None: the kind of data of the run in the folder `model`; else digits.
        path: as `Recipe.path`. None: the place of the run's data.

            The images of a run are divided as its ``images.json`` says, so that no training image is
            scored, also where the folder was moved. Images that were added since are left out. Where
            another place has images that the run trained on, a warning says so.
        part: ``"test"`` or ``"val"``. In a folder, ``"test"`` is ``test/``, else ``val/``, else all
            images.
        batch: images in a batch.
        device: ``"auto"`` (a GPU where there is one), ``"cpu"``, ``"cuda"``, ...
        workers: processes that read images from folders.
        pixels: side of the images, instead of the checkpoint's.

    Raises:
        ValueError: the network has another number of classes than the data, or the data has classes
            that the checkpoint does not name (fewer are fine).
            Images of the run are missing, or of another class. A path without its kind of data.
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
        network: the network as it was given or saved, or a copy in float32.
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
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in network.parameters()):
        network = copy.deepcopy(network).float()
    config = getattr(network, "pretrained_cfg", None) or {}
    # Of a saved network this is what its checkpoint says; timm's own knows nothing of in_chans.
    size = config.get("input_size") if folder else input_size(network) or (3, 224, 224)
    if size is None:
        raise ValueError(f"{folder} does not say its input size; save it again with input_size=")
    channels, *sides = (size[0], pixels, pixels) if pixels else size
    view = {k: config[k] for k in ("interpolation", "crop_pct", "crop_mode") if config.get(k)}
    place = None if path is None else os.fspath(path)
    run = None if folder is None else run_of(folder)
    own = None if run is None else read_recipe(run)
    division = None if run is None else read_division(run)
    if data is None and own is None and place is not None:
        raise ValueError(f"path={place} needs its kind of data, such as data=folder: no run says it")
    kind = data or (own.data if own else "digits")
    if place is None and own is not None and kind == own.data:
        place = own.path if division is None else division.path
    # The network of a run, named by its own folder, is also scored on all images of a place.
    asked = folder == run or (data is None and path is None)
    same = own is not None and asked and _is_of_run(own, division, kind, place)
    held_out = ("val_fraction", "test_fraction", "split_seed") if same else ()
    recipe = Recipe.from_dict(
        {
            **{name: getattr(own, name) for name in held_out},
            "name": "evaluate",
            "model": type(network).__name__,
            "model_args": {"in_chans": channels},
            "data": kind,
            "path": place,
            "pixels": max(sides),
            "batch": batch,
            "workers": workers,
        }
    )
    images, classes = load_part(recipe, part, divided=same, division=division if same else None)
    if division is not None and not same and (seen := division.trained_on(images, place)):
        logging.getLogger(__name__).warning(
            "%d of the %d images in %s are ones that the run in %s trained on, by their names, such as %s; "
            "scored without data and path, the run is scored on what it held out",
            len(seen), len(images), place, run, seen[0],
        )  # fmt: skip
    named = config.get("label_names") if folder else None
    if named is not None:
        images.labels, classes = _renumbered(images.labels, classes, named), named
    told = (config.get("mean") or (), config.get("std") or ())
    mean, std = (
        tuple(one) if len(one) in (1, channels) else data
        for one, data in zip(told, normalisation(recipe), strict=True)
    )
    where = _device(device)
    if isinstance(images, TensorImages) and images.images.shape[2:] != tuple(sides):
        fitted = F.interpolate(images.images.float(), tuple(sides), mode="bilinear")
        images = TensorImages(fitted.round().clamp(0, 255).byte(), images.labels)
    view["input_size"] = (channels, *sides)
    loader = make_batches(images, recipe, mean, std, device=where, view=view)
    return NetworkOnData(network, images, loader, classes, where, recipe)


def _is_of_run(own: Recipe, division: Division | None, kind: str, place: str | None) -> bool:
    """Whether a place holds the images of a run; a log line says so if it is not the run's own place."""
    if division is None:  # of an older pliant
        return (kind, resolved(place)) == (own.data, resolved(own.path))
    if not division.lies_in(kind, place):
        return False
    if resolved(place) != division.path:
        logging.getLogger(__name__).warning(
            "%s holds all images of the run, so it is taken for %s, moved: what the run held out is scored",
            place, division.path,
        )  # fmt: skip
    return True


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r} is not available: PyTorch sees no GPU; give cpu")
    return device


@torch.no_grad()
def score(
    model: nn.Module,
    loader: Iterable[tuple[Tensor, Tensor]],
    classes: tuple[str, ...],
    *,
    device: torch.device | str = "cpu",
) -> Evaluation:
    """Score a network on batches. The network stays on `device`, and each of its modules keeps its mode.

    Raises:
        ValueError: the network has not one output for each of `classes`, or there is no image.
    """
    scores = Scores(classes, device)
    with evaluating(model.to(device)):
        for x, y in loader:
            scores.update(model(x.to(device)), y.to(device))
    return scores.result()


class Scores:
    """Scores of a network, collected batch by batch.

    Args:
        classes: names of the classes, two or more.
        device: device of the outputs and labels.

    Raises:
        ValueError: there are fewer classes.
    """

    def __init__(self, classes: tuple[str, ...], device: torch.device | str = "cpu") -> None:
        n = len(classes)
        if n < 2:
            raise ValueError(
                f"scores need two classes or more to tell apart, not only {', '.join(classes) or 'none'}"
            )
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
