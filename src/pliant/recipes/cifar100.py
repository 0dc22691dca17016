"""CIFAR-100: as CIFAR-10."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from pliant.recipes import cifar10
from pliant.train.recipe import Recipe

SHARED: dict[str, Any] = {"data": "cifar100", "path": "data/cifar100"}
network_of = cifar10.network_of


def short(network: str = "resnet18_mod") -> Recipe:
    """As `cifar10.short`.

    Example:
        >>> short("resnet34").name, short("resnet34").data
        ('cifar100.resnet34', 'cifar100')
    """
    return replace(cifar10.short(network), name=f"cifar100.{network}", **SHARED)


FORMS: dict[str, Callable[[str], Recipe]] = {"short": short}
