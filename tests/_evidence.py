"""Rows of experiments, made by hand."""

from __future__ import annotations

import json

from pliant.compare import Score
from pliant.measuring.rows import Measurement
from research.experiments.plans import planned_runs

NAME = "cifar10-controls"
RUNS = planned_runs(NAME)
VARIANTS = "cifar10-variants"


def scores_of(accuracies, runs=RUNS):
    """Rows for {label: accuracies of seeds 0, 1, ...}."""
    found = []
    for run in runs:
        recipe = run.recipe
        for label in run.labels:
            if recipe.seed < len(accuracies.get(label, ())):
                found.append(
                    Score(
                        label=label,
                        recipe=recipe.name,
                        model=recipe.model,
                        model_args=json.dumps(dict(recipe.model_args)),
                        data="cifar10",
                        pixels=32,
                        epochs=recipe.epochs,
                        seed=recipe.seed,
                        parameters=1000,
                        macs=2_000_000,
                        train_accuracy=0.9,
                        train_ce=0.3,
                        val_accuracy=0.88,
                        gap=0.02,
                        test_accuracy=round(accuracies[label][recipe.seed] / 100, 6),
                        seconds=600.0,
                        cpu="a CPU",
                        cores=2,
                    )
                )
    return found


def times_of(ratios, engine="eager", batch=1, spread=0.01):
    """Rows for {label: time ratio}."""
    return [
        Measurement(
            model=f"resnet20: {label}",
            engine=engine,
            batch=batch,
            median_ms=10 * ratio,
            time_ratio=ratio,
            time_ratio_iqr=spread,
            against="resnet20: plain",
        )
        for label, ratio in ratios.items()
    ]
