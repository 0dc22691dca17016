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

import inspect
from functools import partial
from typing import Any

from torch import nn

from pliant.methods.adaptive_depth import AdaptiveDepth
from pliant.methods.condconv import CondConv
from pliant.methods.mixture_of_depths import MixtureOfDepths
from pliant.models._build import Builder, register
from pliant.models.cifar import CIFAR_NETWORKS, CIFAR_SIZE, feature_levels
from pliant.surgery import Method, convert

# As the networks of one method by name: see `pliant.models.mod` and `pliant.models.condconv`.
_MOD: dict[str, Any] = {"reduction": 4}
_CONDCONV: dict[str, Any] = {"upcycle": False}


def _converted(build: Builder, method: type[Method], defaults: dict[str, Any], **kwargs: Any) -> nn.Module:
    """The network of `build` by a method, whose options are among the keywords."""
    options = inspect.signature(method).parameters.keys() & kwargs.keys()
    chosen = defaults | {name: kwargs.pop(name) for name in options}
    return convert(build(**kwargs), method(**chosen), inplace=True)


_BASE = "resnet20"
_PAIRS: dict[str, tuple[type[Method], dict[str, Any], type[Method], dict[str, Any]]] = {
    "mod_adn": (MixtureOfDepths, _MOD, AdaptiveDepth, {}),
    "cc_adn": (CondConv, _CONDCONV, AdaptiveDepth, {}),
    "mod_cc": (MixtureOfDepths, _MOD, CondConv, _CONDCONV),
}

for _name, (_first, _options, _second, _defaults) in _PAIRS.items():
    register(
        __name__,
        f"{_BASE}_cifar_{_name}",
        partial(_converted, CIFAR_NETWORKS[_BASE], _first, _options),
        method=_second,
        input_size=CIFAR_SIZE,
        num_classes=10,
        feature_levels=feature_levels(_BASE),
        **_defaults,
    )
