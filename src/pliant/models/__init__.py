"""Plain networks by name, and how a named network is registered with timm."""

from __future__ import annotations

from pliant.models._build import PlainNetwork, list_networks, register
from pliant.models.cifar import CIFAR_RESNETS
from pliant.models.mobile import MOBILENETS_V1, MOBILENETS_V2
from pliant.models.resnet import RESNETS
from pliant.models.vit import VITS

# What a method's named networks are converted from.
PLAIN_NETWORKS: dict[str, PlainNetwork] = {
    **RESNETS,
    **CIFAR_RESNETS,
    **MOBILENETS_V1,
    **MOBILENETS_V2,
    **VITS,
}

__all__ = ["PLAIN_NETWORKS", "PlainNetwork", "list_networks", "register"]
