"""Who started the processes of a run: Lightning itself, torchrun, or SLURM's srun.

Lightning reads rank and number of processes from what the launcher says; here it is held against
the recipe first, because processes that do not agree wait for one another without a word, or each
train the whole.
"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

from pliant.train.recipe import Recipe


class Launch(NamedTuple):
    """Processes that somebody else started.

    Attributes:
        by: who.
        processes: in all.
        nodes: machines.
    """

    by: str
    processes: int
    nodes: int


def launched() -> Launch | None:
    """The processes that this one is of, if torchrun or srun started it.

    Within an allocation of SLURM, torchrun's word counts (``srun torchrun ...``), as it does for
    Lightning.

    Raises:
        ValueError: srun was told ``--ntasks`` and not ``--ntasks-per-node``.
    """
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    said = os.environ
    if TorchElasticEnvironment.detect():
        processes = int(said["WORLD_SIZE"])
        return Launch("torchrun", processes, processes // int(said.get("LOCAL_WORLD_SIZE", processes)))
    if SLURMEnvironment.detect():
        processes = int(said["SLURM_NTASKS"])
        if processes > 1 and "SLURM_NTASKS_PER_NODE" not in said:
            raise ValueError("give srun --ntasks-per-node, the devices of a node, instead of --ntasks")
        return Launch("srun", processes, int(said.get("SLURM_NNODES", 1)))
    return None


def check_launch(recipe: Recipe) -> None:
    """Refuse processes that are not those of the recipe.

    Raises:
        ValueError: their number, or that of machines, is another.
    """
    launch = launched()
    if launch is None:
        if recipe.nodes > 1:
            raise ValueError(
                f"nodes = {recipe.nodes}: start the run on each of them, by torchrun or SLURM's srun"
            )
        return
    by, processes, nodes = launch
    if (processes, nodes) != (recipe.devices * recipe.nodes, recipe.nodes):
        raise ValueError(
            f"{by} started {processes} processes on {nodes} nodes, but the recipe says "
            f"devices={recipe.devices} on each of nodes={recipe.nodes}; set devices={processes // nodes} "
            f"nodes={nodes}{', or unset SLURM_NTASKS if srun did not start it' * (by == 'srun')}"
        )


def environment_plugins() -> list[Any]:
    """What Lightning is to know of the launcher.

    Under SLURM, Lightning's own requeueing is off: on SIGUSR1 it would write a checkpoint of its own
    in the middle of a step, in each process in another one, and go on from that rather than from
    ours. Runs stop after the step at hand instead (`pliant.train.keeping`).
    """
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        return [SLURMEnvironment(auto_requeue=False)]
    return []
