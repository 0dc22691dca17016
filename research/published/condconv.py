"""How *CondConv* counts: as TensorFlow's profiler does, halved.

arXiv 1904.04971, Tables 1 to 3 and 5 to 8. The paper does not say how it counts; this is
the one reading that gives all of its figures. The profiler counts the operations of
``tensorflow/python/profiler/internal/flops_registry.py``: norms, ReLU and sigmoid are not
among them. Biases, which it does count, change no printed digit and are left out.

Shapes in this file::

    E  experts         x  [1, C, H, W], or [1, C]   input of a layer
    C  channels in     y  [1, O, H', W'], or [1, O] its output
    O  channels out    P  values of one expert: O C/g h w
"""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

import timm
import torch
from timm.layers import SelectAdaptivePool2d
from torch import Tensor, nn

from pliant import anatomy
from pliant.counting import count_macs, count_parameters, run_once
from pliant.methods.condconv import CondConvBlock
from pliant.methods.condconv.layers import CondConv2d, CondLinear, Router
from research.analysis._passes import watched
from research.published.counts import CountRow, Paper
from research.published.printed import PublishedRow

Mixing = Literal["product", "sum"]

_PROFILER = (
    "TensorFlow's profiler, halved: convolutions, classifier, routers; means (the routers' too) and "
    "residual additions 1/2 per element, a 3x3 max pool 9/2; normalising the image 3 x 224 x 224; 1001 "
    "classes; mixing, for E experts of P values: "
)
CONVENTIONS: dict[str, str] = {
    "TF profiler": _PROFILER + "E P",
    "TF profiler, summed": _PROFILER + "(2 E - 1) P / 2, as sums of products (MobileNetV1)",
}

_SIZE = (3, 224, 224)
_CLASSES = 1001  # TensorFlow's ImageNet models have one for the background

# What follows the network's name in the data file, as options of `CondConv`.
_VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "depthwise+pointwise": {},
    "pointwise only": {"layers": "pointwise"},
    "depthwise only": {"layers": "depthwise"},
    "routing=single": {"routing": "single"},
    "routing=partially-shared": {"routing": "shared"},
    "routing=hidden-small": {"hidden": 1 / 8},
    "routing=hidden-medium": {"hidden": 1},
    "routing=hidden-large": {"hidden": 8},
    "routing=hierarchical": {"routing": "hierarchical"},
    "routing=softmax": {"activation": "softmax"},
    "features only": {"classifier": False},
    "classifier only": {"features": False},
    "features and classifier": {},
}


def count(row: PublishedRow) -> CountRow | str:
    """A row of the paper beside ours, or why it cannot be counted."""
    if row.accuracy_kind == "mAP":
        return "pliant has no detection networks yet"
    network, options = _network(row)
    with torch.device("meta"):
        model = timm.create_model(network, **options)
    summed = "mobilenetv1" in network
    return CountRow(
        row,
        network,
        options,
        count_parameters(model),
        count_macs(model, _SIZE),
        "TF profiler, summed" if summed else "TF profiler",
        tf_profiler_macs(model, _SIZE, mixing="sum" if summed else "product"),
    )


def _network(row: PublishedRow) -> tuple[str, dict[str, Any]]:
    """Name and options of the timm network that a row of the CondConv paper is."""
    name, _, variant = row.model.partition(" ")
    options: dict[str, Any] = {"num_classes": _CLASSES}
    if not row.variant:  # no experts: a plain network, however it is written
        name = name.removeprefix("cc_")
        return name.replace("mobilenetv1_", "mobilenetv1_w"), options
    options["experts"] = int(row.variant.split()[0])
    if variant.startswith("begin="):
        options["begin"] = int(variant.removeprefix("begin="))
    else:
        options |= _VARIANTS[variant]
    if "plain classifier" in row.counts:
        options["classifier"] = False
    return name, options


def tf_profiler_macs(
    model: nn.Module, input_size: tuple[int, int, int], *, mixing: Mixing = "product"
) -> int:
    """MACs of one image as *CondConv* counts them: the FLOPs of TensorFlow's profiler, halved.

    A conditional layer counts as the mixing of its kernel and one convolution, whatever
    form it runs in.

    Args:
        model: a MobileNet or a ResNet of timm, plain or with `CondConv`; also on the meta
            device.
        input_size: channels, height, width.
        mixing: ``"product"``: kernels are mixed by a matrix product, E P for E experts of
            P values; ``"sum"``: one by one, (2 E - 1) P / 2, as in the paper's MobileNetV1.

    Raises:
        ValueError: a `mixing` that there is not.

    Example:
        >>> tf_profiler_macs(nn.Conv2d(3, 8, 1), (3, 10, 10))  # 2400, and 300 to normalise
        2700
    """
    if mixing not in get_args(Mixing):
        raise ValueError(f"mixing must be one of {', '.join(get_args(Mixing))}; not {mixing!r}")
    flops = 2 * math.prod(input_size)  # less the mean, over the deviation
    blocks = [block.module for stage in anatomy.stages(model) for block in stage.blocks]
    adding = {block for block in blocks if _adds(block)}

    def see(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
        nonlocal flops
        flops += _flops(module, args[0], y, mixing) if args else 0
        flops += y.numel() if module in adding else 0

    with watched(model, [(module, see) for module in model.modules()]):
        run_once(model, input_size)
    return flops // 2


def _adds(block: nn.Module) -> bool:
    """Whether a block adds its input to its output."""
    if isinstance(block, CondConvBlock):
        block = block.block
    return bool(getattr(block, "has_skip", True))  # MobileNets say so; ResNet's always do


def _flops(module: nn.Module, x: Tensor, y: Tensor, mixing: Mixing) -> int:
    """FLOPs of one layer, its submodules not included."""
    if isinstance(module, (CondConv2d, CondLinear)):
        experts, out, taps = module.weight.shape
        mixed = (2 * experts - (mixing == "sum")) * out * taps
        return mixed + 2 * taps * y.numel()
    if isinstance(module, Router):  # its mean: its layers are called, and counted as any others
        return x.numel() if x.dim() == 4 else 0
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        return 2 * module.weight[0].numel() * y.numel()
    if isinstance(module, SelectAdaptivePool2d):
        return x.numel()
    if isinstance(module, nn.MaxPool2d):
        kernel = module.kernel_size
        return y.numel() * (kernel * kernel if isinstance(kernel, int) else math.prod(kernel))
    return 0


PAPER = Paper("CondConv", CONVENTIONS, count)
