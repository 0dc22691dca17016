"""CIFAR-10: recipes of ours; the methods bring those of their papers (`Method.recipes`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pliant.models._build import base_of
from pliant.recipes._networks import cifar_network, objective_of, start_arguments
from pliant.train.recipe import PLAIN_TEACHER, Recipe

SHARED: dict[str, Any] = {"data": "cifar10", "path": "data/cifar10"}
network_of = cifar_network


def short(network: str = "resnet18_mod") -> Recipe:
    """30 epochs: bf16, cosine after a warm-up, Nesterov, smoothed labels, EMA. Ours."""
    return Recipe(
        name=f"cifar10.{network}",
        note="ours; short and modern",
        model=(model := network_of(network)),
        **SHARED,
        epochs=30,
        batch=128,
        lr=0.2,
        nesterov=True,
        weight_decay=5e-4,
        decay_all=False,
        schedule="cosine",
        warmup=3,
        objective=objective_of(model),
        smoothing=0.1,
        augmentation="flip_crop",
        erasing=0.25,
        ema=0.998,
        precision="bf16",
        channels_last=True,
    )


def controls(network: str = "resnet20_mod") -> Recipe:
    """12 epochs of `short`, so that a network and all its controls fit a CPU. Ours.

    A run this short has one epoch of warm-up and no random erasing. The rows of
    `python -m research experiment cifar10-controls` are of this form; `Score.recipe` names it, so that
    the rows say how they were trained.

    Example:
        >>> recipe = controls("resnet20")
        >>> recipe.name, recipe.epochs, recipe.warmup
        ('cifar10.resnet20.controls', 12, 1.0)
    """
    whole = short(network)
    return replace(
        whole,
        name=f"{whole.name}.controls",
        note="ours; short, for many controls on a CPU",
        epochs=12,
        warmup=1,
        erasing=0,
    )


def recover(network: str = "resnet20_mod") -> Recipe:
    """3 epochs that mend a trained network after its conversion, taught by what it was. Ours.

    It starts from the plain network's weights, ``weights=``: by default what the `short` recipe of
    the plain network left. Each method keeps what it can of them
    (`pliant.train.weights.load_weights`), and the teacher is the network before the conversion. A
    plain network's form, trained on alike, is the control. ``python -m research recover``, from a
    checkout, reports the accuracy of each epoch, with and without the teacher (`research.recovery`).

    Example:
        >>> recipe = recover("resnet20_mod")
        >>> recipe.teacher, recipe.weights, recipe.model_args
        ('plain', 'runs/cifar10.resnet20-s0', {'zero_init_last': True})
    """
    whole = short(network)
    plain = base_of(whole.model).replace("_cifar", "")
    return replace(
        whole,
        name=f"{whole.name}.recover",
        note="ours; mends a trained network after its conversion",
        model_args=start_arguments(whole.model),
        weights=f"runs/{short(plain).name}-s0",
        teacher=PLAIN_TEACHER,
        epochs=3,
        lr=0.02,
        warmup=0.25,
        smoothing=0,
        erasing=0,
        ema=None,
        test_each=True,
    )


FORMS: dict[str, Callable[[str], Recipe]] = {
    "short": short,
    "controls": controls,
    "recover": recover,
}
