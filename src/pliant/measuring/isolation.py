"""A process of its own for an engine that may crash or hang, which then costs a row only.

A child is asked for each step by a line of JSON, and answers by another. One runs all networks
of one engine, in turn: it is asked for each load and each round. Others write files (`writing`).
When a child dies, or does not answer in time, the network that was its turn is out, and the
others go on in a new child: those that were loaded are loaded again when their next turns come.
"""

from __future__ import annotations

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from contextlib import AbstractContextManager, ExitStack, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pliant.deploy.engines import FileEngine
from pliant.measuring.candidates import EngineError

STARTING = 120.0  # seconds that a child may take to begin: it imports PyTorch
COMMAND = (sys.executable, "-m", "pliant.measuring.worker")


class Isolated(AbstractContextManager["Isolated"]):
    """A child process in which an engine writes files, and runs networks from them.

    Args:
        engine: whose class can be imported, and made without arguments.
        timeout: seconds that loading a network, or one round, may take.
    """

    def __init__(self, engine: FileEngine, timeout: float) -> None:
        self.engine, self.timeout = engine, timeout
        self._requests: list[dict[str, Any]] = []
        self._loaded: set[int] = set()
        self._child: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()
        self._said = Path()
        self._open = ExitStack()
        self._stopped = False

    def write(self, given: Path, folder: Path, how: dict[str, Any], limit: float) -> Path | None:
        """Let the engine write a file into `folder`, within so many seconds; its path.

        `given` is a file with the pair of network and images, by `torch.save`; `how` are keywords
        of the engine's `write`, ``threads`` among them. None if the child could not read the
        network: its class is, for example, in the caller's ``__main__``.

        Raises:
            EngineError: as `load`.
        """
        request = {
            "do": "write",
            "given": str(given),
            "folder": str(folder),
            "how": how,
            "threads": how["threads"],
            "seed": torch.initial_seed(),
        }
        path = self._ask(request, limit, " (writing a file)")["path"]
        return None if path is None else Path(path)

    def load(self, path: Path, example: Tensor, precision: str, threads: int) -> tuple[int, float]:
        """Let the engine load a file and run it; a number for `time`, and the seconds of one call.

        Arguments as of the engine's `load`. The child draws images of its own, like `example`.

        Raises:
            EngineError: the child crashed or hung, or something went wrong in it.
        """
        self._requests.append(
            {
                "path": str(path),
                "shape": list(example.shape),
                "strides": list(example.stride()),
                "dtype": str(example.dtype).removeprefix("torch."),
                "device": str(example.device),
                "precision": precision,
                "threads": threads,
            }
        )
        number = len(self._requests) - 1
        return number, self._load(number)

    def time(self, number: int, calls: int) -> float:
        """Mean seconds of so many calls of a network that was loaded; raises as `load`."""
        if number not in self._loaded:  # the child that had it is gone
            self._load(number)
        answer = self._ask({"do": "time", "number": number, "calls": calls}, self.timeout)
        return float(answer["seconds"])

    def _load(self, number: int) -> float:
        answer = self._ask({"do": "load", "number": number, **self._requests[number]}, self.timeout)
        self._loaded.add(number)
        return float(answer["seconds"])

    def _ask(self, request: dict[str, Any], limit: float, doing: str = "") -> dict[str, Any]:
        if self._child is None:
            self._start(request.get("threads", 1))
            self._answer(STARTING, doing)
        assert self._child is not None
        assert self._child.stdin is not None
        engine = type(self.engine)
        request = {"engine": f"{engine.__module__}:{engine.__qualname__}", **request}
        with suppress(OSError):  # it died: the answer will be that
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
        return self._answer(limit, doing)

    def _start(self, threads: int) -> None:
        # The child finds what this process finds, and starts no more threads than it is told.
        path = os.pathsep.join(p or str(Path.cwd()) for p in sys.path)
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
        folder = self._open.enter_context(tempfile.TemporaryDirectory(prefix="pliant-"))
        self._said = Path(folder) / "stderr"
        self._answers = queue.Queue()
        with self._said.open("wb") as said:
            self._child = subprocess.Popen(
                COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                env=environment,
                text=True,
                start_new_session=True,  # a group of its own, with the compilers that it starts
            )
        if self._stopped:  # meanwhile
            _kill(self._child)
        threading.Thread(target=_listen, args=(self._child, self._answers), daemon=True).start()

    def _answer(self, limit: float, doing: str) -> dict[str, Any]:
        """The child's next line; the child is gone if there is none. `doing` is for the error."""
        assert self._child is not None
        try:
            line = self._answers.get(timeout=limit)
        except queue.Empty:
            self.close()
            raise EngineError(f"{self.engine.name}{doing} did not answer within {limit:g} s") from None
        if not line:
            status, last = self._child.wait(), self._last_words()
            self.close()
            raise EngineError(f"{self.engine.name}{doing} died: {_ending(status)}{last}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer

    def _last_words(self) -> str:
        """The last line that the child wrote to its standard error."""
        lines = self._said.read_text(errors="replace").strip().splitlines()
        return f" ({lines[-1].strip()[:120]})" if lines else ""

    def stop(self) -> None:
        """End the child and let no other start: what another thread waits for fails at once.

        `close` is still that thread's, or is called after it.
        """
        self._stopped = True
        if (child := self._child) is not None:
            _kill(child)

    def close(self) -> None:
        """End the child, and all that it has loaded."""
        self._loaded.clear()
        if self._child is not None:
            _kill(self._child)
            with suppress(OSError):  # a request that was never read
                self._child.__exit__(None, None, None)
        self._open.close()
        self._child = None

    def __exit__(self, *_: object) -> None:
        self.close()


def _kill(child: subprocess.Popen[str]) -> None:
    """End a child and what it started: a compiler that goes on would be in the times of others."""
    if sys.platform != "win32":
        with suppress(OSError):  # all of them have ended
            os.killpg(child.pid, signal.SIGKILL)
    child.kill()


def _listen(child: subprocess.Popen[str], answers: queue.Queue[str]) -> None:
    """Pass the child's lines on; an empty one when there are no more."""
    assert child.stdout is not None
    try:
        for line in child.stdout:
            answers.put(line)
    except ValueError:  # closed meanwhile
        pass
    answers.put("")


def _ending(status: int) -> str:
    """How a process ended, for example ``SIGSEGV`` or ``exit status 3``."""
    number = -status if status < 0 else status - 128  # as a shell reports it
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"exit status {status}"
