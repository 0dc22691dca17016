"""Commands that look into trained networks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer


def inspect(
    place: Annotated[
        Path, typer.Argument(help="Folder of a run or of a saved network, or a .ckpt file of a run")
    ],
) -> None:
    """Show the recipe, versions and progress of a run.

    Of a saved network: its architecture, methods and versions.
    """
    from pliant.checkpoint import CONFIG, read_config
    from pliant.train import read_state

    if (place / CONFIG).is_file():
        config = read_config(place)
        about = {
            "network": config.network,
            "arguments": json.dumps(dict(config.arguments), default=list),
            "methods": ", ".join(map(str, config.methods)) or "those in its name",
            "classes": config.num_classes,
            "input": config.input_size,
            **config.versions,
        }
    else:
        state = read_state(place)
        typer.echo(f"{state.path}: epoch {state.epoch}, step {state.step}")
        # The date is that of the process's start; `threads` and the rest tell how it computed.
        about = {**state.environment, **state.recipe.as_dict()}
        if state.teacher is not None:
            about["teacher"] = "{network}, weights {sha256}".format(**state.teacher)
    for name, value in about.items():
        typer.echo(f"{name:18} {value}")
