"""Write image folders as shards that `pliant.train.shards`, and webdataset's readers, take."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pliant._files import atomic_path, writing
from pliant.train.shards import CLASSES, IMAGES, LABEL

Report = Callable[[int, int, str], None]


def write_shards(
    folder: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    images: int = 1000,
    shuffle: bool = True,
    seed: int = 0,
    progress: Report | None = None,
) -> list[Path]:
    """Pack a folder of images into tar files, content as it is, each with its class.

    Shards are called ``train-00000-of-01282.tar``, and ``classes.txt`` beside them names the
    classes. The same images give the same bytes. A shard has its name when it is whole.

    Args:
        folder: holds one folder for each class; or ``train/``, ``val/``, ``test/`` that do.
        destination: folder for the shards; made if missing.
        images: of one shard; the last one of a part may have fewer.
        shuffle: mix the images, which readers that stream with a small buffer want. Off: in the
            order of the folder, so that runs on either end in the same bits.
        seed: of the mixing.
        progress: called with images written, images in all, and the shard.

    Returns:
        The shards.

    Raises:
        ValueError: `images` is below 1; parts have other classes; there are shards in the
            destination; a file's name ends in none of what readers know as images; or an image
            cannot be read.
        FileNotFoundError: there are no such folders.
        NotWrittenError: the disk is full, or the destination cannot be written; shards that were
            written are whole.

    Example:
        >>> import tempfile
        >>> from PIL import Image
        >>> from pliant.train.shards import find_shards
        >>> with tempfile.TemporaryDirectory() as place:
        ...     for name in ("cat", "dog"):
        ...         os.makedirs(f"{place}/images/{name}")
        ...         Image.new("RGB", (8, 8)).save(f"{place}/images/{name}/1.png")
        ...     found = write_shards(f"{place}/images", f"{place}/shards")
        ...     tarfile.open(found[0]).getnames()
        ['cat/1.png', 'cat/1.cls', 'dog/1.png', 'dog/1.cls']
    """
    folder, destination = Path(folder), Path(destination)
    if images < 1:
        raise ValueError(f"images must be at least 1, not {images}")
    there = sorted(destination.glob("*.tar"))
    if there:
        raise ValueError(f"{destination} holds shards already, such as {there[0].name}; choose another")
    parts, classes = _parts(folder)
    total, done = sum(len(samples) for samples in parts.values()), 0
    advice = "shards that were written are whole; remove them, mend that, then write again"
    found = []
    with writing(destination / CLASSES, advice), atomic_path(destination / CLASSES) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
    for part, samples in parts.items():
        keys = _keys(samples, classes)
        order = np.random.default_rng(seed).permutation(len(samples)) if shuffle else range(len(samples))
        count = -(-len(samples) // images)
        for n in range(count):
            path = destination / f"{part}-{n:05d}-of-{count:05d}.tar"
            chosen = [(*samples[i], keys[i]) for i in order[n * images : (n + 1) * images]]
            with writing(path, advice), atomic_path(path) as temporary:
                _write(temporary, chosen)
            found.append(path)
            done += len(chosen)
            if progress is not None:
                progress(done, total, path.name)
    return found


def _parts(folder: Path) -> tuple[dict[str, list[tuple[str, int]]], list[str]]:
    """Files with their classes, by part, and the classes' names."""
    from torchvision.datasets import ImageFolder

    names = [name for name in ("train", "val", "test") if (folder / name).is_dir()]
    parts: dict[str, list[tuple[str, int]]] = {}
    classes: list[str] = []
    for name in names or [""]:
        try:
            read = ImageFolder(str(folder / name))
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{folder / name} should hold one folder of images for each class ({error})"
            ) from error
        if classes and read.classes != classes:
            odd = sorted(set(read.classes) ^ set(classes))
            raise ValueError(f"{folder / name} has other classes than {folder / names[0]}: {odd[0]}")
        classes = read.classes
        for path, _ in read.samples:
            if Path(path).suffix[1:].lower() not in IMAGES:
                raise ValueError(f"{path}: readers of shards know only .{', .'.join(IMAGES)}; convert it")
        parts[name or "images"] = read.samples
    return parts, classes


def _keys(samples: Sequence[tuple[str, int]], classes: Sequence[str]) -> list[str]:
    """A key for each sample, which no other has: its class, and its file's name without dots."""
    taken: set[str] = set()
    keys = []
    for path, label in samples:
        start = f"{classes[label]}/{Path(path).stem.replace('.', '_')}"
        key, n = start, 1
        while key in taken:
            n += 1
            key = f"{start}-{n}"
        taken.add(key)
        keys.append(key)
    return keys


def _write(path: Path, samples: Sequence[tuple[str, int, str]]) -> None:
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for file, label, key in samples:
            suffix = Path(file).suffix.lower()
            for name, content in (
                (key + suffix, _content(file)),
                (f"{key}.{LABEL}", str(label).encode()),
            ):
                member = tarfile.TarInfo(name)  # of nobody, at no time: the same bytes each time
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def _content(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:  # else it would be told of the shard, as one that cannot be written
        why = error.strerror or error
        raise ValueError(f"{file} cannot be read ({why}); mend it, or take it out of the folder") from error
