"""Sets of images, in memory or in files.

Shapes in this file::

    N  images of a set    images  uint8 [N, C, S, S]
    S  side in pixels     labels  int64 [N], classes
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from PIL import Image
from torch import Tensor

from pliant._config import some


class UnreadableImageError(RuntimeError):
    """An image cannot be decoded, and the run is to stop then; the message names its path."""


class ImageSet(Protocol):
    """A set of images with their classes; `labels` is int64 [N]."""

    labels: Tensor

    def __len__(self) -> int:
        """Number of images, readable or not."""

    def subset(self, index: Tensor) -> ImageSet:
        """The images at `index`, in that order."""

    def image(self, i: int) -> Image.Image:
        """Decode image `i`; a damaged one raises the decoder's error."""

    def where(self, i: int) -> str:
        """Name of image `i` in messages."""


def decoded(source: str | IO[bytes], channels: int) -> Image.Image:
    """An image from a file, decoded whole, in grey (1 channel) or colour (3)."""
    with Image.open(source) as image:
        return image.convert("L" if channels == 1 else "RGB")


def class_folders(folder: Path, wanted: Sequence[str] | None = None) -> Any:
    """The files of a folder that holds one folder of images for each class: torchvision's `ImageFolder`.

    Raises:
        FileNotFoundError: there are no such folders, or one has no image.
        ValueError: the classes are not those `wanted`.
    """
    from torchvision.datasets import ImageFolder

    try:
        found = ImageFolder(str(folder))
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} must hold one folder of images for each class ({error})"
        ) from error
    if wanted is not None and found.classes != list(wanted):
        raise ValueError(
            f"{folder} must have the same classes as the folders beside it; they differ in "
            f"{some(set(found.classes) ^ set(wanted))}"
        )
    return found


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
        """The images at `index`, in that order."""
        return TensorImages(self.images[index], self.labels[index])

    def image(self, i: int) -> Image.Image:
        """Image `i`; grey where there is one channel."""
        pixels = self.images[i].permute(1, 2, 0).squeeze(-1).numpy()
        return Image.fromarray(pixels)

    def where(self, i: int) -> str:
        """Number of the image, which has no path."""
        return f"image {i}"


class FileImages:
    """Images in files, opened on access.

    Args:
        paths: path of each image.
        labels: int64 [N].
        channels: channels that images are converted to: 1 (grey) or 3 (colour).
    """

    def __init__(self, paths: Sequence[str], labels: Tensor, channels: int = 3) -> None:
        self.paths, self.labels, self.channels = list(paths), labels, channels

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, index: Tensor) -> FileImages:
        """The images at `index`, in that order."""
        return FileImages([self.paths[i] for i in index.tolist()], self.labels[index], self.channels)

    def image(self, i: int) -> Image.Image:
        """Image `i`, decoded whole."""
        return decoded(self.paths[i], self.channels)

    def where(self, i: int) -> str:
        """Path of image `i`."""
        return self.paths[i]
