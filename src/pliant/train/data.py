"""The images that a recipe trains, validates and tests on: `load_data`.

Shapes in this file::

    N  images of a set    images  uint8 [N, C, S, S]
    S  side in pixels     labels  int64 [N], classes
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
import torch.nn.functional as F
from timm.data import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from timm.data.constants import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from torch import Tensor

from pliant.train.batches import Batches, make_batches
from pliant.train.division import Division
from pliant.train.images import FileImages, ImageSet, TensorImages, class_folders, part_folders
from pliant.train.recipe import Recipe
from pliant.train.shards import ShardImages, class_names, find_shards, index_shards

IMAGENET = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
CIFAR = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
DIGITS = ((0.3053,), (0.3760,))
MEAN_STD = {
    "imagenet": IMAGENET,
    "inception": (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD),
    "clip": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
}
Part = Literal["test", "val"]
_PLACED = ("folder", "imagenet", "shards")  # data in parts, each with a place of its own
DIGITS_TEST = 0.3  # share of the 1797 digits


@dataclass(frozen=True)
class Data:
    """The sets of one run.

    Attributes:
        train: training images.
        check: a fixed part of `train`, as large as `val` if possible; accuracy is measured on both alike.
        val: validation images, which choose the best epoch.
        test: test images, scored once at the end; None without a test set.
        classes: names, in the order of the labels.
        mean: mean of each channel, for values in [0, 1].
        std: standard deviation of each channel.
        recipe: how batches are made.

    Example:
        >>> data = load_data(Recipe(name="example", model="resnet20_cifar", batch=32))
        >>> x, y = next(iter(data.batches("val")))
        >>> x.shape, y.shape
        (torch.Size([32, 1, 32, 32]), torch.Size([32]))
    """

    recipe: Recipe
    train: ImageSet
    check: ImageSet
    val: ImageSet
    test: ImageSet | None
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def batches(
        self, part: Literal["train", "check", "val", "test"], device: torch.device | str = "cpu"
    ) -> Batches:
        """Batches of one set: those of `train` shuffled and augmented, the others in order.

        Raises:
            ValueError: there is no test set.
        """
        images: ImageSet | None = getattr(self, part)
        if images is None:
            raise ValueError(
                f"data={self.recipe.data} at path={self.recipe.path} has no test set; score another part"
            )
        return make_batches(images, self.recipe, self.mean, self.std, train=part == "train", device=device)

    @property
    def division(self) -> Division:
        """Which images are in which part, to be held to later."""
        sets = {"train": self.train, "val": self.val} | ({} if self.test is None else {"test": self.test})
        return Division.of(sets, self.classes, self.recipe.data, self.recipe.path)


def load_data(recipe: Recipe, division: Division | None = None) -> Data:
    """The sets that a recipe names.

    Args:
        recipe: names the data, and how it is divided.
        division: that of a run (`pliant.train.run.read_division`), to hold to instead.

    Raises:
        FileNotFoundError: the data is not there; says how to get it.
        ValueError: folders that do not fit together, fewer than two classes, or sets too small to divide;
            images of `division` are missing, or of another class.

    Example:
        >>> data = load_data(Recipe(name="example", model="resnet20_cifar"))
        >>> len(data.train), len(data.val), len(data.test), data.train.images.shape[1:]
        (1131, 126, 540, torch.Size([1, 32, 32]))
    """
    if recipe.data == "imagenet" and division is None and not {"train", "val"} <= _places(recipe).keys():
        raise FileNotFoundError(
            f"{recipe.path} must hold train/ and val/ with one folder a class, as ImageNet is laid out; "
            f"for other layouts set data=folder, for tar files data=shards"
        )
    sets, classes = _sets(recipe)
    if division is None:
        held = _divided(sets, recipe)
    else:
        held, classes = division.hold(sets, classes, ("train", "val", "test")), division.classes
    if len(classes) < 2:
        raise ValueError(
            f"path={recipe.path} has one class, {classes[0]}, and there is nothing to tell it from; add a "
            f"class of other images"
        )
    train, val = held["train"], held["val"]
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(recipe.split_seed))
    check = train.subset(order[: len(val)].sort().values)
    return Data(recipe, train, check, val, held.get("test"), classes, *normalisation(recipe))


def load_part(
    recipe: Recipe, part: Part = "test", *, divided: bool = False, division: Division | None = None
) -> tuple[ImageSet, tuple[str, ...]]:
    """One set to score, and its classes. In a folder, ``train/`` is not looked at.

    Args:
        recipe: names the data.
        part: ``"test"`` or ``"val"``. In a folder, ``"test"`` is ``test/``, else ``val/``, else all images.
        divided: divide a folder as a run of the recipe does; without a test set, ``"test"`` is then the
            validation set.
        division: that of a run, to hold to. Implies `divided`.

    Raises:
        FileNotFoundError: the data is not there.
        ValueError: the data has no such part, or there is no part of this name; as `load_data`.
    """
    if part not in get_args(Part):
        raise ValueError(f"part must be one of {', '.join(get_args(Part))}, not {part!r}")
    if division is not None:
        wanted = part if part in division.parts else "val"
        return division.hold(*_sets(recipe), (wanted,))[wanted], division.classes
    if divided or recipe.data not in _PLACED:
        data = load_data(recipe)
        return data.val if part == "val" or data.test is None else data.test, data.classes
    places = _places(recipe)
    found = next(
        (name for name in (("test", "val", "") if part == "test" else ("val",)) if name in places), None
    )
    if found is None:
        has = ", ".join(name or "images that are not divided" for name in places)
        raise ValueError(f"path={recipe.path} has no images for {part}, only {has}; score another part")
    sets, classes = _read({found: places[found]}, recipe)
    return sets[found], classes


def normalisation(recipe: Recipe) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, of values in [0, 1].

    Example:
        >>> normalisation(Recipe(name="example", model="resnet20_cifar", mean_std="inception"))
        ((0.5,), (0.5,))
    """
    mean: tuple[float, ...]
    std: tuple[float, ...]
    if recipe.mean_std != "data":
        mean, std = MEAN_STD[recipe.mean_std]
    else:
        mean, std = DIGITS if recipe.data == "digits" else CIFAR.get(recipe.data, IMAGENET)
    if recipe.in_chans == 1:
        return (sum(mean) / len(mean),), (sum(std) / len(std),)
    return (mean, std) if len(mean) == 3 else (mean * 3, std * 3)


