"""The commands of ``python -m research``: how the papers are reproduced, and the tables of results made."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from pliant.cli import assemble
from pliant.commands._common import Changes, Device, Threads, going_on, progress_of, show


def quickstart(
    changes: Changes = None,
    folder: Annotated[Path, typer.Option(help="Folder for runs, rows, figures and the page")] = Path(
        "runs/quickstart"
    ),
    threads: Threads = None,
    readme: Annotated[Path | None, typer.Option(help="Markdown file that gets the table")] = None,
    results: Annotated[Path | None, typer.Option(help="Folder that gets a copy of the rows")] = None,
) -> None:
    """Train and measure plain networks and those of all methods, in five minutes."""
    from research.quickstart import quickstart as run

    run(folder, changes=changes or (), threads=threads, readme=readme, results=results)


def counts(
    method: Annotated[str | None, typer.Option(help="Paper: mod, condconv or adn; by default all")] = None,
    table: Annotated[
        list[str] | None, typer.Option(help="Only this table of the paper; repeat for several")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown")] = False,
) -> None:
    """Compare the parameters and MACs of the papers with ours."""
    from research import published

    if table and method is None:
        raise ValueError(f"--table needs the paper; add --method with one of {', '.join(published.PAPERS)}")
    for name in published.PAPERS if method is None else [method]:
        report = published.reproduce_counts(name, table)
        if markdown:
            typer.echo(published.markdown(report))
        else:
            show(published.render(report))
            typer.echo("\n".join(f"- {note}" for note in report.notes) + "\n")


def experts(
    folder: Annotated[Path, typer.Argument(help="Saved CondConv network, or its run")],
    data: Annotated[
        str | None,
        typer.Option(
            help="Data set: digits, cifar10, cifar100, folder, imagenet, shards; by default the run's"
        ),
    ] = None,
    path: Annotated[Path | None, typer.Option(help="Folder of the data; digits need none")] = None,
    to: Annotated[
        Path | None, typer.Option(help="Folder of the files; by default experts/ in FOLDER")
    ] = None,
    part: Annotated[str, typer.Option(help="Images: test or val")] = "test",
    class_: Annotated[
        list[str] | None, typer.Option("--class", help="Class to draw beside all; repeat for several")
    ] = None,
    per_class: Annotated[int | None, typer.Option(help="Most images of a class", min=1)] = None,
    batch: Annotated[int, typer.Option(help="Images in a forward")] = 256,
    device: Annotated[str, typer.Option(help="Device: auto, cpu or cuda")] = "auto",
) -> None:
    """Write the routing weights of a CondConv network by layer, class and image, and draw them."""
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
    recipe: Annotated[
        str, typer.Argument(help="Recipe of a converted network: cifar10.resnet20_mod.recover")
    ],
    changes: Changes = None,
    folder: Annotated[Path, typer.Option(help="Folder of the runs; finished runs are kept")] = Path(
        "runs/recover"
    ),
    rows: Annotated[Path | None, typer.Option(help="CSV file to append the rows to")] = None,
    page: Annotated[
        Path | None, typer.Option(help="With --rows: Markdown file to write from all rows")
    ] = None,
    teacher: Annotated[bool, typer.Option(help="Train with the teacher")] = True,
    control: Annotated[bool, typer.Option(help="Train without the teacher too")] = True,
    progress: Annotated[bool, typer.Option(help="Show a progress bar")] = True,
) -> None:
    """Convert a trained network (weights=PATH), train it, and report the accuracy of each epoch."""
    from pliant import tables
    from pliant.recipes import get_recipe
    from pliant.train.recipe import override
    from research import recovery

    if page is not None and rows is None:
        raise ValueError("--page needs the rows; add --rows FILE")

    def keep(found: list[recovery.Recovery]) -> None:
        if rows is not None:
            recovery.write_recoveries(rows, found, append=True)

    chosen = override(get_recipe(recipe), changes or [])
    options: Any = {"teacher": teacher, "control": control, "progress": progress}
    typer.echo("scoring the plain and the converted network before training")
    with going_on("run the same command again to go on: finished runs are kept"):
        found = recovery.recover(chosen, folder / recipe, finished=keep, **options)
    if page is not None:
        assert rows is not None
        recovery.write_recovery_page(page, recovery.read_recoveries(rows))
    show(tables.terminal(*recovery.recovery_table(found), recovery.TEXT, caption="test accuracy, %"))


def experiment(
    name: Annotated[str, typer.Argument(help="cifar10-controls, or cifar10-variants with --page")],
    where: Annotated[
        list[str] | None,
        typer.Argument(help="key=value changes of where it runs: path=FOLDER threads=2 workers=0"),
    ] = None,
    device: Device = "cpu",
    folder: Annotated[Path | None, typer.Option(help="Folder of the runs; by default runs/NAME")] = None,
    results: Annotated[Path, typer.Option(help="Folder of the rows")] = Path("results"),
    docs: Annotated[Path, typer.Option(help="With --page: folder of the page")] = Path("docs"),
    only: Annotated[list[str] | None, typer.Option(help="Only this label; repeat for several")] = None,
    network: Annotated[
        list[str] | None, typer.Option(help="Only this plain network; repeat for several")
    ] = None,
    seeds: Annotated[int | None, typer.Option(help="Only the first seeds of each label")] = None,
    epochs: Annotated[int | None, typer.Option(help="Epochs of a rehearsal")] = None,
    limit_minutes: Annotated[
        float | None, typer.Option(help="Minutes after which no further run begins")
    ] = None,
    processes: Annotated[int, typer.Option(help="Runs at a time, each in its own process", min=1)] = 1,
    engine: Annotated[
        list[str] | None, typer.Option(help="With --measure: only this engine; repeat for several")
    ] = None,
    list_: Annotated[bool, typer.Option("--list", help="List the state of each run; run none")] = False,
    measure: Annotated[bool, typer.Option("--measure", help="Time the networks; train none")] = False,
    page: Annotated[bool, typer.Option("--page", help="Write the page from the rows; train none")] = False,
) -> None:
    """Train all networks of an experiment; a repeated command goes on where it stopped."""
    from research import experiments
    from research.experiments.execution import scores_in

    if list_ + measure + page > 1:
        raise ValueError("--list, --measure and --page exclude each other; give one of them")
    if engine and not measure:
        raise ValueError("--engine has no effect on training; add --measure or remove --engine")
    if processes > 1 and (list_ or measure or page):
        raise ValueError("--processes is for training; remove it, or --list, --measure and --page")
    if page:
        from research.experiments.evidence_page import write_evidence

        if only or network or seeds is not None:
            raise ValueError("the page shows all rows; remove --only, --network and --seeds")
        typer.echo(f"written: {write_evidence(name, results, docs, epochs=epochs)}")
        return
    runs = experiments.planned_runs(
        name, device, only=only or (), networks=network or (), seeds=seeds, epochs=epochs, where=where or ()
    )
    rows = results / f"{name}-{device}.csv"
    place = folder or Path("runs", name)
    if list_:
        found = experiments.states(runs, scores_in(rows), place)
        for run, state in zip(runs, found, strict=True):
            typer.echo(f"{run.network:9} {run.label:28} seed {run.recipe.seed}  {state}")
        done = sum(state.kind == "done" for state in found)
        typer.echo(f"{done} of {len(runs)} done; rows in {rows}")
        return
    if measure:
        from research.experiments.network_times import time_networks

        times = results / f"{name}-latency-{device}.csv"
        with progress_of("timing") as step:
            timed = time_networks(
                runs, times, device=device, threads=runs[0].recipe.threads, engines=engine, progress=step
            )
        typer.echo(f"{len(timed)} rows of times in {times}")
        return
    limit = None if limit_minutes is None else 60 * limit_minutes
    try:
        if processes > 1:
            added = experiments.execute_together(runs, rows, place, processes, limit=limit)
        else:
            added = experiments.execute(
                runs, rows, place, limit=limit, progress=sys.stdout.isatty(), tell=typer.echo
            )
    except KeyboardInterrupt as stop:
        typer.secho("pliant: interrupted; repeat the command to go on from here", fg="red", err=True)
        raise typer.Exit(130) from stop
    typer.echo(f"{len(added)} rows added to {rows}")


def bench(
    device: Device = "cpu",
    results: Annotated[Path, typer.Option(help="Folder of rows, tables and figures")] = Path("results"),
    quick: Annotated[bool, typer.Option("--quick", help="Rehearse with one network at batch 1")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep what this commit measured on this machine before")
    ] = False,
    suite: Annotated[
        str,
        typer.Option(
            help="Networks in all engines (mod, mod-bfloat16, mod-int8, condconv-engines) or in PyTorch "
            "(condconv), forms of a mixed convolution (forms), training steps (steps), image loading "
            "(loader), depths (depths), or switching the depth (switch)"
        ),
    ] = "mod",
    threads: Annotated[int | None, typer.Option(help="Threads of PyTorch and of each engine")] = None,
    patient: Annotated[bool, typer.Option("--patient", help="Measure without limits of time")] = False,
    readme: Annotated[
        Path | None, typer.Option(help="With --suite mod: Markdown file that gets the table of speed")
    ] = None,
    path: Annotated[
        Path | None,
        typer.Option(help="With --suite loader: folder of images; by default scikit-learn's photographs"),
    ] = None,
) -> None:
    """Measure latency, training steps or image loading, and write the tables of results."""
    from research.bench.depths import run_depth_bench
    from research.bench.loader import run_loader_bench
    from research.bench.mixing_forms import run_forms
    from research.bench.steps import run_step_bench
    from research.bench.suites import SUITES, run_bench
    from research.bench.switching import run_switch_bench

    others = ("forms", "steps", "loader", "depths", "switch")
    if suite not in (suites := (*SUITES, *others)):
        raise ValueError(f"no benchmark {suite!r}; there are {', '.join(suites)}")
    for option, given in {"resume": resume, "patient": patient, "readme": readme}.items():
        if given and suite in others:
            raise ValueError(f"--{option} has no effect on --suite {suite}; remove it")
    if path is not None and suite != "loader":
        raise ValueError("--path names images; add --suite loader or remove --path")
    if suite == "loader":
        if device != "cpu" or threads is not None:
            raise ValueError(
                "--suite loader loads on the CPU with 0 to 2 workers; remove --device and --threads"
            )
        run_loader_bench(path, results, quick)
    elif suite == "switch":
        if device != "cpu" or threads is not None:
            raise ValueError(
                "--suite switch times on the CPU, without a forward; remove --device and --threads"
            )
        typer.echo(f"rows: {run_switch_bench(results, quick)}")
    elif suite == "depths":
        if device != "cpu":
            raise ValueError("--suite depths times on the CPU; remove --device")
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


def coverage(
    names: Annotated[
        list[str] | None,
        typer.Argument(help="Networks of timm; by default those that have rows, and two of each module"),
    ] = None,
    results: Annotated[Path, typer.Option(help="Folder of the rows")] = Path("results"),
    docs: Annotated[Path, typer.Option(help="Folder of the page")] = Path("docs"),
    file: Annotated[Path | None, typer.Option(help="Text file of further names, one a line")] = None,
    again: Annotated[bool, typer.Option("--again", help="Survey those that have rows, too")] = False,
) -> None:
    """Convert networks of timm by each method, and write the page of what is covered."""
    from pliant.records import read_records
    from research import coverage as program

    rows, page = results / "coverage.csv", docs / "coverage.md"
    given = [*(names or ()), *(file.read_text().split() if file else ())]
    chosen = given or program.default_names(
        read_records(rows, program.CoverageRow) if rows.exists() else ()
    )
    if again:
        rows.unlink(missing_ok=True)
    found = program.cover(chosen, rows, typer.echo)
    page.write_text(program.coverage_page(found))
    typer.echo(f"{len(found)} rows in {rows}; written: {page}")


app = assemble(
    "Reproduce the papers, and make the tables of results, from a checkout.",
    *(quickstart, counts, experts, recover, experiment, bench, coverage),
)
