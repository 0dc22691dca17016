"""Writing files so that nothing partial ever stands under a final name."""

from __future__ import annotations

import os
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path`, which becomes `path` if the block ends well.

    The folder is made if it is missing. If the block raises, the temporary file goes
    and whatever `path` held before stays. The temporary name ends as `path` does, so
    that libraries that look at the suffix see the right one. The content is on the disk
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
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}-{uuid.uuid4().hex[:8]}{path.suffix}")
    # Not by tempfile, which makes files private: a result is as readable as the umask says.
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666))
    mode = stat.S_IMODE(temporary.stat().st_mode)
    try:
        yield temporary
        temporary.chmod(mode)  # a library may have put a file of its own there
        sync(temporary)
        temporary.replace(path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


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
