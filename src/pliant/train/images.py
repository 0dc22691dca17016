"""Sets of images, in memory or in files, and the folders of parts and classes that hold files.

Shapes in this file::

    N  images of a set    images  uint8 [N, C, S, S]
    S  side in pixels     labels  int64 [N], classes
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from PIL import Image
from torch import Tensor

from pliant._config import some
from pliant.image_files import SUFFIXES, decoded, files_below, leads_back

# The part that a folder or shard of this name holds.
PARTS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("val", "valid", "validation"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class UnreadableImageError(RuntimeError):
    """An image cannot be read, and the run is to stop then; the message names its path."""


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

    def name(self, i: int) -> str:
        """Name of image `i` in its data, wherever the data lies."""


def part_folders(root: Path) -> dict[str, Path]:
    """The folders of the parts ``train``, ``val`` and ``test`` in a folder of images, as far as there are.

    ``Train``, ``training``, ``valid`` and ``validation`` are parts, too. A folder of such a name that
    holds no folders is a class.

    Returns:
        Part to folder; the part ``""`` is all of `root`, which is not divided.

    Raises:
        ValueError: two folders are of one part.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     for name in ("Train/cat", "valid/cat"):
        ...         os.makedirs(f"{place}/{name}")
        ...     {part: folder.name for part, folder in part_folders(Path(place)).items()}
        {'train': 'Train', 'val': 'valid'}
    """
    found: dict[str, Path] = {}
    for folder in sorted(root.iterdir()):
        part = PARTS.get(folder.name.lower())
        if part is None or not folder.is_dir() or not any(inner.is_dir() for inner in folder.iterdir()):
            continue
        if part in found:
            raise ValueError(
                f"{found[part]} and {folder} are both images for {part}; merge them, or rename one"
            )
        found[part] = folder
    return {part: found[part] for part in ("train", "val", "test") if part in found} or {"": root}


def class_folders(root: Path, parts: Sequence[Path]) -> tuple[list[list[tuple[str, int]]], list[str]]:
    """The files of folders that hold one folder of images for each class.

    Args:
        root: the folder of `parts`, or the one part itself.
        parts: have the same classes. A file that links lead to is read once in all of them
            (`pliant.image_files.files_below`).

    Returns:
        Path and class of each image, for each of `parts`; names of the classes.

    Raises:
        FileNotFoundError: there are no such folders, or one has no image.
        ValueError: the classes of two parts differ.
    """
    names = [
        sorted(e.name for e in os.scandir(part) if e.is_dir() and not leads_back(e.path)) for part in parts
    ]
    classes = names[0]
    for part, own in zip(parts, names, strict=True):
        if not own:
            raise FileNotFoundError(
                f"{part} must hold one folder of images for each class; it has no folder"
            )
        if own != classes:
            raise ValueError(
                f"{part} must have the same classes as the folders beside it; they differ in "
                f"{some(set(own) ^ set(classes))}"
            )
    files = iter(files_below(str(root), [str(part / name) for part in parts for name in classes]))
    found = []
    for part in parts:
        inside = [next(files) for _ in classes]
        if empty := [name for name, paths in zip(classes, inside, strict=True) if not paths]:
            raise FileNotFoundError(
                f"{part} must hold one folder of images for each class; {some(empty)} has no image of its "
                f"own ({', '.join(SUFFIXES)})"
            )
        found.append([(path, label) for label, paths in enumerate(inside) for path in paths])
    return found, classes


class TensorImages:
    """Images in memory.

    Args:
        images: uint8 [N, C, S, S].
        labels: int64 [N].
        numbers: int64 [N], numbers of the images in their data; None: from 0.
    """

    def __init__(self, images: Tensor, labels: Tensor, numbers: Tensor | None = None) -> None:
        self.images, self.labels = images, labels
        self.numbers = torch.arange(len(labels)) if numbers is None else numbers

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, index: Tensor) -> TensorImages:
        """The images at `index`, in that order."""
        return TensorImages(self.images[index], self.labels[index], self.numbers[index])

    def image(self, i: int) -> Image.Image:
        """Image `i`; grey where there is one channel."""
        pixels = self.images[i].permute(1, 2, 0).squeeze(-1).numpy()
        return Image.fromarray(pixels)

    def where(self, i: int) -> str:
        """Number of the image, which has no path."""
        return f"image {self.name(i)}"

    def name(self, i: int) -> str:
        """Number of image `i` in its data."""
        return str(int(self.numbers[i]))


class FileImages:
    """Images in files, opened on access.

    Args:
        paths: path of each image.
        labels: int64 [N].
        channels: channels that images are converted to: 1 (grey) or 3 (colour).
        root: folder of the data, which all paths begin with.
    """

    def __init__(
        self, paths: Sequence[str], labels: Tensor, channels: int = 3, root: Path = Path()
    ) -> None:
        self.paths, self.labels, self.channels, self.root = list(paths), labels, channels, root
        # A path in the current folder does not begin with its dot.
        self._prefix = "" if root == Path() else f"{root}{os.sep}"

    def __len__(self) -> int:
        return len(self.paths)

    def subset(self, index: Tensor) -> FileImages:
        """The images at `index`, in that order."""
        paths = [self.paths[i] for i in index.tolist()]
        return FileImages(paths, self.labels[index], self.channels, self.root)

    def image(self, i: int) -> Image.Image:
        """Image `i`, decoded whole."""
        return decoded(self.paths[i], self.channels)

    def where(self, i: int) -> str:
        """Path of image `i`."""
        return self.paths[i]

    def name(self, i: int) -> str:
        """Path of image `i` below the folder of the data."""
        return self.paths[i].removeprefix(self._prefix).replace(os.sep, "/")
