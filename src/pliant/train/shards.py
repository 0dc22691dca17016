"""Images in shards: tar files in webdataset's format, read at any position.

The members of a sample stand side by side and share a key: their name up to the first dot of its
last part. ``n01440764/10026.jpg`` is an image, ``n01440764/10026.cls`` its class, a number.

The `webdataset` package streams shards through a shuffle buffer, so a run on it cannot be resumed
within an epoch. A tar file is not compressed, so its headers say where each image lies. With this
index any image can be read at any time, the order depends on (seed, epoch) alone, and runs resume to
the same bits.

Shapes in this file::

    N  images of a set    labels  int64 [N], classes
"""

from __future__ import annotations

import glob
import io
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pliant.train.images import decoded

IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "pgm", "bmp")
LABEL = "cls"
CLASSES = "classes.txt"
PARTS = {"train": "train", "training": "train", "val": "val", "validation": "val", "test": "test"}
_OPEN = 128  # files a process keeps open; the usual limit is 1024
_BLOCK = 512  # bytes of a tar file's block


class DamagedShardError(ValueError):
    """A shard is damaged or cut off; the message names the shard and its last whole member."""


class ShardImages:
    """Images in tar files, read on access.

    Args:
        shards: the tar files.
        index: structured array [N] of `index_shards`: number of the shard, offset and size in bytes,
            name of the member.
        labels: int64 [N].
        channels: channels that images are converted to: 1 (grey) or 3 (colour).
    """

    def __init__(
        self, shards: Sequence[Path], index: np.ndarray[Any, Any], labels: Tensor, channels: int = 3
    ) -> None:
        self.shards, self.index, self.labels, self.channels = tuple(shards), index, labels, channels
        self._files: dict[int, BinaryIO] = {}
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        """State without open files, for workers that are spawned rather than forked."""
        return {**vars(self), "_files": {}}

    def subset(self, index: Tensor) -> ShardImages:
        """The images at `index`, in that order."""
        return ShardImages(self.shards, self.index[index.numpy()], self.labels[index], self.channels)

    def image(self, i: int) -> Image.Image:
        """Image `i`, decoded whole.

        Raises:
            ValueError: the shard ends before the image does.
            OSError: the member is no image.
        """
        return decoded(io.BytesIO(self.content(i)), self.channels)

    def content(self, i: int) -> bytes:
        """The encoded bytes of image `i`."""
        shard, offset, size, _ = self.index[i]
        file = self._file(int(shard))
        file.seek(int(offset))
        content = file.read(int(size))
        if len(content) < size:
            raise ValueError(f"the shard ends after {len(content)} of its {size} bytes")
        return content

    def where(self, i: int) -> str:
        """Shard and member of image `i`, as ``train-00000.tar/dog/17.jpg``."""
        shard, _, _, member = self.index[i]
        return f"{self.shards[int(shard)]}/{member.decode()}"

    def _file(self, shard: int) -> BinaryIO:
        if self._process != os.getpid():  # after a fork both processes would share the file's position
            self._files, self._process = {}, os.getpid()
        if shard not in self._files:
            while len(self._files) >= _OPEN:
                self._files.pop(next(iter(self._files))).close()
            self._files[shard] = self.shards[shard].open("rb")
        return self._files[shard]


def find_shards(pattern: str) -> dict[str, list[Path]]:
    """The shards that a path names, by part: ``train``, ``val``, ``test``, or ``""``.

    The part of a shard is the word ``train``, ``val`` (``validation``) or ``test`` in its name, or else
    its folder's name. If no name has such a word, all shards are of part ``""``. Names that end in
    ``-of-00128`` need all 128 shards.

    Args:
        pattern: a folder (its ``.tar`` files and those one level below), or a path with ``*``, ``?``,
            ``[...]``, and braces for lists and ranges: ``data/{train,val}-{000..127}.tar``.

    Raises:
        FileNotFoundError: there is no shard, or a shard of a list, a range or a numbered set is missing.
        ValueError: some names have such a word and others do not.
    """
    folder = Path(pattern)
    if folder.is_dir():
        found = sorted([*folder.glob("*.tar"), *folder.glob("*/*.tar")])
    else:
        found = [path for one in braces(pattern) for path in _matching(one)]
    if not found:
        raise FileNotFoundError(
            f"path={pattern} names no shards; give a folder of .tar files, or their names with * or "
            f"{{000..127}} for many"
        )
    parts: dict[str, list[Path]] = {}
    for path in found:
        parts.setdefault(_part(path), []).append(path)
    if "" in parts and len(parts) > 1:
        other = next(part for part in parts if part)
        raise ValueError(
            f"the name {parts[''][0]} does not say train, val or test, while {parts[other][0]} says "
            f"{other}; rename it, or give path= as a pattern that leaves it out"
        )
    for paths in parts.values():
        _check_complete(paths)
    return parts


def braces(pattern: str) -> list[str]:
    """Expand the braces of a pattern as a shell does.

    Example:
        >>> braces("{train,val}-{08..10}.tar")
        ['train-08.tar', 'train-09.tar', 'train-10.tar', 'val-08.tar', 'val-09.tar', 'val-10.tar']
        >>> braces("{a{1,2},b}")
        ['a1', 'a2', 'b']
    """
    before, opened, rest = pattern.partition("{")
    depth, start, options = 1, 0, []
    for at, sign in enumerate(rest):
        depth += (sign == "{") - (sign == "}")
        if depth == 0 or (depth == 1 and sign == ","):
            options.append(rest[start:at])
            start = at + 1
        if depth == 0:
            break
    if not opened or depth:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", options[0]) if len(options) == 1 else None
    if span is not None:
        first, last = span.groups()
        options = [f"{n:0{len(first)}d}" for n in range(int(first), int(last) + 1)]
    inner = [text for option in options for text in braces(option)]
    return [before + text + after for text in inner for after in braces(rest[start:])]


