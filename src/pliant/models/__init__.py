"""Plain networks by name, and how a named network is registered with timm."""

from __future__ import annotations

from pliant.models import cifar as cifar
from pliant.models import mobile as mobile
from pliant.models._build import list_networks

__all__ = ["list_networks"]
