"""The device of a run, and its processes. A run that is not distributed has one process."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import nn

from pliant.train.recipe import Recipe

T = TypeVar("T")


def device_of(recipe: Recipe) -> torch.device:
    """Device of a recipe's run on this machine: a CUDA GPU, or else the CPU.

    Example:
        >>> device_of(Recipe(name="example", model="resnet20_cifar", accelerator="cpu"))
        device(type='cpu')
    """
    gpu = recipe.accelerator != "cpu" and torch.cuda.is_available()
    return torch.device("cuda" if gpu else "cpu")


def check_devices(recipe: Recipe) -> None:
    """Refuse a recipe whose devices this machine does not have.

    Raises:
        ValueError: there is no GPU, or there are fewer than the recipe wants.
    """
    gpus = torch.cuda.device_count() or int(torch.backends.mps.is_available())
    if recipe.accelerator == "gpu" and not gpus:
        raise ValueError(
            "accelerator=gpu needs a GPU, and PyTorch sees none; set accelerator=cpu, or install a build "
            "of PyTorch for the GPU"
        )
    if recipe.accelerator != "cpu" and 0 < gpus < recipe.devices:
        raise ValueError(
            f"devices={recipe.devices} is more than the {gpus} GPUs that PyTorch sees; set devices={gpus}, "
            f"or accelerator=cpu"
        )


def place() -> tuple[int, int]:
    """Number of this process, and number of processes.

    Example:
        >>> place()
        (0, 1)
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return 0, 1


def gathered(value: T) -> list[T]:
    """The values of all processes, in order. Every process has to call this.

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
    """Whether any process wants each of some things. Every process has to call this.

    Lightning's `reduce_boolean_decision` takes one thing at a time and waits at a barrier first (2.6),
    which a step of a small network would feel.

    Args:
        wanted: what this process wants.
        device: device that the processes communicate on.

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
    """Give every process the buffers of the first. Every process has to call this.

    Without it, each process would validate with the batch-norm statistics of its own images.
    """
    if place()[1] > 1:
        for buffer in module.buffers():
            torch.distributed.broadcast(buffer, src=0)
