"""Images that a file in 8-bit integers gets its ranges from, and those it is then compared on.

Shapes: images [B, C, H, W] as the file takes them (`pliant.deploy.inputs.Preparation`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from PIL import Image
from torch import Tensor

from pliant.deploy.inputs import Preparation, image_files, pixels_of, read_image, sampled


@runtime_checkable
class Images(Protocol):
    """A set of images, such as `pliant.train.images.ImageSet`."""

    def __len__(self) -> int:
        """Number of images."""

    def image(self, i: int) -> Image.Image:
        """Image `i`."""


Calibration = str | Path | Images | Iterable[Any]


def calibration(
    given: Calibration | None, preparation: Preparation, count: int, check_folder: Path | None = None
) -> tuple[Tensor, Tensor]:
    """The images that set the ranges, and those to compare on, which are others.

    Args:
        given: a folder of images, a set, or batches, as for `pliant.export`.
        preparation: says what the file takes.
        count: images of each of the two, at most.
        check_folder: folder of the images to compare on. None: every second one of `given`.

    Raises:
        ValueError: nothing is given; there are too few images; one cannot be read, holds what is no number,
            or is of another shape or type than the file takes; or none has two values that differ.
    """
    if type(count) is not int or count < 1:
        raise ValueError(f"calibrate_images must be a whole number from 1, not {count!r}")
    most = count if check_folder else 2 * count
    if given is None:
        raise ValueError(
            "precision='int8' needs calibrate=: some hundred images such as the file will get, as a folder "
            "or as batches; they set the ranges of the activations"
        )
    if isinstance(given, str | Path):
        images = _of_folder(Path(given), preparation, most)
    elif isinstance(given, Images):
        images = _of_set(given, preparation, most)
    else:
        images = _of_batches(given, preparation, most)
    least = 1 if check_folder else 2
    if len(images) < least:
        raise ValueError(
            f"calibrate holds {len(images)} images; give at least {least}, better some hundred: they set "
            f"the ranges, and without check_images the file is compared on every second one"
        )
    _check_values(images)
    if check_folder:
        return images, preparation.real(count, check_folder)
    return images[::2], images[1::2]


def in_batches(images: Tensor, sizes: Iterable[int]) -> Iterator[Tensor]:
    """Images in batches of these sizes, in turn; the rest, where it is smaller, by itself.

    Example:
        >>> [len(some) for some in in_batches(torch.zeros(9, 3, 4, 4), (1, 2, 5))]
        [1, 2, 5, 1]
    """
    sizes, start = list(sizes), 0
    while start < len(images):
        for size in sizes:
            if start < len(images):
                yield images[start : start + size]
            start += size


def in_whole_batches(images: Tensor, size: int) -> Iterator[Tensor]:
    """Images in batches of one size; the last is filled with the first images.

    Example:
        >>> [some.flatten().tolist() for some in in_whole_batches(torch.arange(3.0).view(3, 1, 1, 1), 2)]
        [[0.0, 1.0], [2.0, 0.0]]
    """
    filled = torch.arange(-(-len(images) // size) * size) % len(images)
    yield from torch.split(images[filled], size)


def _of_folder(folder: Path, preparation: Preparation, most: int) -> Tensor:
    files = sampled(image_files(folder, "to calibrate with"), most)
    return preparation.taken(
        torch.stack([read_image(f, preparation.size, "to calibrate with") for f in files])
    )


def _of_set(given: Images, preparation: Preparation, most: int) -> Tensor:
    read = []
    for i in sampled(range(len(given)), most):
        try:
            image = given.image(i)
        except Exception as error:  # decoders raise anything for damaged files
            raise ValueError(f"image {i} of calibrate cannot be read: {error}; remove it") from error
        read.append(pixels_of(image, preparation.size))
    return preparation.taken(torch.stack(read)) if read else torch.empty(0, *preparation.size)


def _of_batches(given: Iterable[Any], preparation: Preparation, most: int) -> Tensor:
    kind = torch.uint8 if preparation.takes == "uint8" else torch.float32
    wanted = f"{kind} images of [any, {', '.join(map(str, preparation.size))}]"
    found, count = [], 0
    try:
        batches = iter([given] if isinstance(given, Tensor) else given)
    except TypeError as error:
        raise ValueError(
            f"calibrate must be a folder, a set of images or batches of them, not a {type(given).__name__}"
        ) from error
    while count < most and (batch := next(batches, None)) is not None:
        images = (
            batch[0] if isinstance(batch, tuple | list) and batch else batch
        )  # as data loaders give them
        if not isinstance(images, Tensor):
            raise ValueError(
                f"calibrate must give {wanted}, as the file takes them, not a {type(images).__name__}"
            )
        if tuple(images.shape[1:]) != preparation.size or images.dtype != kind:
            raise ValueError(
                f"calibrate must give {wanted}, as the file takes them, not {images.dtype} of "
                f"{list(images.shape)}"
            )
        found.append(images[: most - count].detach().cpu())
        count += len(found[-1])
    return torch.cat(found) if found else torch.empty(0, *preparation.size)


def _check_values(images: Tensor) -> None:
    """Refuse images that would set ranges which hold for no image."""
    if images.is_floating_point():
        wrong = ~images.flatten(1).isfinite().all(1)
        if wrong.any():
            raise ValueError(
                f"image {int(wrong.nonzero()[0])} of calibrate holds NaN or infinity; remove it"
            )
    flat = images.flatten(1)
    if bool((flat == flat[:, :1]).all()):
        raise ValueError(
            f"the {len(images)} images of calibrate have no spread: each is of one value, such as "
            f"{flat[0, 0].item():g}; give images such as the file will get"
        )
