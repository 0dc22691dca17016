"""Commands that train and score."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, cast

import typer

from pliant.commands._common import Changes, Data, going_on, show


def recipes() -> None:
    """List the training recipes."""
    from pliant.recipes import get_recipe, list_recipes

    for name in list_recipes():
        # The recipe.json of each run has the whole note, of several lines.
        typer.echo(f"{name:34} {get_recipe(name).note.partition(':')[0]}")


def train(
    recipe: Annotated[str, typer.Argument(help="Name of a recipe, such as digits.resnet18_mod")],
    changes: Changes = None,
    folder: Annotated[
        Path | None, typer.Option(help="Folder of the run; by default runs/<recipe>-s<seed>")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in the folder")] = False,
    progress: Annotated[bool, typer.Option(help="Show a progress bar")] = True,
) -> None:
    """Train a network by a recipe.

    The epoch of the best validation accuracy is saved and tested.
    """
    from pliant.recipes import get_recipe
    from pliant.train import fit
    from pliant.train.recipe import override

    chosen = override(get_recipe(recipe), changes or [])
    with going_on():
        run = fit(chosen, folder, resume=resume, progress=progress)
    typer.echo(f"best epoch {run.best_epoch + 1}: validation {100 * run.val_accuracy:.2f} %")
    if (base := run.history[run.best_epoch].get("val_accuracy_base")) is not None:
        typer.echo(
            f"base network: validation {100 * base:.2f} %; `pliant evaluate --depths` scores all depths"
        )
    if run.test_accuracy is not None:
        typer.echo(f"test {100 * run.test_accuracy:.2f} %")
    if run.unreadable:
        typer.echo(f"{run.unreadable} images could not be read; run.json names them")
    typer.echo(f"saved in {run.folder}")


def evaluate(
    folder: Annotated[
        Path, typer.Argument(help="Folder that `train` or `pliant.save` wrote, or file that `export` did")
    ],
    data: Data = None,
    path: Annotated[Path | None, typer.Option(help="Folder of the data; digits need none")] = None,
    part: Annotated[str, typer.Option(help="test or val")] = "test",
    batch: Annotated[int, typer.Option(help="Images a forward")] = 256,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda")] = "auto",
    depths: Annotated[
        bool, typer.Option("--depths", help="Score all depths of an adaptive network")
    ] = False,
    rows: Annotated[Path | None, typer.Option(help="With --depths: CSV file to append the rows to")] = None,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="With --depths: print a Markdown table")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="With --depths: figure to draw (.svg, .png, .pdf), accuracy against MACs"),
    ] = None,
) -> None:
    """Score a saved network on images, or all its depths."""
    from pliant.adaptive.scores import (
        depth_markdown,
        depth_table,
        evaluate_depths,
        plot_depths,
        write_depth_scores,
    )
    from pliant.figures import check_suffix
    from pliant.train import evaluate as score
    from pliant.train.data import Part

    if depths:
        # What cannot be written is refused before the scoring, not after.
        if plot is not None:
            check_suffix(plot)
        if rows is not None:
            write_depth_scores(rows, [], append=True)
        found = evaluate_depths(folder, data, path, part=cast("Part", part), batch=batch, device=device)
        if rows is not None:
            write_depth_scores(rows, found, append=True)
        if plot is not None:
            plot_depths(found, plot)
        if markdown:
            typer.echo(depth_markdown(found))
        else:
            show(depth_table(found))
        return
    if rows or markdown or plot:
        raise ValueError("--rows, --markdown and --plot are for depths; add --depths")
    scores = score(folder, data, path, part=cast("Part", part), batch=batch, device=device)
    typer.echo(str(scores))
    for name in scores.unreadable_paths:
        typer.echo(f"unreadable: {name}")


def compare(
    recipe: Annotated[str, typer.Argument(help="Recipe of the plain network, such as cifar10.resnet20")],
    changes: Changes = None,
    method: Annotated[
        str, typer.Option(help="Comparison of a method, such as mod, condconv, condconv-ablations or adn")
    ] = "mod",
    seeds: Annotated[int, typer.Option(help="Number of seeds, from the recipe's seed on", min=1)] = 1,
    only: Annotated[list[str] | None, typer.Option(help="Label to train; repeat for several")] = None,
    folder: Annotated[Path, typer.Option(help="Folder of the runs; finished ones are kept")] = Path(
        "runs/compare"
    ),
    rows: Annotated[Path | None, typer.Option(help="CSV file to append the scores to")] = None,
) -> None:
    """Train a network, its converted forms and controls.

    All are trained by one recipe and scored on the same images.
    """
    from pliant.compare import PLAIN, controls_by_name, terminal_summary, write_scores
    from pliant.compare import compare as run

    controls = controls_by_name(recipe, changes or [], method)
    unknown = set(only or ()) - controls.keys()
    if unknown:
        raise ValueError(f"there is no label {unknown.pop()!r}; the labels are {', '.join(controls)}")
    scores = []
    first = controls[PLAIN].seed
    with going_on("run the same command again to go on: finished runs are kept"):
        for seed in range(first, first + seeds):
            chosen = {k: replace(r, seed=seed) for k, r in controls.items() if not only or k in only}
            done = run(chosen, folder / recipe, started=lambda label, _: typer.echo(label))
            for score, _ in done.values():
                scores.append(score)
                if rows is not None:
                    write_scores(rows, [score], append=True)
    show(terminal_summary(scores))
