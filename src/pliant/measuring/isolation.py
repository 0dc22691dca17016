"""A process of its own for an engine that may crash or hang, which then costs a row only.

One child runs all networks of one engine, in turn, and is asked for each load and each round
by a line of JSON; it answers by another. When it dies, or does not answer in time, the
network that was its turn is out, and the others are loaded again in a new child when their
next turns come.
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

from torch import Tensor

from pliant.deploy.engines import FileEngine
from pliant.measuring.entrants import EngineError

STARTING = 120.0  # seconds that a child may take to begin: it imports PyTorch


class Isolated(AbstractContextManager["Isolated"]):
    """A child process in which an engine runs networks from files.

    Args:
        engine: whose class can be imported, and made without arguments.
        timeout: seconds that loading a network, or one round, may take.
        command: that starts a child, for a test; by default this Python.
    """

    def __init__(self, engine: FileEngine, timeout: float, command: list[str] | None = None) -> None:
        self.engine, self.timeout = engine, timeout
        self._command = command or [sys.executable, "-m", "pliant.measuring.worker"]
        self._requests: list[dict[str, Any]] = []
        self._loaded: set[int] = set()
        self._child: subprocess.Popen[str] | None = None
        self._answers: queue.Queue[str] = queue.Queue()
        self._said = Path()
        self._open = ExitStack()

    def load(self, path: Path, example: Tensor, precision: str, threads: int) -> tuple[int, float]:
        """Load a file and run it; a number for `time`, and the seconds of one call.

        Args:
            path: that the engine's `write` made.
            example: images of the shape, dtype and memory format that are run; the child
                draws its own.
            precision: of the engine.
            threads: likewise.

        Raises:
            EngineError: the child crashed or hung, or something went wrong in it.
        """
        engine = type(self.engine)
        self._requests.append(
            {
                "engine": f"{engine.__module__}:{engine.__qualname__}",
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
        return float(self._ask({"do": "time", "number": number, "calls": calls})["seconds"])

    def _load(self, number: int) -> float:
        answer = self._ask({"do": "load", "number": number, **self._requests[number]})
        self._loaded.add(number)
        return float(answer["seconds"])

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        if self._child is None:
            self._start(request.get("threads", 1))
            self._answer(STARTING)
        assert self._child is not None
        assert self._child.stdin is not None
        with suppress(OSError):  # it died: the answer will be that
            self._child.stdin.write(json.dumps(request) + "\n")
            self._child.stdin.flush()
        return self._answer(self.timeout)

    def _start(self, threads: int) -> None:
        # The child finds what this process finds, and starts no more threads than it is told.
        path = os.pathsep.join(p or str(Path.cwd()) for p in sys.path)
        environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": str(threads)}
        folder = self._open.enter_context(tempfile.TemporaryDirectory(prefix="pliant-"))
        self._said = Path(folder) / "stderr"
        self._answers = queue.Queue()
        with self._said.open("wb") as said:
            self._child = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=said,
                env=environment,
                text=True,
            )
        threading.Thread(target=_listen, args=(self._child, self._answers), daemon=True).start()

    def _answer(self, limit: float) -> dict[str, Any]:
        """The child's next line; the child is gone if there is none."""
        assert self._child is not None
        try:
            line = self._answers.get(timeout=limit)
        except queue.Empty:
            self.close()
            raise EngineError(f"{self.engine.name} did not answer within {limit:g} s") from None
        if not line:
            status, last = self._child.wait(), self._last_words()
            self.close()
            raise EngineError(f"{self.engine.name} died: {_ending(status)}{last}")
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise EngineError(answer["error"])
        return answer

    def _last_words(self) -> str:
        """The last line that the child wrote to its standard error."""
        lines = self._said.read_text(errors="replace").strip().splitlines()
        return f" ({lines[-1].strip()[:120]})" if lines else ""

    def close(self) -> None:
        """End the child, and all that it has loaded."""
        self._loaded.clear()
        if self._child is not None:
            self._child.kill()
            with suppress(OSError):  # a request that was never read
                self._child.__exit__(None, None, None)
        self._open.close()
        self._child = None

    def __exit__(self, *_: object) -> None:
        self.close()


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
