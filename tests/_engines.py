"""What tests of engines share: a small network, the runtimes that are here, an engine put in place."""

from __future__ import annotations

import importlib.util

import pytest
from torch import nn

from pliant.deploy.engines import ENGINES, FileEngine

RUNTIMES = [name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name)]


def conv(width: int = 1) -> nn.Sequential:
    """Of ten parameters a channel."""
    return nn.Sequential(nn.Conv2d(1, width, 3))


def use(engine: FileEngine, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(ENGINES, engine.name, engine)
    return engine.name
