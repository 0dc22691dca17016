"""Digits: scikit-learn's 1797 handwritten digits of 8 x 8 pixels, at 16 x 16.

Wide ResNets are CIFAR's at a quarter of their width, so that one trains in well under a
minute on two cores. The recipe is ours: digits are in none of the papers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pliant.models import PLAIN_NETWORKS
from pliant.models._build import base_of, methods_of
from pliant.models.cifar import CIFAR_RESNETS
from pliant.recipes._networks import cifar_network, objective_of
from pliant.train.recipe import Recipe

SHARED: dict[str, Any] = {
    "data": "digits",
    "pixels": 16,
    "workers": 0,
    "threads": 1,  # more do not help so small a network, and the figures then hold on any machine
}
network_of = cifar_network


def short(network: str = "resnet18_mod") -> Recipe:
    """10 epochs of SGD with momentum, one cosine cycle; 95 % of test images and more.

    Example:
        >>> short("resnet18").model
        'resnet18_cifar'
    """
    model = network_of(network)
    arguments: dict[str, Any] = {}
    base = base_of(model)
    if base in CIFAR_RESNETS and not PLAIN_NETWORKS[base].narrow:
        arguments["channels"] = [16, 32, 64, 128]
        for method in methods_of(model):
            arguments |= method.narrow
    return Recipe(
        name=f"digits.{network}",
        note="ours; made for a first run",
        model=model,
        model_args=arguments,
        **SHARED,
        epochs=10,
        batch=32,
        lr=0.1,
        nesterov=True,
        weight_decay=5e-4,
        schedule="cosine",
        warmup=0.5,  # so that one epoch is a run too
        objective=objective_of(model),
        augmentation="crop",
    )


FORMS: dict[str, Callable[[str], Recipe]] = {"short": short}
