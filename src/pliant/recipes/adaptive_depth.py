"""Adaptive networks in recipes: their objective, and Table 3 of the paper as four forms.

*Specialization of Sub-paths for Adaptive Depth Networks*, arXiv 2312.16392. Every form of a
``*_adn`` network trains by Algorithm 1, but for those of the ablation without it:
``imagenet.resnet50_adn.ablation-norms`` has the second norms, and no specialization.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from pliant.recipes.ablations import PREFIX
from pliant.train.recipe import Recipe

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


def objective_of(network: str) -> str:
    """What a network, named as in recipes, minimises.

    Example:
        >>> objective_of("resnet50_adn"), objective_of("resnet50")
        ('specialize', 'cross_entropy')
    """
    return "specialize" if is_adaptive(network) else "cross_entropy"


def base_arguments(model: str, model_args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that give a plain network the depth of its adaptive form's base-net.

    So it is trained by itself, which is the paper's control ("individual", Table 1).

    Args:
        model: a plain network of timm.
        model_args: its arguments.

    Raises:
        ValueError: its blocks are not counted by an argument that is known here.

    Example:
        >>> base_arguments("resnet50", {"in_chans": 1})
        {'in_chans': 1, 'layers': [2, 2, 3, 2]}
    """
    import timm
    import torch

    from pliant.anatomy import RemovedBlock, stages
    from pliant.counting import count_parameters
    from pliant.methods.adaptive_depth import AdaptiveDepth
    from pliant.methods.adaptive_depth.depth import get_depth, subnet
    from pliant.surgery import convert

    with torch.device("meta"):
        plain = timm.create_model(model, **model_args)
        network = convert(plain, AdaptiveDepth())
        cut = subnet(network, (True,) * len(get_depth(network)), share=True)
        left = [
            sum(not isinstance(cut.get_submodule(block.path), RemovedBlock) for block in stage.blocks)
            for stage in stages(plain)
        ]
        # By timm's names: of ResNet, of ConvNeXt, of vision transformers.
        for name, value in (("layers", left), ("depths", left), ("depth", left[0])):
            found = {**model_args, name: value}
            try:
                alone = timm.create_model(model, **found)
            except (TypeError, AssertionError):  # RegNet's builder asserts
                continue
            if count_parameters(alone) == count_parameters(cut):
                return found
    raise ValueError(f"{model} has no argument that gives it the base network's {sum(left)} blocks")


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
