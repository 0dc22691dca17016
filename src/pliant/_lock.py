"""One process at a time in a folder: a lock that ends with the process that holds it.

The lock is filelock's native one. It is never filelock's soft lock, which a killed process leaves behind.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout, lock_descriptor

# What the system answers on a file system without locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP)


class FolderInUseError(ValueError):
    """Another process works in the folder; the message names both."""


@contextmanager
def held(path: str | Path, *, wait: bool = False, keep: bool = True) -> Iterator[None]:
    """Hold the lock `path`, a file that names the process that has it.

    The system releases the lock when the process ends, however that is, so a lock is never stale.
    Where the file system knows no locks, a warning is logged and nothing is locked.

    Args:
        path: the file.
        wait: wait until another process releases the lock, rather than raise.
        keep: leave the file there; False removes it (but on Windows).

    Raises:
        FolderInUseError: another process, or another block of this one, holds the lock.
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
    path = Path(path)
    lock = FileLock(path, blocking=wait, fallback_to_soft=False, preserve_lock_file=True, on_acquired=_sign)
    try:
        lock.acquire()
    except Timeout:
        holder = ""
        with suppress(OSError):  # Windows lets nobody else read what is locked
            holder = path.read_text(encoding="utf-8", errors="replace").strip()
        raise FolderInUseError(
            f"{path.parent} is in use by {holder or 'another process'}: wait for it, end it, or choose "
            f"another folder"
        ) from None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        logging.getLogger(__name__).warning(
            "%s cannot be locked (%s): see to it that no second run uses the folder", path, error
        )
    try:
        yield
    finally:
        if not keep:
            # While it is held: filelock sees that a file which it waited for is gone, and begins anew.
            with suppress(OSError):
                path.unlink()
        lock.release()


def _sign(handle: int) -> None:
    """Write into the lock's file which process has it."""
    os.ftruncate(handle, 0)
    os.write(handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())


def in_use(path: str | Path) -> bool:
    """Whether a process holds the lock `path`. A process that asks for it in the same moment is refused.

    False where nothing can be locked.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, held(f"{folder}/lock"):
        ...     in_use(f"{folder}/lock"), in_use(f"{folder}/other")
        (True, False)
    """
    if not Path(path).is_file():
        return False
    handle = os.open(path, os.O_RDONLY)
    try:
        return not lock_descriptor(handle, blocking=False)
    except OSError:
        return False
    finally:
        os.close(handle)


def locks_in(folder: str | Path) -> bool:
    """Whether files in a folder can be locked. The folder is made if it is missing.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     locks_in(folder)
        True
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, prefix=".lock-") as file, held(file.name):
        return in_use(file.name)
