"""The launcher of a run's processes: Lightning itself, torchrun, or SLURM's srun.

Lightning reads rank and number of processes from the launcher. They are compared with the recipe first:
processes that do not agree wait for one another without a word, or each train the whole.
"""

from __future__ import annotations

import os
from typing import Any

from pliant.train.recipe import Recipe


def launched() -> tuple[str, int, int] | None:
    """Name of the launcher that started this process, and its numbers of processes and machines.

    None if neither torchrun nor srun did. In ``srun torchrun ...`` torchrun counts, as for Lightning.

    Raises:
        ValueError: srun got ``--ntasks`` without ``--ntasks-per-node``.
    """
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    said = os.environ
    if TorchElasticEnvironment.detect():
        processes = int(said["WORLD_SIZE"])
        return "torchrun", processes, processes // int(said.get("LOCAL_WORLD_SIZE", processes))
    if SLURMEnvironment.detect():
        processes = int(said["SLURM_NTASKS"])
        if processes > 1 and "SLURM_NTASKS_PER_NODE" not in said:
            raise ValueError(
                f"srun was given --ntasks={processes}; give --ntasks-per-node, the devices of a node"
            )
        return "srun", processes, int(said.get("SLURM_NNODES", 1))
    return None


def check_launch(recipe: Recipe) -> None:
    """Refuse a launch that is not what the recipe says.

    Raises:
        ValueError: the number of processes or of machines differs.
    """
    launch = launched()
    if launch is None:
        if recipe.nodes > 1:
            raise ValueError(
                f"nodes={recipe.nodes} needs a launcher; start the run on each machine by torchrun or srun"
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
    """Plugins that tell Lightning about the launcher.

    Under SLURM they turn Lightning's own requeueing off. On SIGUSR1 it would write its own checkpoint in
    the middle of a step, a different one in each process, and continue from that. Runs stop after the
    current step instead (`pliant.train.keeping`).
    """
    from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
    from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

    if SLURMEnvironment.detect() and not TorchElasticEnvironment.detect():
        return [SLURMEnvironment(auto_requeue=False)]
    return []
