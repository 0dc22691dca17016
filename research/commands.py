"""The commands of ``python -m research``: how the papers are reproduced, and the tables of results made."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

import typer

from pliant.commands._common import Changes, Device, Threads, progress_of, show
from research.experimenting import experiment

app = typer.Typer(
    help="Reproduce the papers and the tables of results.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def quickstart(
    changes: Changes = None,
    folder: Annotated[Path, typer.Option(help="for runs, rows, figures and the page")] = Path(
        "runs/quickstart"
    ),
    threads: Threads = None,
    readme: Annotated[Path | None, typer.Option(help="Markdown file that gets the table")] = None,
    results: Annotated[Path | None, typer.Option(help="folder that gets the rows too")] = None,
) -> None:
    """Train and measure plain and converted networks, all three methods, in five minutes."""
    from research.quickstart import quickstart as run

    run(folder, changes=changes or (), threads=threads, readme=readme, results=results)


def counts(
    method: Annotated[str | None, typer.Option(help="mod, condconv or adn; by default every paper")] = None,
    table: Annotated[list[str] | None, typer.Option(help="only this one; repeat for several")] = None,
    markdown: Annotated[bool, typer.Option(help="print Markdown")] = False,
) -> None:
    """Parameters and MACs of every published row that pliant builds, beside ours."""
    from research import published

    if table and method is None:
        raise ValueError(f"--table needs --method, the paper's: one of {', '.join(published.PAPERS)}")
    for name in published.PAPERS if method is None else [method]:
        report = published.reproduce_counts(name, table)
        if markdown:
            typer.echo(published.markdown(report))
        else:
            show(published.render(report))
            typer.echo("\n".join(f"- {note}" for note in report.notes) + "\n")


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
    from pliant.train.data import Part
    from research.analysis.expert_report import report_experts

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


def recover(
    recipe: Annotated[str, typer.Argument(help="of a converted network: cifar10.resnet20_mod.recover")],
    changes: Changes = None,
    folder: Annotated[Path, typer.Option(help="of runs; finished ones are kept")] = Path("runs/recover"),
    rows: Annotated[Path | None, typer.Option(help="CSV file that gets the rows, appended")] = None,
    page: Annotated[
        Path | None, typer.Option(help="Markdown file that is written from all rows of --rows")
    ] = None,
    teacher: Annotated[bool, typer.Option(help="train with the teacher")] = True,
    control: Annotated[bool, typer.Option(help="train without it too")] = True,
    progress: Annotated[bool, typer.Option(help="show a progress bar")] = True,
) -> None:
    """Convert a trained network (weights=PATH), train a little, and report each epoch's accuracy."""
    from rich.table import Table

    from pliant.recipes import get_recipe
    from pliant.train.recipe import override
    from research import recovery

    if page is not None and rows is None:
        raise ValueError("--page is written from the rows: add --rows")

    def keep(found: list[recovery.Recovery]) -> None:
        if rows is not None:
            recovery.write_recoveries(rows, found, append=True)

    chosen = override(get_recipe(recipe), changes or [])
    options: Any = {"teacher": teacher, "control": control, "progress": progress}
    found = recovery.recover(chosen, folder / recipe, finished=keep, **options)
    if page is not None:
        assert rows is not None
        recovery.write_recovery_page(page, recovery.read_recoveries(rows))
    headings, lines = recovery.recovery_table(found)
    table = Table(*headings, caption="test accuracy, %")
    for line in lines:
        table.add_row(*line)
    show(table)


def bench(
    device: Device = "cpu",
    results: Annotated[Path, typer.Option(help="folder for rows, tables and figures")] = Path("results"),
    quick: Annotated[bool, typer.Option(help="one network, batch 1, to see that it works")] = False,
    resume: Annotated[bool, typer.Option(help="keep what this commit measured here before")] = False,
    suite: Annotated[
        str,
        typer.Option(
            help="mod (in all engines), mod-bfloat16, mod-int8 or condconv networks, forms of a mixed "
            "convolution, training steps, the loader of images, or the depths of an adaptive network"
        ),
    ] = "mod",
    threads: Annotated[int | None, typer.Option(help="of PyTorch and of each engine")] = None,
    patient: Annotated[bool, typer.Option(help="no limit of time: all networks, all rounds")] = False,
    readme: Annotated[Path | None, typer.Option(help="Markdown file that gets the table of mod")] = None,
    path: Annotated[
        Path | None, typer.Option(help="of loader: folder of images, if not scikit-learn's photographs")
    ] = None,
) -> None:
    """Measure the speed tables: plain and converted networks in each engine."""
    from research.bench.depths import run_depth_bench
    from research.bench.loader import run_loader_bench
    from research.bench.mixing_forms import run_forms
    from research.bench.steps import run_step_bench
    from research.bench.suites import SUITES, run_bench

    others = ("forms", "steps", "loader", "depths")
    if suite not in (suites := (*SUITES, *others)):
        raise ValueError(f"no benchmark {suite!r}; there are {', '.join(suites)}")
    for option, given in {"resume": resume, "patient": patient, "readme": readme}.items():
        if given and suite in others:
            raise ValueError(f"--{option} is for networks, not for --suite {suite}")
    if path is not None and suite != "loader":
        raise ValueError("--path is of images, for --suite loader")
    if suite == "loader":
        if device != "cpu" or threads is not None:
            raise ValueError(
                "--suite loader loads on the CPU, with 0 to 2 workers: leave these options out"
            )
        run_loader_bench(path, results, quick)
    elif suite == "depths":
        if device != "cpu":
            raise ValueError("--suite depths times on the CPU: leave --device out")
        typer.echo(f"figure: {run_depth_bench(results, quick, threads)}")
    elif suite == "steps":
        run_step_bench(device, results, quick, threads=threads)
    elif suite == "forms":
        with progress_of("timing") as step:
            typer.echo(f"{len(run_forms(device, results, quick, step))} rows written to {results}")
    else:
        run_bench(
            device=device,
            results=results,
            quick=quick,
            name=suite,
            resume=resume,
            patient=patient,
            threads=threads,
            readme=readme,
        )


for command in (quickstart, counts, experts, recover, experiment, bench):
    app.command()(command)
