"""Where a run takes place: its device, and the processes of a distributed one.

A run in one process is one of one.
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from pliant.train.recipe import Recipe

T = TypeVar("T")


def device_of(recipe: Recipe) -> torch.device:
    """Where a run of a recipe takes place on this machine: a CUDA GPU, or else the CPU.

    Example:
        >>> device_of(Recipe(name="example", model="resnet20_cifar", accelerator="cpu"))
        device(type='cpu')
    """
    gpu = recipe.accelerator != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu")


def place() -> tuple[int, int]:
    """This process's number, and how many there are.

    Example:
        >>> place()
        (0, 1)
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def gathered(value: T) -> list[T]:
    """What each process holds, in order; every one of them has to call this.

    Example:
        >>> gathered({"a.png"})
        [{'a.png'}]
    """
    _, world = place()
    if world == 1:
        return [value]
    found: list[T] = [value] * world
    torch.distributed.all_gather_object(found, value)
    return found


def agreed(*wanted: bool, device: torch.device | str = "cpu") -> tuple[bool, ...]:
    """For each of some wishes, whether any process has it; every one of them has to call this.

    Args:
        wanted: this process's.
        device: that its group communicates on.

    Example:
        >>> agreed(True, False)
        (True, False)
    """
    if place()[1] == 1:
        return wanted
    votes = torch.tensor(wanted, dtype=torch.int32, device=device)
    torch.distributed.all_reduce(votes, torch.distributed.ReduceOp.MAX)
    return tuple(map(bool, votes.tolist()))


def share_buffers(module: nn.Module) -> None:
    """Give every process the first one's buffers; every one of them has to call this.

    Batch norms keep the statistics of their own process's images.
    """
    if place()[1] > 1:
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)
