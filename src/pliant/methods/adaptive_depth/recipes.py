"""How *Adaptive Depth Networks* (arXiv 2312.16392) trains its networks (section 4.1), and Table 3.

The settings are for the individual networks of the paper too, which have no adaptive depth.
"""

from __future__ import annotations

from typing import Any

BASE_ALONE = "plain, base depth"  # label of the plain network with the blocks of the base network

NOTE = (
    "arXiv 2312.16392, section 4.1: Algorithm 1 with alpha 0.5; individual networks at the same settings, "
    "'most training settings in the original papers'"
)
# Settings of each family of networks, and which of them are whose.
RESNET = (
    ", ResNets for 150 epochs. Of He et al. 2016: batch 256, SGD 0.1 with momentum 0.9, weight decay 1e-4, "
    "rate times 0.1 in steps. Ours: a step every 50 epochs, random resized crops and flips"
)
MOBILENET = (
    ". Of Sandler et al. 2018: rate 0.045 times 0.98 each epoch, weight decay 4e-5. Ours: 300 epochs, "
    "batch 256, SGD with momentum 0.9 in place of RMSProp, random resized crops and flips"
)
VIT = (
    "; ViT by DeiT's recipe (Touvron et al. 2020): 300 epochs, batch 1024, AdamW 1e-3, weight decay 0.05, "
    "cosine after 5 epochs of warm-up, smoothing 0.1, RandAugment 9/0.5, mixup 0.8, CutMix 1, erasing "
    "0.25, stochastic depth 0.1. Ours: no repeated augmentation"
)

# Table 3: whether sub-paths are specialised, and whether norms are skip-aware.
ABLATIONS: dict[str, dict[str, Any]] = {
    "neither": {"objective": "joint", "model_args": {"switchable_norms": False}},
    "norms": {"objective": "joint"},
    "specialization": {"objective": "specialize", "model_args": {"switchable_norms": False}},
    "both": {"objective": "specialize"},
}


def adn(network: str) -> dict[str, Any]:
    """Settings for a network: MobileNetV2 and transformers have their own, all others ResNet's."""
    settings: dict[str, Any] = {
        "note": NOTE + RESNET,
        "epochs": 150,
        "batch": 256,
        "lr": 0.1,
        "weight_decay": 1e-4,
        "schedule": "step",
        "step_size": 50,
        "gamma": 0.1,
        "channels_last": True,
    }
    if network.startswith("mobilenetv2"):
        settings |= {
            "note": NOTE + MOBILENET,
            "epochs": 300,
            "lr": 0.045,
            "weight_decay": 4e-5,
            "step_size": 1,
            "gamma": 0.98,
        }
    if network.startswith(("vit_", "deit_")):
        settings |= {
            "note": NOTE + VIT,
            "model_args": {"drop_path_rate": 0.1},
            "epochs": 300,
            "batch": 1024,
            "optimizer": "adamw",
            "lr": 1e-3,
            "weight_decay": 0.05,
            "decay_all": False,
            "schedule": "cosine",
            "warmup": 5,
            "smoothing": 0.1,
            "mixup": 0.8,
            "cutmix": 1.0,
            "augmentation": "rand-m9-mstd0.5-inc1",
            "erasing": 0.25,
            "channels_last": False,
        }
    return settings
