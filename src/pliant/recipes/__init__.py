"""Recipes by name: ``<data>.<network>`` or ``<data>.<network>.<form>``.

A recipe is a function of a network's name that returns a `Recipe`; each module here has some of ours,
its *forms*. The name is short (``resnet18_mod`` for ``resnet18_cifar_mod``), for ImageNet any of timm's.
``short`` is the form that a name without one means: ``cifar10.resnet50_mod`` is
``cifar10.short("resnet50_mod")``.

Methods add forms: the recipes of their papers, for every network (`Method.recipes`), ``paper`` among
them; and their ablations, for their own networks (``ablation-<name>``, `Method.ablations`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from pliant._options import suggestion
from pliant.methods import METHODS
from pliant.models._build import methods_of
from pliant.recipes import cifar10, cifar100, digits, imagenet
from pliant.recipes._networks import cifar_networks, imagenet_networks, objective_of
from pliant.train.recipe import Recipe

__all__ = ["get_recipe", "list_recipes"]

_DATA: dict[str, Any] = {"digits": digits, "cifar10": cifar10, "cifar100": cifar100, "imagenet": imagenet}
_ABLATION = "ablation-"


def list_recipes() -> list[str]:
    """Names of all recipes, as `get_recipe` takes them.

    Example:
        >>> names = list_recipes()
        >>> "digits.resnet18_mod" in names, "cifar10.resnet20.paper" in names
        (True, True)
    """
    return [
        f"{data}.{network}" + ("" if form == "short" else f".{form}")
        for data in _DATA
        for network in _networks(data)
        for form in _forms(data)
        if _is_of(data, network, form)
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
        >>> get_recipe("imagenet.cc_mobilenetv1_025.ablation-single").model_args
        {'experts': 32, 'routing': 'single'}
        >>> recipe = get_recipe("imagenet.resnet50_adn.paper")
        >>> recipe.epochs, recipe.step_size, recipe.objective
        (150, 50, 'specialize')
    """
    data, dot, rest = name.partition(".")
    if data not in _DATA or not dot or not rest:
        known = list_recipes() if data in _DATA else [f"{d}.{n}" for d in _DATA for n in _networks(d)]
        raise ValueError(f"no recipe {name!r}; {suggestion(name, known)}")
    network, _, form = rest.rpartition(".")
    if not network or form not in _forms(data):  # timm's names may have dots: resnet50.a1_in1k
        network, form = rest, "short"
    try:
        return _recipe(data, network, form)
    except ValueError as error:
        raise ValueError(f"no recipe {name!r}: {error}") from error


def _forms(data: str) -> list[str]:
    """Names of all forms of recipes of a data set."""
    found = dict.fromkeys(_DATA[data].FORMS)
    for method in METHODS.values():
        found |= dict.fromkeys(method.recipes.get(data, ()))
        found |= {f"{_ABLATION}{name}": None for name in method.ablations}
    return list(found)


def _recipe(data: str, network: str, form: str) -> Recipe:
    """One form of a network's recipe.

    Raises:
        ValueError: there is no such network, or it has no such form.
    """
    home = _DATA[data]
    if form.startswith(_ABLATION):
        return _ablation(data, network, form.removeprefix(_ABLATION))
    if form == "paper":
        for method in reversed(methods_of(home.network_of(network))):
            if data in method.paper:
                whole = _recipe(data, network, method.paper[data])
                return replace(whole, name=f"{data}.{network}.paper")
    if form in home.FORMS:
        own: Recipe = home.FORMS[form](network)
        return own
    settings = next(m.recipes[data][form] for m in METHODS.values() if form in m.recipes.get(data, ()))
    model = home.network_of(network)
    shared = home.SHARED | {"objective": objective_of(model)}
    return Recipe(name=f"{data}.{network}.{form}", model=model, **(shared | dict(settings(network))))


def _ablation(data: str, network: str, name: str) -> Recipe:
    """An ablation of one of the network's methods: a change of its paper's recipe, or of `short`."""
    methods = [m for m in METHODS.values() if name in m.ablations]
    own = [m for m in methods_of(_DATA[data].network_of(network)) if m in methods]
    method = (own or methods)[0]
    shared = method.check_ablation(data, network)
    if not own:
        raise ValueError(f"this ablation is of networks of {method.__name__}, not of {network!r}")
    whole = _recipe(data, network, "paper" if data in method.paper else "short")
    changes = dict(method.ablations[name])
    arguments = {**whole.model_args, **shared, **changes.pop("model_args", {})}
    title = f"{whole.name.removesuffix('.paper')}.{_ABLATION}{name}"
    return replace(whole, name=title, model_args=arguments, **changes)


def _is_of(data: str, network: str, form: str) -> bool:
    """Whether a form is of this network: it refuses others itself."""
    try:
        _recipe(data, network, form)
    except ValueError:
        return False
    return True


def _networks(data: str) -> Iterable[str]:
    return imagenet_networks() if data == "imagenet" else cifar_networks()
