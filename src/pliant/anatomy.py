"""What a network is made of: its stages, its blocks and their shapes.

The only file of pliant that knows families of networks. A *block* is a module of one
of the types in `_READERS` (or a `Block` that pliant put in one's place); a *stage* is
a container whose direct children include blocks. Detecting the containers, instead of
reading timm's ``feature_info``, finds RegNet's stages (which are no ``Sequential``)
and ConvNeXt's (which nest their blocks one level down) alike.

A module that holds several layers, but no block and not the classifier, is an *unknown block*. It
is named, and methods leave all that is inside it alone. A module that stands at several paths is
listed once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

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

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        """Return `x` [B, C, H, W] itself; what else a block takes does nothing."""
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
class UnknownBlock:
    """A block that cannot be read.

    Attributes:
        path: dotted path from the network's root.
        module: the block itself.
        reason: why it cannot be read; names its type.
    """

    path: str
    module: nn.Module
    reason: str


@dataclass(frozen=True)
class Stage:
    """A container of blocks: its dotted path and its blocks in order."""

    path: str
    blocks: tuple[BlockInfo, ...]


Shape = tuple[int, int, int]  # in channels, out channels, stride


def _total_stride(*layers: nn.Module | None) -> int:
    """The product of the strides of those layers that have one."""
    product = 1
    for layer in layers:
        stride = getattr(layer, "stride", 1)
        product *= stride[0] if isinstance(stride, (tuple, list)) else stride
    return product


def _mobile_shape(block: Any, first: Any, strided: Any, last: Any) -> Shape:
    """The shape of a block of EfficientNet's, from its first, its strided and its last convolution.

    EfficientNet-X folds pixels into channels before them; a blur pool strides in their stead.
    """
    folding = getattr(block, "conv_s2d", None)  # older timms have none
    stride = strided.stride[0] * _total_stride(getattr(block, "aa", None), folding)
    return (first if folding is None else folding).in_channels, last.out_channels, stride


def _universal_shape(block: Any) -> Shape:
    """The shape of a block of MobileNetV4's, any of whose three depthwise layers may stride."""
    depthwise = (block.dw_start, block.dw_mid, block.dw_end)
    strided = (getattr(layer, name, None) for layer in depthwise for name in ("conv", "aa"))
    return block.pw_exp.conv.in_channels, block.pw_proj.conv.out_channels, _total_stride(*strided)


_READERS: dict[type[nn.Module], Callable[..., Shape]] = {
    resnet.BasicBlock: lambda b: (b.conv1.in_channels, b.conv2.out_channels, b.stride),
    resnet.Bottleneck: lambda b: (b.conv1.in_channels, b.conv3.out_channels, b.stride),
    regnet.Bottleneck: lambda b: (
        b.conv1.conv.in_channels,
        b.conv3.conv.out_channels,
        b.conv2.conv.stride[0],
    ),
    efficientnet.ConvBnAct: lambda b: _mobile_shape(b, b.conv, b.conv, b.conv),
    efficientnet.DepthwiseSeparableConv: lambda b: _mobile_shape(b, b.conv_dw, b.conv_dw, b.conv_pw),
    efficientnet.InvertedResidual: lambda b: _mobile_shape(b, b.conv_pw, b.conv_dw, b.conv_pwl),
    efficientnet.EdgeResidual: lambda b: _mobile_shape(b, b.conv_exp, b.conv_exp, b.conv_pwl),
    efficientnet.UniversalInvertedResidual: _universal_shape,
    convnext.ConvNeXtBlock: lambda b: (
        b.conv_dw.in_channels,
        b.conv_dw.out_channels,
        b.conv_dw.stride[0],
    ),
    vision_transformer.Block: lambda b: (b.norm1.weight.shape[0],) * 2 + (1,),
    Block: lambda b: (b.channels, b.out_channels, b.stride),
}


def _read(module: nn.Module) -> Shape | str | None:
    """A block's shape; why it has none that can be read, though its type is known; None: no block."""
    for cls in type(module).__mro__:
        if cls in _READERS:
            try:
                return _READERS[cls](module)
            except (AttributeError, TypeError) as error:  # MixNet's blocks hold several kernels in one
                return f"{type_name(module)} is built as no other of its type and cannot be read: {error}"
    return None


def _is_block(module: nn.Module) -> bool:
    return isinstance(_read(module), tuple)