def divide(images: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Hold out `fraction` of some images, the same share of every class.

    Returns:
        The rest, and the images held out.

    Raises:
        ValueError: a class has too few images for both.
    """
    from sklearn.model_selection import train_test_split

    numbers = np.arange(len(images))
    try:
        rest, held = train_test_split(
            numbers, test_size=fraction, stratify=images.labels.numpy(), random_state=seed
        )
    except ValueError as error:
        raise ValueError(
            f"{len(images)} images cannot be divided so that {fraction:g} of every class is held out "
            f"({error}); take more images or another fraction"
        ) from error
    return images.subset(torch.from_numpy(np.sort(rest))), images.subset(torch.from_numpy(np.sort(held)))


def _sets(recipe: Recipe) -> tuple[dict[str, ImageSet], tuple[str, ...]]:
    """All images of the data, by the part that they come in (``""``: not divided), and the classes."""
    if recipe.data == "digits":
        return _digits(recipe)
    return _read(_places(recipe), recipe) if recipe.data in _PLACED else _cifar(recipe)


def _divided(sets: Mapping[str, ImageSet], recipe: Recipe) -> dict[str, ImageSet]:
    """Train, val, and test if there is one, as the recipe says, from the parts that the data comes in."""
    place, fraction, seed = f"path={recipe.path}", recipe.val_fraction, recipe.split_seed
    if "" in sets:
        if fraction is None:
            raise ValueError(f"{place} is not divided into train and val; set val_fraction")
        held, rest = {}, sets[""]
        if recipe.data == "digits":
            # The test images are the same for every recipe: always divided with seed 0.
            rest, held["test"] = divide(rest, DIGITS_TEST, 0)
        elif recipe.test_fraction:
            rest, held["test"] = divide(rest, recipe.test_fraction, seed)
        train, val = divide(rest, fraction, seed)
        return held | {"train": train, "val": val}
    if "train" not in sets:
        raise ValueError(f"{place} has {', '.join(sets)} and no train; add train")
    if fraction is None:
        if "val" not in sets:
            raise ValueError(f"{place} has no val/; set val_fraction to hold out images of train/")
        return dict(sets)
    train, val = divide(sets["train"], fraction, seed)
    test = sets.get("test", sets.get("val"))
    return {"train": train, "val": val} | ({} if test is None else {"test": test})


def _digits(recipe: Recipe) -> tuple[dict[str, ImageSet], tuple[str, ...]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    every = TensorImages(_fitted(images, recipe), torch.from_numpy(digits.target).long())
    return {"": every}, tuple(str(name) for name in digits.target_names)


def _cifar(recipe: Recipe) -> tuple[dict[str, ImageSet], tuple[str, ...]]:
    from torchvision import datasets

    kind = datasets.CIFAR10 if recipe.data == "cifar10" else datasets.CIFAR100
    sets: dict[str, ImageSet] = {}
    for part, train in (("train", True), ("test", False)):
        try:
            found = kind(recipe.path, train=train, download=recipe.download)
        except RuntimeError as error:
            raise FileNotFoundError(
                f"path={recipe.path} holds no {recipe.data} (no whole {kind.base_folder}); set path to its "
                f"folder, unpack {kind.url} there, or set download=true"
            ) from error
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2)
        numbers = torch.arange(len(images)) + sum(len(before) for before in sets.values())
        sets[part] = TensorImages(_fitted(images, recipe), torch.tensor(found.targets), numbers)
    return sets, tuple(found.classes)


def _fitted(images: Tensor, recipe: Recipe) -> Tensor:
    """Bytes of the recipe's size and channels, [N, C, S, S], from any [N, c, s, s]."""
    if images.shape[1] != recipe.in_chans:
        _check_channels(recipe)
        images = (
            images.expand(-1, 3, -1, -1) if recipe.in_chans == 3 else images.float().mean(1, keepdim=True)
        )
    if images.shape[-1] != recipe.pixels:
        images = F.interpolate(images.float(), size=(recipe.pixels, recipe.pixels), mode="bilinear")
    return images if images.dtype == torch.uint8 else images.round().clamp(0, 255).byte()


def _places(recipe: Recipe) -> dict[str, Path | list[Path]]:
    """The folder, or the shards, of each part; the part ``""`` is all images, not divided."""
    if recipe.data == "shards":
        found = find_shards(recipe.path or "")
        return {part: found[part] for part in ("train", "val", "test", "") if part in found}
    root = Path(recipe.path or "")
    if not root.is_dir():
        raise FileNotFoundError(
            f"path={recipe.path} is no folder; give one that holds train/ and val/, or one folder a class"
        )
    return {**part_folders(root)}


def _read(
    places: Mapping[str, Path | list[Path]], recipe: Recipe
) -> tuple[dict[str, ImageSet], tuple[str, ...]]:
    """The images of folders or of shards by part, and their classes, those of the first part."""
    _check_channels(recipe)
    folders = [place for place in places.values() if isinstance(place, Path)]
    if folders:
        root = Path(recipe.path or "")
        found, names = class_folders(root, folders)
        read: dict[str, ImageSet] = {}
        for part, samples in zip(places, found, strict=True):
            paths, labels = zip(*samples, strict=True)
            read[part] = FileImages(paths, torch.tensor(labels), recipe.in_chans, root)
        return read, tuple(names)
    shards = {part: place for part, place in places.items() if isinstance(place, list)}
    inside = recipe.path or ""
    if not Path(inside).is_dir():  # a pattern
        inside = os.path.commonpath([shard.parent for every in shards.values() for shard in every])
    images = {p: ShardImages(s, *index_shards(s), recipe.in_chans, inside) for p, s in shards.items()}
    classes: list[str] = []
    for part, files in shards.items():
        count = int(images[part].labels.max()) + 1 if len(images[part]) else 0
        classes = classes or class_names(files, count)
        if count > len(classes):
            raise ValueError(
                f"shards such as {files[0]} have class {count - 1}, but the shards to train on have "
                f"{len(classes)} classes; write both from one list of classes"
            )
    return {**images}, tuple(classes)


def _check_channels(recipe: Recipe) -> None:
    if recipe.in_chans not in (1, 3):
        raise ValueError(
            f"model_args.in_chans must be 1 or 3, the channels of images, not {recipe.in_chans}"
        )
