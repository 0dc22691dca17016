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


def plain_network(short: str) -> str:
    """Short name of the plain network behind a converted one.

    Example:
        >>> [plain_network(name) for name in ("resnet20_mod_adn", "cc_mobilenetv1_025", "resnet20")]
        ['resnet20', 'mobilenetv1_w025', 'resnet20']
    """
    base, *_ = short.removeprefix("cc_").partition("_mod")[0].partition("_adn")
    base = base.removesuffix("_cc")
    # MobileNetV1's plain widths have a letter more, because timm took the name without.
    return base.replace("mobilenetv1_", "mobilenetv1_w") if short.startswith("cc_") else base


def start_arguments(short: str) -> dict[str, bool]:
    """Options by which a converted network keeps what it can of a trained one.

    Experts start as copies; narrow blocks start as no blocks, so that nothing untrained is added.

    Example:
        >>> start_arguments("resnet20_mod_cc"), start_arguments("resnet20_adn")
        ({'zero_init_last': True, 'upcycle': True}, {})
    """
    parts = short.split("_")
    mod = {"zero_init_last": True} if "mod" in parts else {}
    return mod | ({"upcycle": True} if "cc" in parts else {})


def close(name: str, known: Iterable[str]) -> str:
    """What to say of a name that is not known."""
    known = sorted(known)
    found = difflib.get_close_matches(name, known, n=3)
    return f"did you mean {', '.join(found)}?" if found else f"known: {', '.join(known)}"
