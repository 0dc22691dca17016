"""What a network declares, and what stands outside its blocks: stem, head and classifier."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from pliant.anatomy import (
    BlockInfo,
    Convolution,
    blocks,
    declared_classifiers,
    elements,
)
from pliant.parts import Part


def classifier(model: nn.Module) -> str | None:
    """Path of the linear layer that gives the classes; None without one.

    timm's networks name it, also inside a container; of others it is the last module, if it
    stands in no block and has no other linear layer beside it. So it is behind a network of timm
    that was made without a classifier.

    Example:
        >>> import timm
        >>> classifier(nn.Sequential(nn.Identity(), timm.create_model("regnetx_002")))
        '1.head.fc'
    """
    found = next(iter(declared_classifiers(model)), None)
    if found is None or isinstance(found, nn.Identity):
        path, found = list(model.named_modules())[-1]
        owner = model.get_submodule(path.rpartition(".")[0])
        beside = [child for child in owner.children() if isinstance(child, nn.Linear)]
        lonely = len(beside) == 1 or isinstance(owner, nn.Sequential)
        if not lonely or any(path.startswith(f"{block.path}.") for block in blocks(model)):
            return None
    paths = (path for path, module in model.named_modules() if module is found)
    return next(paths, None) if isinstance(found, nn.Linear) else None


def stem_and_head(model: nn.Module) -> tuple[list[Convolution], list[Convolution]]:
    """Convolutions before the first block, and those between the last one and the classes.

    Behind an unknown block there is no head: nobody knows what stands there.

    Example:
        >>> import timm
        >>> stem, head = stem_and_head(timm.create_model("mobilenetv2_100"))
        >>> [c.path for c in stem], [c.path for c in head]
        (['conv_stem'], ['conv_head'])
    """
    every = blocks(model)
    around = [(n, conv) for n, conv, outermost in _outside(model) if outermost]
    known = bool(every) and isinstance(every[-1], BlockInfo)
    return [c for n, c in around if n == 0], [c for n, c in around if known and n == len(every)]


def outside_blocks(model: nn.Module) -> list[tuple[int, Convolution]]:
    """Each convolution that lies in no block, with the number of blocks before it.

    Example:
        >>> import timm
        >>> [(n, c.path) for n, c in outside_blocks(timm.create_model("convnext_atto"))][:2]
        [(0, 'stem.0'), (2, 'stages.1.downsample.1')]
    """
    return [(n, conv) for n, conv, _ in _outside(model)]


def _outside(model: nn.Module) -> Iterator[tuple[int, Convolution, bool]]:
    """The convolutions that lie in no block: number of blocks before it, itself, `Element.outermost`."""
    seen = 0
    for element in elements(model):
        if isinstance(element.what, Convolution):
            yield seen, element.what, element.outermost
        else:
            seen += 1


def take_dropout(model: nn.Module, classifier: str) -> float:
    """Turn off the dropout on the classifier's input; returns the rate that it had.

    For a classifier that drops by itself, because it also needs the features whole. timm
    drops by a function with the network's ``drop_rate``, or by a module beside the classifier;
    in a plain sequence it is the module before.
    """
    owner = model.get_submodule(classifier.rpartition(".")[0])
    beside = [getattr(owner, drop, None) for drop in ("drop", "head_drop")]
    if type(owner) is nn.Sequential:
        layers = list(owner)
        place = layers.index(model.get_submodule(classifier))
        beside += layers[max(place - 1, 0) : place]
    for drop in beside:
        if isinstance(drop, nn.Dropout):
            rate, drop.p = drop.p, 0.0
            return rate
    rate = float(getattr(owner, "drop_rate", 0.0))
    if rate:
        vars(owner)["drop_rate"] = 0.0
    return rate


def name_of(model: nn.Module) -> str:
    """A network's name: that of its architecture in timm, or else its class's."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(model).__name__)


def input_size(model: nn.Module) -> tuple[int, int, int] | None:
    """Channels, height and width that a network was made for, ``(3, 224, 224)``.

    Height and width come from timm's configuration of the network, the channels from its first
    convolution (so ``in_chans`` counts, and one that was put in by hand); from what the network
    says where that convolution gets no image, but pixels folded into channels. None when nothing
    tells.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    size, named = config.get("input_size"), config.get("first_conv")
    told: int | None = getattr(model, "in_chans", None)
    paths = {
        path: module for path, module in model.named_modules() if isinstance(module, (nn.Conv2d, Part))
    }
    names = (named,) if isinstance(named, str) else named or ()
    first = next((paths[name] for name in names if name in paths), None)
    if first is None and told is None:  # `features_only` names its modules anew
        first = next((m for m in paths.values() if isinstance(m, nn.Conv2d)), None)
    channels = getattr(first, "in_channels", told)
    if size is None or channels is None:
        return None
    folded = told is not None and channels in (4 * told, 16 * told, 64 * told)
    return (told if folded and told else channels), int(size[1]), int(size[2])


def is_channels_last(model: nn.Module) -> bool:
    """Whether weights of `model` lie in memory with their channels last."""
    maps = [p for p in model.parameters() if p.dim() == 4]
    # A 1x1 kernel, or one channel, lies in both ways at once. Its strides count where nothing else tells
    # (a MobileNet for grey images), because the last bits of what a kernel computes depend on them.
    certain = [p for p in maps if p.is_contiguous() != p.is_contiguous(memory_format=torch.channels_last)]
    return any(p.stride() == _strides(p, torch.channels_last) != _strides(p) for p in certain or maps)


def _strides(like: Tensor, form: torch.memory_format = torch.contiguous_format) -> tuple[int, ...]:
    """The strides that PyTorch gives a tensor of a shape in a memory format."""
    return torch.empty_like(like, device="meta", memory_format=form).stride()
