"""Recipes by name: ``<data>.<network>`` or ``<data>.<network>.<form>``.

A recipe is a function of a network that returns a `Recipe`; each module here has some,
its *forms*. ``short`` is the form that a name without one means; ``paper`` is that of
the paper. So ``cifar10.resnet50_mod.paper`` is ``cifar10.paper("resnet50_mod")``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from pliant.recipes import cifar10, cifar100, digits, imagenet
from pliant.recipes._networks import cifar_networks, close, imagenet_networks
from pliant.train.recipe import Recipe

__all__ = ["get_recipe", "list_recipes"]

_FORMS: dict[str, dict[str, Callable[[str], Recipe]]] = {
    "digits": digits.FORMS,
    "cifar10": cifar10.FORMS,
    "cifar100": cifar100.FORMS,
    "imagenet": imagenet.FORMS,
}


def list_recipes() -> list[str]:
    """Names of all recipes, as `get_recipe` takes them.

    Example:
        >>> names = list_recipes()
        >>> "digits.resnet18_mod" in names, "cifar10.resnet20.paper" in names
        (True, True)
    """
    return [
        f"{data}.{network}" + ("" if form == "short" else f".{form}")
        for data, forms in _FORMS.items()
        for network in _networks(data)
        for form, recipe in forms.items()
        if _is_of(recipe, network)
    ]


def get_recipe(name: str) -> Recipe:
    """The recipe of a name.

    Args:
        name: ``"digits.resnet18_mod"``, ``"imagenet.resnet50_mod.paper"``. For
            ImageNet the network may be any of timm's.

    Raises:
        ValueError: there is none of this name; close ones are listed.

    Example:
        >>> get_recipe("digits.resnet18_mod").model
        'resnet18_cifar_mod'
    """
    data, dot, rest = name.partition(".")
    if data not in _FORMS or not dot or not rest:
        raise ValueError(
            f"no recipe {name!r}; {close(name, list_recipes() if data in _FORMS else _starts())}"
        )
    forms = _FORMS[data]
    network, _, form = rest.rpartition(".")
    if not network or form not in forms:  # timm's names may have dots: resnet50.a1_in1k
        network, form = rest, "short"
    try:
        return forms[form](network)
    except ValueError as error:
        raise ValueError(f"no recipe {name!r}: {error}") from error


def _is_of(recipe: Callable[[str], Recipe], network: str) -> bool:
    """Whether a form is of this network: it refuses others itself."""
    try:
        recipe(network)
    except ValueError:
        return False
    return True


def _networks(data: str) -> Iterable[str]:
    return imagenet_networks() if data == "imagenet" else cifar_networks()


def _starts() -> list[str]:
    return [f"{data}.{network}" for data in _FORMS for network in _networks(data)]