def type_name(module: nn.Module) -> str:
    """A module's type and the library that it is of, for messages.

    Example:
        >>> type_name(resnet.BasicBlock(8, 8)), type_name(nn.ReLU())
        ("timm's resnet.BasicBlock", 'torch.nn.modules.activation.ReLU')
    """
    cls = type(module)
    if cls.__module__.startswith("timm."):
        return f"timm's {cls.__module__.rsplit('.', 1)[-1]}.{cls.__name__}"
    return f"{cls.__module__}.{cls.__qualname__}"


def shape_of(block: nn.Module) -> Shape:
    """Channels in, channels out and stride of a block.

    Raises:
        ValueError: a block of no known family, or one that cannot be read.
    """
    shape = _read(block)
    if shape is None:
        shape = f"{type_name(block)} is no known block; known: {', '.join(block_families())}"
    if isinstance(shape, str):
        raise ValueError(shape)
    return shape


def stages(model: nn.Module) -> list[Stage]:
    """The stages of a network, in the order in which they were registered.

    Args:
        model: a network, converted or not.

    Returns:
        One `Stage` for each container that directly holds blocks that can be read; empty when the
        network's family is not known here. A block that stands in several containers belongs to
        the one with most blocks.

    Example:
        >>> import timm
        >>> [len(stage.blocks) for stage in stages(timm.create_model("resnet18"))]
        [2, 2, 2, 2]
    """
    found: dict[str, list[BlockInfo]] = {}
    for element in elements(model):
        if isinstance(element.what, BlockInfo):
            found.setdefault(element.container, []).append(element.what)
    return [Stage(path, tuple(blocks)) for path, blocks in found.items()]


def blocks(model: nn.Module) -> list[BlockInfo | UnknownBlock]:
    """All blocks of a network, the unknown ones too, in the order in which they were registered.

    Example:
        >>> import timm
        >>> [(b.path, type(b).__name__) for b in blocks(timm.create_model("ghostnet_050"))][-2:]
        [('blocks.8.3', 'UnknownBlock'), ('blocks.9.0', 'BlockInfo')]
    """
    return [e.what for e in elements(model) if not isinstance(e.what, Convolution)]


@dataclass(frozen=True)
class Element:
    """A block, or a convolution outside all blocks.

    Attributes:
        container: path of the module that directly holds a block.
        what: the block or convolution.
        outermost: it lies in containers alone, and in modules that hold all of the network's blocks.
    """

    container: str
    what: BlockInfo | UnknownBlock | Convolution
    outermost: bool


def elements(model: nn.Module) -> Iterator[Element]:
    """The blocks of a network, and the convolutions outside them, in order, each module once."""
    held, homes = _held_blocks(model)
    every = held[id(model)]
    declared = {id(found) for found in declared_classifiers(model)}
    paths = [path.split(".") for path, module in model.named_modules() if id(module) in declared]
    around_classifier = {
        id(model.get_submodule(".".join(names[:n]))) for names in paths for n in range(1, len(names))
    }
    seen: set[int] = set()

    def walk(path: str, module: nn.Module, outermost: bool) -> Iterator[Element]:
        for name, child in module.named_children():
            below = f"{path}.{name}" if path else name
            shape = _read(child)
            if id(child) in seen or (isinstance(shape, tuple) and homes[id(child)] != id(module)):
                continue
            seen.add(id(child))
            inside = held.get(id(child), frozenset())
            if isinstance(shape, tuple):
                yield Element(path, BlockInfo(below, child, *shape), outermost)
            elif isinstance(shape, str):
                yield Element(path, UnknownBlock(below, child, shape), outermost)
            elif inside or _is_container(child) or id(child) in around_classifier:
                yield from walk(below, child, outermost and (not inside or inside == every))
            elif isinstance(child, Part):
                continue  # what a method made of a convolution outside the blocks
            elif _is_unknown_stage(child):
                yield from walk(below, child, False)
            elif count_layers(child) > 1:
                reason = f"{type_name(child)} is no block of a known family"
                yield Element(path, UnknownBlock(below, child, reason), outermost)
            else:  # a layer, or one with its norm and activation
                for inner, layer in child.named_modules():
                    if isinstance(layer, nn.Conv2d):
                        where = f"{below}.{inner}" if inner else below
                        yield Element(path, Convolution(where, layer, _kind(layer)), outermost)

    return walk("", model, True)


