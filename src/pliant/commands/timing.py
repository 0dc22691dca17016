"""Commands that time: networks, depths, the tables of results."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Annotated, cast

import typer

from pliant.commands._common import Device, Threads, network_of, progress_of, show


def measure(
    models: Annotated[
        list[str], typer.Argument(help="networks of timm, or folders that `save` or `train` wrote")
    ],
    against: Annotated[str | None, typer.Option(help="the baseline of all ratios")] = None,
    batch: Annotated[list[int] | None, typer.Option(help="images a forward (1); may be repeated")] = None,
    pixels: Annotated[int | None, typer.Option(help="height and width, if not each network's own")] = None,
    device: Device = "cpu",
    dtype: Annotated[
        list[str] | None,
        typer.Option(help="float32 (as it is), bfloat16, float16 or int8; repeat for several"),
    ] = None,
    engine: Annotated[
        str, typer.Option(help="runs networks as they are: eager, compiled, or another of --engines")
    ] = "eager",
    engines: Annotated[
        str | None,
        typer.Option(
            help="instead: networks as deployed (norms folded, channels_last, MoD blocks plain, "
            "optimized and native) in all, or some of eager,compile,aoti,onnxruntime,openvino"
        ),
    ] = None,
    forms: Annotated[
        str | None,
        typer.Option(help="some of: as built,plain,optimized,native; with --engines the last three"),
    ] = None,
    channels_last: Annotated[
        bool | None, typer.Option(help="memory format; the default only with --engines")
    ] = None,
    threads: Threads = None,
    rounds: Annotated[int, typer.Option(help="how often each network is timed, in turn")] = 15,
    timeout: Annotated[
        float, typer.Option(help="seconds that an engine in its own process may take for one step")
    ] = 300.0,
    write_timeout: Annotated[
        float, typer.Option(help="seconds that it may take there to export or compile a network")
    ] = 600.0,
    tax: Annotated[bool, typer.Option(help="time MoD networks without their blocks too")] = True,
    lower_resolution: Annotated[int | None, typer.Option(help="time the baseline at these too")] = None,
    rows: Annotated[
        Path | None, typer.Option(help="CSV file that gets the rows, appended run by run")
    ] = None,
    markdown: Annotated[bool, typer.Option(help="print Markdown tables")] = False,
    html: Annotated[Path | None, typer.Option(help="page with tables and figure")] = None,
    plot: Annotated[Path | None, typer.Option(help="figure of --plot-y against latency")] = None,
    plot_y: Annotated[str, typer.Option(help="macs or parameters")] = "macs",
) -> None:
    """Parameters, MACs and latency, interleaved in one run; ratios and the MoD tax."""
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
            show(terminal_table(group))
    if html is not None:
        typer.echo(f"page: {write_page(html, found)}")
    if plot is not None:
        typer.echo(f"figure: {plot_against_latency(found, cast('Quantity', plot_y), plot)}")


def depths(
    model: Annotated[
        str, typer.Argument(help="adaptive network of timm, or a folder that `save` or `train` wrote")
    ],
    profile: Annotated[bool, typer.Option("--profile", help="time each depth too")] = False,
    batch: Annotated[int, typer.Option(help="of --profile: images a forward", min=1)] = 1,
    device: Device = "cpu",
    engine: Annotated[str, typer.Option(help="of --profile: eager or compiled")] = "eager",
    threads: Threads = None,
    rounds: Annotated[int, typer.Option(help="of --profile: how often each depth is timed")] = 9,
    rows: Annotated[Path | None, typer.Option(help="of --profile: CSV file that gets the rows")] = None,
    plot: Annotated[Path | None, typer.Option(help="of --profile: figure of MACs against latency")] = None,
) -> None:
    """List the depths of an adaptive network: parameters, MACs and, with --profile, latency."""
    from pliant.adaptive.profiling import depth_report

    if not profile and (rows or plot):
        raise ValueError("--rows and --plot are of times: add --profile")
    how = {"batch": batch, "device": device, "engine": engine, "threads": threads, "rounds": rounds}
    show(depth_report(network_of(model), how if profile else None, rows, plot))
