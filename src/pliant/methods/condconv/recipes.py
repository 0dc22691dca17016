"""How *CondConv* (arXiv 1904.04971) trains and compares its networks.

One recipe for all networks, the plain baselines included (section 4.1); the ablations of section
4.3; and capacity by the number of experts, as in Table 1. An ablation changes one option of the
network that the recipe trains; ``begin`` counts MobileNetV1's units as Table 7 does.
"""

from __future__ import annotations

from typing import Any

NOTE = (
    "arXiv 1904.04971, section 4.1: one recipe for all networks, batch norm momentum 0.1 (0.9 in "
    "TensorFlow's sense), no averaged weights. It gives no other setting ('following Kornblith et al. "
    "2018'); ours: 120 epochs, batch 256, SGD 0.1 with Nesterov momentum 0.9, weight decay 4e-5, cosine "
    "after 5 epochs of warm-up, random resized crops and flips at 224 px"
)
REGULARIZED = (
    "; for networks of large capacity also AutoAugment, mixup 0.2 and dropout on the classifier's input "
    "(its rate is not given; ours: 0.2)"
)

CONTROLS: dict[str, dict[str, Any]] = {
    "CondConv, 4 experts": {"experts": 4},
    "CondConv, 8 experts": {"experts": 8},
}

ABLATIONS: dict[str, dict[str, Any]] = {
    "pointwise": {"layers": "pointwise"},  # Table 5
    "depthwise": {"layers": "depthwise"},
    "single": {"routing": "single"},  # Table 6
    "partially-shared": {"routing": "shared"},
    "hidden-small": {"hidden": 0.125},
    "hidden-medium": {"hidden": 1.0},
    "hidden-large": {"hidden": 8.0},
    "hierarchical": {"routing": "hierarchical"},
    "softmax": {"activation": "softmax"},
    "begin-1": {"begin": 1},  # Table 7; the network itself begins at 7
    "begin-3": {"begin": 3},
    "begin-5": {"begin": 5},
    "begin-13": {"begin": 13},
    "features-only": {"classifier": False},  # Table 8
    "classifier-only": {"features": False},
    "per-channel": {"per_channel": True},  # section 4.3.1 and figure 3
    "hard-2": {"active": 2},  # section 3: hard routing as a special case
}


def condconv(_network: str) -> dict[str, Any]:
    """Settings without further regularization.

    The paper measures capacity with it (training cross entropy) and runs its ablations.
    """
    return {
        "note": NOTE,
        "epochs": 120,
        "batch": 256,
        "lr": 0.1,
        "nesterov": True,
        "weight_decay": 4e-5,
        "schedule": "cosine",
        "warmup": 5,
        "channels_last": True,
    }


def regularized(network: str) -> dict[str, Any]:
    """As `condconv`, with what the paper adds for networks of large capacity."""
    return {
        **condconv(network),
        "note": NOTE + REGULARIZED,
        "mixup": 0.2,
        "augmentation": "original",
        "model_args": {"drop_rate": 0.2},
    }
