"""What a network is made of: its stages, its blocks and their shapes.

The only file of pliant that knows families of networks. A *block* is a module of one
of the types in `_READERS` (or a `Block` that pliant put in one's place); a *stage* is
a container whose direct children include blocks. Detecting the containers, instead of
reading timm's ``feature_info``, finds RegNet's stages (which are no ``Sequential``)
and ConvNeXt's (which nest their blocks one level down) alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from timm import layers
from timm.models import _efficientnet_blocks as efficientnet
from timm.models import convnext, regnet, resnet, vision_transformer
from torch import Tensor, nn

from pliant.parts import Part


class Block(Part):
    """A module that stands where a block of a stage stood, and says its shape.

    Methods derive what they put in place of a block from it, so that a network that
    was converted once can still be read, for a second method or for measuring.

    Args:
        channels: of its input.
        out_channels: of its output; None: as many.
        stride: its spatial stride.
    """

    def __init__(self, channels: int, out_channels: int | None = None, stride: int = 1) -> None:
        super().__init__()
        self.channels = channels
        self.out_channels = channels if out_channels is None else out_channels
        self.stride = stride

    def extra_repr(self) -> str:
        """What `print` shows."""
        shape = f"channels={self.channels}"
        if self.out_channels != self.channels:
            shape += f", out_channels={self.out_channels}"
        return shape if self.stride == 1 else f"{shape}, stride={self.stride}"


class RemovedBlock(Block):
    """No block at all: the input is the output. The control of every block method."""

    def forward(self, x: Tensor) -> Tensor:
        """Return `x` [B, C, H, W] itself."""
        return x


@dataclass(frozen=True)
class BlockInfo:
    """One block of a stage.

    Attributes:
        path: dotted path from the network's root, ``"layer1.0"``.
        module: the block itself.
        in_channels: channels of its input (tokens' width for a transformer).
        out_channels: channels of its output.
        stride: its spatial stride.
    """

    path: str
    module: nn.Module
    in_channels: int
    out_channels: int
    stride: int

    @property
    def kind(self) -> str:
        """The block's type, as a reader knows it: ``"resnet.Bottleneck"``."""
        cls = type(self.module)
        return f"{cls.__module__.rsplit('.', 1)[-1]}.{cls.__name__}"


@dataclass(frozen=True)
class Stage:
    """A container of blocks: its dotted path and its blocks in order."""

    path: str
    blocks: tuple[BlockInfo, ...]


Shape = tuple[int, int, int]  # in channels, out channels, stride

_READERS: dict[type[nn.Module], Callable[..., Shape]] = {
    resnet.BasicBlock: lambda b: (b.conv1.in_channels, b.conv2.out_channels, b.stride),
    resnet.Bottleneck: lambda b: (b.conv1.in_channels, b.conv3.out_channels, b.stride),
    regnet.Bottleneck: lambda b: (
        b.conv1.conv.in_channels,
        b.conv3.conv.out_channels,
        b.conv2.conv.stride[0],
    ),
    efficientnet.ConvBnAct: lambda b: (b.conv.in_channels, b.conv.out_channels, b.conv.stride[0]),
    efficientnet.DepthwiseSeparableConv: lambda b: (
        b.conv_dw.in_channels,
        b.conv_pw.out_channels,
        b.conv_dw.stride[0],
    ),
    efficientnet.InvertedResidual: lambda b: (
        b.conv_pw.in_channels,
        b.conv_pwl.out_channels,
        b.conv_dw.stride[0],
    ),
    efficientnet.EdgeResidual: lambda b: (
        b.conv_exp.in_channels,
        b.conv_pwl.out_channels,
        b.conv_exp.stride[0],
    ),
    convnext.ConvNeXtBlock: lambda b: (
        b.conv_dw.in_channels,
        b.conv_dw.out_channels,
        b.conv_dw.stride[0],
    ),
    vision_transformer.Block: lambda b: (b.norm1.weight.shape[0],) * 2 + (1,),
    Block: lambda b: (b.channels, b.out_channels, b.stride),
}


def _read(module: nn.Module, path: str = "") -> Shape | None:
    for cls in type(module).__mro__:
        if cls in _READERS:
            try:
                return _READERS[cls](module)
            except (AttributeError, TypeError) as error:  # MixNet's blocks hold several kernels in one
                name = f"{type(module).__name__} {path}".strip()
                raise ValueError(
                    f"{name} is built as no other of its type and cannot be read: {error}"
                ) from error
    return None


def shape_of(block: nn.Module) -> Shape:
    """Channels in, channels out and stride of a block.

    Raises:
        ValueError: a block of no known family, or one that cannot be read.
    """
    shape = _read(block)
    if shape is None:
        raise ValueError(f"{type(block).__name__} is no known block; known: {', '.join(block_families())}")
    return shape


def _containers(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """Every module below (and with) `module` that is not itself inside a block."""
    yield path, module
    for name, child in module.named_children():
        below = f"{path}.{name}" if path else name
        if _read(child, below) is None:
            yield from _containers(child, below)


def stages(model: nn.Module) -> list[Stage]:
    """The stages of a network, in the order in which they were registered.

    Args:
        model: a network, converted or not.

    Returns:
        One `Stage` for each container that directly holds blocks; empty when the
        network's family is not known here.

    Raises:
        ValueError: a block of a known type lacks what tells its shape; names it.

    Example:
        >>> import timm
        >>> [len(stage.blocks) for stage in stages(timm.create_model("resnet18"))]
        [2, 2, 2, 2]
    """
    found = []
    for path, container in _containers(model, ""):
        blocks = []
        for name, child in container.named_children():
            below = f"{path}.{name}" if path else name
            shape = _read(child, below)
            if shape is not None:
                blocks.append(BlockInfo(below, child, *shape))
        if blocks:
            found.append(Stage(path, tuple(blocks)))
    return found


@dataclass(frozen=True)
class Convolution:
    """A layer that convolves, inside or outside a block.

    Attributes:
        path: dotted path from the module that was searched.
        module: an `nn.Conv2d`, or an `nn.Linear` that is applied at each position.
        kind: ``"depthwise"``, ``"pointwise"`` (1x1, or linear) or ``"spatial"``.
    """

    path: str
    module: nn.Conv2d | nn.Linear
    kind: Literal["depthwise", "pointwise", "spatial"]


def convolutions(block: nn.Module) -> list[Convolution]:
    """The convolutions of a block, in order; without those of squeeze-and-excitation.

    Example:
        >>> import timm
        >>> block = timm.create_model("mobilenetv3_small_100").blocks[0][0]
        >>> [(c.path, c.kind) for c in convolutions(block)]
        [('conv_dw', 'depthwise'), ('conv_pw', 'pointwise')]
    """
    found: list[Convolution] = []
    if isinstance(block, vision_transformer.Block):
        return found  # its linear layers are no convolutions: attention lies between them
    for path, module in block.named_modules():
        if "se" in path.split("."):
            continue
        if isinstance(module, nn.Linear):
            found.append(Convolution(path, module, "pointwise"))
        elif isinstance(module, nn.Conv2d):
            found.append(Convolution(path, module, _kind(module)))
    return found


def _kind(conv: nn.Conv2d) -> Literal["depthwise", "pointwise", "spatial"]:
    if conv.groups == conv.in_channels > 1:
        return "depthwise"
    return "pointwise" if conv.kernel_size == (1, 1) else "spatial"


def is_transformer(block: nn.Module) -> bool:
    """Whether a block is one of a vision transformer, whose blocks are all one stage."""
    return isinstance(getattr(block, "block", block), vision_transformer.Block)


_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    layers.RmsNorm,
    layers.RmsNormFp32,
    layers.RmsNorm2d,
    layers.RmsNorm2dFp32,
    layers.SimpleNorm,
    layers.SimpleNormFp32,
    layers.SimpleNorm2d,
    layers.SimpleNorm2dFp32,
)


def norms(block: nn.Module) -> list[str]:
    """Paths of the norms on a block's main path: those of its shortcut are left out.

    Example:
        >>> import timm
        >>> norms(timm.create_model("resnet18").layer2[0])
        ['bn1', 'bn2']
    """
    return [
        path
        for path, module in block.named_modules()
        if isinstance(module, _NORMS) and not {"downsample", "shortcut"} & set(path.split("."))
    ]


def is_residual(block: nn.Module) -> bool:
    """Whether a block adds its input to its output, so that it can be left out.

    Example:
        >>> import timm
        >>> [is_residual(block) for block in timm.create_model("mobilenetv2_100").blocks[1]]
        [False, True]
    """
    inner = getattr(block, "block", block)  # of a block that a method wrapped
    if isinstance(inner, regnet.Bottleneck):
        return inner.downsample is not None and isinstance(inner.downsample, nn.Identity)
    added = getattr(inner, "has_skip", True)
    channels, out_channels, stride = shape_of(block)
    return bool(added) and channels == out_channels and stride == 1


def classifier(model: nn.Module) -> str | None:
    """Path of the linear layer that gives the classes; None without one.

    timm's networks name it, also inside a container; of others it is the last module, as
    it is behind a network of timm that was made without a classifier.

    Example:
        >>> import timm
        >>> classifier(nn.Sequential(nn.Identity(), timm.create_model("regnetx_002")))
        '1.head.fc'
    """
    getters = (getattr(module, "get_classifier", None) for module in model.modules())
    asked = [get() for get in getters if callable(get)]
    found: object = asked[0] if asked else None
    if found is None or isinstance(found, nn.Identity):
        found = list(model.modules())[-1]
    paths = (path for path, module in model.named_modules() if module is found)
    return next(paths, None) if isinstance(found, nn.Linear) else None


def stem_and_head(model: nn.Module) -> tuple[list[Convolution], list[Convolution]]:
    """Convolutions before the first block, and those between the last one and the classes.

    Example:
        >>> import timm
        >>> stem, head = stem_and_head(timm.create_model("mobilenetv2_100"))
        >>> [c.path for c in stem], [c.path for c in head]
        (['conv_stem'], ['conv_head'])
    """
    count = sum(len(stage.blocks) for stage in stages(model))
    around = outside_blocks(model)
    return [c for n, c in around if n == 0], [c for n, c in around if n == count]


def outside_blocks(model: nn.Module) -> list[tuple[int, Convolution]]:
    """Each convolution that lies in no block, with the number of blocks before it.

    Example:
        >>> import timm
        >>> [(n, c.path) for n, c in outside_blocks(timm.create_model("convnext_atto"))][:2]
        [(0, 'stem.0'), (2, 'stages.1.downsample.1')]
    """
    blocks = [block.path for stage in stages(model) for block in stage.blocks]
    found: list[tuple[int, Convolution]] = []
    seen = 0
    for path, module in model.named_modules():
        if path in blocks:
            seen += 1
        elif isinstance(module, nn.Conv2d) and not any(path.startswith(f"{b}.") for b in blocks):
            found.append((seen, Convolution(path, module, _kind(module))))
    return found


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


def block_families() -> list[str]:
    """The block types that `stages` can read, for error messages."""
    return sorted(
        f"{cls.__module__.rsplit('.', 1)[-1]}.{cls.__name__}" for cls in _READERS if cls is not Block
    )


def name_of(model: nn.Module) -> str:
    """A network's name: that of its architecture in timm, or else its class's."""
    config = getattr(model, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(model).__name__)


def input_size(model: nn.Module) -> tuple[int, int, int] | None:
    """Channels, height and width that a network was made for, ``(3, 224, 224)``.

    Height and width come from timm's configuration of the network, the channels from
    its first convolution (so ``in_chans`` counts). None when nothing tells.
    """
    config = getattr(model, "pretrained_cfg", None) or {}
    size = config.get("input_size")
    first = next((m for m in model.modules() if isinstance(m, nn.Conv2d)), None)
    if size is None or first is None:
        return None
    return first.in_channels, int(size[1]), int(size[2])


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
