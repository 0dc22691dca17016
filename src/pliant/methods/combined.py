"""CIFAR networks of two methods by name, for experiments on how these add up.

``resnet20_cifar_mod_adn``, ``resnet20_cifar_cc_adn``, ``resnet20_cifar_mod_cc``: the methods in
the order in which they are applied. Every option of both is a keyword of ``timm.create_model``.

Example:
    >>> import timm, pliant
    >>> model = timm.create_model("resnet20_cifar_mod_adn", c=8)
    >>> [type(record.method).__name__ for record in pliant.surgery.conversions(model)]
    ['MixtureOfDepths', 'AdaptiveDepth']
"""

from __future__ import annotations

from pliant.method import Method
from pliant.methods.adaptive_depth.method import AdaptiveDepth
from pliant.methods.condconv.method import CondConv
from pliant.methods.mixture_of_depths.method import MixtureOfDepths
from pliant.models import PLAIN_NETWORKS, register

_BASE = "resnet20_cifar"
_PAIRS: dict[str, tuple[type[Method], ...]] = {
    "mod_adn": (MixtureOfDepths, AdaptiveDepth),
    "cc_adn": (CondConv, AdaptiveDepth),
    "mod_cc": (MixtureOfDepths, CondConv),
}

for _name, _methods in _PAIRS.items():
    register(__name__, f"{_BASE}_{_name}", PLAIN_NETWORKS[_BASE], base=_BASE, methods=_methods)
