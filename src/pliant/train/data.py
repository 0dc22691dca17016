"""Images for training and evaluation: which there are, and how they come in batches.

Digits and CIFAR are held as bytes in memory, on the device when that is a GPU, and are
augmented a batch at a time without worker processes; folders are read by workers and
timm's transforms. Either way order and augmentation are functions of (seed, epoch,
index of the image), so a run that is continued repeats what it would have seen.

Shapes in this file::

    N  images of a set    images  uint8 [N, C, S, S]
    B  batch              x       float32 [B, C, S, S], normalised
    S  side in pixels     y       int64 [B], classes
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from pliant.train.recipe import AUGMENTATIONS, Recipe

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
CIFAR = {
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
DIGITS = (0.3053, 0.3760)
DIGITS_TEST = 0.3  # share of the 1797 digits


class UnreadableImageError(RuntimeError):
    """An image that cannot be decoded, in a run that stops at such; names its path."""


class ImageSet(Protocol):
    """Images with their classes; `labels` is int64 [N]."""

    labels: Tensor

    def __len__(self) -> int:
        """How many there are, readable or not."""

    def subset(self, index: Tensor) -> ImageSet:
        """Those at `index`, in that order."""

    def image(self, i: int) -> Image.Image:
        """Image `i`, or an error of the decoder."""

    def where(self, i: int) -> str:
        """What image `i` is called in messages."""


class TensorImages:
    """Images in memory.

    Args:
        images: uint8 [N, C, S, S].
        labels: int64 [N].
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> TensorImages:
        """Those at `index`, in that order."""
        return TensorImages(self.images[index], self.labels[index])

    def image(self, i: int) -> Image.Image:
        """Image `i`; grey where there is one channel."""
        pixels = self.images[i].permute(1, 2, 0).squeeze(-1).numpy()
        return Image.fromarray(pixels)

    def where(self, i: int) -> str:
        """Its number: such images have no path."""
        return f"image {i}"


class FileImages:
    """Images in files, opened when they are asked for.

    Args:
        paths: one for each image.
        labels: int64 [N].
        channels: 1 (grey) or 3 (colour): what images are turned into.
    """

    def __init__(self, paths: Sequence[str], labels: Tensor, channels: int = 3) -> None:
        self.paths, self.labels, self.channels = list(paths), labels, channels

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, index: Tensor) -> FileImages:
        """Those at `index`, in that order."""
        return FileImages([self.paths[i] for i in index.tolist()], self.labels[index], self.channels)

    def image(self, i: int) -> Image.Image:
        """Image `i`, decoded whole."""
        with Image.open(self.paths[i]) as image:
            return image.convert("L" if self.channels == 1 else "RGB")

    def where(self, i: int) -> str:
        """Its path."""
        return self.paths[i]


