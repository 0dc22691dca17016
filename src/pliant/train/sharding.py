"""Training with gradients and optimiser shared out over the processes: FSDP2, by Lightning.

A network is one unit: its weights lie in shares and are gathered whole for a step, gradients are
reduced to shares, and each process updates its own (stage 2 of ZeRO). Blocks could be units of
their own, so that weights too are gathered a few at a time; the largest network here has 0.7 GB of
them, and that would only add messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pliant.train.processes import place
from pliant.train.recipe import Recipe


def strategy_of(recipe: Recipe) -> Any:
    """What Lightning's Trainer takes for the recipe's `strategy`."""
    if recipe.strategy != "fsdp":
        return recipe.strategy
    from lightning.pytorch.strategies import ModelParallelStrategy

    # One file, as every checkpoint of ours: whole weights, gathered by the first process.
    return ModelParallelStrategy(
        data_parallel_size=recipe.devices * recipe.nodes,
        tensor_parallel_size=1,
        save_distributed_checkpoint=False,
    )


def share_out(network: nn.Module, mesh: Any) -> None:
    """Turn a network's parameters into this process's shares, in place, once.

    Args:
        network: of which every process has a whole copy with the same weights.
        mesh: Lightning's device mesh.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not isinstance(network, FSDPModule):
        fully_shard(network, mesh=mesh["data_parallel"])


def of_the_first(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The weights that the first process holds; every one of them has to call this.

    Of a sharded network the first process alone has gathered them.
    """
    found = [dict(weights) if place()[0] == 0 else None]
    if place()[1] > 1:
        torch.distributed.broadcast_object_list(found, src=0)
    (held,) = found
    assert held is not None
    return held
