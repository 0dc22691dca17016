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
import json
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

from pliant.image_files import decoded
from pliant.train.images import PARTS

IMAGES = ("jpg", "jpeg", "png", "webp", "ppm", "pgm", "bmp")
LABEL = "cls"
CLASSES = "classes.txt"
INFO = "_info.json"  # as timm's reader of shards has it: names of the shards of each part, and their images
_OPEN = 128  # files a process keeps open; the usual limit is 1024
_BLOCK = 512  # bytes of a tar file's block
_RECORD = 20 * _BLOCK  # to which most writers fill a tar file up with zeros
# Bounds, so that a small file does not ask for gigabytes.
_LONGEST_NAME = 4096  # bytes of a member's name
_LONGEST_LABEL = 9  # digits
_MOST_NUMBERS = 100_000  # classes that nothing names


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
        root: folder of the data, in which all shards lie.
    """

    def __init__(
        self,
        shards: Sequence[Path],
        index: np.ndarray[Any, Any],
        labels: Tensor,
        channels: int = 3,
        root: str = "",
    ) -> None:
        self.shards, self.index, self.labels, self.channels = tuple(shards), index, labels, channels
        self.root = root
        self._names = [os.path.relpath(shard, root or ".").replace(os.sep, "/") for shard in shards]
        self._files: dict[int, BinaryIO] = {}
        self._process = os.getpid()

    def __len__(self) -> int:
        return len(self.labels)

    def __getstate__(self) -> dict[str, Any]:
        """State without open files, for workers that are spawned rather than forked."""
        return {**vars(self), "_files": {}}

    def subset(self, index: Tensor) -> ShardImages:
        """The images at `index`, in that order."""
        places, labels = self.index[index.numpy()], self.labels[index]
        return ShardImages(self.shards, places, labels, self.channels, self.root)

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

    def name(self, i: int) -> str:
        """Shard and member of image `i`, the shard as it lies in the folder of the data."""
        shard, _, _, member = self.index[i]
        return f"{self._names[int(shard)]}/{member.decode()}"

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

    The part of a shard is the word ``train``, ``val`` (``valid``, ``validation``) or ``test`` in its
    name, or else its folder's name. If no name has such a word, all shards are of part ``""``. Names that
    end in ``-of-00128`` need all 128 shards. A shard that links lead to is taken once.

    Args:
        pattern: a folder (its ``.tar`` files and those one level below), or a path with ``*``, ``?``,
            ``[...]``, and braces for lists and ranges: ``data/{train,val}-{000..127}.tar``.

    Raises:
        FileNotFoundError: there is no shard, or a shard of a list, a range or a numbered set is missing.
        ValueError: some names have such a word and others do not.
    """
    folder = Path(pattern)
    if folder.is_dir():
        inside = glob.escape(str(folder))
        found = sorted([*_matching(f"{inside}/*.tar"), *_matching(f"{inside}/*/*.tar")])
    else:
        found = [path for one in braces(pattern) for path in _matching(one)]
    if not found:
        raise FileNotFoundError(
            f"path={pattern} names no shards; give a folder of .tar files, or their names with * or "
            f"{{000..127}} for many"
        )
    once: dict[str, Path] = {}
    for path in found:
        once.setdefault(os.path.realpath(path), path)
    parts: dict[str, list[Path]] = {}
    for path in once.values():
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
    # Path.glob takes no absolute pattern, and hidden files: a killed `write_shards` leaves half a shard so.
    return sorted(map(Path, glob.glob(pattern)))  # noqa: PTH207


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
        DamagedShardError: a shard is cut off, is no tar file, is compressed, or has not as many images
            as ``_info.json`` beside it says.
        ValueError: a sample lacks its image or its class, or the class is no number.
    """
    expected = _expected(shards)
    places: list[tuple[int, int, int, bytes]] = []
    labels: list[int] = []
    for number, shard in enumerate(shards):
        before = len(labels)
        for member, offset, size, label in _samples(shard):
            name = member.encode()
            if len(name) > _LONGEST_NAME:
                raise ValueError(
                    f"{shard} has a member with a name of {len(name)} bytes, {member[:20]}...; at most "
                    f"{_LONGEST_NAME} are read"
                )
            places.append((number, offset, size, name))
            labels.append(label)
        if (info := expected.get(shard)) and info[1] != len(labels) - before:
            raise DamagedShardError(
                f"shard {shard} has {len(labels) - before} images, and {info[0]} says {info[1]}; copy or "
                f"write the shard again, or remove {INFO} if it is out of date"
            )
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
                    label = _label(f"{shard}/{member.name}", file.read(min(member.size, _BLOCK)))
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
    if len(text) > _LONGEST_LABEL:
        raise ValueError(
            f"{where} must hold a number of at most {_LONGEST_LABEL} digits, not {text[:20]}..."
        )
    return int(text)


def _members(shard: Path, file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file that is whole.

    `tarfile` reports no error where a file is cut off between members or a header is damaged, and takes
    any block of zeros for the end. So the end is checked too: two blocks of zeros, and after them at most
    the zeros that fill the last record up.
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
    size, whole = os.fstat(file.fileno()).st_size, archive.offset + 2 * _BLOCK
    file.seek(archive.offset)
    # Where more zeros follow than that, members were overwritten with zeros.
    if size not in (whole, -(-whole // _RECORD) * _RECORD) or any(file.read()):
        raise DamagedShardError(_damaged(shard, last, "no end of archive follows"))


def _damaged(shard: Path, last: str, why: str) -> str:
    return (
        f"shard {shard} is damaged or cut off after {last} ({why}); copy or write it again, as a .tar file "
        f"without compression"
    )


def _expected(shards: Sequence[Path]) -> dict[Path, tuple[Path, int]]:
    """The index that names a shard, and its number of images there, for shards that an index names."""
    found = {}
    for folder in dict.fromkeys(f for shard in shards for f in (shard.parent, shard.parent.parent)):
        path = folder / INFO
        if not path.is_file():
            continue
        try:
            for part in json.loads(path.read_bytes()).get("splits", {}).values():
                for name, count in zip(part["filenames"], part["shard_lengths"], strict=True):
                    found[folder / name] = (path, int(count))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(
                f"{path} is no index of shards ({error!r}); write it again, or remove it"
            ) from error
    return found


def class_names(shards: Sequence[Path], count: int) -> list[str]:
    """Names of the classes: the lines of ``classes.txt`` beside the shards, else the numbers.

    Args:
        shards: the folder of the first shard, or the folder above, may hold ``classes.txt``.
        count: number of classes in the labels.

    Raises:
        ValueError: the file names fewer classes; or there is none, and `count` is above 100,000.
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
    if count > _MOST_NUMBERS:
        raise ValueError(
            f"shards such as {shards[0]} have class {count - 1}; without {CLASSES} beside them, which "
            f"names the classes, at most {_MOST_NUMBERS} are read"
        )
    return [str(n) for n in range(count)]
