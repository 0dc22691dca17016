"""Commands that train and score."""

from __future__ import annotations

import signal
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from pliant.commands._common import Changes, show


def recipes() -> None:
    """List the training recipes."""
    from pliant.recipes import get_recipe, list_recipes

    for name in list_recipes():
        # The whole note, of several lines, is in the recipe.json of each run.
        typer.echo(f"{name:34} {get_recipe(name).note.partition(':')[0]}")


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
    from pliant.train.fitting import Terminated
    from pliant.train.recipe import override

    chosen = override(get_recipe(recipe), changes or [])
    try:
        run = fit(chosen, folder, resume=resume, progress=progress)
    except KeyboardInterrupt as stop:  # says how to go on, where there is something to go on with
        typer.secho(f"pliant: {stop}" if str(stop) else "pliant: interrupted", fg="red", err=True)
        raise typer.Exit(130) from stop
    except Terminated as stop:  # a status of its own, by which a job knows that it is to go on
        typer.secho(f"pliant: {stop}", fg="red", err=True)
        raise typer.Exit(128 + signal.SIGTERM) from stop
    typer.echo(f"best epoch {run.best_epoch + 1}: validation {100 * run.val_accuracy:.2f} %")
    if (base := run.history[run.best_epoch].get("val_accuracy_base")) is not None:
        typer.echo(f"its base network: validation {100 * base:.2f} %; evaluate --depths scores all depths")
    if run.test_accuracy is not None:
        typer.echo(f"test {100 * run.test_accuracy:.2f} %")
    if run.unreadable:
        typer.echo(f"{run.unreadable} images could not be read; run.json names them")
    typer.echo(f"saved in {run.folder}")


def evaluate(
    folder: Annotated[Path, typer.Argument(help="a saved model: a folder that `save` or `train` wrote")],
    data: Annotated[
        str | None,
        typer.Option(help="digits, cifar10, cifar100, folder, imagenet, shards; or the run's own"),
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
    from pliant.adaptive.scores import depth_markdown, depth_table, report_depths
    from pliant.train import evaluate as score
    from pliant.train.data import Part

    if depths:
        options: Any = {"part": part, "batch": batch, "device": device}
        found = report_depths(folder, data, path, rows=rows, plot=plot, **options)
        if markdown:
            typer.echo(depth_markdown(found))
        else:
            show(depth_table(found))
        return
    if rows or markdown or plot:
        raise ValueError("--rows, --markdown and --plot are of depths: add --depths")
    scores = score(folder, data, path, part=cast("Part", part), batch=batch, device=device)
    typer.echo(str(scores))
    for name in scores.unreadable_paths:
        typer.echo(f"unreadable: {name}")


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
    show(terminal_summary(scores))