def _held_blocks(model: nn.Module) -> tuple[dict[int, frozenset[int]], dict[int, int]]:
    """Which blocks each module outside the blocks holds, and which module is home to each block.

    Returns:
        Both by the modules' `id`. A block's home is, of all modules that directly hold it, the one
        that holds most blocks; containers go before others, such as a wrapper with names of its own.
    """
    held: dict[int, frozenset[int]] = {}
    homes: dict[int, int] = {}
    best: dict[int, tuple[bool, int]] = {}

    def look(module: nn.Module) -> frozenset[int]:
        if id(module) in held:
            return held[id(module)]
        direct = {id(child) for child in module.children() if _is_block(child)}
        rank = (_is_container(module), len(direct))
        for block in direct:
            if rank > best.get(block, (False, 0)):
                homes[block], best[block] = id(module), rank
        below = (look(child) for child in module.children() if _read(child) is None)
        held[id(module)] = frozenset(direct).union(*below)
        return held[id(module)]

    look(model)
    return held, homes


def _is_container(module: nn.Module) -> bool:
    """Whether a module only holds or chains others, as `nn.Sequential` does."""
    return any(
        isinstance(module, cls) and type(module).forward is cls.forward
        for cls in (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    )


def _is_unknown_stage(module: nn.Module) -> bool:
    """Whether most of a module lies in a container of unknown blocks; these are then named singly."""
    inner = (child for m in module.children() if _is_container(m) for child in m.children())
    unknown = [child for child in inner if count_layers(child) > 1]
    return 2 * sum(map(_size, unknown)) > _size(module)


def _size(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def count_layers(module: nn.Module) -> int:
    """How many modules have a matrix or a kernel of their own."""
    return sum(any(p.dim() > 1 for p in m.parameters(recurse=False)) for m in module.modules())


@dataclass(frozen=True)
class Convolution:
    """A layer that convolves, inside or outside a block.

    Attributes:
        path: dotted path from the module that was searched.
        module: an `nn.Conv2d`, or an `nn.Linear` that is applied at each position.
        kind: ``"depthwise"``, ``"pointwise"`` (1x1, or linear) or ``"spatial"``.
        inside: type of a module in the block that is neither timm's nor PyTorch's and holds the
            layer, such as an adapter; empty for none.
    """

    path: str
    module: nn.Conv2d | nn.Linear
    kind: Literal["depthwise", "pointwise", "spatial"]
    inside: str = ""


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
    foreign: dict[str, str] = {}
    for path, module in block.named_modules():
        if "se" in path.split("."):
            continue
        if path and type(module).__module__.partition(".")[0] not in ("torch", "timm", "pliant"):
            foreign[f"{path}."] = type_name(module)
        inside = next((name for prefix, name in foreign.items() if path.startswith(prefix)), "")
        if isinstance(module, nn.Linear):
            found.append(Convolution(path, module, "pointwise", inside))
        elif isinstance(module, nn.Conv2d):
            found.append(Convolution(path, module, _kind(module), inside))
    return found


def _kind(conv: nn.Conv2d) -> Literal["depthwise", "pointwise", "spatial"]:
    if conv.groups == conv.in_channels > 1:
        return "depthwise"
    return "pointwise" if conv.kernel_size == (1, 1) else "spatial"


def is_transformer(block: nn.Module) -> bool:
    """Whether a block is one of a vision transformer, whose blocks are all one stage."""
    return isinstance(getattr(block, "block", block), vision_transformer.Block)


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
    if isinstance(inner, (resnet.BasicBlock, resnet.Bottleneck)) and inner.downsample is not None:
        return False  # a block of HRNet's that keeps width and resolution, and convolves its input
    added = getattr(inner, "has_skip", True)
    channels, out_channels, stride = shape_of(block)
    return bool(added) and channels == out_channels and stride == 1


def declared_classifiers(model: nn.Module) -> list[object]:
    """What the networks in `model` say is their classifier, outermost first."""
    found = []
    for module in model.modules():
        get = getattr(type(module), "get_classifier", None)
        try:
            found += [get(module)] if callable(get) else []
        except (AttributeError, TypeError):  # an encoder whose classifier was deleted
            continue
    return found


def block_families() -> list[str]:
    """The block types that `stages` can read, all of timm, for error messages."""
    return sorted(
        f"{cls.__module__.rsplit('.', 1)[-1]}.{cls.__name__}" for cls in _READERS if cls is not Block
    )
