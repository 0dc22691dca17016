"""The adaptive depth networks by name (Tables 1 to 3 of arXiv 2312.16392), and CIFAR forms.

``resnet{18,34,50,101}_adn``, ``mobilenetv2_adn``, ``vit_base_patch32_adn`` and
``vit_tiny_patch16_adn`` for 224 x 224 images; ``resnet{18,20,50,56}_cifar_adn`` for 32 x 32.
Every option of `AdaptiveDepth` is a keyword of ``timm.create_model``; `pliant.set_depth`
switches.

Example:
    >>> import timm, pliant
    >>> model = timm.create_model("resnet50_adn", skippable=(0, 1, 2, 1), num_classes=10)
    >>> pliant.get_depth(model)
    (False, False, False)
"""

from __future__ import annotations

from pliant.methods.adaptive_depth.method import AdaptiveDepth
from pliant.models import PLAIN_NETWORKS, register
from pliant.models.vit import VITS

_BASES = [f"resnet{layers}" for layers in (18, 34, 50, 101)]
_BASES += [f"resnet{layers}_cifar" for layers in (18, 20, 56, 50)]

for _base in (*_BASES, *VITS):
    _name = AdaptiveDepth.network_name(_base)
    register(__name__, _name, PLAIN_NETWORKS[_base], base=_base, methods=(AdaptiveDepth,))

register(
    __name__,
    "mobilenetv2_adn",
    PLAIN_NETWORKS["mobilenetv2_100"],
    base="mobilenetv2_100",
    methods=(AdaptiveDepth,),
    # The paper does not say which blocks; of the stages of two, none.
    skippable=(0, 0, 1, 1, 1, 1, 0),
)
