"""Commands that prepare data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pliant.commands._common import progress_of


def shards(
    folder: Annotated[
        Path, typer.Argument(help="of images: one folder a class, or train/, val/, test/ that hold such")
    ],
    destination: Annotated[Path, typer.Argument(help="folder that gets the shards")],
    images: Annotated[int, typer.Option(help="of one shard", min=1)] = 1000,
    shuffle: Annotated[bool, typer.Option(help="mix the images, for readers that stream")] = True,
    seed: Annotated[int, typer.Option(help="of the mixing", min=0)] = 0,
) -> None:
    """Pack a folder of images into tar files that webdataset reads too; train with data=shards."""
    from pliant.train.shard_writing import write_shards

    with progress_of("packing") as step:
        found = write_shards(folder, destination, images=images, shuffle=shuffle, seed=seed, progress=step)
    typer.echo(f"{len(found)} shards in {destination}; train with data=shards path={destination}")
