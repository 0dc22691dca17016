"""Commands that look at networks: which there are, what a method makes of one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pliant.commands._common import Network, built, options_of, show


def models(
    pattern: Annotated[str, typer.Argument(help="Part of the names to list; by default all")] = "",
) -> None:
    """List the networks that pliant adds to timm."""
    from pliant import tables
    from pliant.anatomy import input_size
    from pliant.counting import count_macs, count_parameters
    from pliant.models import list_networks

    rows = []
    for name in list_networks():
        if pattern in name:
            model = built(name, "meta")
            size = input_size(model)
            assert size is not None
            shape = "x".join(map(str, size))
            rows.append(
                (name, shape, f"{count_parameters(model):,}", f"{count_macs(model, size) / 1e9:.3f}")
            )
    if not rows:
        raise ValueError(f"no network of pliant has {pattern!r} in its name; `pliant models` lists all")
    show(tables.terminal(("network", "input", "parameters", "MACs, G"), rows, ("network", "input")))


def plan(
    model: Network,
    options: Annotated[
        list[str] | None, typer.Argument(help="Options of the method: key=value, such as c=16 order=index")
    ] = None,
    method: Annotated[str, typer.Option(help="Name of the method")] = "MixtureOfDepths",
    num_classes: Annotated[
        int | None,
        typer.Option(help="Classes of the network, by a fresh classifier; by default its own", min=1),
    ] = None,
    save_to: Annotated[
        Path | None,
        typer.Option(help="Folder to save the converted network to; without it nothing is kept"),
    ] = None,
) -> None:
    """Show what a method would replace in a network.

    Prints each replaced block, and the parameters and MACs before and after.
    """
    from pliant.checkpoint import save
    from pliant.methods import METHODS
    from pliant.surgery import convert
    from pliant.surgery import plan as make_plan

    if method not in METHODS:
        raise ValueError(f"there is no method {method!r}; the methods are {', '.join(METHODS)}")
    chosen = METHODS[method](**options_of(METHODS[method], options or []))
    network = built(model, num_classes=num_classes)
    typer.echo(str(make_plan(network, chosen)))
    if save_to is not None:
        save(convert(network, chosen, inplace=True), save_to)
        typer.echo(f"saved to {save_to}")
