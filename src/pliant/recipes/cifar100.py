"""CIFAR-100: as CIFAR-10, whose recipes the paper shares (appendix D)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pliant.recipes import cifar10
from pliant.recipes._networks import cifar_network
from pliant.train.recipe import Recipe

SHARED: dict[str, Any] = {"data": "cifar100", "path": "data/cifar100"}
network_of = cifar_network


def short(network: str = "resnet18_mod") -> Recipe:
    """As `cifar10.short`.

    Args:
        network: a short name, such as ``"resnet18_mod"`` or ``"resnet20"``.
    """
    return cifar10.for_cifar100(cifar10.short(network))


def paper(network: str = "resnet18_mod") -> Recipe:
    """As `cifar10.paper`.

    Args:
        network: a short name; the paper's are resnet18, 34 and 50, plain and ``_mod``.

    Example:
        >>> paper("resnet34").name, paper("resnet34").data
        ('cifar100.resnet34.paper', 'cifar100')
    """
    return cifar10.for_cifar100(cifar10.paper(network))


FORMS: dict[str, Callable[[str], Recipe]] = {"short": short, "paper": paper}
