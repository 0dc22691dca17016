"""How *Adaptive Depth Networks* counts (arXiv 2312.16392, Tables 1 and 2).

The paper does not say how it counts. Its ResNets are what fvcore gives; its vision
transformers are what a counter gives that does not look into attention.

Shapes: counts are for one image of 3 x 224 x 224.
"""

from __future__ import annotations

from typing import Any, Literal

import timm
import torch
from torch import Tensor, nn

from pliant.counting import count_macs, count_parameters, run_once
from pliant.methods.adaptive_depth.depth import subnet
from pliant.methods.adaptive_depth.switch import Skip
from research.analysis._passes import watched
from research.published.counts import CountRow, Paper
from research.published.printed import PublishedRow

Convention = Literal["fvcore", "without attention"]

CONVENTIONS: dict[str, str] = {
    "fvcore": "fvcore 0.1.5: convolutions and linear layers, norms 2 per element (ResNet, MobileNetV2)",
    "without attention": (
        "convolutions and the linear layers outside attention; nothing of attention counts, neither its "
        "projections nor its products (ViT)"
    ),
}

_SIZE = (3, 224, 224)
# Plain networks: as given, and cut out of the adaptive one (``_base``).
_PLAIN = {
    "resnet50": "resnet50",
    "mobilenetv2": "mobilenetv2_100",
    "vit_base_patch32": "vit_base_patch32_224",
}
_SKIPS: dict[str, Skip] = {"": (False,) * 4, "super": (False,) * 4, "base": (True,) * 4}


def count(row: PublishedRow) -> CountRow | str:
    """A row of the paper beside ours, or why it cannot be counted.

    Example:
        >>> from research.published import published_rows
        >>> row = count(published_rows("adn", ["1"])[1])
        >>> row.published.variant, row.parameters, row.printed_macs, row.verdict
        ('base', 25583144, Decimal('2.58'), 'match')
    """
    if row.counts == "not ours":
        return "another paper's network"
    if row.model.startswith(("fasterrcnn", "maskrcnn")):
        return "pliant has no detection networks yet"
    if row.params_m is None or row.macs is None:
        return "the paper prints no count"
    name = row.model.removesuffix("_base")
    adaptive = f"{name.removesuffix('_adn')}_adn"
    with torch.device("meta"):
        whole = timm.create_model(adaptive)
        cut = subnet(whole, _skip("base" if row.model.endswith("_base") else row.variant))
        given = timm.create_model(_PLAIN[name]) if name in _PLAIN else whole
    # An adaptive network has all of its parameters at every depth; a base network its own.
    parameters = count_parameters(cut if row.model.endswith("_base") else given)
    convention: Convention = "without attention" if name.startswith("vit") else "fvcore"
    counter = without_attention_macs if convention == "without attention" else fvcore_macs
    network = _PLAIN.get(row.model, adaptive)
    return CountRow(row, network, {}, parameters, count_macs(cut, _SIZE), convention, counter(cut, _SIZE))


def _skip(variant: str) -> Skip:
    """Flags of a row: ``"super"``, ``"base"``, or one letter a stage, ``"TTFF"``."""
    return _SKIPS.get(variant) or tuple(letter == "T" for letter in variant)


def fvcore_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """MACs of one image as *Adaptive Depth Networks* counts ResNets and MobileNets.

    Args:
        model: any network, also on the meta device.
        input_size: channels, height, width.

    Example:
        >>> fvcore_macs(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)), (3, 10, 10))
        4000
    """
    norms = nn.modules.batchnorm._BatchNorm, nn.LayerNorm, nn.GroupNorm
    return count_macs(model, input_size) + 2 * sum(n for _, n in _outputs(model, input_size, norms))


def without_attention_macs(model: nn.Module, input_size: tuple[int, int, int]) -> int:
    """MACs of one image as *Adaptive Depth Networks* counts vision transformers.

    Args:
        model: a network whose modules of attention are named ``attn``, as timm's are.
        input_size: channels, height, width.

    Example:
        >>> import timm
        >>> without_attention_macs(timm.create_model("vit_base_patch32_224"), (3, 224, 224))
        2947528704
    """
    hidden = {m for name, attn in model.named_modules() if name.endswith("attn") for m in attn.modules()}
    return sum(
        layer.weight[0].numel() * values
        for layer, values in _outputs(model, input_size, (nn.Conv2d, nn.Linear))
        if layer not in hidden
    )


def _outputs(
    model: nn.Module, input_size: tuple[int, int, int], kinds: tuple[type[nn.Module], ...]
) -> list[tuple[Any, int]]:
    """Layers of some kinds in the order in which one image meets them, each with the size of its output."""
    seen: list[tuple[Any, int]] = []

    def see(layer: nn.Module, _args: Any, y: Tensor) -> None:
        seen.append((layer, y.numel()))

    with watched(model, [(layer, see) for layer in model.modules() if isinstance(layer, kinds)]):
        run_once(model, input_size)
    return seen


PAPER = Paper("Adaptive Depth Networks", CONVENTIONS, count)
