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

from functools import partial

from timm.models.resnet import ResNet
from timm.models.vision_transformer import VisionTransformer

from pliant.methods.adaptive_depth.method import AdaptiveDepth
from pliant.models._build import register
from pliant.models.cifar import CIFAR_NETWORKS, CIFAR_SIZE, feature_levels
from pliant.models.mobile import MOBILE, mobilenet
from pliant.models.resnet import RESNETS

# Twelve layers of ViT-Base and of DeiT-Tiny (Dosovitskiy 2021; Touvron 2021).
VITS = {
    "vit_base_patch32": {"patch_size": 32, "embed_dim": 768, "depth": 12, "num_heads": 12},
    "vit_tiny_patch16": {"patch_size": 16, "embed_dim": 192, "depth": 12, "num_heads": 3},
}

for _base in ("resnet18", "resnet34", "resnet50", "resnet101"):
    _block, _layers = RESNETS[_base]
    register(
        __name__,
        f"{_base}_adn",
        partial(ResNet, block=_block, layers=_layers),
        methods=(AdaptiveDepth,),
    )

for _base in ("resnet18", "resnet20", "resnet56", "resnet50"):
    register(
        __name__,
        f"{_base}_cifar_adn",
        CIFAR_NETWORKS[_base],
        methods=(AdaptiveDepth,),
        input_size=CIFAR_SIZE,
        num_classes=10,
        feature_levels=feature_levels(_base),
    )

register(
    __name__,
    "mobilenetv2_adn",
    partial(mobilenet, version=2),
    methods=(AdaptiveDepth,),
    flatten=True,
    config=MOBILE,
    # The paper does not say which blocks; of the stages of two, none.
    skippable=(0, 0, 1, 1, 1, 1, 0),
)

for _base, _size in VITS.items():
    register(
        __name__,
        f"{_base}_adn",
        partial(VisionTransformer, **_size),
        methods=(AdaptiveDepth,),
        config={"first_conv": "patch_embed.proj", "classifier": "head"},
        feature_levels=(2, 5, 8, 11),  # what leaves each of the four groups
        feature_class="getter",
    )
