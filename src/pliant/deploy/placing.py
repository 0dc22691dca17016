"""Several files that belong together, under their final names together or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pliant._files import NotWrittenError, scratch_folder, sync

# What a system says where there is no room for a file; not every system knows a quota.
NO_ROOM = (errno.ENOSPC, errno.EFBIG, getattr(errno, "EDQUOT", errno.ENOSPC))
_BLOCK = 1 << 20  # bytes that are written at once to find out


@contextmanager
def workshop(path: Path, need: int = 0) -> Iterator[Path]:
    """A hidden folder beside `path` to write its files in; gone afterwards, with what is in it.

    What killed processes left of `path` goes, too (`scratch_folder`).

    The libraries that write them say many things where the disk is full, and some say nothing and
    fail when they read. So whatever is raised, the disk is asked.

    Args:
        path: path of the main file.
        need: bytes that its files are known to take; 0: not known.

    Raises:
        ValueError: `path` is a folder.
        NotWrittenError: an ``OSError``: the disk is full; says what the files take, and what is free.
        OSError: nothing can be written there; says so of `path`.

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
    sizes: list[int] = []
    try:
        with scratch_folder(path) as folder:
            try:
                yield folder
            except Exception:
                sizes = [f.stat().st_size for f in folder.glob("*") if f.is_file()]
                raise  # the folder goes before the disk is asked
    except Exception as error:
        text = f"{path} could not be written, and nothing is left of it"
        full: OSError | None = None
        if isinstance(error, OSError) and (error.errno in NO_ROOM or isinstance(error, NotWrittenError)):
            full = error
        elif sizes:  # something was begun; there was no room for a byte more, or is none for the whole
            full = lack_of_room(path.parent, max(need, sum(sizes) + 1))
        if full is not None:
            takes, free = max(need, sum(sizes)) / 1e6, shutil.disk_usage(path.parent).free / 1e6
            clear = NotWrittenError(
                f"{text}: {full.strerror or full}; free some space: it takes about {takes:.1f} MB, and "
                f"{free:.1f} MB are free"
            )
            clear.errno = full.errno
            raise clear from error
        if isinstance(error, OSError):
            raise type(error)(error.errno, f"{text}: {error.strerror or error}") from error
        raise


def lack_of_room(folder: Path, need: int) -> OSError | None:
    """What the system says if a folder's disk cannot hold so many bytes more; None if it can.

    It is found out by writing them: how much is free is neither what a user may have nor what one file may.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     print(lack_of_room(Path(place), 1000))
        None
    """
    probe = folder / f".{uuid.uuid4().hex[:8]}.tmp"
    noise = os.urandom(min(need, _BLOCK))  # some file systems store no zeros
    try:
        with probe.open("wb", buffering=0) as file:
            left = need
            while left > 0:
                left -= file.write(noise[:left])
    except OSError as error:
        return error if error.errno in NO_ROOM else None
    finally:
        with suppress(OSError):
            probe.unlink()
    return None


def put_in_place(files: list[Path], folder: Path) -> None:
    """Move files to `folder`, the first one last: where it stands, all it refers to stand.

    What stood there under these names is replaced; if anything fails, it is put back.

    Args:
        files: the main one first.
        folder: on the same file system.
    """
    for file in files:
        sync(file)
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
