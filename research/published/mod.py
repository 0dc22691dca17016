"""How *CNN Mixture-of-Depths* counts: as the public counter ptflops does, for the most part.

arXiv 2409.17016, Tables 1, 7, 8 and 11.
"""

from __future__ import annotations

import importlib.util
from decimal import Decimal
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.counting import count_macs, count_parameters
from pliant.methods.mixture_of_depths import MoDBlock
from pliant.methods.mixture_of_depths.selectors import ChannelSelector
from research.published.counts import CountRow, Paper
from research.published.printed import PublishedRow

Convention = Literal["ptflops", "ptflops, functional", "conv and linear"]

CONVENTIONS: dict[str, str] = {
    "ptflops": (
        "ptflops 0.7.5: conv and linear with bias, norms 2 per element; nn.ReLU, nn.MaxPool2d and "
        "nn.AdaptiveAvgPool2d count twice, as modules and as the functions they call"
    ),
    "ptflops, functional": (
        "as ptflops, but ReLU and the last pool once: networks that call F.relu and F.avg_pool2d (CIFAR)"
    ),
    "conv and linear": "convolutions and matrix products only, our own figure (ResNet-101 in Table 1)",
}

INSTALL_COUNTS = "pip install 'ptflops==0.7.5'"


def has_ptflops() -> bool:
    """Whether the counter of the paper's convention is installed."""
    return importlib.util.find_spec("ptflops") is not None


def _network(row: PublishedRow) -> tuple[str, dict[str, Any]]:
    """Name and options of the timm network that a row of the Mixture-of-Depths paper is."""
    name, options = row.model, dict[str, Any]()
    for suffix, option in (("_lastk", {"fusion": "last"}), ("_random", {"selection": "random"})):
        if name.endswith(suffix):
            name, options = name.removesuffix(suffix), option
    if row.task.startswith("cifar"):
        base = name.removesuffix("_mod")
        name = f"{base}_cifar{name.removeprefix(base)}"
        options["num_classes"] = int(row.task.removeprefix("cifar"))
    elif "10-class head" in row.counts:
        options["num_classes"] = 10
    return name, options


def _why_not(row: PublishedRow, network: str) -> str:
    """Why a row cannot be counted; empty when it can."""
    if row.counts == "not ours":
        return "another paper's network"
    if row.params_m is None or row.macs is None:
        return "the paper prints no count"
    if row.task not in ("imagenet", "cifar10", "cifar100") or not timm.is_model(network):
        return "pliant does not have it yet"
    return ""


def count(row: PublishedRow) -> CountRow | str:
    """A row of the paper beside ours, or why it cannot be counted."""
    network, options = _network(row)
    why_not = _why_not(row, network)
    if why_not:
        return why_not
    assert row.macs is not None
    with torch.device("meta"):
        model = timm.create_model(network, **options)
    size = (3, 224, 224) if row.task == "imagenet" else (3, 32, 32)
    macs = count_macs(model, size)
    parameters = count_parameters(model)
    convention: Convention = "ptflops" if row.task == "imagenet" else "ptflops, functional"
    if row.table == "1" and row.model == "resnet101":  # 7.80; the others' convention gives 7.87
        convention = "conv and linear"
    theirs: int | None = None
    if convention == "conv and linear":
        theirs = macs
    elif has_ptflops():
        theirs = ptflops_macs(model, size, functional=row.task != "imagenet")
    # ptflops says "1.16 GMac", which the paper prints as 1160 M.
    step = Decimal(10) if row.macs_unit == "M" and row.macs >= 1000 else None
    return CountRow(row, network, options, parameters, macs, convention, theirs, step)


class _SelectorOfModules(nn.Module):
    """A `ChannelSelector` spelled in modules, the only spelling that ptflops can count."""

    def __init__(self, selector: ChannelSelector) -> None:
        super().__init__()
        self.k = selector.k
        self.logits = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), selector.fc1, nn.ReLU(), selector.fc2
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        top, index = self.logits(x).topk(self.k, dim=1)
        return top.sigmoid(), index


class _FunctionalPool(nn.Module):
    """The pool before the classifier, as a function."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, (x.shape[2], x.shape[3])).flatten(1)


def ptflops_macs(model: nn.Module, input_size: tuple[int, int, int], *, functional: bool = False) -> int:
    """MACs of one image as the public counter ptflops counts them.

    Args:
        model: any network; ptflops hangs counters on it, so do not use it further.
            Selectors of Mixture-of-Depths blocks are counted as the modules that
            they stand for.
        input_size: channels, height, width.
        functional: count each ReLU and the last pool once, as in a network that calls
            ``F.relu`` and ``F.avg_pool2d`` where timm's has modules.

    Raises:
        ImportError: ptflops is not installed.
        RuntimeError: ptflops could not run the network.

    Example:
        >>> ptflops_macs(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()), (3, 10, 10))
        4800
    """
    try:
        from ptflops import get_model_complexity_info
    except ImportError as error:
        raise ImportError(f"counting in the paper's convention needs ptflops: {INSTALL_COUNTS}") from error
    for block in model.modules():
        if isinstance(block, MoDBlock) and isinstance(block.selector, ChannelSelector):
            block.selector = _SelectorOfModules(block.selector)
    if functional:
        model.global_pool = _FunctionalPool()
    macs, _ = get_model_complexity_info(
        model,
        input_size,
        as_strings=False,
        print_per_layer_stat=False,
        backend="pytorch",
        # Not counted as a module, a ReLU still counts as the function that it calls.
        ignore_modules=[nn.ReLU] if functional else [],
    )
    if macs is None:
        raise RuntimeError(f"ptflops could not run {type(model).__name__} at {input_size}")
    return int(macs)


PAPER = Paper(
    title="CNN Mixture-of-Depths",
    conventions=CONVENTIONS,
    count=count,
    uncounted=f"ptflops is not installed, so most MACs were not compared: {INSTALL_COUNTS}",
)
