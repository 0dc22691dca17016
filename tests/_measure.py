"""A small network to measure, its image's size, and children that stand in for the worker."""

from __future__ import annotations

import sys

from torch import nn

SMALL = (1, 8, 8)


def conv(width: int = 4) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(1, width, 3), nn.BatchNorm2d(width))


# What goes wrong with a network is its `kind`, which stands in the pickle.
_HEAD = """
import json, os, re, signal, subprocess, sys, time
from pathlib import Path

def kind_of(given):
    return re.search(rb"kind=([a-z ]+);", Path(given).read_bytes())[1].decode()
"""
_LOOP = """
print("{}", flush=True)
for line in sys.stdin:
    try:
        said = answer(json.loads(line))
    except Exception as e:
        said = {"error": f"{type(e).__name__}: {e}"}
    print(json.dumps(said), flush=True)
"""


def stand_in(answer: str) -> tuple[str, ...]:
    """The command of a child that speaks as the worker does, and starts in no time: without PyTorch.

    Args:
        answer: Python that defines ``answer(request)``; ``kind_of(file)`` reads a network's `kind`.
    """
    return sys.executable, "-c", f"{_HEAD}{answer}{_LOOP}"


def kind(name: str, width: int = 4) -> nn.Sequential:
    """A network of which `stand_in` finds the name."""
    network = conv(width)
    network.kind = f"kind={name};"  # type: ignore[assignment]
    return network
