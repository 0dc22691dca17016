"""Plain MobileNets on timm's EfficientNet: every width, and a form for small images.

``mobilenetv1_w{025,050,075,100}`` are Howard et al. 2017 at four widths, as *CondConv*
counts them (timm has width 1 only, as ``mobilenetv1_100``); ``mobilenetv1_w*_cifar``
have a stem that does not stride.

Shapes: images [B, in_chans, H, W]; 224 x 224, or 32 x 32 (``_cifar``), by default.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from timm.models._efficientnet_builder import decode_arch_def, resolve_act_layer, round_channels
from timm.models.efficientnet import EfficientNet

from pliant.models._build import PlainNetwork, register
from pliant.models.cifar import CIFAR_SIZE

# timm's notation: ds(a) depthwise-separable (activated), ir inverted residual; r times,
# k kernel, s stride, e expansion, c channels.
_STAGES = {
    1: "dsa_r1_k3_s1_c64 dsa_r2_k3_s2_c128 dsa_r2_k3_s2_c256 dsa_r6_k3_s2_c512 dsa_r2_k3_s2_c1024",
    2: "ds_r1_k3_s1_c16 ir_r2_k3_s2_e6_c24 ir_r3_k3_s2_e6_c32 ir_r4_k3_s2_e6_c64 "
    "ir_r3_k3_s1_e6_c96 ir_r3_k3_s2_e6_c160 ir_r1_k3_s1_e6_c320",
}


def mobilenet(
    *,
    version: Literal[1, 2] = 1,
    width: float = 1.0,
    small_images: bool = False,
    output_stride: int | None = None,
    **kwargs: Any,
) -> EfficientNet:
    """MobileNetV1 or V2 of some width.

    Args:
        version: 1 (Howard et al. 2017) or 2 (Sandler et al. 2018).
        width: multiplies all channels, which are rounded to multiples of 8.
        small_images: the stem has stride 1 instead of 2.
        output_stride: pixels of the image for one of the last feature map; later stages
            dilate instead of striding. By default 32, or 16 for small images.
        kwargs: timm's ``EfficientNet`` takes the rest.

    Raises:
        ValueError: an `output_stride` that the stages cannot have.

    Example:
        >>> sum(p.numel() for p in mobilenet(width=0.25, num_classes=1001).parameters())
        470329
    """
    largest = 16 if small_images else 32
    allowed = [n for n in (2, 4, 8, 16, 32) if n <= largest]
    if output_stride not in (None, *allowed):
        raise ValueError(
            f"output_stride must be one of {', '.join(map(str, allowed))}; not {output_stride!r}"
        )
    rounded = partial(round_channels, multiplier=width)
    # timm counts a stem that strides.
    kwargs["output_stride"] = (output_stride or largest) * (2 if small_images else 1)
    model = EfficientNet(
        block_args=decode_arch_def([[stage] for stage in _STAGES[version].split()]),
        num_features=0 if version == 1 else max(1280, rounded(1280)),
        round_chs_fn=rounded,
        act_layer=resolve_act_layer(kwargs, "relu6"),
        **kwargs,
    )
    if small_images:
        model.conv_stem.stride = (1, 1)
        model.feature_info = [{**info, "reduction": info["reduction"] // 2} for info in model.feature_info]
    return model


_WIDTHS = {"025": 0.25, "050": 0.5, "075": 0.75, "100": 1.0}
_SHARED: dict[str, Any] = {
    "flatten": True,
    "config": {"first_conv": "conv_stem", "classifier": "classifier"},
}
_SMALL: dict[str, Any] = {**_SHARED, "input_size": CIFAR_SIZE, "num_classes": 10, "reduction": 16}

MOBILENETS_V1 = {
    f"mobilenetv1_w{name}": PlainNetwork(build=partial(mobilenet, width=width), **_SHARED)
    for name, width in _WIDTHS.items()
} | {
    f"mobilenetv1_w{name}_cifar": PlainNetwork(
        build=partial(mobilenet, width=width, small_images=True), **_SMALL
    )
    for name, width in _WIDTHS.items()
}
# timm has these under the same names.
MOBILENETS_V2 = {
    f"mobilenetv2_{name}": PlainNetwork(build=partial(mobilenet, version=2, width=_WIDTHS[name]), **_SHARED)
    for name in ("050", "100")
}

for _name, _plain in MOBILENETS_V1.items():
    register(__name__, _name, _plain)
