"""The command that runs an experiment, times its networks and writes its page."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from pliant.commands._common import Device, progress_of


def experiment(
    name: Annotated[str, typer.Argument(help="cifar10-controls or cifar10-variants")],
    where: Annotated[
        list[str] | None,
        typer.Argument(help="key=value changes of where it runs: path=FOLDER threads=2 workers=0"),
    ] = None,
    device: Device = "cpu",
    folder: Annotated[Path | None, typer.Option(help="of the runs; runs/NAME if not given")] = None,
    results: Annotated[Path, typer.Option(help="folder that has and gets the rows")] = Path("results"),
    docs: Annotated[Path, typer.Option(help="folder that gets the page")] = Path("docs"),
    only: Annotated[list[str] | None, typer.Option(help="only these labels; repeat for several")] = None,
    network: Annotated[
        list[str] | None, typer.Option(help="only of these plain networks; repeat for several")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="only the first so many of each label")] = None,
    chosen: Annotated[
        int | None,
        typer.Option(
            help="of cifar10-variants: the further seeds of so many, those whose first seed did best on "
            "validation images"
        ),
    ] = None,
    epochs: Annotated[int | None, typer.Option(help="in place of the experiment's: a rehearsal")] = None,
    limit_minutes: Annotated[
        float | None, typer.Option(help="begin no further run after so long; the one that runs ends")
    ] = None,
    processes: Annotated[
        int, typer.Option(help="so many runs at a time, each in a process of its own", min=1)
    ] = 1,
    engine: Annotated[
        list[str] | None,
        typer.Option(help="of --measure: in these engines, beside training steps; repeat for several"),
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="say where each run stands, and run none")] = False,
    measure: Annotated[
        bool, typer.Option("--measure", help="instead of training, time the same networks")
    ] = False,
    page: Annotated[
        bool, typer.Option("--page", help="instead of training, write the page that the rows give")
    ] = False,
) -> None:
    """Train all networks of an experiment, one row each; the same command goes on where it stopped."""
    from research.experiments import cells_of, choosing, rivals_of, run_cells, run_cells_together, states
    from research.experiments.cells import DEVICES
    from research.experiments.walking import scores_in

    if list_ + measure + page > 1:
        raise ValueError("--list, --measure and --page are one at a time")
    if engine and not measure:
        raise ValueError("--engine is of --measure: training has no engine")
    if processes > 1 and (list_ or measure or page):
        raise ValueError("--processes is of training, which --list, --measure and --page do not do")
    if chosen is not None:
        if name != choosing.EXPERIMENT:
            raise ValueError(f"--chosen is of {choosing.EXPERIMENT}, not of {name}")
        if only or seeds is not None or measure or page:
            raise ValueError(
                "--chosen says which labels and seeds run: no --only, --seeds, --measure or --page"
            )
        there = [row for kind in DEVICES for row in scores_in(results / f"{name}-{kind}.csv")]
        only = choosing.chosen(there, chosen, epochs=epochs)
    if page:
        from research.experiments.page import write_evidence

        if only or network or seeds is not None:
            raise ValueError("the page is of all rows: --page takes no --only, --network or --seeds")
        typer.echo(f"written: {write_evidence(name, results, docs, epochs=epochs)}")
        return
    cells = cells_of(
        name,
        device,
        only=only or (),
        networks=network or (),
        seeds=seeds,
        epochs=epochs,
        where=where or (),
    )
    if chosen is not None:
        cells = choosing.deciding(cells)
    rows = results / f"{name}-{device}.csv"
    place = folder or Path("runs", name)
    if list_:
        found = states(cells, scores_in(rows), place)
        for cell, state in zip(cells, found, strict=True):
            typer.echo(f"{cell.network:9} {cell.label:28} seed {cell.recipe.seed}  {state}")
        done = sum(state.kind == "done" for state in found)
        typer.echo(f"{done} of {len(cells)} done; rows in {rows}")
        return
    if measure:
        from research.experiments.timing import time_cells

        with progress_of("timing") as step:
            timed = time_cells(
                [*rivals_of(name, device), *cells],
                results / f"{name}-latency-{device}.csv",
                device=device,
                threads=cells[0].recipe.threads,
                engines=engine,
                progress=step,
            )
        typer.echo(f"{len(timed)} rows of times in {results / f'{name}-latency-{device}.csv'}")
        return
    limit = None if limit_minutes is None else 60 * limit_minutes
    try:
        if processes > 1:
            added = run_cells_together(cells, rows, place, processes, limit=limit)
        else:
            added = run_cells(
                cells, rows, place, limit=limit, progress=sys.stdout.isatty(), tell=typer.echo
            )
    except KeyboardInterrupt as stop:
        typer.secho("pliant: interrupted; the same command goes on from here", fg="red", err=True)
        raise typer.Exit(130) from stop
    typer.echo(f"{len(added)} rows added to {rows}")
