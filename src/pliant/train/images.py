"""Sets of images, in memory or in files.

Shapes in this file::

    N  images of a set    images  uint8 [N, C, S, S]
    S  side in pixels     labels  int64 [N], classes
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from PIL import Image
from torch import Tensor


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
