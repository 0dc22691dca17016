"""The images that a recipe trains, validates and tests on: `load_data`.

Shapes in this file::

    N  images of a set    images  uint8 [N, C, S, S]
    S  side in pixels     labels  int64 [N], classes
"""

from __future__ import annotations

from collections.abc import Sequence
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
from pliant.train.images import FileImages, ImageSet, TensorImages, class_folders
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
PARTS = ("train", "val", "test")
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


def load_data(recipe: Recipe) -> Data:
    """The sets that a recipe names.

    Raises:
        FileNotFoundError: the data is not there; says how to get it.
        ValueError: folders that do not fit together, or sets too small to divide.

    Example:
        >>> data = load_data(Recipe(name="example", model="resnet20_cifar"))
        >>> len(data.train), len(data.val), len(data.test), data.train.images.shape[1:]
        (1131, 126, 540, torch.Size([1, 32, 32]))
    """
    if recipe.data in _PLACED:
        return _placed(recipe)
    whole, test, classes = _digits(recipe) if recipe.data == "digits" else _cifar(recipe)
    assert recipe.val_fraction is not None  # checked by `Recipe`
    train, val = divide(whole, recipe.val_fraction, recipe.split_seed)
    return _data(recipe, train, val, test, classes)


def load_part(
    recipe: Recipe, part: Part = "test", *, divided: bool = False
) -> tuple[ImageSet, tuple[str, ...]]:
    """One set to score, and its classes. In a folder, ``train/`` is not looked at.

    Args:
        recipe: names the data.
        part: ``"test"`` or ``"val"``. In a folder, ``"test"`` is ``test/``, else ``val/``, else all images.
        divided: divide a folder as a run of the recipe does; without a test set, ``"test"`` is then the
            validation set.

    Raises:
        FileNotFoundError: the data is not there.
        ValueError: the data has no such part, or there is no part of this name.
    """
    if part not in get_args(Part):
        raise ValueError(f"part must be one of {', '.join(get_args(Part))}, not {part!r}")
    if recipe.data in _PLACED and not divided:
        parts = _parts(recipe)
        wanted = ("test", "val", "") if part == "test" else ("val",)
        found = next((name for name in wanted if name in parts), None)
        if found is None:
            has = ", ".join(name or "images that are not divided" for name in parts)
            raise ValueError(f"path={recipe.path} has no images for {part}, only {has}; score another part")
        images, classes = _read(parts[found], recipe)
        return images, tuple(classes)
    data = load_data(recipe)
    chosen = data.val if part == "val" or data.test is None else data.test
    return chosen, data.classes


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


def _data(
    recipe: Recipe,
    train: ImageSet,
    val: ImageSet,
    test: ImageSet | None,
    classes: Sequence[str],
) -> Data:
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(recipe.split_seed))
    check = train.subset(order[: len(val)].sort().values)
    return Data(recipe, train, check, val, test, tuple(classes), *normalisation(recipe))


def _digits(recipe: Recipe) -> tuple[TensorImages, TensorImages, list[str]]:
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None] * (255 / 16)
    every = TensorImages(_fitted(images, recipe), torch.from_numpy(digits.target).long())
    # The test images are the same for every recipe: always divided with seed 0.
    whole, test = divide(every, DIGITS_TEST, seed=0)
    assert isinstance(whole, TensorImages)
    assert isinstance(test, TensorImages)
    return whole, test, [str(name) for name in digits.target_names]


def _cifar(recipe: Recipe) -> tuple[TensorImages, TensorImages, list[str]]:
    from torchvision import datasets

    kind = datasets.CIFAR10 if recipe.data == "cifar10" else datasets.CIFAR100
    sets = []
    for train in (True, False):
        try:
            found = kind(recipe.path, train=train, download=recipe.download)
        except RuntimeError as error:
            raise FileNotFoundError(
                f"path={recipe.path} holds no {recipe.data} (no whole {kind.base_folder}); set path to its "
                f"folder, unpack {kind.url} there, or set download=true"
            ) from error
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2)
        sets.append(TensorImages(_fitted(images, recipe), torch.tensor(found.targets)))
    return sets[0], sets[1], list(found.classes)


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


def _placed(recipe: Recipe) -> Data:
    """The sets of folders or shards; images that are not divided into parts are divided here."""
    parts = _parts(recipe)
    if recipe.data == "imagenet" and not {"train", "val"} <= parts.keys():
        raise FileNotFoundError(
            f"{recipe.path} must hold train/ and val/ with one folder a class, as ImageNet is laid out; "
            f"for other layouts set data=folder, for tar files data=shards"
        )
    divided = "train" in parts
    place = parts.pop("train", None) or parts.pop("", None)
    if place is None:
        raise ValueError(f"path={recipe.path} has {', '.join(parts)} and no train; add train")
    train, classes = _read(place, recipe)
    read = {name: _read(place, recipe, classes)[0] for name, place in parts.items()}
    test: ImageSet | None = None
    if not divided:
        if recipe.val_fraction is None:
            raise ValueError(f"path={recipe.path} is not divided into train and val; set val_fraction")
        if recipe.test_fraction:
            train, test = divide(train, recipe.test_fraction, recipe.split_seed)
        train, val = divide(train, recipe.val_fraction, recipe.split_seed)
    elif recipe.val_fraction is None:
        if "val" not in read:
            raise ValueError(
                f"path={recipe.path} has no val/; set val_fraction to hold out images of train/"
            )
        val, test = read["val"], read.get("test")
    else:
        train, val = divide(train, recipe.val_fraction, recipe.split_seed)
        test = read.get("test", read.get("val"))
    return _data(recipe, train, val, test, classes)


def _parts(recipe: Recipe) -> dict[str, Path | list[Path]]:
    """The folder, or the shards, of each part; the part ``""`` is all images, not divided."""
    if recipe.data == "shards":
        return {**find_shards(recipe.path or "")}
    root = Path(recipe.path or "")
    if not root.is_dir():
        raise FileNotFoundError(
            f"path={recipe.path} is no folder; give one that holds train/ and val/, or one folder a class"
        )
    return {name: root / name for name in PARTS if (root / name).is_dir()} or {"": root}


def _read(
    place: Path | list[Path], recipe: Recipe, wanted: Sequence[str] | None = None
) -> tuple[ImageSet, Sequence[str]]:
    """The images of a folder or of shards, and their classes, which must be those `wanted`."""
    _check_channels(recipe)
    if isinstance(place, Path):
        found = class_folders(place, wanted)
        paths, labels = zip(*found.samples, strict=True)
        return FileImages(paths, torch.tensor(labels), recipe.in_chans), found.classes
    images = ShardImages(place, *index_shards(place), recipe.in_chans)
    count = int(images.labels.max()) + 1 if len(images) else 0
    if wanted is None:
        return images, class_names(place, count)
    if count > len(wanted):
        raise ValueError(
            f"shards such as {place[0]} have class {count - 1}, but the shards to train on have "
            f"{len(wanted)} classes; write both from one list of classes"
        )
    return images, wanted


def _check_channels(recipe: Recipe) -> None:
    if recipe.in_chans not in (1, 3):
        raise ValueError(
            f"model_args.in_chans must be 1 or 3, the channels of images, not {recipe.in_chans}"
        )
