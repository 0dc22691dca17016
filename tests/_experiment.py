"""Small runs of an experiment, on digits, and the execution of some."""

from __future__ import annotations

from dataclasses import replace

import _cli
from _runs import SMALL
from pliant.train.recipe import Recipe
from research.commands import app
from research.experiments import PlannedRun, execute

TINY = Recipe(
    name="tiny",
    model="resnet20_cifar",
    model_args=SMALL,
    pixels=8,
    epochs=1,
    batch=256,
    workers=0,
    threads=1,
    accelerator="cpu",
)
PLAIN = PlannedRun(network="resnet20", family="controls", label="plain", recipe=TINY)
REMOVED = replace(
    PLAIN,
    label="blocks removed",
    recipe=replace(TINY, model="resnet20_cifar_mod", model_args={**SMALL, "selection": "none"}),
)
ADN = replace(
    PLAIN,
    family="adn",
    label="ADN",
    recipe=replace(TINY, model="resnet20_cifar_adn", objective="specialize"),
)


def executed(runs, place, **options):
    """Labels of the rows that are added, and what is told."""
    told = []
    added = execute(runs, place / "rows.csv", place / "runs", tell=told.append, **options)
    return [s.label for s in added], told


def command(*arguments, code=0):
    """What ``python -m research experiment`` prints."""
    return _cli.run("experiment", *arguments, app=app, code=code)
