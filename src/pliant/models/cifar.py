"""Plain ResNets for small images: a 3x3 stem and no pool, on timm's ResNet.

Two families:

- ``resnet{18,34,50}_cifar``: the ImageNet networks' stages (64 to 512 channels) behind
  a 3x3 stem, as in Table 11 of *CNN Mixture-of-Depths*.
- ``resnet20_cifar``, ``resnet56_cifar``: He et al. 2016, section 4.2: 6n + 2 layers,
  three stages of 16, 32 and 64 channels, shortcuts without parameters (option A).

Shapes: images [B, in_chans, H, W], 32 x 32 by default; any size that three (or two)
halvings can take.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import resnet
from timm.models._features import feature_take_indices
from timm.models.resnet import BasicBlock, Bottleneck
from torch import Tensor, nn

from pliant.models._build import PlainNetwork, register


class PadShortcut(nn.Module):
    """Shortcut without parameters: every second pixel, new channels zero (option A).

    Args:
        channels: how many channels are added, half on each side.
        stride: 2, or 1 where ``output_stride`` keeps the resolution.
    """

    def __init__(self, channels: int, stride: int = 2) -> None:
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, C + channels, ceil(H / stride), ceil(W / stride)]."""
        half = self.channels // 2
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.channels - half))


class ResNet(resnet.ResNet):  # type: ignore[misc]  # timm is not typed
    """timm's, of four stages or three: where the fourth is empty, it gives no features either."""

    def forward_intermediates(
        self, x: Tensor, indices: int | list[int] | None = None, **options: Any
    ) -> Any:
        """timm's, by indices of the feature maps that there are."""
        taken, _ = feature_take_indices(len(self.feature_info), indices)
        return super().forward_intermediates(x, taken, **options)

    def prune_intermediate_layers(self, indices: int | list[int] = 1, *args: Any, **options: Any) -> Any:
        """timm's, by indices of the feature maps that there are."""
        taken, _ = feature_take_indices(len(self.feature_info), indices)
        return super().prune_intermediate_layers(taken, *args, **options)


def cifar_resnet(
    *,
    channels: tuple[int, ...] = (64, 128, 256, 512),
    pad_shortcut: bool = False,
    output_stride: int = 8,
    **kwargs: Any,
) -> ResNet:
    """A ResNet of timm with a 3x3 stem, no pool, and three or four stages.

    Args:
        channels: width of each stage before the block's expansion; the stem has the
            first. Even numbers.
        pad_shortcut: shortcuts without parameters in place of projections. Blocks then
            start with their last norm at one, where timm has zero: behind a padded
            channel, which is zero, ReLU would get exactly zero and never learn.
        output_stride: pixels of the image for one of the last feature map; at most 2, 4
            or 8. Later stages dilate instead of striding.
        kwargs: timm's ``ResNet`` takes the rest (``block``, ``layers``, ...).

    Raises:
        ValueError: not three or four stages, an odd width of the stem, or another
            `output_stride`.
    """
    channels = tuple(channels)
    if len(channels) not in (3, 4):
        raise ValueError(f"channels must name three or four stages, not {channels}")
    if channels[0] % 2:
        raise ValueError(f"the stem's width, channels[0] = {channels[0]}, must be even")
    if output_stride not in (2, 4, 8):
        raise ValueError(f"output_stride must be 2, 4 or 8 behind a 3x3 stem, not {output_stride!r}")
    kwargs["output_stride"] = 4 * output_stride  # timm counts a stem and a pool that stride
    kwargs.setdefault("zero_init_last", not pad_shortcut)
    # timm fixes a plain stem to 64 channels; a deep one is twice stem_width wide. The
    # convolution itself is replaced below, so only the width of the deep stem is used.
    model = ResNet(channels=channels, stem_type="deep", stem_width=channels[0] // 2, **kwargs)
    in_chans = kwargs.get("in_chans", 3)
    with torch.device(next(model.parameters()).device):
        model.conv1 = nn.Conv2d(in_chans, channels[0], 3, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    if len(channels) == 3:
        model.layer4 = nn.Sequential()  # timm's forward calls it
    # No halving before the first stage, where timm's ResNet has two.
    model.feature_info = [
        {**info, "reduction": max(1, info["reduction"] // 4)} for info in model.feature_info
    ]
    if pad_shortcut:
        for stage in (model.layer2, model.layer3, model.layer4):
            for block in list(stage)[:1]:
                added = block.conv2.out_channels - block.conv1.in_channels
                block.downsample = PadShortcut(added, block.stride)
    return model


_he = partial(cifar_resnet, block=BasicBlock, channels=(16, 32, 64), pad_shortcut=True)

CIFAR_SIZE = (3, 32, 32)
_WIDE: dict[str, Any] = {"input_size": CIFAR_SIZE, "num_classes": 10, "reduction": 8}
_NARROW: dict[str, Any] = {**_WIDE, "reduction": 4, "feature_levels": 4, "narrow": True}  # three stages

CIFAR_RESNETS = {
    "resnet18_cifar": PlainNetwork(
        build=partial(cifar_resnet, block=BasicBlock, layers=(2, 2, 2, 2)), **_WIDE
    ),
    "resnet34_cifar": PlainNetwork(
        build=partial(cifar_resnet, block=BasicBlock, layers=(3, 4, 6, 3)), **_WIDE
    ),
    "resnet50_cifar": PlainNetwork(
        build=partial(cifar_resnet, block=Bottleneck, layers=(3, 4, 6, 3)), **_WIDE
    ),
    "resnet20_cifar": PlainNetwork(build=partial(_he, layers=(3, 3, 3)), **_NARROW),
    "resnet56_cifar": PlainNetwork(build=partial(_he, layers=(9, 9, 9)), **_NARROW),
}

for _name, _plain in CIFAR_RESNETS.items():
    register(__name__, _name, _plain)
