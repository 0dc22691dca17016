"""Named networks, registered with timm when `pliant` is imported."""

from __future__ import annotations

import timm

from pliant.models import cifar, mod

__all__ = ["cifar", "list_networks", "mod"]


def list_networks() -> list[str]:
    """Names of all networks that pliant registers with timm, sorted.

    Example:
        >>> "resnet50_mod" in list_networks()
        True
    """
    # timm goes by the last part of a module's name, which another package may share.
    homes = {cifar.__name__, mod.__name__}
    names = timm.list_models(module="cifar") + timm.list_models(module="mod")
    return sorted(name for name in names if timm.model_entrypoint(name).__module__ in homes)
