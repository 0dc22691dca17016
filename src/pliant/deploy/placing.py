"""Several files that belong together, under their final names together or not at all."""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def workshop(path: Path) -> Iterator[Path]:
    """A hidden folder beside `path` to write its files in; gone afterwards, with what is in it.

    Raises:
        ValueError: `path` is a folder.
        OSError: nothing can be written there, or the disk is full; says so of `path`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     with workshop(Path(place) / "net.onnx") as folder:
        ...         _ = (folder / "net.onnx").write_text("whole")
        ...         put_in_place([folder / "net.onnx"], Path(place))
        ...     [file.name for file in Path(place).iterdir()]
        ['net.onnx']
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder; name a file in it")
    folder = path.parent / f".{path.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        try:
            folder.mkdir(parents=True)
            yield folder
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(
            error.errno, f"{path} could not be written, and nothing is left of it: {reason}"
        ) from error


def put_in_place(files: list[Path], folder: Path) -> None:
    """Move files to `folder`, the first one last: where it stands, all it refers to stand.

    What stood there under these names is replaced; if anything fails, it is put back.

    Args:
        files: the main one first.
        folder: on the same file system.
    """
    for file in files:
        with file.open("rb+") as opened:
            os.fsync(opened.fileno())
    aside: list[tuple[Path, Path]] = []
    placed: list[Path] = []
    try:
        for n, file in enumerate(files):
            target = folder / file.name
            if target.exists():
                old = file.with_name(f"{n}-{file.name}.old")
                target.replace(old)
                aside.append((old, target))
        for file in reversed(files):
            file.replace(folder / file.name)
            placed.append(folder / file.name)
    except BaseException:
        for target in placed:
            target.unlink(missing_ok=True)
        for old, target in reversed(aside):
            old.replace(target)
        raise
