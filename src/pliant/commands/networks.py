"""Commands that look at networks: which there are, what a method makes of one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pliant.commands._common import options_of, show


def models(pattern: Annotated[str, typer.Argument(help="part of the name")] = "") -> None:
    """List the networks that pliant registers with timm, with parameters and MACs."""
    import timm
    import torch
    from rich.table import Table

    from pliant.anatomy import input_size
    from pliant.counting import count_macs, count_parameters
    from pliant.models import list_networks

    table = Table("network", "input", "parameters", "MACs")
    for name in list_networks():
        if pattern in name:
            with torch.device("meta"):
                model = timm.create_model(name)
            size = input_size(model)
            assert size is not None
            shape = "x".join(map(str, size))
            macs = f"{count_macs(model, size) / 1e9:.3f} G"
            table.add_row(name, shape, f"{count_parameters(model):,}", macs)
    if not table.row_count:
        raise ValueError(f"no network of pliant has {pattern!r} in its name; pliant models lists all")
    show(table)


def plan(
    model: Annotated[str, typer.Argument(help="any network of timm")],
    options: Annotated[
        list[str] | None, typer.Argument(help="options of the method, such as c=16 order=index")
    ] = None,
    method: Annotated[str, typer.Option(help="name of the method")] = "MixtureOfDepths",
    save_to: Annotated[
        Path | None, typer.Option(help="convert, and save the network (fresh weights) to this folder")
    ] = None,
) -> None:
    """Show what a method would replace in a network, and what that costs."""
    import timm

    from pliant.checkpoint import save
    from pliant.methods import METHODS
    from pliant.surgery import convert
    from pliant.surgery import plan as make_plan

    if not timm.is_model(model):
        raise ValueError(f"timm has no model named {model!r}; timm.list_models() lists those it has")
    if method not in METHODS:
        raise ValueError(f"no method {method!r}; there are {', '.join(METHODS)}")
    chosen = METHODS[method](**options_of(METHODS[method], options or []))
    network = timm.create_model(model)
    typer.echo(str(make_plan(network, chosen)))
    if save_to is not None:
        save(convert(network, chosen, inplace=True), save_to)
        typer.echo(f"saved to {save_to}")
