"""The ablations of *CondConv* (arXiv 1904.04971, section 4.3) as forms of recipes.

Each changes one option of the network that the recipe trains: ``begin`` counts
MobileNetV1's units as Table 7 does. ``imagenet.cc_mobilenetv1_025.ablation-single`` is one
row of Table 6, with its 32 experts; ``pliant compare DATA.mobilenetv1_w025 --method
condconv-ablations`` trains them all with the network's own 8.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pliant.train.recipe import Recipe

ABLATIONS: dict[str, dict[str, Any]] = {
    "pointwise": {"layers": "pointwise"},  # Table 5
    "depthwise": {"layers": "depthwise"},
    "single": {"routing": "single"},  # Table 6
    "partially-shared": {"routing": "shared"},
    "hidden-small": {"hidden": 0.125},
    "hidden-medium": {"hidden": 1.0},
    "hidden-large": {"hidden": 8.0},
    "hierarchical": {"routing": "hierarchical"},
    "softmax": {"activation": "softmax"},
    "begin-1": {"begin": 1},  # Table 7; the network itself begins at 7
    "begin-3": {"begin": 3},
    "begin-5": {"begin": 5},
    "begin-13": {"begin": 13},
    "features-only": {"classifier": False},  # Table 8
    "classifier-only": {"features": False},
    "per-channel": {"per_channel": True},  # section 4.3.1 and figure 3
    "hard-2": {"active": 2},  # section 3: hard routing as a special case
}

PREFIX = "ablation-"


def ablation_forms(base: Callable[[str], Recipe], **shared: Any) -> dict[str, Callable[[str], Recipe]]:
    """The ablations as forms of a recipe.

    Args:
        base: gives the recipe of a network.
        shared: further options of every network (``experts=32``, as in the tables).

    Example:
        >>> from pliant.recipes import cifar10
        >>> recipe = ablation_forms(cifar10.short)["ablation-single"]("cc_mobilenetv1_025")
        >>> recipe.name, recipe.model_args
        ('cifar10.cc_mobilenetv1_025.ablation-single', {'routing': 'single'})
    """

    def form(name: str, options: dict[str, Any]) -> Callable[[str], Recipe]:
        def recipe(network: str) -> Recipe:
            if not has_ablations(network):
                raise ValueError(f"the ablations are of cc_mobilenetv1_* networks, not of {network!r}")
            plain = base(network)
            return replace(
                plain,
                name=f"{plain.name.removesuffix('.paper')}.{PREFIX}{name}",
                model_args={**plain.model_args, **shared, **options},
            )

        return recipe

    return {f"{PREFIX}{name}": form(name, options) for name, options in ABLATIONS.items()}


def has_ablations(network: str) -> bool:
    """Whether the ablations are of this network, named as in recipes."""
    return network.startswith("cc_mobilenetv1_")
