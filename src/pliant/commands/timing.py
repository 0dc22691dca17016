"""Commands that time networks and their depths."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, cast

import typer

from pliant.commands._common import (
    Device,
    Network,
    Pixels,
    Threads,
    built,
    network_of,
    progress_of,
    show,
    width,
)


def measure(
    models: Annotated[
        list[str],
        typer.Argument(
            help="Networks of timm, folders that `train` or `pliant.save` wrote, or exported files"
        ),
    ],
    against: Annotated[str | None, typer.Option(help="Baseline of all ratios, a network too")] = None,
    batch: Annotated[
        list[int] | None, typer.Option(help="Images a forward, by default 1; repeat for several")
    ] = None,
    pixels: Pixels = None,
    device: Device = "cpu",
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float32 (the default), bfloat16, float16 or int8; repeat for several"),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="Engine for the networks as they are: eager, compiled, or one of --engines")
    ] = "eager",
    engines: Annotated[
        str | None,
        typer.Option(
            help="Time networks as they are deployed instead (norms folded, channels_last), in these "
            "engines: all, or some of eager,compile,aoti,onnxruntime,openvino"
        ),
    ] = None,
    forms: Annotated[
        str | None,
        typer.Option(
            help="Forms of the blocks, some of: as built,plain,optimized,native; by default as built, "
            "with --engines the other three"
        ),
    ] = None,
    channels_last: Annotated[
        bool | None, typer.Option(help="Memory format channels_last; by default only with --engines")
    ] = None,
    threads: Threads = None,
    rounds: Annotated[int, typer.Option(help="How often each network is timed, in turn")] = 15,
    timeout: Annotated[
        float,
        typer.Option(help="Seconds for one step (loading, one round) of an engine in its own process"),
    ] = 300.0,
    write_timeout: Annotated[
        float, typer.Option(help="Seconds for the export or compilation of one network")
    ] = 600.0,
    tax: Annotated[
        bool, typer.Option(help="Time the control of each converted network too, for the MoD tax")
    ] = True,
    lower_resolution: Annotated[
        int | None, typer.Option(help="Height and width at which the baseline is timed too")
    ] = None,
    rows: Annotated[Path | None, typer.Option(help="CSV file to append the rows to, run by run")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown tables")] = False,
    html: Annotated[Path | None, typer.Option(help="HTML page to write, with tables and a figure")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Figure to draw (.svg, .png, .pdf): --plot-y against latency")
    ] = None,
    plot_y: Annotated[str, typer.Option(help="With --plot: macs or parameters")] = "macs",
) -> None:
    """Measure latency, parameters and MACs of networks.

    All networks are timed in turn in each round, so that their ratios hold on a busy machine.
    """
    from pliant.measuring.figure import Quantity, check_figure, plot_against_latency
    from pliant.measuring.latency import measure as run
    from pliant.measuring.page import write_page
    from pliant.measuring.rows import grouped, markdown_table, terminal_table, write_rows

    # What cannot be written is refused before the timing, not after.
    if plot is not None:
        check_figure(plot, plot_y)
    if rows is not None:
        write_rows(rows, [], append=True)
    names = models if against is None or against in models else [against, *models]
    with progress_of("timing") as step:
        found = run(
            {name: network_of(name) for name in names},
            against=against,
            batch=batch or 1,
            input_size=pixels,
            device=device,
            dtype=dtype or "float32",
            engine=engine,
            engines=None if engines is None else engines.split(","),
            forms=None if forms is None else forms.split(","),
            channels_last=channels_last,
            threads=threads,
            rounds=rounds,
            timeout=timeout,
            write_timeout=write_timeout,
            tax=tax,
            lower_resolution=lower_resolution,
            progress=step,
            # Each run's rows at once: a later one may take this process down.
            done=None if rows is None else partial(write_rows, rows, append=True),
        )
    for i, group in enumerate(grouped(found)):
        if markdown:
            typer.echo("\n" * bool(i) + markdown_table(group))
        else:
            show(terminal_table(group, width=width()))
    if html is not None:
        typer.echo(f"page: {write_page(html, found)}")
    if plot is not None:
        typer.echo(f"figure: {plot_against_latency(found, cast('Quantity', plot_y), plot)}")


def depths(
    model: Network,
    profile: Annotated[bool, typer.Option("--profile", help="Time each depth too")] = False,
    batch: Annotated[int, typer.Option(help="With --profile: images a forward", min=1)] = 1,
    device: Device = "cpu",
    engine: Annotated[str, typer.Option(help="With --profile: eager or compiled")] = "eager",
    threads: Threads = None,
    rounds: Annotated[int, typer.Option(help="With --profile: how often each depth is timed")] = 9,
    rows: Annotated[Path | None, typer.Option(help="With --profile: CSV file to write the rows to")] = None,
    plot: Annotated[
        Path | None,
        typer.Option(help="With --profile: figure to draw (.svg, .png, .pdf), MACs against latency"),
    ] = None,
) -> None:
    """List the depths of an adaptive network.

    The table has parameters, MACs and, with --profile, latency.
    """
    import torch

    from pliant.adaptive.profiling import counted, profile_depths
    from pliant.anatomy import input_size
    from pliant.figures import check_suffix
    from pliant.measuring.rows import CONDITIONS, terminal_table

    if not profile:
        if rows or plot:
            raise ValueError("--rows and --plot need latencies; add --profile")
        found = counted(built(model, "meta"))
        show(terminal_table(found, ["label", "parameters", "macs"], leave_out=list(CONDITIONS)))
        return
    if plot is not None:
        check_suffix(plot)  # before the timing, not after
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device is cuda, and PyTorch sees no GPU; use cpu")
    network = built(model).to(device)
    size = input_size(network)
    if size is None:
        raise ValueError("this network does not say its input size; use pliant.profile_depths")
    profiled = profile_depths(network, torch.zeros(batch, *size), engine, threads=threads, rounds=rounds)
    if rows is not None:
        profiled.save(rows)
    if plot is not None:
        profiled.plot(plot)
    show(terminal_table(profiled.rows, width=width()))
