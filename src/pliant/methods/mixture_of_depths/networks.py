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

from functools import partial

from timm.models.resnet import ResNet

from pliant.methods.mixture_of_depths.method import MixtureOfDepths
from pliant.models._build import register
from pliant.models.cifar import CIFAR_NETWORKS, CIFAR_SIZE, feature_levels
from pliant.models.resnet import RESNETS

for _base, (_block, _layers) in RESNETS.items():
    register(
        __name__,
        f"{_base}_mod",
        partial(ResNet, block=_block, layers=_layers),
        methods=(MixtureOfDepths,),
    )

for _base, _build in CIFAR_NETWORKS.items():
    register(
        __name__,
        f"{_base}_cifar_mod",
        _build,
        methods=(MixtureOfDepths,),
        input_size=CIFAR_SIZE,
        num_classes=10,
        feature_levels=feature_levels(_base),
        # At r = 16, blocks of 16 and 32 channels would have one and two hidden units.
        reduction=4 if _base in ("resnet20", "resnet56") else 16,
    )
