"""ImageNet: a short recipe of ours; the methods bring those of their papers (`Method.recipes`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pliant.models._build import check_network
from pliant.recipes._networks import objective_of
from pliant.train.recipe import Recipe

DATA: dict[str, Any] = {"data": "imagenet", "path": "data/imagenet", "val_fraction": None}
# What the papers' recipes share: 224 pixels, momentum, crops and flips.
SHARED: dict[str, Any] = {
    **DATA,
    "pixels": 224,
    "resize": 256,
    "momentum": 0.9,
    "augmentation": "flip_crop",
    "workers": 8,
}


def network_of(name: str) -> str:
    """The network of a recipe: any of timm's.

    Raises:
        ValueError: timm has none of this name; close ones are listed.
    """
    check_network(name)
    return name


def short(network: str = "resnet50_mod") -> Recipe:
    """18 epochs of 176 px: bf16, cosine after a warm-up, smoothed labels. Ours."""
    return Recipe(
        name=f"imagenet.{network}",
        note="ours; short and modern",
        model=(model := network_of(network)),
        **DATA,
        pixels=176,
        resize=232,
        epochs=18,
        batch=256,
        lr=0.5,
        nesterov=True,
        weight_decay=5e-5,
        decay_all=False,
        schedule="cosine",
        warmup=2,
        objective=objective_of(model),
        smoothing=0.1,
        augmentation="flip_crop",
        ema=0.9999,
        precision="bf16",
        channels_last=True,
        workers=8,
    )


FORMS: dict[str, Callable[[str], Recipe]] = {"short": short}
