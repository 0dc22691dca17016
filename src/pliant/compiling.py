"""What `torch.compile` has to be told when many networks are compiled in one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def room_to_compile() -> Iterator[None]:
    """Let any number of networks that share a forward be compiled side by side.

    PyTorch's limits are eight for a forward, 256 in all, and what the process compiled before
    counts; past them a network silently runs uncompiled.

    Example:
        >>> import torch._dynamo
        >>> with room_to_compile():
        ...     torch._dynamo.config.recompile_limit > 1000
        True
    """
    import torch._dynamo

    with torch._dynamo.config.patch(recompile_limit=1 << 20, accumulated_recompile_limit=1 << 20):
        yield


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """So many threads in PyTorch's pool (None: as many as there are), then as many as before."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
