"""One process at a time in a folder: a lock that ends with the process that holds it."""

from __future__ import annotations

import errno
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

fcntl: ModuleType | None
try:
    import fcntl
except ImportError:  # Windows: nothing is locked there
    fcntl = None


class FolderInUseError(ValueError):
    """Another process works in the folder; the message names both."""


_HELD: set[int] = set()


def _let_go() -> None:
    """In a forked child: a worker that outlives its killed parent must not keep the lock."""
    for handle in _HELD:
        os.close(handle)
    _HELD.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextmanager
def held(path: str | Path, *, wait: bool = False) -> Iterator[None]:
    """Hold the lock `path`, a file that says which process has it; it stays there.

    The system lets go of it when the process ends, however that is, so a lock is never stale.
    Where the file system knows no locks, a warning is logged and nothing is locked.

    Args:
        path: the file.
        wait: until another lets go of it, rather than raise.

    Raises:
        FolderInUseError: another process, or another block of this one, holds it.
        OSError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, held(f"{folder}/lock"):
        ...     try:
        ...         with held(f"{folder}/lock"):
        ...             pass
        ...     except FolderInUseError as error:
        ...         f"process {os.getpid()} " in str(error)
        True
    """
    if fcntl is None:
        yield
        return
    path = Path(path)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except OSError as error:
            if error.errno in (errno.EAGAIN, errno.EACCES):
                holder = os.pread(handle, 1000, 0).decode(errors="replace").strip() or "another process"
                raise FolderInUseError(
                    f"{path.parent} is in use by {holder}: wait for it, end it, or choose another folder"
                ) from None
            logging.getLogger(__name__).warning(
                "%s cannot be locked (%s): see to it that no second run uses the folder", path, error
            )
        _HELD.add(handle)
        os.ftruncate(handle, 0)
        os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode(), 0)
        yield
    finally:
        _HELD.discard(handle)
        os.close(handle)


def in_use(path: str | Path) -> bool:
    """Whether a process holds the lock `path`; a process that tries to in the same moment is refused it.

    False where nothing can be locked.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, held(f"{folder}/lock"):
        ...     in_use(f"{folder}/lock"), in_use(f"{folder}/other")
        (True, False)
    """
    if fcntl is None or not Path(path).is_file():
        return False
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        return error.errno in (errno.EAGAIN, errno.EACCES)
    finally:
        os.close(handle)
    return False


def locks_in(folder: str | Path) -> bool:
    """Whether files of a folder can be locked, which is made for it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     fcntl is None or locks_in(folder)
        True
    """
    if fcntl is None:
        return False
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".lock-") as file, held(file.name):
        return in_use(file.name)
