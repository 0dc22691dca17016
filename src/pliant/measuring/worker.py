"""The child of `isolation.Isolated`: writes files, loads them, and times networks when it is asked.

A request is a line of JSON on standard input, its answer one on standard output.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from pliant.measuring.candidates import reason
from pliant.measuring.clock import Clock, clock, warm

LOOK = 5.0  # seconds after which a child that works on notices that its parent is gone


def serve() -> None:
    """Answer requests until there are no more."""
    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    # What an engine prints is no answer.
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    print(json.dumps({}), file=answers, flush=True)
    clocks: dict[int, Clock] = {}
    for line in sys.stdin:
        answer: dict[str, Any] = {}
        try:
            answer = _done(json.loads(line), clocks)
        except Exception as e:  # whatever an engine raises is an answer, too
            answer = {"error": reason(e)}
        print(json.dumps(answer), file=answers, flush=True)


def _end_with(parent: int) -> None:
    """End this process, and the compilers that it started, soon after its parent.

    A signal to the parent's group does not reach it, as it leads a group of its own.
    """
    while os.getppid() == parent:
        time.sleep(LOOK)
    if sys.platform != "win32" and os.getpgrp() == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def _done(request: dict[str, Any], clocks: dict[int, Clock]) -> dict[str, Any]:
    if request["do"] == "write":
        return {"path": _write(request)}
    number = request["number"]
    if request["do"] == "load":
        clocks[number] = _load(request)
        return {"seconds": warm(clocks[number])}
    return {"seconds": clocks[number](request["calls"])}


def _engine(request: dict[str, Any]) -> Any:
    module, _, name = request["engine"].partition(":")
    return getattr(importlib.import_module(module), name)()


def _write(request: dict[str, Any]) -> str | None:
    """The path of the file; None if the network cannot be read here."""
    engine = _engine(request)
    torch.set_num_threads(request["threads"])
    torch.manual_seed(request["seed"])  # the same images, whichever child it is
    try:
        network, images = torch.load(request["given"], weights_only=False)  # our parent's own
    except Exception:  # it is made of what only the parent has
        return None
    return str(engine.write(network, images, Path(request["folder"]), **request["how"]))


def _load(request: dict[str, Any]) -> Clock:
    engine = _engine(request)
    threads, precision = request["threads"], request["precision"]
    torch.set_num_threads(threads)
    like = {"dtype": getattr(torch, request["dtype"]), "device": request["device"]}
    images = torch.empty_strided(request["shape"], request["strides"], **like).normal_()
    run = engine.load(Path(request["path"]), images, precision=precision, threads=threads)
    return clock(partial(run, images), threads)


if __name__ == "__main__":
    serve()
