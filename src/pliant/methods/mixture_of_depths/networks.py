"""The Mixture-of-Depths networks by name (Tables 1, 5, 7 and 11 of arXiv 2409.17016).

``resnet{18,26,34,42,50,75,86,101,152}_mod`` for 224 x 224 images, and the CIFAR forms
``resnet{18,34,50}_cifar_mod`` and ``resnet{20,56}_cifar_mod`` (narrow, so with a selector
of reduction 4). Every option of `MixtureOfDepths` is a keyword of ``timm.create_model``.

Example:
    >>> import timm, pliant
    >>> timm.create_model("resnet50_mod", c=16, order="index", num_classes=10).num_classes
    10
"""

from __future__ import annotations

from pliant.methods.mixture_of_depths.method import MixtureOfDepths
from pliant.models import PLAIN_NETWORKS, register
from pliant.models.cifar import CIFAR_RESNETS
from pliant.models.resnet import RESNETS

for _base in (*RESNETS, *CIFAR_RESNETS):
    _name = MixtureOfDepths.network_name(_base)
    register(__name__, _name, PLAIN_NETWORKS[_base], base=_base, methods=(MixtureOfDepths,))
