"""What tests of engines share: a small network, the runtimes that are here, engines that fail."""

from __future__ import annotations

import importlib.util

import pytest
from torch import nn

from pliant.deploy.engines import ENGINES, FileEngine

RUNTIMES = [name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name)]

# Engines for a child process; each does one thing that it must not.
FAKES = '''
import os, time
import torch
from pliant.deploy.engines import FileEngine


class Fake(FileEngine):
    name = "fake"

    def shared(self, precision, optimized=False, native=False):
        return "fake"

    def write(self, model, example, folder, **how):
        path = folder / "network"
        path.write_text(str(sum(p.numel() for p in model.parameters())))
        return path

    def load(self, path, example, **how):
        print("noise on standard output")
        return lambda images: images.sum()


class Fails(Fake):
    """What goes wrong depends on the network, which its number of parameters tells."""

    name = "fails"

    def load(self, path, example, **how):
        kind = path.read_text()
        if kind == "20":
            os._exit(139)
        if kind == "30":
            time.sleep(600)
        if kind == "40":
            raise RuntimeError("no luck in /home/someone/secret/file.py")
        left = 6 if kind == "50" else 10**9

        def run(images):  # of 50 parameters: dies in the first round, after warming up
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), 11)
            return images.sum()

        return run
'''


def conv(width: int = 1) -> nn.Sequential:
    """Of ten parameters a channel."""
    return nn.Sequential(nn.Conv2d(1, width, 3))


def use(engine: FileEngine, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(ENGINES, engine.name, engine)
    return engine.name
