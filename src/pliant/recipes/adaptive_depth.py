"""Adaptive networks in recipes: their objective, and Table 3 of the paper as four forms.

*Specialization of Sub-paths for Adaptive Depth Networks*, arXiv 2312.16392. Every form of a
``*_adn`` network trains by Algorithm 1, but for those of the ablation without it:
``imagenet.resnet50_adn.ablation-norms`` has the second norms, and no specialization.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from pliant.recipes.ablations import PREFIX
from pliant.train.recipe import ObjectiveName, Recipe

# Table 3: whether sub-paths are specialised, and whether norms are skip-aware.
TABLE3 = {
    "neither": (False, False),
    "norms": (False, True),
    "specialization": (True, False),
    "both": (True, True),
}


def is_adaptive(network: str) -> bool:
    """Whether a network, named as in recipes, has adaptive depth."""
    return network.endswith("_adn")


def objective_of(network: str) -> ObjectiveName:
    """What a network, named as in recipes, minimises.

    Example:
        >>> objective_of("resnet50_adn"), objective_of("resnet50")
        ('specialize', 'cross_entropy')
    """
    return "specialize" if is_adaptive(network) else "cross_entropy"


def table3_forms(base: Callable[[str], Recipe]) -> dict[str, Callable[[str], Recipe]]:
    """Table 3 as forms of a recipe; ``both`` is the recipe itself.

    Args:
        base: gives the recipe of a network.

    Example:
        >>> from pliant.recipes import cifar10
        >>> recipe = table3_forms(cifar10.short)["ablation-neither"]("resnet20_adn")
        >>> recipe.name, recipe.objective, recipe.model_args
        ('cifar10.resnet20_adn.ablation-neither', 'joint', {'switchable_norms': False})
    """

    def form(name: str, specialize: bool, norms: bool) -> Callable[[str], Recipe]:
        def recipe(network: str) -> Recipe:
            if not is_adaptive(network):
                raise ValueError(f"this ablation is of *_adn networks, not of {network!r}")
            whole = base(network)
            return replace(
                whole,
                name=f"{whole.name.removesuffix('.paper')}.{PREFIX}{name}",
                objective="specialize" if specialize else "joint",
                model_args={**whole.model_args, **({} if norms else {"switchable_norms": False})},
            )

        return recipe

    return {f"{PREFIX}{name}": form(name, *parts) for name, parts in TABLE3.items()}
