"""Short names of networks in recipes: ``resnet18_mod`` for ``resnet18_cifar_mod``."""

from __future__ import annotations

from typing import Any

from pliant._options import suggestion
from pliant.models import list_networks
from pliant.models._build import methods_of

# Published baselines beside pliant's own networks, which timm has by the same name.
_BASELINES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def cifar_networks() -> dict[str, str]:
    """Timm's names of the CIFAR-form networks, by short name.

    Example:
        >>> cifar_networks()["resnet50_mod"]
        'resnet50_cifar_mod'
    """
    return {name.replace("_cifar", ""): name for name in list_networks() if "_cifar" in name}


def imagenet_networks() -> list[str]:
    """Names of the networks for large images."""
    return [*_BASELINES, *(name for name in list_networks() if "_cifar" not in name)]


def cifar_network(short: str) -> str:
    """Timm's name of a CIFAR-form network.

    Raises:
        ValueError: there is none of this short name; close ones are listed.
    """
    known = cifar_networks()
    if short not in known:
        raise ValueError(f"no network {short!r} for small images; {suggestion(short, known)}")
    return known[short]


def objective_of(model: str) -> str:
    """What a network of timm minimises: the objective of its last method that brings one.

    Example:
        >>> objective_of("resnet50_adn"), objective_of("resnet50")
        ('specialize', 'cross_entropy')
    """
    found = [method.objective for method in methods_of(model) if method.objective]
    return found[-1] if found else "cross_entropy"


def start_arguments(model: str) -> dict[str, Any]:
    """Options by which a network of timm keeps what it can of its plain form's weights.

    Example:
        >>> start_arguments("resnet20_cifar_mod_cc"), start_arguments("resnet20_cifar_adn")
        ({'zero_init_last': True, 'upcycle': True}, {})
    """
    return {k: v for method in methods_of(model) for k, v in method.start.items()}
