"""ImageNet: the recipes of the papers, and a short one of ours.

``paper`` is that of *CNN Mixture-of-Depths* (appendix A.1), or for ``cc_*`` networks that of
*CondConv* (section 4.1), which ``condconv`` gives for their plain base lines too, and for
``*_adn`` networks that of *Adaptive Depth Networks*, likewise ``adn``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import timm

from pliant.recipes._networks import close, imagenet_networks
from pliant.recipes.ablations import ablation_forms
from pliant.recipes.adaptive_depth import is_adaptive, objective_of, table3_forms
from pliant.train.recipe import Recipe

PAPER = (
    "arXiv 2409.17016, section 4.1 and appendix A.1: 100 epochs, batch 256 in all, SGD 0.1 times 0.1 "
    "every 30 epochs, momentum 0.9, weight decay 1e-4, 3 seeds (0 to 2), after PyTorch's reference "
    "(random resized crops and flips at 224 px, centre crop of 256). The official validation set gives "
    "the figure, as everyone's; the best epoch on it is chosen, which favours every network alike"
)

CONDCONV = (
    "arXiv 1904.04971, section 4.1: one recipe for all networks, batch norm momentum 0.1 (0.9 in "
    "TensorFlow's sense), no averaged weights. It gives no other setting ('following Kornblith et al. "
    "2018'); ours: 120 epochs, batch 256, SGD 0.1 with Nesterov momentum 0.9, weight decay 4e-5, cosine "
    "after 5 epochs of warm-up, random resized crops and flips at 224 px"
)
ADN = (
    "arXiv 2312.16392, section 4.1: Algorithm 1 with alpha 0.5; individual networks at the same settings, "
    "'most training settings in the original papers'"
)
# How each family is trained, and what of it is whose.
ADN_RESNET = (
    ", ResNets for 150 epochs. Of He et al. 2016: batch 256, SGD 0.1 with momentum 0.9, weight decay 1e-4, "
    "rate times 0.1 in steps. Ours: a step every 50 epochs, random resized crops and flips"
)
ADN_MOBILENET = (
    ". Of Sandler et al. 2018: rate 0.045 times 0.98 each epoch, weight decay 4e-5. Ours: 300 epochs, "
    "batch 256, SGD with momentum 0.9 in place of RMSProp, random resized crops and flips"
)
ADN_VIT = (
    "; ViT by DeiT's recipe (Touvron et al. 2020): 300 epochs, batch 1024, AdamW 1e-3, weight decay 0.05, "
    "cosine after 5 epochs of warm-up, smoothing 0.1, RandAugment 9/0.5, mixup 0.8, CutMix 1, erasing "
    "0.25, stochastic depth 0.1. Ours: no repeated augmentation"
)
REGULARIZED = (
    "; for networks of large capacity also AutoAugment, mixup 0.2 and dropout on the classifier's input "
    "(its rate is not given; ours: 0.2)"
)


def short(network: str = "resnet50_mod") -> Recipe:
    """18 epochs of 176 px: bf16, cosine after a warm-up, smoothed labels. Ours.

    Args:
        network: a network of pliant or of timm.
    """
    return Recipe(
        name=f"imagenet.{network}",
        note="ours; short and modern",
        model=_network(network),
        data="imagenet",
        path="data/imagenet",
        val_fraction=None,
        pixels=176,
        resize=232,
        epochs=18,
        batch=256,
        lr=0.5,
        nesterov=True,
        weight_decay=5e-5,
        decay_all=False,
        schedule="cosine",
        warmup=2,
        objective=objective_of(network),
        smoothing=0.1,
        augmentation="flip_crop",
        ema=0.9999,
        precision="bf16",
        channels_last=True,
        workers=8,
    )


def paper(network: str = "resnet50_mod") -> Recipe:
    """The paper's recipe; run it with seeds 0 to 2.

    For ``cc_*`` networks: `condconv`; for ``*_adn`` networks: `adn`.

    Args:
        network: a network of pliant or of timm.

    Example:
        >>> recipe = paper("resnet75_mod")
        >>> recipe.epochs, recipe.batch, recipe.schedule, recipe.step_size
        (100, 256, 'step', 30)
    """
    if network.startswith("cc_"):
        return replace(condconv(network), name=f"imagenet.{network}.paper")
    if is_adaptive(network):
        return replace(adn(network), name=f"imagenet.{network}.paper")
    return _at_224(
        network,
        "paper",
        PAPER,
        epochs=100,
        batch=256,
        lr=0.1,
        weight_decay=1e-4,
        schedule="step",
        step_size=30,
        gamma=0.1,
    )


def condconv(network: str = "cc_mobilenetv1_050") -> Recipe:
    """The recipe of *CondConv* without further regularization; the base line's too.

    The paper measures capacity with it (training cross entropy) and runs its ablations.

    Args:
        network: a network of pliant or of timm.

    Example:
        >>> recipe = condconv("mobilenetv1_w050")
        >>> recipe.epochs, recipe.nesterov, recipe.weight_decay, recipe.ema
        (120, True, 4e-05, None)
    """
    return _at_224(
        network,
        "condconv",
        CONDCONV,
        epochs=120,
        batch=256,
        lr=0.1,
        nesterov=True,
        weight_decay=4e-5,
        schedule="cosine",
        warmup=5,
        objective=objective_of(network),
        channels_last=True,
    )


def adn(network: str = "resnet50_adn") -> Recipe:
    """The recipe of *Adaptive Depth Networks*; its individual networks' too.

    The form ``adn`` of ``resnet50`` is the individual network of Table 1, and with
    ``model_args.layers=(2,2,3,2)`` the one of the base network's depth.

    Args:
        network: a network of pliant or of timm. ``mobilenetv2*`` and ``vit_*`` or ``deit_*``
            have recipes of their own, all others ResNet's.

    Example:
        >>> recipe = adn("resnet50_adn")
        >>> recipe.epochs, recipe.step_size, recipe.objective
        (150, 50, 'specialize')
        >>> adn("vit_base_patch32_adn").optimizer, adn("mobilenetv2_adn").gamma
        ('adamw', 0.98)
    """
    recipe = _at_224(
        network,
        "adn",
        ADN + ADN_RESNET,
        epochs=150,
        batch=256,
        lr=0.1,
        weight_decay=1e-4,
        schedule="step",
        step_size=50,
        gamma=0.1,
        objective=objective_of(network),
        channels_last=True,
    )
    if network.startswith("mobilenetv2"):
        return replace(
            recipe,
            note=ADN + ADN_MOBILENET,
            epochs=300,
            lr=0.045,
            weight_decay=4e-5,
            step_size=1,
            gamma=0.98,
        )
    if network.startswith(("vit_", "deit_")):
        return replace(
            recipe,
            note=ADN + ADN_VIT,
            model_args={"drop_path_rate": 0.1},
            epochs=300,
            batch=1024,
            optimizer="adamw",
            lr=1e-3,
            weight_decay=0.05,
            decay_all=False,
            schedule="cosine",
            warmup=5,
            smoothing=0.1,
            mixup=0.8,
            cutmix=1.0,
            augmentation="rand-m9-mstd0.5-inc1",
            erasing=0.25,
            channels_last=False,
        )
    return recipe


def regularized(network: str = "cc_mobilenetv1_050") -> Recipe:
    """As `condconv`, with what the paper adds for networks of large capacity.

    Args:
        network: a network of pliant or of timm.

    Example:
        >>> recipe = regularized("cc_mobilenetv1_050")
        >>> recipe.mixup, recipe.augmentation, recipe.model_args
        (0.2, 'original', {'drop_rate': 0.2})
    """
    return replace(
        condconv(network),
        name=f"imagenet.{network}.condconv-regularized",
        note=CONDCONV + REGULARIZED,
        mixup=0.2,
        augmentation="original",
        model_args={"drop_rate": 0.2},
    )


def _at_224(network: str, form: str, note: str, **settings: Any) -> Recipe:
    """What the papers' recipes share: ImageNet at 224 pixels, momentum, crops and flips."""
    return Recipe(
        name=f"imagenet.{network}.{form}",
        note=note,
        model=_network(network),
        data="imagenet",
        path="data/imagenet",
        val_fraction=None,
        pixels=224,
        resize=256,
        momentum=0.9,
        augmentation="flip_crop",
        workers=8,
        **settings,
    )


def _network(name: str) -> str:
    if not timm.is_model(name):
        raise ValueError(f"no network {name!r}; {close(name, imagenet_networks())}")
    return name


FORMS: dict[str, Callable[[str], Recipe]] = {
    "short": short,
    "paper": paper,
    "adn": adn,
    "condconv": condconv,
    "condconv-regularized": regularized,
    **ablation_forms(paper, experts=32),
    **table3_forms(paper),
}
