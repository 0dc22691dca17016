"""What `torch.compile` has to be told when many networks are compiled in one process."""

from __future__ import annotations

import threading
from collections import Counter
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
    """So many threads in PyTorch's pool (None: as many as there are), then as many as before.

    The number is this Python thread's, and that with which others begin. So blocks may be open in several
    threads at once: each leaves with the number that held before the first of them.
    """
    global _outside
    if threads is None:
        yield
        return
    me = threading.get_ident()
    here = torch.get_num_threads()  # a thread's first call takes over what others have set
    with _changing:
        if not _open:
            _outside = here
        before = here if me in _open else _outside
        _open[me] += 1
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
        with _changing:
            _open[me] -= 1
            if not _open[me]:
                del _open[me]


_changing = threading.Lock()
_open: Counter[int] = Counter()  # blocks of `torch_threads`, by Python thread
_outside = 1  # threads of the pool before the first of them
