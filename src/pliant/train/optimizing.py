"""The recipe's optimiser, and its learning rate as a function of the step."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from pliant.train.recipe import Recipe


def make_optimizer(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """The recipe's optimiser over the parameters of `model`.

    Example:
        >>> recipe = Recipe(name="example", model="resnet20_cifar", decay_all=False)
        >>> [g["weight_decay"] for g in make_optimizer(nn.Linear(2, 2), recipe).param_groups]
        [0.0, 0.0005]
    """
    groups: Iterable[Any] = [p for p in model.parameters() if p.requires_grad]
    if not recipe.decay_all:
        from timm.optim import param_groups_weight_decay

        groups = param_groups_weight_decay(model, recipe.weight_decay)
    if recipe.optimizer == "adamw":
        betas = (recipe.momentum, 0.999)
        return torch.optim.AdamW(groups, lr=recipe.lr, betas=betas, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        groups,
        lr=recipe.lr,
        momentum=recipe.momentum,
        nesterov=recipe.nesterov,
        weight_decay=recipe.weight_decay,
    )


def rate(recipe: Recipe, step: int, steps: int) -> float:
    """The learning rate at a step, as a share of the recipe's `lr`.

    Args:
        recipe: names the schedule.
        step: number of the step in the whole run, from 0.
        steps: steps in an epoch.

    Example:
        >>> recipe = Recipe(name="x", model="x", epochs=4, warmup=1, schedule="cosine")
        >>> [round(rate(recipe, step, 2), 3) for step in range(8)]
        [0.5, 1.0, 1.0, 0.933, 0.75, 0.5, 0.25, 0.067]
    """
    warmup = round(recipe.warmup * steps)
    if step < warmup:
        return (step + 1) / warmup
    if recipe.schedule == "step":
        return float(recipe.gamma ** (step // steps // recipe.step_size))
    if recipe.schedule == "cosine":
        done = (step - warmup) / max(1, recipe.epochs * steps - warmup)
        return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))
    return 1.0