def _matching(pattern: str) -> list[Path]:
    if not glob.has_magic(pattern):
        if not Path(pattern).is_file():
            raise FileNotFoundError(f"shard {pattern} is missing")
        return [Path(pattern)]
    return sorted(map(Path, glob.glob(pattern)))  # noqa: PTH207 - Path.glob takes no absolute pattern


def _part(path: Path) -> str:
    words = re.split(r"[^a-z]+", path.stem.lower())
    found = next((PARTS[word] for word in words if word in PARTS), None)
    return found or PARTS.get(path.parent.name.lower(), "")


def _check_complete(paths: Sequence[Path]) -> None:
    """Refuse numbered sets (``-of-00128``) with missing shards."""
    sets: dict[tuple[Path, str, str], set[str]] = {}
    for path in paths:
        if counted := re.fullmatch(r"(.*?)\d+-of-(\d+)", path.stem):
            start, total = counted.groups()
            sets.setdefault((path.parent, start, total), set()).add(path.name)
    for (folder, start, total), there in sets.items():
        for n in range(int(total)):
            name = f"{start}{n:0{len(total)}d}-of-{total}.tar"
            if name not in there:
                raise FileNotFoundError(
                    f"{folder / name} is missing: only {len(there)} of {int(total)} shards are there"
                )


def index_shards(shards: Sequence[Path]) -> tuple[np.ndarray[Any, Any], Tensor]:
    """Index the images of some shards, and read their classes.

    Returns:
        A structured array [N] (``shard``, ``offset``, ``size``, ``member``), and int64 [N].

    Raises:
        DamagedShardError: a shard is cut off, is no tar file, or is compressed.
        ValueError: a sample lacks its image or its class, or the class is no number.
    """
    places: list[tuple[int, int, int, bytes]] = []
    labels: list[int] = []
    for number, shard in enumerate(shards):
        for member, offset, size, label in _samples(shard):
            places.append((number, offset, size, member.encode()))
            labels.append(label)
    longest = max((len(place[3]) for place in places), default=1)
    kinds = [("shard", np.int32), ("offset", np.int64), ("size", np.int64), ("member", f"S{longest}")]
    return np.array(places, dtype=kinds), torch.tensor(labels, dtype=torch.long)


def _samples(shard: Path) -> Iterator[tuple[str, int, int, int]]:
    """Member, offset and size of each image, and its class."""
    with shard.open("rb") as file:
        named = ((*_split(member.name), member) for member in _members(shard, file) if member.isreg())
        for key, members in groupby(named, lambda item: item[0]):
            image = label = None
            for _, extension, member in members:
                if extension == LABEL:
                    file.seek(member.offset_data)
                    label = _label(f"{shard}/{member.name}", file.read(member.size))
                elif extension in IMAGES:
                    image = member
            if image is None or label is None:
                lacking = f"image (.{', .'.join(IMAGES)})" if image is None else f"class (.{LABEL})"
                raise ValueError(
                    f"sample {key} of {shard} has no {lacking}; put all members of a sample side by side"
                )
            yield image.name, image.offset_data, image.size, label


def _split(name: str) -> tuple[str, str]:
    """Key and extension of a member.

    Example:
        >>> _split("a.b/dog.seg.PNG")
        ('a.b/dog', 'seg.png')
    """
    folder, slash, base = name.rpartition("/")
    stem, _, extension = base.partition(".")
    return f"{folder}{slash}{stem}", extension.lower()


def _label(where: str, content: bytes) -> int:
    text = content.decode(errors="replace").strip()
    if not text.isdecimal():
        raise ValueError(f"{where} must hold the number of a class, from 0, not {text[:20]!r}")
    return int(text)


def _members(shard: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file that is whole.

    `tarfile` reports no error where a file is cut off between members or a header is damaged, so the
    mark at the end of the archive is checked too.
    """
    last = "its beginning"
    try:
        archive = tarfile.TarFile(fileobj=file)
        while (member := archive.next()) is not None:
            yield member
            archive.members = []  # type: ignore[attr-defined]  # or it keeps them all
            last = member.name
    except (tarfile.TarError, EOFError) as error:
        raise DamagedShardError(_damaged(shard, last, str(error))) from error
    file.seek(archive.offset)
    if file.read(_BLOCK) != bytes(_BLOCK):
        raise DamagedShardError(_damaged(shard, last, "no end of archive follows"))


def _damaged(shard: Path, last: str, why: str) -> str:
    return (
        f"shard {shard} is damaged or cut off after {last} ({why}); copy or write it again, as a .tar file "
        f"without compression"
    )


def class_names(shards: Sequence[Path], count: int) -> list[str]:
    """Names of the classes: the lines of ``classes.txt`` beside the shards, else the numbers.

    Args:
        shards: the folder of the first shard, or the folder above, may hold ``classes.txt``.
        count: number of classes in the labels.

    Raises:
        ValueError: the file names fewer classes.
    """
    for folder in (shards[0].parent, shards[0].parent.parent):
        path = folder / CLASSES
        if path.is_file():
            names = path.read_text(encoding="utf-8").splitlines()
            if len(names) < count:
                raise ValueError(
                    f"{path} names {len(names)} classes, but the shards have class {count - 1}"
                )
            return names
    return [str(n) for n in range(count)]
