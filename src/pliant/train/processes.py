"""The processes of one distributed run; a run in one process is one of one."""

from __future__ import annotations

from typing import TypeVar

import torch

T = TypeVar("T")


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