@dataclass(frozen=True)
class Data:
    """The sets of one run.

    Attributes:
        train: what is trained on.
        check: a fixed part of `train`, as large as `val` where there are enough, on
            which accuracy is measured as it is on `val`.
        val: chooses the best epoch.
        test: scored once, at the end; None where there is no such set.
        classes: names, in the order of the labels.
        mean: of each channel, of values in [0, 1].
        std: standard deviation, likewise.
        recipe: says how batches are made.

    Example:
        >>> data = load_data(Recipe(name="example", model="resnet20_cifar", batch=32))
        >>> x, y = next(iter(data.val_batches()))
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

    def train_batches(self, device: torch.device | str = "cpu") -> Batches:
        """Shuffled, augmented batches of `train`."""
        return self._batches(self.train, device, train=True)

    def check_batches(self, device: torch.device | str = "cpu") -> Batches:
        """Batches of `check`, in order, not augmented; likewise the next two."""
        return self._batches(self.check, device)

    def val_batches(self, device: torch.device | str = "cpu") -> Batches:
        """Batches of `val`."""
        return self._batches(self.val, device)

    def test_batches(self, device: torch.device | str = "cpu") -> Batches:
        """Batches of `test`.

        Raises:
            ValueError: there is no test set.
        """
        if self.test is None:
            raise ValueError(
                f"{self.recipe.data} at {self.recipe.path} has no test set; score another part"
            )
        return self._batches(self.test, device)

    def _batches(self, images: ImageSet, device: torch.device | str, train: bool = False) -> Batches:
        recipe = self.recipe
        if isinstance(images, TensorImages):
            if not (train and recipe.augmentation not in AUGMENTATIONS):
                return TensorBatches(images, recipe, self.mean, self.std, train=train, device=device)
            if len(images) < 4 * recipe.batch:  # starting processes would take longer
                recipe = replace(recipe, workers=0)
        return FileBatches(images, recipe, self.mean, self.std, train=train)


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
    if recipe.data == "digits":
        whole, rest, classes = _digits(recipe)
    elif recipe.data in CIFAR:
        whole, rest, classes = _cifar(recipe)
    else:
        return _folders(recipe)
    assert recipe.val_fraction is not None  # `Recipe` sees to it
    train, val = divide(whole, recipe.val_fraction, recipe.split_seed)
    mean, std = CIFAR.get(recipe.data, ((DIGITS[0],) * 3, (DIGITS[1],) * 3))
    if recipe.in_chans == 1:
        mean, std = (sum(mean) / len(mean),), (sum(std) / len(std),)
    return _data(recipe, train, val, rest, classes, (mean, std))


def divide(images: ImageSet, fraction: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """Hold out `fraction` of some images, the same share of every class.

    Returns:
        The rest, and what is held out.

    Raises:
        ValueError: a class has too few images to be in both.
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
    normalisation: tuple[tuple[float, ...], tuple[float, ...]],
) -> Data:
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(recipe.split_seed))
    check = train.subset(order[: len(val)].sort().values)
    return Data(recipe, train, check, val, test, tuple(classes), *normalisation)


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
                f"{recipe.data} is not in {recipe.path!r} (no whole {kind.base_folder}): point path at "
                f"it, or unpack {kind.url} there, or let download=true do it"
            ) from error
        images = torch.from_numpy(found.data).permute(0, 3, 1, 2)
        sets.append(TensorImages(_fitted(images, recipe), torch.tensor(found.targets)))
    return sets[0], sets[1], list(found.classes)


def _fitted(images: Tensor, recipe: Recipe) -> Tensor:
    """Bytes of the recipe's size and channels, [N, C, S, S], from any [N, c, s, s]."""
    if images.shape[1] != recipe.in_chans:
        if recipe.in_chans not in (1, 3):
            raise ValueError(
                f"images have 1 or 3 channels, but model_args asks for in_chans = {recipe.in_chans}"
            )
        images = (
            images.expand(-1, 3, -1, -1) if recipe.in_chans == 3 else images.float().mean(1, keepdim=True)
        )
    if images.shape[-1] != recipe.pixels:
        images = F.interpolate(images.float(), size=(recipe.pixels, recipe.pixels), mode="bilinear")
    return images if images.dtype == torch.uint8 else images.round().clamp(0, 255).byte()


def _folders(recipe: Recipe) -> Data:
    root = Path(recipe.path or "")
    if not root.is_dir():
        raise FileNotFoundError(
            f"path = {recipe.path!r} is no folder; it should hold train/ and val/, or classes"
        )
    parts = {name: root / name for name in ("train", "val", "test") if (root / name).is_dir()}
    if recipe.data == "imagenet" and not {"train", "val"} <= parts.keys():
        raise FileNotFoundError(
            f"{root} has no train/ and val/ folders that hold one folder a class, as ImageNet is laid out; "
            f"for other layouts use data=folder"
        )
    train, classes = _files(parts.get("train", root), recipe)
    read = {name: _files(folder, recipe, classes)[0] for name, folder in parts.items() if name != "train"}
    test: ImageSet | None
    val: ImageSet
    if "train" not in parts:
        if read or recipe.val_fraction is None:
            raise ValueError(
                f"{root} has no train/ beside {', '.join(parts) or 'the classes'}; set val_fraction"
            )
        whole: ImageSet = train
        test = None
        if recipe.test_fraction:
            whole, test = divide(train, recipe.test_fraction, recipe.split_seed)
        rest, val = divide(whole, recipe.val_fraction, recipe.split_seed)
    elif recipe.val_fraction is None:
        if "val" not in read:
            raise ValueError(f"{root} has no val/; set val_fraction to hold images of train/ out")
        rest, val, test = train, read["val"], read.get("test")
    else:
        rest, val = divide(train, recipe.val_fraction, recipe.split_seed)
        test = read.get("test", read.get("val"))
    mean, std = IMAGENET
    if recipe.in_chans == 1:
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    return _data(recipe, rest, val, test, classes, (mean, std))


