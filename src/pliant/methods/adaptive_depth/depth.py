"""Choose, list and cut out the depths of an adaptive network.

A depth is one flag for each stage that can skip its last blocks: a string such as ``"TTFF"``,
or a sequence of booleans. All False (F) is the whole network, all True (T) the base network.

Shapes: images as the network takes them; nothing here changes a shape.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import product
from typing import Any, cast

import torch
from torch import Tensor, nn

from pliant import outside
from pliant.compiling import room_to_compile
from pliant.counting import count_macs, count_parameters
from pliant.methods.adaptive_depth.method import cut_out
from pliant.methods.adaptive_depth.method import subnet as subnet
from pliant.methods.adaptive_depth.switch import (
    Default,
    Skip,
    SkipLike,
    check_skip,
    check_skips,
    depth_name,
    find_depth,
)
from pliant.surgery import skeleton


def set_depth(model: nn.Module, skip: SkipLike) -> Default:
    """Set the depth at which a network runs by default: from now on, in all threads.

    A ``with at_depth(...)`` that is open goes before the default, in its own context. One
    forward has one depth for each stage, whatever is set meanwhile.

    What `torch.compile` made of the network follows, and compiles anew for each depth:
    `compile_depths` does that ahead. (PyTorch that cannot compile the reading of a context
    variable, 2.11 say, breaks the graph there, so it refuses ``fullgraph=True``.) A network
    that was traced, exported or cut out has one depth for ever, and refuses another.

    Args:
        model: a network converted by `AdaptiveDepth`.
        skip: a flag for each stage that can skip: a string such as ``"TTFF"``, or booleans;
            T (True) skips. `depths` lists them all.

    Returns:
        The flags, as booleans.

    Raises:
        ValueError: the network has no adaptive depth, or another number of flags.
        TypeError: used in a ``with``: that is `at_depth`.

    Example:
        >>> import timm, pliant
        >>> model = pliant.convert(timm.create_model("resnet18"), pliant.AdaptiveDepth())
        >>> set_depth(model, "FFFT")
        (False, False, False, True)
        >>> get_depth(model)
        (False, False, False, True)
    """
    depth = find_depth(model)
    depth.skip = check_skip(skip, len(depth.skip))
    return Default(depth.skip)


def at_depth(model: nn.Module, skip: SkipLike) -> AbstractContextManager[Skip]:
    """Run a network at a depth within a ``with``: in this thread or asyncio task only.

    Other threads and tasks do not see it, and the default (`set_depth`) stays. Tasks that are
    started in the block keep its depth. A thread that is started there begins without it, as
    with all of Python's context variables (`asyncio.to_thread` and `nn.DataParallel` take it
    along). A copy of the network that is made in the block has its depth as its default.

    Args:
        model: a network converted by `AdaptiveDepth`.
        skip: as of `set_depth`.

    Returns:
        A context manager that gives the flags, as booleans.

    Raises:
        ValueError: the network has no adaptive depth, or another number of flags.

    Example:
        >>> import timm, pliant
        >>> model = pliant.convert(timm.create_model("resnet18"), pliant.AdaptiveDepth())
        >>> with at_depth(model, "TTFF"):
        ...     get_depth(model)
        (True, True, False, False)
        >>> get_depth(model)
        (False, False, False, False)
    """
    depth = find_depth(model)
    return depth.hold(check_skip(skip, len(depth.skip)))


def get_depth(model: nn.Module) -> Skip:
    """The flags that hold here and now: of the innermost `at_depth`, else of `set_depth`.

    Raises:
        ValueError: the network has no adaptive depth.

    Example:
        >>> import timm, pliant
        >>> get_depth(timm.create_model("resnet20_cifar_adn"))
        (False, False, False)
    """
    return find_depth(model).current()


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
    size = input_size or outside.input_size(model)
    bare = skeleton(model)  # counting needs no arithmetic
    result = []
    for skip in product((False, True), repeat=len(find_depth(model).skip)):
        cut = subnet(bare, skip, share=True)
        macs = count_macs(cut, size) if size else None
        result.append(DepthInfo(skip, count_parameters(cut), macs))
    return result


class CompiledDepths(nn.Module):
    """Depths of a network, each compiled for itself; `set_depth` and `at_depth` choose (`compile_depths`).

    Args:
        model: a network converted by `AdaptiveDepth`.
        runners: what runs at each depth, on the weights of `model`.
        copies: for each depth the modules in its runner, each with that of `model` whose mode it follows.
    """

    def __init__(
        self,
        model: nn.Module,
        runners: dict[Skip, nn.Module],
        copies: dict[Skip, list[tuple[nn.Module, nn.Module]]],
    ) -> None:
        super().__init__()
        self.model = model
        self._runners = runners  # in a dict they are no submodules: their weights are the model's
        self._copies = copies

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        if any(fn(t) is not t for t in (*self.parameters(), *self.buffers())):
            raise ValueError(
                "what is compiled stays on its device and in its dtype: move the network, and then "
                "compile_depths anew"
            )
        return self

    def forward(self, x: Tensor) -> Any:
        """The network's output for `x`, at the depth that holds here and now.

        In evaluation mode without gradients, whatever the caller's mode: compiled code is
        for one, and would be compiled anew for `torch.inference_mode`, say.

        Raises:
            ValueError: that depth is not among the compiled ones.
        """
        skip = get_depth(self.model)
        if skip not in self._runners:
            compiled = ", ".join(map(depth_name, self._runners))
            raise ValueError(f"depth {depth_name(skip)} is not compiled; compiled are {compiled}")
        for module, source in self._copies[skip]:  # a frozen norm in a network that trains, say
            if module.training != source.training:
                module.training = source.training
        gradients = self.model.training and torch.is_grad_enabled()
        with torch.inference_mode(False), torch.set_grad_enabled(gradients):
            return self._runners[skip](x.clone() if x.is_inference() else x)


def compile_depths(
    model: nn.Module,
    example: Tensor,
    skips: Iterable[SkipLike] | None = None,
    **compile_options: Any,
) -> CompiledDepths:
    """Compile every depth ahead, so that switching recompiles nothing.

    Compiled code is for inputs of the example's shape and dtype, in the mode that each module of the
    network has now: evaluation, where the network computes no gradients, or training.

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
        >>> fast = compile_depths(model, torch.randn(1, 3, 32, 32), ["TTT"], backend="eager")
        >>> with at_depth(model, "TTT"):
        ...     fast(torch.randn(1, 3, 32, 32)).shape
        torch.Size([1, 10])
    """
    runners, copies = {}, {}
    for skip in check_skips(skips, len(find_depth(model).skip)):
        cut, copies[skip] = cut_out(model, skip, share=True)
        runners[skip] = cast("nn.Module", torch.compile(cut, **compile_options))
    compiled = CompiledDepths(model, runners, copies)
    training = any(module.training for module in model.modules())
    statistics = [(buffer, buffer.clone()) for buffer in model.buffers()] if training else []
    with room_to_compile():  # depths share their classes' code
        for skip in runners:
            with at_depth(model, skip):
                compiled(example)
    for buffer, before in statistics:
        buffer.copy_(before)
    return compiled
