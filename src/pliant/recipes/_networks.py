"""Short names of networks in recipes: ``resnet18_mod`` for ``resnet18_cifar_mod``."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from pliant.models import list_networks

# Published baselines beside pliant's own networks, which timm has by the same name.
PLAIN = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def cifar_networks() -> dict[str, str]:
    """Timm's names of the CIFAR-form networks, by short name.

    Example:
        >>> cifar_networks()["resnet50_mod"]
        'resnet50_cifar_mod'
    """
    return {name.replace("_cifar", ""): name for name in list_networks() if "_cifar" in name}


def imagenet_networks() -> list[str]:
    """Names of the networks for large images."""
    return [*PLAIN, *(name for name in list_networks() if "_cifar" not in name)]


def cifar_network(short: str) -> str:
    """Timm's name of a CIFAR-form network.

    Raises:
        ValueError: there is none of this short name; close ones are listed.
    """
    known = cifar_networks()
    if short not in known:
        raise ValueError(f"no network {short!r} for small images; {close(short, known)}")
    return known[short]


def close(name: str, known: Iterable[str]) -> str:
    """What to say of a name that is not known."""
    known = sorted(known)
    found = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {', '.join(found)}?" if found else f"known: {', '.join(known)}"
