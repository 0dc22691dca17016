"""How much memory a step takes: bytes of tensors, not those of the process.

A process keeps what it has freed, and what libraries take besides changes from run to run. Bytes
of tensors do not: the same step gives the same figure.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def peak_memory(step: Callable[[], Any], device: torch.device | str = "cpu") -> int:
    """Most bytes of tensors alive at once while `step` runs, beyond those alive before it.

    On a GPU what the allocator counts (`torch.cuda.max_memory_allocated`), on a CPU what
    PyTorch's profiler sees of the allocator: both know PyTorch's tensors, and not the buffers that
    a library such as oneDNN takes for itself.

    Args:
        step: run once. Run it before, so that what it keeps for good (momentum) is there, and drop
            what it will make anew (gradients): what is freed was there before, and is not counted off.
        device: where it runs.

    Example:
        >>> peak_memory(lambda: torch.ones(1000).exp())
        8000
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        step()
    inner: Any = seen.profiler
    events = [e for e in inner.kineto_results.events() if e.name() == "[memory]"]
    alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        alive += event.nbytes()  # negative where memory is freed
        peak = max(peak, alive)
    return peak
