"""Write image folders as shards for `pliant.train.shards` and for webdataset's readers."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pliant._files import atomic_path, writing
from pliant.train.images import class_folders, part_folders
from pliant.train.shards import CLASSES, IMAGES, INFO, LABEL

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
    """Pack a folder of images into tar files; each image keeps its bytes and gets its class.

    Shards are called ``train-00000-of-01282.tar``; ``classes.txt`` beside them names the classes, and
    ``_info.json``, written last, says how many images each has: pliant compares, and timm's reader of
    shards needs it. The same images give the same bytes. A shard gets its name when it is whole.

    Args:
        folder: folder with one folder for each class, or with ``train/``, ``val/``, ``test/`` of these.
        destination: folder for the shards; made if missing.
        images: images in a shard; the last shard of a part may have fewer.
        shuffle: shuffle the images, for readers that stream with a small buffer. False keeps the
            order of the folder, so that runs on the shards and on the folder end in the same bits.
        seed: seed of the shuffling.
        progress: called with the images written, all images, and the shard.

    Returns:
        Paths of the shards.

    Raises:
        ValueError: `images` is below 1; the parts have different classes; the destination holds shards;
            an image has another suffix than readers know, or cannot be read.
        FileNotFoundError: there are no such folders.
        NotWrittenError: the disk is full, or the destination cannot be written; the shards that were
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
        raise ValueError(
            f"{destination} holds shards already, such as {there[0].name}; choose another folder"
        )
    parts, classes = _parts(folder)
    total, done = sum(len(samples) for samples in parts.values()), 0
    advice = "the shards written so far are whole; remove them, mend the cause, then write again"
    found = []
    splits = {}
    with writing(destination / CLASSES, advice), atomic_path(destination / CLASSES) as temporary:
        temporary.write_text("".join(f"{name}\n" for name in classes), encoding="utf-8")
    for part, samples in parts.items():
        keys = _keys(samples, classes)
        order = np.random.default_rng(seed).permutation(len(samples)) if shuffle else range(len(samples))
        count = -(-len(samples) // images)
        lengths: dict[str, int] = {}
        for n in range(count):
            path = destination / f"{part}-{n:05d}-of-{count:05d}.tar"
            chosen = [(*samples[i], keys[i]) for i in order[n * images : (n + 1) * images]]
            with writing(path, advice), atomic_path(path) as temporary:
                _write(temporary, chosen)
            found.append(path)
            lengths[path.name] = len(chosen)
            done += len(chosen)
            if progress is not None:
                progress(done, total, path.name)
        splits[part] = {
            "name": part,
            "filenames": list(lengths),
            "shard_lengths": list(lengths.values()),
            "num_samples": len(samples),
        }
    with writing(destination / INFO, advice), atomic_path(destination / INFO) as temporary:
        temporary.write_text(json.dumps({"splits": splits}, indent=1) + "\n", encoding="utf-8")
    return found


def _parts(folder: Path) -> tuple[dict[str, list[tuple[str, int]]], list[str]]:
    """Files and their classes, by part; names of the classes."""
    folders = part_folders(folder) if folder.is_dir() else {"": folder}
    found, classes = class_folders(folder, list(folders.values()))
    for path, _ in (sample for samples in found for sample in samples):
        if Path(path).suffix[1:].lower() not in IMAGES:
            raise ValueError(
                f"{path} must be a .{', .'.join(IMAGES)} file for readers of shards; convert it"
            )
    return {part or "images": samples for part, samples in zip(folders, found, strict=True)}, classes


def _keys(samples: Sequence[tuple[str, int]], classes: Sequence[str]) -> list[str]:
    """A unique key for each sample: its class, and the name of its file without dots."""
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
                member = tarfile.TarInfo(name)  # without owner and time, so the bytes repeat
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))


def _content(file: str) -> bytes:
    try:
        return Path(file).read_bytes()
    except OSError as error:  # or the shard would be reported as one that cannot be written
        why = error.strerror or error
        raise ValueError(f"{file} cannot be read ({why}); mend it, or remove it from the folder") from error
