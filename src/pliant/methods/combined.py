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

from typing import Any

from pliant.methods.adaptive_depth.method import AdaptiveDepth
from pliant.methods.condconv.method import CondConv
from pliant.methods.mixture_of_depths.method import MixtureOfDepths
from pliant.models._build import register
from pliant.models.cifar import CIFAR_NETWORKS, CIFAR_SIZE, feature_levels
from pliant.surgery import Method

# As the networks of one method by name, in the folders of the methods.
_MOD: dict[str, Any] = {"reduction": 4}
_CONDCONV: dict[str, Any] = {"upcycle": False}

_BASE = "resnet20"
_PAIRS: dict[str, tuple[tuple[type[Method], ...], dict[str, Any]]] = {
    "mod_adn": ((MixtureOfDepths, AdaptiveDepth), _MOD),
    "cc_adn": ((CondConv, AdaptiveDepth), _CONDCONV),
    "mod_cc": ((MixtureOfDepths, CondConv), _MOD | _CONDCONV),
}

for _name, (_methods, _defaults) in _PAIRS.items():
    register(
        __name__,
        f"{_BASE}_cifar_{_name}",
        CIFAR_NETWORKS[_BASE],
        methods=_methods,
        input_size=CIFAR_SIZE,
        num_classes=10,
        feature_levels=feature_levels(_BASE),
        **_defaults,
    )
