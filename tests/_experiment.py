"""Small cells of an experiment, on digits, and a walk through some."""

from __future__ import annotations

from dataclasses import replace

import _cli
from pliant.train.recipe import Recipe
from research.commands import app
from research.experiments import Cell, run_cells

TINY = Recipe(
    name="tiny",
    model="resnet20_cifar",
    pixels=8,
    epochs=1,
    batch=256,
    workers=0,
    threads=1,
    accelerator="cpu",
)
PLAIN = Cell(network="resnet20", family="controls", label="plain", recipe=TINY)
REMOVED = replace(
    PLAIN,
    label="blocks removed",
    recipe=replace(TINY, model="resnet20_cifar_mod", model_args={"selection": "none"}),
)
ADN = replace(
    PLAIN,
    family="adn",
    label="ADN",
    recipe=replace(TINY, model="resnet20_cifar_adn", objective="specialize"),
)


def walk(cells, place, **options):
    """Labels of the rows that a walk adds, and what it tells."""
    told = []
    added = run_cells(cells, place / "rows.csv", place / "runs", tell=told.append, **options)
    return [s.label for s in added], told


def run(*arguments, code=0):
    """What ``python -m research experiment`` prints."""
    return _cli.run("experiment", *arguments, app=app, code=code)
