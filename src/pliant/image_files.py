"""Image files: found in folders, each file once, and decoded to 8 bits a channel."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
from PIL import Image

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")
_BITS = 258  # TIFF's tag BitsPerSample


def decoded(source: str | Path | IO[bytes], channels: int) -> Image.Image:
    """Decode an image file whole, to 8 bits a channel, in grey (1 channel) or colour (3).

    Grey values of more than 8 bits are scaled: whole numbers by the range of their format (16 bits of a
    PNG, 12 of some TIFF files), floating-point numbers from [0, 1].

    Raises:
        ValueError: the values are of no known range: integers of 32 bits, or floats outside [0, 1].
        OSError: the file is damaged, or no image.
    """
    with Image.open(source) as image:
        grey = _scaled(image) if image.mode.startswith(("I", "F")) else image
        return grey.convert("L" if channels == 1 else "RGB")


def _scaled(image: Image.Image) -> Image.Image:
    """Grey values of more than 8 bits in 8; Pillow's own conversion cuts off what is above 255."""
    values = np.asarray(image)
    top: float
    if image.mode == "F":
        top = 1
        if not (values.min() >= 0 and values.max() <= 1):  # so that NaN is refused, too
            raise ValueError(
                f"its values, {values.min():g} to {values.max():g}, have no known range; floats are read "
                f"from 0 to 1"
            )
    elif image.mode.startswith("I;16") or image.format in ("PNG", "PPM"):  # older Pillows say "I" for these
        bits = image.tag_v2.get(_BITS, (16,))[0] if image.format == "TIFF" else 16  # type: ignore[attr-defined]
        top = 2**bits - 1
    else:
        raise ValueError(
            f"its whole numbers, {values.min()} to {values.max()}, have no known range; save it with 8 or "
            f"16 bits without a sign"
        )
    return Image.fromarray((values * (255 / top)).round().astype(np.uint8))


class _Folder(NamedTuple):
    """Image files of one folder, in order.

    Attributes:
        path: the folder, as it was reached.
        real: its path without links.
        linked: a link leads there.
        names: names of its image files.
        links: real paths of those that are links.
    """

    path: str
    real: str
    linked: bool
    names: list[str]
    links: dict[str, str]

    def paths(self) -> list[str]:
        """Paths of the files, as they were reached."""
        return [f"{self.path}{os.sep}{name}" for name in self.names]


def leads_back(path: str) -> bool:
    """Whether a path is a link to a folder that the link itself lies in; a warning names it."""
    target = Path(os.path.realpath(path))
    back = Path(path).is_symlink() and target in Path(os.path.realpath(Path(path).parent), "x").parents
    if back:
        logging.getLogger(__name__).warning(
            "%s leads back to %s, which it lies in, and is passed over", path, target
        )
    return back


def files_below(root: str, folders: Sequence[str]) -> list[list[str]]:
    """The image files in each of some folders and in the folders below, each file once.

    Links are followed. A file that several paths lead to counts where it lies itself, or else where the
    first link to it lies; a warning names the others. The order is that of torchvision's ``ImageFolder``.

    Args:
        root: a folder that holds `folders`; a link to `root` itself makes no difference.
        folders: the folders to read.

    Returns:
        Paths for each of `folders`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     os.makedirs(f"{place}/cat/young")
        ...     Path(f"{place}/cat/young/1.png").touch()
        ...     os.symlink(f"{place}/cat/young/1.png", f"{place}/cat/2.png")
        ...     [[os.path.relpath(path, place) for path in files_below(place, [f"{place}/cat"])[0]]]
        [['cat/young/1.png']]
    """
    base, reached = os.path.realpath(root), set[str]()
    trees = []
    for folder in folders:
        real = os.path.realpath(folder)
        tree: list[_Folder] = []
        straight = Path(base, os.path.relpath(folder, root))
        _walk(folder, real, Path(real) != straight, tree, reached)
        trees.append(sorted(tree))
    again = _repeated([folder for tree in trees for folder in tree])
    return [[path for folder in tree for path in folder.paths() if path not in again] for tree in trees]


def _walk(path: str, real: str, linked: bool, found: list[_Folder], reached: set[str]) -> None:
    """Collect a folder's image files and those below it.

    Args:
        path: the folder, as it was reached.
        real: its path without links.
        linked: a link leads there.
        found: gets the folders.
        reached: real paths of the folders that links lead to; none is read a second time, or links
            between two folders would have no end.
    """
    if linked:
        if real in reached:
            return
        reached.add(real)
    here = _Folder(path, real, linked, [], {})
    with os.scandir(path) as entries:
        for entry in entries:
            link = entry.is_symlink()
            if entry.is_dir():
                if not (link and leads_back(entry.path)):
                    target = os.path.realpath(entry.path) if link else f"{real}{os.sep}{entry.name}"
                    _walk(entry.path, target, linked or link, found, reached)
            elif entry.name.lower().endswith(SUFFIXES):
                here.names.append(entry.name)
                if link:
                    here.links[entry.name] = os.path.realpath(entry.path)
    here.names.sort()
    found.append(here)


def _repeated(folders: Sequence[_Folder]) -> set[str]:
    """Paths of files that another path leads to, which counts; a warning names one."""
    if not any(folder.linked or folder.links for folder in folders):
        return set()
    counts: dict[str, str] = {}  # real path, and the path that counts
    again: dict[str, str] = {}
    for by_link in (False, True):  # a file counts where it lies itself
        for folder in folders:
            for name, path in zip(folder.names, folder.paths(), strict=True):
                if (folder.linked or name in folder.links) == by_link:
                    real = folder.links.get(name, f"{folder.real}{os.sep}{name}")
                    if counts.setdefault(real, path) != path:
                        again[path] = counts[real]
    if again:
        path, first = next(iter(again.items()))
        logging.getLogger(__name__).warning(
            "%d links lead to images that are read already, such as %s to %s; each image is read once",
            len(again), path, first,
        )  # fmt: skip
    return set(again)
