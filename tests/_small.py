"""Small networks of every family that CondConv converts, its routing variants, what it passes over."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

import timm
import torch
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.efficientnet import EfficientNet
from torch import nn

from pliant import CondConv, convert
from pliant.models._build import create

NARROW = {"channels": (8, 16, 24, 32), "num_classes": 5}

FAMILIES: dict[str, dict[str, Any]] = {
    "mobilenetv1_w025_cifar": {"num_classes": 5},
    "mobilenetv2_035": {"num_classes": 5},
    "mobilenetv3_small_050": {"num_classes": 5},
    "tf_mobilenetv3_small_minimal_100": {"num_classes": 5},  # "same" padding
    "efficientnet_b0": {"num_classes": 5},
    "tf_efficientnet_b0": {"num_classes": 5},
    "resnet20_cifar": {"num_classes": 5},
    "resnet18_cifar": NARROW,
    "resnet50_cifar": NARROW,
    "regnetx_002": {"num_classes": 5},
    "regnety_002": {"num_classes": 5},
    "convnext_atto": {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "num_classes": 5},  # 1x1 convs
    "convnext_tiny": {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1), "num_classes": 5},  # linear
}

# Every variant of Table 6 and sections 3 and 4.3, by what differs from the default.
VARIANTS: dict[str, dict[str, Any]] = {
    "block": {},
    "layer": {"routing": "layer"},
    "single": {"routing": "single"},
    "shared": {"routing": "shared"},
    "hierarchical": {"routing": "hierarchical"},
    "hidden": {"hidden": 0.125},
    "softmax": {"activation": "softmax"},
    "per_channel": {"per_channel": True},
    "hard": {"activation": "softmax", "active": 2},
    "pointwise": {"layers": "pointwise"},
    "depthwise": {"layers": "depthwise"},
}

LATE = {"begin": 13}  # of MobileNetV1's 15 units: cheap


def small(name: str) -> nn.Module:
    """An instance whose every layer bears on its output."""
    network = copy.deepcopy(_settled(name))
    torch.manual_seed(0)
    return network


@cache
def _settled(name: str) -> nn.Module:
    torch.manual_seed(0)
    return settled(timm.create_model(name, **FAMILIES[name]))


def settled(model: nn.Module) -> nn.Module:
    """The same, every layer bearing on its output: norms of statistics that fit, none of them zero."""
    for path, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):  # timm starts the last one of a block at zero
            nn.init.uniform_(module.weight, 0.8, 1.2)
            nn.init.uniform_(module.bias, -0.2, 0.2)
        if hasattr(module, "gamma") and "stages" in path:  # ConvNeXt's scale of a block, 1e-6
            nn.init.constant_(module.gamma, 0.5)
    norms = [m for m in model.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:  # statistics that fit, so that a signal comes through
        norm.momentum = 1.0
    with torch.no_grad():
        model.train()(images(32))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def separable(**options: Any) -> nn.Module:
    """`separable_plain` with all but the stem conditional."""
    torch.manual_seed(0)
    method = CondConv(**{"experts": 3, "upcycle": False, "begin": 2, **options})
    return convert(separable_plain(), method).eval()


def separable_plain() -> nn.Module:
    """A stem, three depthwise-separable blocks and a classifier."""
    stages = decode_arch_def([["dsa_r1_k3_s2_c8"], ["dsa_r2_k3_s2_c16"]])
    return EfficientNet(stages, num_classes=5, num_features=0, stem_size=8)


def images(batch: int = 4, size: int = 32) -> torch.Tensor:
    """Images that are not alike in their means, so that routings are not either."""
    return torch.randn(batch, 3, size, size) + torch.randn(batch, 3, 1, 1)


def meta(name: str, **kwargs: Any) -> nn.Module:
    """A network without weights; a copy, because building one takes ten times as long."""
    return copy.deepcopy(_meta(name, **kwargs))


@cache
def _meta(name: str, **kwargs: Any) -> nn.Module:
    return create(name, "meta", **kwargs)


def mobilenet(**kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("mobilenetv1_w025_cifar", **kwargs).eval()


def reasons(model, **options) -> dict[str, str]:
    return {p.path: p.reason for p in CondConv(experts=2, **options).survey(model).passed_over}


class Attention(nn.Module):
    """A block of somebody's: two convolutions."""

    def __init__(self, channels=8):
        super().__init__()
        self.query, self.key = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.query(x) * self.key(x)


def own(*middle: nn.Module) -> nn.Module:
    """A stem, known blocks with others among them, a head convolution and a classifier."""
    block = timm.models.resnet.BasicBlock
    stem = nn.Conv2d(3, 8, 3)
    return nn.Sequential(
        stem, block(8, 8), *middle, block(8, 8), nn.Conv2d(8, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 5),
    )  # fmt: skip
