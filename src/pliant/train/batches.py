"""Images in batches, shuffled, augmented and normalised.

Images in memory (digits, CIFAR) lie on the device and are augmented a batch at a time without worker
processes. Images in files are read by workers and go through timm's transforms. Either way, order and
augmentation depend on (seed, epoch, index of the image) alone, so a resumed run sees the same images.

Shapes in this file::

    B  batch              x  float32 [B, C, S, S], normalised
    S  side in pixels     y  int64 [B], classes
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from pliant.train.images import ImageSet, TensorImages, UnreadableImageError
from pliant.train.processes import device_of, place
from pliant.train.recipe import AUGMENTATIONS, Recipe
from pliant.train.seeds import mixed_seed, seeded


class Batches(ABC):
    """Batches of one set, ``(x, y)``, for one epoch after another.

    Training batches are shuffled, augmented and of one size; the last incomplete one is dropped.
    Evaluation batches are all images in order. With several processes, each takes its own share.

    An iteration can begin in the middle of an epoch: `state_dict` says where it is, and after
    `load_state_dict` the next iteration continues there. Lightning saves and restores both.

    Args:
        images: the set.
        recipe: size of batches and images, and augmentation.
        mean: mean of each channel, for the normalisation.
        std: standard deviation of each channel.
        train: for training rather than evaluation.
        device: where images in memory are held, and their batches made.
        view: how evaluation shows images from files, instead of the recipe's size, crop and bilinear
            interpolation: arguments of timm's ``create_transform`` (``input_size``, ``crop_mode``, ...).

    Attributes:
        epoch: epoch that order and augmentation belong to; set by `set_epoch`.
        taken: batches of this epoch given so far, also before a resumption.
        unreadable: paths that could not be read so far.
    """

    def __init__(
        self,
        images: ImageSet,
        recipe: Recipe,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        train: bool,
        device: torch.device | str = "cpu",
        view: Mapping[str, Any] | None = None,
    ) -> None:
        self.images, self.recipe, self.train, self.device = images, recipe, train, torch.device(device)
        self.view = view
        self.mean, self.std = tuple(mean), tuple(std)
        self.epoch = 0
        self.taken = self._first = 0
        self.unreadable: set[str] = set()

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch of the next iteration, which begins with the first batch."""
        self.epoch, self._first = epoch, 0

    def state_dict(self) -> dict[str, int]:
        """The epoch, and the number of its batches given so far."""
        return {"epoch": self.epoch, "taken": self.taken}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Let the next iteration continue where `state` says."""
        self.epoch, self._first = state["epoch"], state["taken"]

    def __len__(self) -> int:
        rank, world = place()
        if not self.train:
            return -(-len(range(rank, len(self.images), world)) // self.recipe.batch)
        return self.steps(world)

    def steps(self, processes: int) -> int:
        """Training batches of an epoch in each of `processes`, which need not have started yet."""
        return max(1, len(self.images) // processes // self.recipe.batch)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of this epoch that are left."""
        self.taken, self._first = self._first, 0
        for batch in self._batches(self.taken):
            self.taken += 1
            yield batch

    @abstractmethod
    def _batches(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of this epoch from number `first`."""

    def order(self) -> list[Tensor]:
        """Indices of the images in each batch of this epoch, for this process."""
        rank, world = place()
        n, size = len(self.images), self.recipe.batch
        if not self.train:
            return list(torch.split(torch.arange(rank, n, world), size))
        shuffled = torch.randperm(n, generator=self._generator("order"))
        return list(torch.split(shuffled[: n // world * world][rank::world], size))[: len(self)]

    def _generator(self, purpose: str) -> torch.Generator:
        return torch.Generator().manual_seed(mixed_seed(self.recipe.seed, self.epoch, purpose))


class TensorBatches(Batches):
    """Batches of images in memory, augmented all at once; see `Batches`."""

    images: TensorImages

    @cached_property
    def _held(self) -> tuple[Tensor, Tensor]:
        """All images and labels, on the device."""
        return self.images.images.to(self.device), self.images.labels.to(self.device)

    def _batches(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        device, (pixels, labels) = self.device, self._held
        mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) for v in (self.mean, self.std))
        scale, shift = 1 / (255 * std), mean / std
        moves = self._moves() if self.train else None
        erase = _eraser(self.recipe, device) if self.train else None
        for number, index in enumerate(self.order()[first:], first):
            there = index.to(device)
            x = pixels[there]
            if moves is not None:
                x = shifted(x, *(m[index].to(device) for m in moves))
            x = x * scale - shift
            if erase is not None:
                with seeded(self.recipe.seed, self.epoch, "erase", number):
                    x = erase(x)
            yield x, labels[there]

    def _moves(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Rows and columns to shift each image of the set by, and whether to flip it."""
        if self.recipe.augmentation == "none":
            return None
        reach, n = max(1, self.recipe.pixels // 8), len(self.images)
        generator = self._generator("moves")
        rows, columns = torch.randint(-reach, reach + 1, (2, n), generator=generator)
        flip = torch.rand(n, generator=generator) < 0.5
        return rows, columns, flip & (self.recipe.augmentation == "flip_crop")


def _eraser(recipe: Recipe, device: torch.device | str = "cpu") -> Any:
    """Random erasing by timm, of images on `device`; None where the recipe has none."""
    from timm.data.random_erasing import RandomErasing

    return RandomErasing(recipe.erasing, mode="pixel", device=str(device)) if recipe.erasing else None


def shifted(x: Tensor, rows: Tensor, columns: Tensor, flip: Tensor) -> Tensor:
    """Shift each image, zeros coming in, and mirror some: cropping from a padded image.

    Args:
        x: [B, C, H, W].
        rows: int64 [B]; row i of the result is row i + rows of the image.
        columns: int64 [B]; the same for columns.
        flip: bool [B]; images to mirror left to right, after shifting.

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
    # Not `contiguous`, which keeps what one channel leaves open: the strides of channels_last.
    return (taken * inside[..., None]).permute(0, 3, 1, 2).clone(memory_format=torch.contiguous_format)


class FileBatches(Batches):
    """Batches of images that are read and transformed one by one; see `Batches`.

    An image is unreadable if it cannot be decoded or transformed. In training, the next readable image of
    the set replaces it; in evaluation it is left out. `Batches.unreadable` names it.

    Raises:
        UnreadableImageError: while iterating, if the recipe says ``unreadable="stop"``.
    """

    def _batches(self, first: int) -> Iterator[tuple[Tensor, Tensor]]:
        from torch.utils.data import DataLoader

        recipe = self.recipe
        shown = transform(self.images, recipe, self.mean, self.std, train=self.train, view=self.view)
        samples = _Samples(self.images, recipe, self.train, shown)
        loader: DataLoader[Any] = DataLoader(
            samples,
            batch_sampler=([(self.epoch, i) for i in index.tolist()] for index in self.order()[first:]),
            num_workers=recipe.workers,
            collate_fn=_collated,
            pin_memory=device_of(recipe).type == "cuda",
        )
        for x, y, bad, stop in loader:
            self.unreadable.update(bad)
            if stop:  # raised here, because a worker's error would carry its traceback as text
                raise UnreadableImageError(stop)
            if len(y):
                yield x, y


class _Samples(torch.utils.data.Dataset[Any]):
    """Transformed images by (epoch, index), or None for one that is left out.

    Each comes with its label, the paths that could not be read, and a reason to stop (or "").
    """

    def __init__(
        self,
        images: ImageSet,
        recipe: Recipe,
        train: bool,
        shown: Callable[[Image.Image], Tensor],
    ) -> None:
        self.images, self.recipe, self.train, self.shown = images, recipe, train, shown

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor | None, int, list[str], str]:
        epoch, first = key
        bad: list[str] = []
        why = ""
        for step in range(len(self.images) if self.train else 1):
            i = (first + step) % len(self.images)
            try:
                image = self.images.image(i)
                with seeded(self.recipe.seed, epoch, "augment", i):
                    return self.shown(image), int(self.images.labels[i]), bad, ""
            except Exception as error:  # decoders raise anything for damaged files
                where = self.images.where(i)
                bad.append(where)
                why = f"{where} cannot be read ({error or type(error).__name__})"
                if self.recipe.unreadable == "stop":
                    return None, -1, bad, f"{why}; remove it, or set unreadable=skip"
        none = f"none of {len(self.images)} images can be read: {why}" if self.train else ""
        return None, -1, bad, none


def _collated(
    samples: list[tuple[Tensor | None, int, list[str], str]],
) -> tuple[Tensor, Tensor, list[str], str]:
    kept = [(x, y) for x, y, _, _ in samples if x is not None]
    bad = [path for _, _, paths, _ in samples for path in paths]
    stop = next((why for *_, why in samples if why), "")
    x = torch.stack([x for x, _ in kept]) if kept else torch.empty(0)
    return x, torch.tensor([y for _, y in kept], dtype=torch.long), bad, stop


def transform(
    images: ImageSet,
    recipe: Recipe,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    train: bool,
    view: Mapping[str, Any] | None = None,
) -> Any:
    """The recipe's transform of one image, by timm: a callable from a PIL image to [C, S, S].

    `view` is that of `Batches`.
    """
    from timm.data import create_transform
    from timm.data.auto_augment import (
        augment_and_mix_transform,
        auto_augment_transform,
        rand_augment_transform,
    )
    from torchvision import transforms as T

    name, side = recipe.augmentation, recipe.pixels
    auto = None if name in AUGMENTATIONS else name
    whole = isinstance(images, TensorImages)  # such images fit already
    erase = [_eraser(recipe)] if train and recipe.erasing else []
    if train and whole:
        parts: list[Any] = [T.RandomCrop(side, padding=max(1, side // 8)), T.RandomHorizontalFlip()]
        if auto is not None:
            make = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
            hparams = {"img_mean": tuple(round(255 * m) for m in mean)}
            parts.append(make.get(auto.split("-")[0], auto_augment_transform)(auto, hparams))
        parts += [T.ToTensor(), T.Normalize(list(mean), list(std))]
        return T.Compose([*parts, *erase])
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
    options |= {"input_size": (len(mean), side, side), "crop_pct": side / eval_size(images, recipe)}
    options |= view or {}
    resized = round(max(options["input_size"][1:]) / options["crop_pct"])
    return T.Compose([partial(_bounded, side=resized), *create_transform(**options).transforms, *erase])


def _bounded(image: Image.Image, *, side: int) -> Image.Image:
    """The image itself, if it is within Pillow's bound once its short side is resized to `side`.

    Raises:
        ValueError: it would be larger; a strip of 1 pixel by 1,000,000 has a small file.
    """
    width, height = (round(n * side / min(image.size)) for n in image.size)
    if width * height > (Image.MAX_IMAGE_PIXELS or math.inf):
        raise ValueError(
            f"{image.width} x {image.height} pixels would be resized to {width} x {height}, more than "
            f"{Image.MAX_IMAGE_PIXELS} in all"
        )
    return image


def eval_size(images: ImageSet, recipe: Recipe) -> int:
    """Short side of an image in evaluation, before its centre is cropped."""
    if isinstance(images, TensorImages):  # fits already
        return recipe.pixels
    return recipe.resize or round(recipe.pixels * 8 / 7)


def make_batches(
    images: ImageSet,
    recipe: Recipe,
    mean: Sequence[float],
    std: Sequence[float],
    *,
    train: bool = False,
    device: torch.device | str = "cpu",
    view: Mapping[str, Any] | None = None,
) -> Batches:
    """Batches of a set in memory or in files; see `Batches`."""
    if isinstance(images, TensorImages):
        if not (train and recipe.augmentation not in AUGMENTATIONS):
            return TensorBatches(images, recipe, mean, std, train=train, device=device)
        if len(images) < 4 * recipe.batch:  # starting processes would take longer
            recipe = replace(recipe, workers=0)
    return FileBatches(images, recipe, mean, std, train=train, view=view)