def _files(
    folder: Path, recipe: Recipe, wanted: Sequence[str] | None = None
) -> tuple[FileImages, list[str]]:
    """The images of a folder that holds one folder a class, and the classes."""
    from torchvision.datasets import ImageFolder

    if recipe.in_chans not in (1, 3):
        raise ValueError(
            f"images have 1 or 3 channels, but model_args asks for in_chans = {recipe.in_chans}"
        )
    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} should hold one folder of images for each class ({error}); see data= and path="
        ) from error
    if wanted is not None and found.classes != list(wanted):
        odd = sorted(set(found.classes) ^ set(wanted))
        raise ValueError(
            f"{folder} has other classes than train/: {', '.join(odd[:5])}{' ...' * (len(odd) > 5)}"
        )
    paths, labels = zip(*found.samples, strict=True)
    return FileImages(paths, torch.tensor(labels), recipe.in_chans), list(found.classes)


class Batches:
    """Batches of one set, ``(x, y)``, for one epoch after another.

    Training batches are shuffled, augmented and of one size, the last incomplete one
    dropped; evaluation's are all images in order. With several processes each takes its
    own share.

    Args:
        images: the set.
        recipe: says how large batches and images are, and how they are augmented.
        mean: with `std`, the normalisation.
        std: see `mean`.
        train: for training rather than evaluation.

    Attributes:
        epoch: of which the order and augmentation are; set by `set_epoch`.
        unreadable: paths that could not be read so far.
    """

    def __init__(
        self, images: ImageSet, recipe: Recipe, mean: Sequence[float], std: Sequence[float], *, train: bool
    ) -> None:
        self.images, self.recipe, self.train = images, recipe, train
        self.mean, self.std = tuple(mean), tuple(std)
        self.epoch = 0
        self.unreadable: set[str] = set()

    def set_epoch(self, epoch: int) -> None:
        """Say which epoch the next iteration is."""
        self.epoch = epoch

    def __len__(self) -> int:
        rank, world = _place()
        if not self.train:
            return -(-len(range(rank, len(self.images), world)) // self.recipe.batch)
        return max(1, len(self.images) // world // self.recipe.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        raise NotImplementedError

    def order(self) -> list[Tensor]:
        """Indices of the images in each batch of this epoch, for this process."""
        rank, world = _place()
        n, size = len(self.images), self.recipe.batch
        if not self.train:
            return list(torch.arange(rank, n, world).split(size))
        shuffled = torch.randperm(n, generator=self._generator("order"))
        return list(shuffled[: n // world * world][rank::world].split(size))[: len(self)]

    def _generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(mixed_seed(self.recipe.seed, self.epoch, purpose))


class TensorBatches(Batches):
    """Batches of images in memory, augmented all at once; see `Batches`.

    Args:
        images: the set.
        recipe: as `Batches`.
        mean: as `Batches`.
        std: as `Batches`.
        train: as `Batches`.
        device: where the images are held and the batches are made.
    """

    def __init__(
        self,
        images: TensorImages,
        recipe: Recipe,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        train: bool,
        device: torch.device | str = "cpu",
    ) -> None:
        super().__init__(images, recipe, mean, std, train=train)
        self.pixels, self.labels = images.images.to(device), images.labels.to(device)
        self.scale = 1 / (255 * torch.tensor(std, device=device).view(-1, 1, 1))
        self.shift = (torch.tensor(mean, device=device) / torch.tensor(std, device=device)).view(-1, 1, 1)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.pixels.device
        batches = self.order()
        moves = self._moves() if self.train else None
        erase = self._eraser() if self.train and self.recipe.erasing else None
        for number, index in enumerate(batches):
            there = index.to(device)
            x = self.pixels[there]
            if moves is not None:
                x = shifted(x, *(m[index].to(device) for m in moves))
            x = x * self.scale - self.shift
            if erase is not None:
                with seeded(self.recipe.seed, self.epoch, "erase", number):
                    x = erase(x)
            yield x, self.labels[there]

    def _moves(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """For every image of the set: rows and columns to shift by, and whether to flip."""
        if self.recipe.augmentation == "none":
            return None
        reach, n = max(1, self.recipe.pixels // 8), len(self.images)
        generator = self._generator("moves")
        rows, columns = torch.randint(-reach, reach + 1, (2, n), generator=generator)
        flip = torch.rand(n, generator=generator) < 0.5
        return rows, columns, flip & (self.recipe.augmentation == "flip_crop")

    def _eraser(self) -> Any:
        from timm.data.random_erasing import RandomErasing

        return RandomErasing(self.recipe.erasing, mode="pixel", device=str(self.pixels.device))


def shifted(x: Tensor, rows: Tensor, columns: Tensor, flip: Tensor) -> Tensor:
    """Shift each image, zeros coming in, and mirror some: cropping from a padded image.

    Args:
        x: [B, C, H, W].
        rows: int64 [B]; row i of the result is row i + rows of the image.
        columns: int64 [B], likewise.
        flip: bool [B]; mirrored left to right after shifting.

    Example:
        >>> x = torch.arange(1, 5).view(1, 1, 2, 2)
        >>> shifted(x, torch.tensor([0]), torch.tensor([1]), torch.tensor([False]))[0, 0]
        tensor([[2, 0],
                [4, 0]])
    """
    height, width = x.shape[-2:]
    across = torch.arange(width, device=x.device).expand(len(x), -1)
    across = torch.where(flip[:, None], width - 1 - across, across) + columns[:, None]
    down = torch.arange(height, device=x.device) + rows[:, None]
    inside = ((down >= 0) & (down < height))[:, :, None] & ((across >= 0) & (across < width))[:, None, :]
    batch = torch.arange(len(x), device=x.device)[:, None, None]
    # Indexing [B, H, W] positions with the channels last gives [B, H, W, C].
    taken = x.permute(0, 2, 3, 1)[
        batch, down.clamp(0, height - 1)[:, :, None], across.clamp(0, width - 1)[:, None, :]
    ]
    return (taken * inside[..., None]).permute(0, 3, 1, 2).contiguous()


class FileBatches(Batches):
    """Batches of images that are read and transformed one by one; see `Batches`.

    An unreadable image is replaced, in training, by the next one of the set that can be
    read; in evaluation it is left out. `Batches.unreadable` names it.

    Raises:
        UnreadableImageError: when read, if the recipe says ``unreadable="stop"``.
    """

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        from torch.utils.data import DataLoader

        recipe = self.recipe
        samples = _Samples(self.images, recipe, self.mean, self.std, self.train)
        loader: DataLoader[Any] = DataLoader(
            samples,
            batch_sampler=([(self.epoch, i) for i in index.tolist()] for index in self.order()),
            num_workers=recipe.workers,
            collate_fn=_collated,
            pin_memory=torch.cuda.is_available() and recipe.accelerator != "cpu",
        )
        for x, y, bad in loader:
            self.unreadable.update(bad)
            if len(y):
                yield x, y


class _Samples(torch.utils.data.Dataset[Any]):
    """Transformed images by (epoch, index); ``None`` for one that is left out."""

    def __init__(
        self, images: ImageSet, recipe: Recipe, mean: Sequence[float], std: Sequence[float], train: bool
    ) -> None:
        self.images, self.recipe, self.train = images, recipe, train
        self.transform = transform(images, recipe, mean, std, train=train)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor | None, int, list[str]]:
        epoch, first = key
        bad: list[str] = []
        for step in range(len(self.images) if self.train else 1):
            i = (first + step) % len(self.images)
            try:
                image = self.images.image(i)
            except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
                where = self.images.where(i)
                if self.recipe.unreadable == "stop":
                    raise UnreadableImageError(
                        f"{where} cannot be read ({error}); remove it, or set unreadable=skip"
                    ) from error
                bad.append(where)
                continue
            with seeded(self.recipe.seed, epoch, "augment", i):
                return self.transform(image), int(self.images.labels[i]), bad
        if self.train:
            raise UnreadableImageError(f"none of {len(self.images)} images can be read, such as {bad[0]}")
        return None, -1, bad


def _collated(samples: list[tuple[Tensor | None, int, list[str]]]) -> tuple[Tensor, Tensor, list[str]]:
    kept = [(x, y) for x, y, _ in samples if x is not None]
    bad = [path for _, _, paths in samples for path in paths]
    x = torch.stack([x for x, _ in kept]) if kept else torch.empty(0)
    return x, torch.tensor([y for _, y in kept], dtype=torch.long), bad


def transform(
    images: ImageSet, recipe: Recipe, mean: Sequence[float], std: Sequence[float], *, train: bool
) -> Any:
    """The transform of one image, by timm, for a recipe: a callable, PIL image to [C, S, S]."""
    from timm.data import create_transform
    from timm.data.auto_augment import (
        augment_and_mix_transform,
        auto_augment_transform,
        rand_augment_transform,
    )
    from timm.data.random_erasing import RandomErasing
    from torchvision import transforms as T

    name, side = recipe.augmentation, recipe.pixels
    auto = None if name in AUGMENTATIONS else name
    whole = isinstance(images, TensorImages)  # such images fit already
    if train and whole:
        parts: list[Any] = [T.RandomCrop(side, padding=max(1, side // 8)), T.RandomHorizontalFlip()]
        if auto is not None:
            make = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
            hparams = {"img_mean": tuple(round(255 * m) for m in mean)}
            parts.append(make.get(auto.split("-")[0], auto_augment_transform)(auto, hparams))
        parts += [T.ToTensor(), T.Normalize(list(mean), list(std))]
        if recipe.erasing:
            parts.append(RandomErasing(recipe.erasing, mode="pixel", device="cpu"))
        return T.Compose(parts)
    options: dict[str, Any] = {"mean": tuple(mean), "std": tuple(std), "interpolation": "bilinear"}
    if train and name != "none":
        return create_transform(
            (len(mean), side, side),
            is_training=True,
            hflip=0.0 if name == "crop" else 0.5,
            color_jitter=0.0,
            auto_augment=auto,
            re_prob=recipe.erasing,
            re_mode="pixel",
            **options,
        )
    resize = side if whole else recipe.resize or round(side * 8 / 7)
    parts = list(create_transform((len(mean), side, side), crop_pct=side / resize, **options).transforms)
    if train and recipe.erasing:
        parts.append(RandomErasing(recipe.erasing, mode="pixel", device="cpu"))
    return T.Compose(parts)


def mixed_seed(seed: int, *parts: int | str) -> int:
    """One seed from a seed and what it is for, in [0, 2**32).

    Example:
        >>> mixed_seed(0, 1, "order") == mixed_seed(0, 2, "order")
        False
    """
    # Strings hash differently in every process, so their bytes are taken.
    words = [seed] + [p if isinstance(p, int) else int.from_bytes(p.encode(), "little") for p in parts]
    return int(np.random.SeedSequence(words).generate_state(1)[0])


@contextmanager
def seeded(seed: int, *parts: int | str) -> Iterator[None]:
    """Seed the generators of Python, numpy and torch's CPU, and put them back after.

    timm's mixup draws from numpy's, its auto-augment from Python's.
    """
    python, numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    torch_state = torch.random.get_rng_state()
    value = mixed_seed(seed, *parts)
    random.seed(value)
    np.random.seed(value)  # noqa: NPY002
    torch.random.default_generator.manual_seed(value)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)  # noqa: NPY002
        torch.random.set_rng_state(torch_state)


def _place() -> tuple[int, int]:
    """This process's number, and how many there are."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1
