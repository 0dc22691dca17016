"""Writing files so that nothing partial ever stands under a final name."""

from __future__ import annotations

import ctypes
import glob
import os
import shutil
import stat
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import lock_descriptor


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary file, which becomes `path` if the block ends well.

    It has the name of `path`, in a `scratch_folder` beside it, so libraries that look at the suffix see the
    right one, and the next write of `path` removes what a killed process left. The folder of `path` is made
    if it is missing. If the block raises, whatever `path` held before stays. The content is on the disk
    before it gets the name, so that a power cut leaves the one or the other too.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with atomic_path(Path(folder) / "a.txt") as temporary:
        ...         _ = temporary.write_text("whole")
        ...     (Path(folder) / "a.txt").read_text()
        'whole'
    """
    path = Path(path)
    with scratch_folder(path) as folder:
        temporary = folder / path.name
        # Not by tempfile, which makes files private: a result is as readable as the umask says.
        os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
        mode = stat.S_IMODE(temporary.stat().st_mode)
        yield temporary
        temporary.chmod(mode)  # a library may have put a file of its own there
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)


@contextmanager
def scratch_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target`, for what is to take its place; their folder is made if need be.

    At the end it goes, with what it holds then. So do the folders that killed processes left there, if the
    block ends well: the system tells which ones no process has.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     with scratch_folder(Path(place, "net")) as temporary:
        ...         _ = (temporary / "a.txt").write_text("whole")
        ...         replace_folder(temporary, Path(place, "net"))
        ...     [path.name for path in Path(place).iterdir()]
        ['net']
    """
    temporary = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.tmp")
    temporary.mkdir(parents=True)
    try:
        with _alone(temporary):
            yield temporary
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for left in leftovers(target):
        with _alone(left) as alone:
            # A process that has just made its folder may not have locked it yet, and it is empty then.
            if alone and any(left.iterdir()):
                shutil.rmtree(left, ignore_errors=True)


def leftovers(target: Path) -> list[Path]:
    """Temporary folders of `target`: of processes that are writing it, or were killed."""
    name = glob.escape(target.name)
    return [p for ending in ("tmp", "old") for p in target.parent.glob(f".{name}.????????.{ending}")]


@contextmanager
def _alone(folder: Path) -> Iterator[bool]:
    """Lock a folder, if that is possible and no other process has; the lock ends with this process."""
    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY)  # Windows opens no folders
        alone = lock_descriptor(handle, blocking=False)
    except OSError:  # some file systems know no locks
        alone = False
    try:
        yield alone
    finally:
        if handle is not None:
            os.close(handle)


def replace_folder(temporary: Path, target: Path) -> None:
    """Let the folder `temporary` take the place of `target`, if there is one, and wait for the disk.

    Linux exchanges two folders at once. Elsewhere the older one steps aside first; it goes only when the
    new one stands, and comes back when that fails.
    """
    sync(temporary)
    if not target.exists():
        temporary.rename(target)
    elif not _exchanged(temporary, target):
        aside = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
        target.rename(aside)
        try:
            temporary.rename(target)
        except BaseException:
            aside.rename(target)
            raise
        shutil.rmtree(aside, ignore_errors=True)
    sync(target.parent)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names; False where the system, or the file system, cannot."""
    if sys.platform != "linux":
        return False
    rename = getattr(ctypes.CDLL(None), "renameat2", None)  # not in every C library
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return rename is not None and not rename(here, os.fsencode(one), here, os.fsencode(other), exchange)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    if path.is_dir():
        with suppress(OSError):  # Windows opens no folders, some file systems sync none
            _sync(path, os.O_RDONLY)
    else:
        _sync(path, os.O_RDWR)


def _sync(path: Path, flags: int) -> None:
    handle = os.open(path, flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class NotWrittenError(OSError):
    """A file cannot be written; the message names it, and says what to do."""


@contextmanager
def writing(path: str | Path, advice: str) -> Iterator[None]:
    """Turn what the system says of a full disk or a lack of rights into a clear error.

    Raises:
        NotWrittenError: an `OSError` came from the block.

    Example:
        >>> with writing("run/a.txt", "free some space"):
        ...     raise OSError(28, "Disk full")
        Traceback (most recent call last):
            ...
        pliant._files.NotWrittenError: run/a.txt cannot be written (Disk full); free some space
    """
    try:
        yield
    except NotWrittenError:
        raise
    except OSError as error:
        clear = NotWrittenError(f"{path} cannot be written ({error.strerror or error}); {advice}")
        clear.errno = error.errno
        raise clear from error
