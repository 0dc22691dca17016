"""What runs a network that is timed: PyTorch as it is, or compiled."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

Runner = Callable[[Tensor], Any]


def _eager(model: nn.Module, _device: torch.device) -> Runner:
    return model


def _compiled(model: nn.Module, device: torch.device) -> Runner:
    """`torch.compile` for one size of input; on a GPU with CUDA graphs."""
    options: dict[str, Any] = {"mode": "reduce-overhead"} if device.type == "cuda" else {}
    # Networks that share a forward (all ResNets) share its cache of compiled code as well,
    # which is searched at each call. Newer versions of PyTorch can part them.
    if "isolate_recompiles" in inspect.signature(torch.compile).parameters:
        options["isolate_recompiles"] = True
    runner: Runner = torch.compile(model, dynamic=False, **options)
    return runner


ENGINES: dict[str, Callable[[nn.Module, torch.device], Runner]] = {"eager": _eager, "compiled": _compiled}


@contextmanager
def room_to_compile() -> Iterator[None]:
    """Let any number of networks that share a forward be compiled side by side.

    PyTorch's limits are eight for a forward, 256 in all, and what the process compiled before
    counts; past them a network silently runs uncompiled.
    """
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=1 << 20, accumulated_recompile_limit=1 << 20):
        yield
