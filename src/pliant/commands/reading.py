"""Commands that look into trained networks, and at published figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, cast

import typer

from pliant.commands._common import show


def inspect(
    place: Annotated[Path, typer.Argument(help="a run's folder, its .ckpt file, or a saved network")],
) -> None:
    """Tell what a run or a saved network is: recipe, versions, commit, how far it is."""
    from pliant.checkpoint import CONFIG, read_config
    from pliant.train import read_state

    if (place / CONFIG).is_file():
        config = read_config(place)
        about = {
            "network": config.network,
            "arguments": json.dumps(dict(config.arguments), default=list),
            "methods": ", ".join(map(str, config.methods)) or "those of its name",
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


def experts(
    folder: Annotated[Path, typer.Argument(help="a saved CondConv network, as for evaluate")],
    data: Annotated[
        str | None,
        typer.Option(help="digits, cifar10, cifar100, folder, imagenet, shards; or the run's own"),
    ] = None,
    path: Annotated[Path | None, typer.Option(help="folder of the data; digits need none")] = None,
    to: Annotated[Path | None, typer.Option(help="folder of the files, if not experts/ in FOLDER")] = None,
    part: Annotated[str, typer.Option(help="test or val")] = "test",
    class_: Annotated[
        list[str] | None, typer.Option("--class", help="drawn against all; repeat for several")
    ] = None,
    per_class: Annotated[int | None, typer.Option(help="at most so many images of a class", min=1)] = None,
    batch: Annotated[int, typer.Option(help="images a forward")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
) -> None:
    """Routing weights by layer, class and example: a file, rows, and four figures."""
    from pliant.analysis.expert_report import report_experts
    from pliant.train.data import Part

    to = folder / "experts" if to is None else to
    found = report_experts(
        folder,
        to,
        data,
        path,
        part=cast("Part", part),
        classes=class_,
        per_class=per_class,
        batch=batch,
        device=device,
    )
    for layer in found.layers:
        idle = ", ".join(map(str, found.idle(layer, 0.01))) or "none"
        source = f", routing of {found.shared[layer]}" if layer in found.shared else ""
        typer.echo(f"{layer}: {found.experts(layer)} experts{source}; never above 0.01: {idle}")
    typer.echo(f"{len(found.labels)} images; routing.npz, experts.csv and figures are in {to}")


def counts(
    method: Annotated[str | None, typer.Option(help="mod, condconv or adn; by default every paper")] = None,
    table: Annotated[list[str] | None, typer.Option(help="only this one; repeat for several")] = None,
    markdown: Annotated[bool, typer.Option(help="print Markdown")] = False,
) -> None:
    """Parameters and MACs of every published row that pliant builds, beside ours."""
    from pliant import published

    if table and method is None:
        raise ValueError(f"--table needs --method, the paper's: one of {', '.join(published.PAPERS)}")
    for name in published.PAPERS if method is None else [method]:
        report = published.reproduce_counts(name, table)
        if markdown:
            typer.echo(published.markdown(report))
        else:
            show(published.render(report))
            typer.echo("\n".join(f"- {note}" for note in report.notes) + "\n")
