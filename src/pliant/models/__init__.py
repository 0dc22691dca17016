"""Named networks, registered with timm when `pliant` is imported."""

from __future__ import annotations

import timm

from pliant.models import adn, cifar, combined, condconv, mobile, mod

__all__ = ["adn", "cifar", "combined", "condconv", "list_networks", "mobile", "mod"]


def list_networks() -> list[str]:
    """Names of all networks that pliant registers with timm, sorted.

    Example:
        >>> "resnet50_mod" in list_networks()
        True
    """
    # timm goes by the last part of a module's name, which another package may share.
    homes = {module.__name__ for module in (adn, cifar, combined, condconv, mobile, mod)}
    names = [name for home in homes for name in timm.list_models(module=home.rpartition(".")[2])]
    return sorted(name for name in names if timm.model_entrypoint(name).__module__ in homes)
