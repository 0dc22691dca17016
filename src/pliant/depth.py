"""Switch, list and cut out the depths of an adaptive network.

A depth is a tuple of flags, one for each stage that can skip its last blocks: all False is
the whole network, all True the base network.

Shapes: images as the network takes them; nothing here changes a shape.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import product
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pliant import anatomy
from pliant.anatomy import RemovedBlock
from pliant.measuring.macs import count_macs, count_parameters
from pliant.methods.adaptive_depth import (
    _HELD,
    AdaptiveBlock,
    Depth,
    Held,
    Skip,
    SwitchableNorm,
    check_skip,
)
from pliant.surgery import forget_conversions

Network = TypeVar("Network", bound=nn.Module)


def set_depth(model: nn.Module, skip: Sequence[bool]) -> Switch:
    """Choose the depth at which a network runs.

    ``set_depth(model, skip)`` sets the default, for all threads. ``with set_depth(model,
    skip):`` holds in its block only: other threads and tasks do not see it, and the
    default stays. One forward has one depth for each stage, whatever is switched
    meanwhile.

    Args:
        model: a network converted by `AdaptiveDepth`.
        skip: a flag for each stage that can skip, True skips; all depths: `depths`.

    Raises:
        ValueError: the network has no adaptive depth, or another number of flags.

    Example:
        >>> import timm, pliant
        >>> model = pliant.convert(timm.create_model("resnet18"), pliant.AdaptiveDepth())
        >>> with set_depth(model, (True, True, True, True)):
        ...     get_depth(model)
        (True, True, True, True)
        >>> get_depth(model)
        (False, False, False, False)
        >>> set_depth(model, (False, False, False, True))
        depth (False, False, False, True)
        >>> get_depth(model)
        (False, False, False, True)
    """
    depth = _depth(model)
    return Switch(depth, check_skip(list(skip), len(depth.skip)))


def get_depth(model: nn.Module) -> Skip:
    """The flags that hold here and now.

    Raises:
        ValueError: the network has no adaptive depth.
    """
    return _depth(model).current()


class Switch:
    """What `set_depth` returns: a context manager, or, thrown away, the new default.

    Until it is entered or thrown away it holds for its own context alone, so that no other
    thread ever runs at the depth of a ``with``.
    """

    def __init__(self, depth: Depth, skip: Skip) -> None:
        others = _HELD.get() or {}
        before = others.get(depth)
        if before is not None and before.pending:
            before.publish()  # kept alive, as by an interactive prompt, and followed by this one
        self._held = Held(depth, skip)
        self._token = _HELD.set({**others, depth: self._held})

    def __enter__(self) -> Skip:
        """Hold the depth; returns its flags."""
        self._held.pending = False
        return self._held.skip

    def __exit__(
        self, _kind: type[BaseException] | None, _error: BaseException | None, _at: TracebackType | None
    ) -> None:
        """What held before holds again."""
        self._held.alive = False
        _HELD.reset(self._token)

    def __del__(self) -> None:
        if self._held.pending:
            self._held.publish()
            with suppress(ValueError):  # thrown away in another context: it is dead there too
                _HELD.reset(self._token)

    def __repr__(self) -> str:
        return f"depth {self._held.skip}"


def _depth(model: nn.Module) -> Depth:
    """The one depth of a network.

    Raises:
        ValueError: it has none, or several.
    """
    found = [m for m in model.modules() if isinstance(m, Depth)]
    if len(found) != 1:
        raise ValueError(
            f"{type(model).__name__} has {len(found) or 'no'} adaptive depth{'s' * (len(found) > 1)}; "
            f"{'give one of its networks' if found else 'convert it by AdaptiveDepth() first'}"
        )
    return found[0]


@dataclass(frozen=True)
class DepthInfo:
    """One depth of a network.

    Attributes:
        skip: its flags.
        parameters: that it uses, those of a `subnet`.
        macs: multiply-accumulates of one image; None where no input size is known.
    """

    skip: Skip
    parameters: int
    macs: int | None


def depths(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> list[DepthInfo]:
    """All depths of a network, the whole network first.

    Args:
        model: a network converted by `AdaptiveDepth`.
        input_size: channels, height, width to count for; by default what the network says.

    Raises:
        ValueError: the network has no adaptive depth.

    Example:
        >>> import timm, pliant
        >>> model = pliant.convert(timm.create_model("resnet50"), pliant.AdaptiveDepth())
        >>> found = depths(model)
        >>> len(found), found[0].macs, found[-1].macs
        (16, 4089184256, 2560622592)
    """
    size = input_size or anatomy.input_size(model)
    result = []
    for skip in product((False, True), repeat=len(_depth(model).skip)):
        cut = subnet(model, skip, share=True)
        macs = count_macs(cut, size) if size else None
        result.append(DepthInfo(skip, count_parameters(cut), macs))
    return result


def subnet(model: Network, skip: Sequence[bool], *, share: bool = False) -> Network:
    """Cut one depth out: a plain network, without what it does not use.

    Its outputs are those of `model` at that depth, bit by bit.

    Args:
        model: a network converted by `AdaptiveDepth`; it stays as it is.
        skip: the depth.
        share: build it on the tensors of `model` instead of copies, so that all depths
            served at once take the memory of one. Training one then trains the other.

    Raises:
        ValueError: the network has no adaptive depth, or another number of flags.

    Example:
        >>> import timm, pliant
        >>> model = pliant.convert(timm.create_model("resnet50"), pliant.AdaptiveDepth())
        >>> sum(p.numel() for p in subnet(model, (True,) * 4).parameters())
        17112360
    """
    flags = check_skip(list(skip), len(_depth(model).skip))
    memo: dict[int, Any] = {}
    if share:
        memo = {id(t): t for t in (*model.parameters(), *model.buffers())}
    cut = copy.deepcopy(model, memo)
    for path, module in list(cut.named_modules()):
        if isinstance(module, AdaptiveBlock):
            _put(cut, path, _plain(module, flags[module.flag]))
    forget_conversions(cut, "AdaptiveDepth")
    return cut


def _plain(block: AdaptiveBlock, skip: bool) -> nn.Module:
    """What a block is at one of its two depths, without anything to switch."""
    if skip and block.skippable:
        return RemovedBlock(block.channels)
    plain: nn.Module = block.block
    for path, norm in list(plain.named_modules()):
        if isinstance(norm, SwitchableNorm):
            _put(plain, path, norm.base if skip else norm.full)
    return plain


def _put(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, module)


class CompiledDepths(nn.Module):
    """All depths of a network, each compiled for itself; `set_depth` switches between them.

    Args:
        model: a network converted by `AdaptiveDepth`; the depths share its weights.
        skips: which depths; None: all.
        compile_options: of `torch.compile`.

    Raises:
        ValueError: the network has no adaptive depth.
    """

    def __init__(
        self, model: nn.Module, skips: Sequence[Sequence[bool]] | None = None, **compile_options: Any
    ) -> None:
        super().__init__()
        self.model = model
        # In a dict they are no submodules: their weights are the model's.
        self._runners: dict[Skip, Callable[..., Any]] = {}
        flags = len(_depth(model).skip)
        chosen = product((False, True), repeat=flags) if skips is None else skips
        for skip in chosen:
            cut = subnet(model, list(skip), share=True)
            self._runners[check_skip(list(skip), flags)] = torch.compile(cut, **compile_options)

    def forward(self, x: Tensor) -> Any:
        """The network's output for `x`, at the depth that holds here and now.

        Raises:
            ValueError: that depth is not among the compiled ones.
        """
        skip = get_depth(self.model)
        if skip not in self._runners:
            raise ValueError(f"depth {skip} is not compiled; compiled are {list(self._runners)}")
        return self._runners[skip](x)


def compile_depths(
    model: nn.Module,
    example: Tensor,
    skips: Sequence[Sequence[bool]] | None = None,
    **compile_options: Any,
) -> CompiledDepths:
    """Compile every depth ahead, so that switching recompiles nothing.

    Compiled code is for inputs of the example's shape and dtype, in the mode (training or
    evaluation) that the network has now.

    Args:
        model: a network converted by `AdaptiveDepth`.
        example: images to compile with.
        skips: which depths; None: all.
        compile_options: of `torch.compile` (``backend``, ``mode``, ...).

    Raises:
        ValueError: the network has no adaptive depth.

    Example:
        >>> import timm, torch, pliant
        >>> model = pliant.convert(timm.create_model("resnet20_cifar"), pliant.AdaptiveDepth()).eval()
        >>> fast = compile_depths(model, torch.randn(1, 3, 32, 32), [(True,) * 3], backend="eager")
        >>> with set_depth(model, (True,) * 3):
        ...     fast(torch.randn(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    import torch._dynamo

    compiled = CompiledDepths(model, skips, **compile_options)
    # Depths share their classes' code, whose cache holds eight entries unless told.
    with torch._dynamo.config.patch(recompile_limit=max(8, 4 * len(compiled._runners))), torch.no_grad():
        for skip in compiled._runners:
            with set_depth(model, skip):
                compiled(example)
    return compiled
