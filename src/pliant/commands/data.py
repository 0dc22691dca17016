"""Commands that prepare data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pliant.commands._common import progress_of


def shards(
    folder: Annotated[
        Path,
        typer.Argument(
            help="Folder of images: one folder a class, or train/, val/ and test/ that hold such"
        ),
    ],
    destination: Annotated[Path, typer.Argument(help="Folder to write the shards to")],
    images: Annotated[int, typer.Option(help="Images in one shard", min=1)] = 1000,
    shuffle: Annotated[bool, typer.Option(help="Mix the images, for readers that stream")] = True,
    seed: Annotated[int, typer.Option(help="Seed of the mixing", min=0)] = 0,
) -> None:
    """Pack a folder of images into tar files (shards).

    Train on them with data=shards; webdataset reads them too.
    """
    from pliant.train.shard_writing import write_shards

    with progress_of("packing") as step:
        found = write_shards(folder, destination, images=images, shuffle=shuffle, seed=seed, progress=step)
    typer.echo(f"{len(found)} shards in {destination}; train with data=shards path={destination}")
