"""Small networks of each method, whose every layer bears on the output, to export."""

from __future__ import annotations

from pathlib import Path

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

import pliant
from _adaptive import scramble
from pliant import AdaptiveDepth, CondConv, MixtureOfDepths, convert, subnet
from pliant.deploy.export import PACKAGES
from pliant.deploy.loading import open_export

ENDINGS = {".pt2": "program", ".onnx": "onnx", ".xml": "openvino"}


def need(ending: str) -> None:
    """Skip a test where the packages that write such a file are not installed."""
    for package in PACKAGES[ENDINGS[ending]]:
        pytest.importorskip(package, reason=f"the extra that has {package} is not installed")


def images(batch: int, size: int = 16) -> Tensor:
    """Images that a network tells apart."""
    return torch.randn(batch, 3, size, size) + torch.randn(batch, 3, 1, 1)


def through_file(model: nn.Module, path: Path) -> tuple[Tensor, Tensor]:
    """What `model`, exported to `path`, gives for images of 32 pixels, and what it gives itself."""
    if path.suffix != ".pt2":
        pytest.importorskip({".onnx": "onnxruntime", ".xml": "openvino"}[path.suffix])
    pliant.export(model, path, example=torch.zeros(2, 3, 32, 32), batches=(1, 3))
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        return open_export(path)(x), model(x)


class Small(nn.Module):
    """A stem, two stages of two blocks and a classifier, for images of 16 pixels."""

    def __init__(self, block: str, classes: int) -> None:
        super().__init__()
        kind = BasicBlock if block == "basic" else Bottleneck
        planes = (16, 24) if block == "basic" else (8, 12)
        width, wide = (n * kind.expansion for n in planes)
        self.conv1 = nn.Conv2d(3, width, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act1 = nn.ReLU()
        self.layer1 = nn.Sequential(kind(width, planes[0]), kind(width, planes[0]))
        down = nn.Sequential(nn.Conv2d(width, wide, 1, 2, bias=False), nn.BatchNorm2d(wide))
        self.layer2 = nn.Sequential(kind(width, planes[1], 2, down), kind(wide, planes[1]))
        self.pool, self.flat = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.fc = nn.Linear(wide, classes)
        self.pretrained_cfg = {"input_size": (3, 16, 16), "mean": (0.4, 0.5, 0.6), "std": (0.2, 0.25, 0.3)}

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer2(self.layer1(self.act1(self.bn1(self.conv1(x)))))
        return self.fc(self.flat(self.pool(x)))


def plain(block: str = "basic", classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    return Small(block, classes)


def mod(block: str = "basic", **options) -> nn.Module:
    """With every second block a Mixture-of-Depths block."""
    method = MixtureOfDepths(**{"c": 4, "reduction": 2, **options})
    return scramble(convert(plain(block), method)).eval()


def condconv(**options) -> nn.Module:
    """With kernels mixed for each example."""
    method = CondConv(**{"experts": 3, "upcycle": False, "begin": 1, **options})
    return scramble(convert(plain(), method)).eval()


def depth(skip=(True, False)) -> nn.Module:
    """One depth of an adaptive network."""
    return subnet(adaptive(), skip)


def adaptive() -> nn.Module:
    return scramble(convert(plain(), AdaptiveDepth())).eval()


def mod_of_depth() -> nn.Module:
    """Two methods in one network."""
    both = convert(
        plain("bottleneck"), MixtureOfDepths(c=4, reduction=2, stages=(0,)), AdaptiveDepth(skippable=(0, 1))
    )
    return subnet(scramble(both).eval(), (False,))


def mobile() -> nn.Module:
    """A network with squeeze-and-excitation and depthwise convolutions."""
    torch.manual_seed(0)
    return timm.create_model("mobilenetv3_small_050", num_classes=5).eval()


NETWORKS = {
    "plain": lambda: scramble(plain()).eval(),
    "mod": mod,
    "mod, bottleneck": lambda: mod("bottleneck"),
    "condconv": condconv,
    "depth": depth,
    "mod and depth": mod_of_depth,
}
