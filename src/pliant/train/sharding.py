"""Training with gradients and optimiser state shared out over the processes: FSDP2, by Lightning.

The network is one unit: weights lie in shares and are gathered for a step, gradients are reduced to
shares, and each process updates its own share (stage 2 of ZeRO). Blocks as units would gather a few
weights at a time, but the largest network here has 0.7 GB of weights, and that only adds messages.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from pliant.train.processes import place
from pliant.train.recipe import Recipe


def strategy_of(recipe: Recipe) -> Any:
    """The Trainer's strategy for the recipe's `strategy`."""
    if recipe.strategy != "fsdp":
        return recipe.strategy
    from lightning.pytorch.strategies import ModelParallelStrategy

    # One file with whole weights, gathered by the first process, as in every checkpoint of pliant.
    return ModelParallelStrategy(
        data_parallel_size=recipe.devices * recipe.nodes,
        tensor_parallel_size=1,
        save_distributed_checkpoint=False,
    )


def share_out(network: nn.Module, mesh: Any) -> None:
    """Turn a network's parameters into this process's shares, in place; a second call does nothing.

    Args:
        network: a whole copy, with the same weights in every process.
        mesh: Lightning's device mesh.
    """
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if not isinstance(network, FSDPModule):
        fully_shard(network, mesh=mesh["data_parallel"])


def of_the_first(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The weights that the first process has. Every process has to call this.

    The first process alone gathers the weights of a sharded network.
    """
    found = [dict(weights) if place()[0] == 0 else None]
    if place()[1] > 1:
        torch.distributed.broadcast_object_list(found, src=0)
    (held,) = found
    assert held is not None
    return held
