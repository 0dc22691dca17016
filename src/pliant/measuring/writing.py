"""The files that engines run: each written once, in a child process, ahead of being loaded.

An exporter or a compiler may crash or hang, and costs a row then. It also takes most of the time
of a run, mainly on one core: so two files are written at once, while those before them are loaded
and warmed up, and none once networks are timed.

Shapes: images [B, C, H, W].
"""

from __future__ import annotations

import os
import queue
import shutil
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pliant.deploy.engines import FileEngine
from pliant.measuring.candidates import Candidate, EngineError, reason
from pliant.measuring.isolation import Isolated
from pliant.measuring.rows import NATIVE, OPTIMIZED

WRITERS = 2  # children that write at once, and networks that are begun ahead; at most one a core
FEW = 4  # files that are not worth more children: each takes seconds to import PyTorch and exporter

Key = tuple[str, ...]


@dataclass(frozen=True)
class Files:
    """The files that engines run, by network and by what they are known by.

    Attributes:
        folder: that holds them.
        written: those that are there.
        failed: why those that would serve other runs as well could not be written.
    """

    folder: Path
    written: dict[Key, Path] = field(default_factory=dict)
    failed: dict[Key, str] = field(default_factory=dict)


class Writing(AbstractContextManager["Writing"]):
    """Writes the files of one run, in child processes.

    More than `FEW` are written by `WRITERS` children of their own, ahead of being loaded. So few are
    written by the child that runs them, each before it is loaded; so are those for a GPU, where
    Triton times its kernels as it compiles.

    A network reaches a child by a file, of which there are never more than one and `WRITERS`. One
    that cannot be pickled (of a local class, or with a lambda), or that a child cannot read (of a
    class in ``__main__``), is written by this process when its turn comes: it is timed like the
    others, but what takes its exporter down takes all.

    Args:
        files: files of all runs; those that serve this one are not written again.
        engine: that writes.
        child: in which it runs networks.
        candidates: candidates of the run, to know how many files it needs.
        how: ``precision`` and ``threads``, as the engine's ``write`` takes them.
        device: kind of device.
        limit: seconds that a child may take for one file.

    Attributes:
        ahead: how many networks to begin before it is the turn of the first of them.
    """

    def __init__(
        self,
        files: Files,
        engine: FileEngine,
        child: Isolated,
        candidates: Sequence[Candidate],
        how: dict[str, Any],
        device: str,
        limit: float,
    ) -> None:
        self._files, self._engine, self._child = files, engine, child
        self._how, self._limit = how, limit
        new = sum(not (e.error or self._known(e)) for e in candidates)
        self.ahead = min(WRITERS, os.cpu_count() or 1) if new > FEW and device == "cpu" else 0
        self._writers = [Isolated(engine, limit) for _ in range(self.ahead)]
        self._idle = queue.SimpleQueue[Isolated]()
        for writer in self._writers:
            self._idle.put(writer)
        self._pool = ThreadPoolExecutor(max(1, self.ahead))

    def begin(
        self, candidate: Candidate, formed: Callable[[], nn.Module], images: Tensor
    ) -> Callable[[], Path]:
        """Begin to write the file of a network, unless one is there that serves.

        Args:
            candidate: whose file it is.
            formed: makes the network as the engine gets it; called where a file is to be written.
            images: as the engine gets them, [B, C, H, W].

        Returns:
            What waits for the file, or writes it now, and gives its path; to be called once. It raises
            what the engine does, or `EngineError` where a child crashed, hung or told what went wrong.

        Raises:
            EngineError: the file would serve other runs too, and could not be written in one of them.
        """
        key = self._key(candidate)
        if why := self._files.failed.get(key):
            raise EngineError(why)
        old = self._files.written.get(key)
        if old is not None and self._shared(candidate):
            return partial(Path, old)
        if old is not None:  # of another batch
            shutil.rmtree(self._files.written.pop(key).parent, ignore_errors=True)
        network = formed()
        folder = Path(tempfile.mkdtemp(dir=self._files.folder))
        how = self._how | {name: True for name, wanted in _forms(candidate).items() if wanted}
        given = folder.with_suffix(".network")
        write: Callable[[], Path | None]
        if not _saved(network, images, given):
            write = partial(self._engine.write, network, images, folder, **how)
        elif self._writers:
            write = self._pool.submit(self._by_a_writer, given, folder, how).result
        else:
            write = partial(self._child.write, given, folder, how, self._limit)

        def written() -> Path:
            try:
                path = write()
                if path is None:  # no child can read it
                    network, images = torch.load(given, weights_only=False)
                    path = self._engine.write(network, images, folder, **how)
            except Exception as e:
                if self._shared(candidate):
                    self._files.failed[key] = reason(e)
                raise
            finally:
                given.unlink(missing_ok=True)
            self._files.written[key] = path
            return path

        return written

    def _by_a_writer(self, given: Path, folder: Path, how: dict[str, Any]) -> Path | None:
        writer = self._idle.get()
        try:
            return writer.write(given, folder, how, self._limit)
        finally:
            self._idle.put(writer)

    def _known(self, candidate: Candidate) -> bool:
        """Whether its file is there, or cannot be written."""
        key = self._key(candidate)
        return key in self._files.failed or (key in self._files.written and bool(self._shared(candidate)))

    def _shared(self, candidate: Candidate) -> str:
        return self._engine.shared(self._how["precision"], **_forms(candidate))

    def _key(self, candidate: Candidate) -> Key:
        known_by = self._shared(candidate) or self._engine.name
        return candidate.model, candidate.variant, candidate.form, known_by

    def __exit__(self, *_: object) -> None:
        """End the children that write; what they were writing is not there then."""
        self._pool.shutdown(wait=False, cancel_futures=True)
        for writer in self._writers:
            writer.stop()
        self._pool.shutdown()
        for writer in self._writers:
            writer.close()


def _forms(candidate: Candidate) -> dict[str, bool]:
    return {"optimized": candidate.form == OPTIMIZED, "native": candidate.form == NATIVE}


def _saved(network: nn.Module, images: Tensor, path: Path) -> bool:
    """Write both to a file for a child; whether that can be done."""
    try:
        torch.save((network, images), path)
    except Exception:  # it cannot be pickled, and why does not matter
        path.unlink(missing_ok=True)
        return False
    return True
