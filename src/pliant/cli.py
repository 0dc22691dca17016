"""The command line: ``pliant COMMAND --help`` tells all.

Each command is a thin layer over a function of the library. What a user can get wrong is
a `ValueError` or `OSError` there, and one sentence without a traceback here.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

if TYPE_CHECKING:
    from rich.table import Table

    from pliant.surgery import Method

app = typer.Typer(
    help="Conditional and adaptive computation for vision networks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
reproduce_app = typer.Typer(help="Hold published figures against ours.", no_args_is_help=True)
app.add_typer(reproduce_app, name="reproduce")

Changes = Annotated[
    list[str] | None, typer.Argument(help="key=value changes, such as epochs=5 seed=1 model_args.c=16")
]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
Threads = Annotated[int | None, typer.Option(help="of PyTorch; by default as many as it takes")]


@app.command()
def models(pattern: Annotated[str, typer.Argument(help="part of the name")] = "") -> None:
    """List the networks that pliant registers with timm, with parameters and MACs."""
    import timm
    import torch
    from rich.table import Table

    from pliant.anatomy import input_size
    from pliant.measuring.macs import count_macs, count_parameters
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
    _print(table)


@app.command()
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
    chosen = METHODS[method](**_options(METHODS[method], options or []))
    network = timm.create_model(model)
    typer.echo(str(make_plan(network, chosen)))
    if save_to is not None:
        save(convert(network, chosen, inplace=True), save_to)
        typer.echo(f"saved to {save_to}")


@app.command()
def measure(
    models: Annotated[
        list[str], typer.Argument(help="networks of timm, or folders that `save` or `train` wrote")
    ],
    against: Annotated[str | None, typer.Option(help="the baseline of all ratios")] = None,
    batch: Annotated[int, typer.Option(help="images a forward")] = 1,
    pixels: Annotated[int | None, typer.Option(help="height and width, if not each network's own")] = None,
    device: Device = "cpu",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16")] = "float32",
    engine: Annotated[str, typer.Option(help="eager or compiled")] = "eager",
    channels_last: Annotated[bool, typer.Option(help="memory format")] = False,
    threads: Threads = None,
    rounds: Annotated[int, typer.Option(help="how often each network is timed, in turn")] = 15,
    tax: Annotated[bool, typer.Option(help="time MoD networks without their blocks too")] = True,
    lower_resolution: Annotated[int | None, typer.Option(help="time the baseline at these too")] = None,
    rows: Annotated[Path | None, typer.Option(help="CSV file that gets the rows, appended")] = None,
    markdown: Annotated[bool, typer.Option(help="print a Markdown table")] = False,
    plot: Annotated[Path | None, typer.Option(help="figure of --plot-y against latency")] = None,
    plot_y: Annotated[str, typer.Option(help="macs or parameters")] = "macs",
) -> None:
    """Parameters, MACs and latency, interleaved in one run; ratios and the MoD tax."""
    from pliant.analysis.plots import Quantity, check_figure, plot_against_latency
    from pliant.measuring.latency import measure as run
    from pliant.measuring.rows import markdown_table, terminal_table, write_rows

    # What cannot be written is refused before the timing, not after.
    if plot is not None:
        check_figure(plot, plot_y)
    if rows is not None:
        write_rows(rows, [], append=True)
    names = models if against is None or against in models else [against, *models]
    with _progress("timing") as step:
        found = run(
            {name: _network(name) for name in names},
            against=against,
            batch=batch,
            input_size=pixels,
            device=device,
            dtype=dtype,
            engine=engine,
            channels_last=channels_last,
            threads=threads,
            rounds=rounds,
            tax=tax,
            lower_resolution=lower_resolution,
            progress=step,
        )
    if markdown:
        typer.echo(markdown_table(found))
    else:
        _print(terminal_table(found))
    if rows is not None:
        write_rows(rows, found, append=True)
    if plot is not None:
        typer.echo(f"figure: {plot_against_latency(found, cast('Quantity', plot_y), plot)}")


@app.command()
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
    from pliant.profiling import depth_report

    if not profile and (rows or plot):
        raise ValueError("--rows and --plot are of times: add --profile")
    how = {"batch": batch, "device": device, "engine": engine, "threads": threads, "rounds": rounds}
    _print(depth_report(_network(model), how if profile else None, rows, plot))


@app.command()
def recipes() -> None:
    """List the training recipes."""
    from pliant.recipes import get_recipe, list_recipes

    for name in list_recipes():
        # The whole note, of several lines, is in the recipe.json of each run.
        typer.echo(f"{name:34} {get_recipe(name).note.partition(':')[0]}")


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="name of a recipe, such as digits.resnet18_mod")],
    changes: Changes = None,
    folder: Annotated[Path | None, typer.Option(help="of the run, if not runs/<recipe>-s<seed>")] = None,
    resume: Annotated[bool, typer.Option(help="go on where the run in the folder stopped")] = False,
    progress: Annotated[bool, typer.Option(help="show a progress bar")] = True,
) -> None:
    """Train a network by a recipe; the best one on validation is saved and tested."""
    from pliant.recipes import get_recipe
    from pliant.train import fit
    from pliant.train.recipe import override

    chosen = override(get_recipe(recipe), changes or [])
    try:
        run = fit(chosen, folder, resume=resume, progress=progress)
    except KeyboardInterrupt as stop:  # says how to go on, where there is something to go on with
        typer.secho(f"pliant: {stop}" if str(stop) else "pliant: interrupted", fg="red", err=True)
        raise typer.Exit(130) from stop
    typer.echo(f"best epoch {run.best_epoch + 1}: validation {100 * run.val_accuracy:.2f} %")
    if (base := run.history[run.best_epoch].get("val_accuracy_base")) is not None:
        typer.echo(f"its base network: validation {100 * base:.2f} %; evaluate --depths scores all depths")
    if run.test_accuracy is not None:
        typer.echo(f"test {100 * run.test_accuracy:.2f} %")
    if run.unreadable:
        typer.echo(f"{run.unreadable} images could not be read; run.json names them")
    typer.echo(f"saved in {run.folder}")


@app.command()
def evaluate(
    folder: Annotated[Path, typer.Argument(help="a saved model: a folder that `save` or `train` wrote")],
    data: Annotated[
        str | None, typer.Option(help="digits, cifar10, cifar100, folder, imagenet; or the run's own")
    ] = None,
    path: Annotated[Path | None, typer.Option(help="folder of the data; digits need none")] = None,
    part: Annotated[str, typer.Option(help="test or val")] = "test",
    batch: Annotated[int, typer.Option(help="images a forward")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    depths: Annotated[
        bool, typer.Option("--depths", help="score all depths of an adaptive network")
    ] = False,
    rows: Annotated[Path | None, typer.Option(help="of depths: CSV file that gets them, appended")] = None,
    markdown: Annotated[bool, typer.Option(help="of depths: print a Markdown table")] = False,
    plot: Annotated[Path | None, typer.Option(help="of depths: figure of accuracy against MACs")] = None,
) -> None:
    """Score a saved model, or all its depths, on images of a data set."""
    from pliant.train import evaluate as score
    from pliant.train.data import Part
    from pliant.train.depth_scores import depth_markdown, depth_table, report_depths

    if depths:
        options: Any = {"part": part, "batch": batch, "device": device}
        found = report_depths(folder, data, path, rows=rows, plot=plot, **options)
        if markdown:
            typer.echo(depth_markdown(found))
        else:
            _print(depth_table(found))
        return
    if rows or markdown or plot:
        raise ValueError("--rows, --markdown and --plot are of depths: add --depths")
    scores = score(folder, data, path, part=cast("Part", part), batch=batch, device=device)
    typer.echo(str(scores))
    for name in scores.unreadable_paths:
        typer.echo(f"unreadable: {name}")


@app.command()
def experts(
    folder: Annotated[Path, typer.Argument(help="a saved CondConv network, as for evaluate")],
    data: Annotated[
        str | None, typer.Option(help="digits, cifar10, cifar100, folder, imagenet; or the run's own")
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


@app.command()
def compare(
    recipe: Annotated[str, typer.Argument(help="recipe of the plain network, such as cifar10.resnet20")],
    changes: Changes = None,
    method: Annotated[
        str, typer.Option(help="which forms: mod, condconv, condconv-ablations, adn")
    ] = "mod",
    seeds: Annotated[int, typer.Option(help="how many, from the recipe's seed on", min=1)] = 1,
    only: Annotated[list[str] | None, typer.Option(help="only these labels; repeat for several")] = None,
    folder: Annotated[Path, typer.Option(help="of runs; finished ones are kept")] = Path("runs/compare"),
    rows: Annotated[Path | None, typer.Option(help="CSV file that gets the scores, appended")] = None,
) -> None:
    """Train a plain network, its forms by a method and their controls, and score them."""
    from pliant.compare import PLAIN, controls_by_name, terminal_summary, write_scores
    from pliant.compare import compare as run

    controls = controls_by_name(recipe, changes or [], method)
    unknown = set(only or ()) - controls.keys()
    if unknown:
        raise ValueError(f"no label {unknown.pop()!r}; the labels are {', '.join(controls)}")
    scores = []
    first = controls[PLAIN].seed
    for seed in range(first, first + seeds):
        chosen = {k: replace(r, seed=seed) for k, r in controls.items() if not only or k in only}
        for score, _ in run(chosen, folder / recipe, started=lambda label, _: typer.echo(label)).values():
            scores.append(score)
            if rows is not None:
                write_scores(rows, [score], append=True)
    _print(terminal_summary(scores))


@reproduce_app.command()
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
            _print(published.render(report))
            typer.echo("\n".join(f"- {note}" for note in report.notes) + "\n")


@app.command()
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
    from pliant.quickstart import quickstart as run

    run(folder, changes=changes or (), threads=threads, readme=readme, results=results)


@app.command()
def bench(
    device: Device = "cpu",
    results: Annotated[Path, typer.Option(help="folder for rows, tables and figures")] = Path("results"),
    quick: Annotated[bool, typer.Option(help="one network, batch 1, to see that it works")] = False,
    resume: Annotated[bool, typer.Option(help="keep what this commit measured here before")] = False,
    suite: Annotated[
        str, typer.Option(help="mod or condconv networks, forms of a mixed convolution, or training steps")
    ] = "mod",
    threads: Annotated[int | None, typer.Option(help="of PyTorch, for steps")] = None,
) -> None:
    """Measure the speed tables: plain and converted networks in each engine."""
    from pliant.bench import SUITES, run_bench
    from pliant.measuring.forms import run_forms
    from pliant.measuring.steps import run_step_bench

    if suite not in (suites := (*SUITES, "forms", "steps")):
        raise ValueError(f"no benchmark {suite!r}; there are {', '.join(suites)}")
    if suite in ("forms", "steps") and resume:
        raise ValueError(f"--resume is for networks, not for --suite {suite}")
    if suite == "steps":
        run_step_bench(device, results, quick, threads=threads)
    elif suite == "forms":
        with _progress("timing") as step:
            typer.echo(f"{len(run_forms(device, results, quick, step))} rows written to {results}")
    else:
        run_bench(device=device, results=results, quick=quick, name=suite, resume=resume)


def _print(table: Table) -> None:
    from rich.console import Console

    console = Console()
    # What is piped is not cut to a terminal's width.
    (console if console.is_terminal else Console(width=200)).print(table)


def _options(method: type[Method], changes: list[str]) -> dict[str, Any]:
    """``["c=16", "order=index"]`` as keyword arguments of a method."""
    from pliant.train.recipe import literal

    known = inspect.signature(method).parameters
    options = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"{change!r} is not of the form key=value, such as c=16")
        if key not in known:
            raise ValueError(f"{method.__name__} has no option {key!r}; it has {', '.join(sorted(known))}")
        options[key] = literal(text)
    return options


def _network(name: str) -> Any:
    """A folder that `save` or `train` wrote, as its network; any other name as it is."""
    from pliant.checkpoint import load
    from pliant.train.run import BEST

    folder = Path(name)
    if not folder.is_dir():
        return name
    return load(folder / BEST if (folder / BEST).is_dir() else folder)


@contextmanager
def _progress(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar for functions that report ``(done, total, what)``."""
    from rich.console import Console

    from pliant.quickstart import progress_bar

    with progress_bar(Console(stderr=True), title) as step:
        yield step


def main() -> None:
    """Run the command line; errors that a user can mend are one sentence, exit code 1."""
    # torch's own note that a machine has a CUDA compiler and no GPU, on every timing.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        app()
    except (ValueError, OSError, RuntimeError) as error:
        typer.secho(f"pliant: {error}", fg="red", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
