"""A Mixture-of-Depths block's training step as two operators: `train_block`, and what it takes.

``pliant::mod_training`` and ``pliant::mod_training_backward`` are native, for the CPU only:
``mod_training.cpp``, which `building` builds. Where they do not fit, `unfit` says so,
and the block runs in PyTorch's operators (`pliant.methods.mixture_of_depths.training`).

Shapes in this file::

    B  batch            x        [B, C, H, W]  feature map
    C  channels         index    [B, k]        channels that are processed, int64
    k  processed        down     [r, C]        selector: hidden = relu(down @ mean(x))
    r  hidden units     up       [C, r]        selector: logits = up @ hidden
    m  behind a layer   weights  [m, k or m, 1 or 3, 1 or 3], for each layer of the core; [m] scales
                                 and shifts of its batch norm
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from pliant.methods.mixture_of_depths.ops import building

SOURCE = Path(__file__).with_name("mod_training.cpp")
# Widest core: in planes, what is wider takes longer than PyTorch's convolutions.
WIDEST = 16

_LIBRARY = cast("Any", torch.library).Library("pliant", "FRAGMENT")
_CORE = "Tensor[] weights, Tensor[] scales, Tensor[] shifts"
_LIBRARY.define(
    f"mod_training(Tensor x, Tensor? index, Tensor? down, Tensor? up, {_CORE}, "
    "Tensor(a!)[] running_means, Tensor(b!)[] running_vars, float[] eps, float[] momenta, "
    "int dilation, bool by_position, str order, str fusion) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    f"mod_training_backward(Tensor grad, Tensor channels, Tensor kept, Tensor? down, Tensor? up, {_CORE}, "
    "int dilation, bool by_position, str fusion, bool wants_x) -> Tensor[]"
)

mod_training: Any = torch.ops.pliant.mod_training.default
mod_training_backward: Any = torch.ops.pliant.mod_training_backward.default

_lock = threading.Lock()
_outcome: str | None = None  # of this process: empty where the library is loaded, else why not


class Layers(NamedTuple):
    """The layers of a core: a convolution with batch norm each, ReLU between."""

    convs: list[nn.Conv2d]
    norms: list[nn.BatchNorm2d]


def layers_of(core: nn.Module) -> Layers | str:
    """The layers of a core that the operators know, or why they do not.

    Example:
        >>> layers_of(nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.GroupNorm(1, 4)))
        'its core is Conv2d, GroupNorm, not convolutions with batch norm and ReLU between'
    """
    parts: list[Any] = list(core.children())
    convs, norms, between = parts[::3], parts[1::3], parts[2::3]
    as_known = (
        len(convs) == len(norms) == len(between) + 1
        and all(type(m) is nn.Conv2d for m in convs)
        and all(type(m) is nn.BatchNorm2d for m in norms)
        and all(type(m) is nn.ReLU for m in between)
    )
    if not as_known:
        names = ", ".join(type(m).__name__ for m in parts)
        return f"its core is {names}, not convolutions with batch norm and ReLU between"
    dilation = max(conv.dilation[0] for conv in convs)
    for conv in convs:
        three = conv.kernel_size == (3, 3)
        space = ((dilation, dilation),) * 2 if three else ((1, 1), (0, 0))
        plain = conv.groups == 1 and conv.stride == (1, 1) and conv.padding_mode == "zeros"
        known = plain and conv.bias is None and (three or conv.kernel_size == (1, 1))
        if not known or (conv.dilation, conv.padding) != space:
            return f"its core has a convolution of another kind: {conv}"
        if conv.weight.dtype != torch.float32:
            return f"its weights are {conv.weight.dtype}"
        if max(conv.in_channels, conv.out_channels) > WIDEST:
            return f"its core is wider than {WIDEST} channels"
    for norm in norms:
        if not norm.training or not norm.affine or norm.running_mean is None or norm.momentum is None:
            return "its batch norms do not use, or do not keep a running mean of, the batch's statistics"
    return Layers(convs, norms)


def unfit(x: Tensor) -> str:
    """Why the operators do not know this feature map; empty if they do.

    Example:
        >>> unfit(torch.zeros(1, 2, 3, 3, dtype=torch.float64))
        'x is torch.float64'
    """
    if type(x) not in (Tensor, nn.Parameter) or x.device.type != "cpu":
        return "x is no plain tensor on the CPU"
    if x.dtype not in (torch.float32, torch.bfloat16):
        return f"x is {x.dtype}"
    if x.dtype == torch.bfloat16 and not torch.is_autocast_enabled("cpu"):
        return "x is bfloat16 and its weights are not: PyTorch refuses it"
    if x.numel() <= x.shape[1]:
        return "x has one value a channel, or none"
    return ""


def ready() -> bool:
    """Whether the operators are there; builds and loads them if need be, ten seconds once a machine.

    The first call in a process decides for all later ones. A failure is a warning, once.
    """
    global _outcome
    if _outcome is None:
        with _lock:
            if _outcome is None:
                try:
                    building._load(building.library(SOURCE))
                    _outcome = ""
                except building.BuildError as error:
                    _outcome = str(error)
                    warnings.warn(
                        f"Mixture-of-Depths blocks train in PyTorch's operators, which is slower: {error}",
                        RuntimeWarning,
                        stacklevel=2,
                    )
    return not _outcome


def train_block(
    x: Tensor,
    index: Tensor | None,
    down: Tensor | None,
    up: Tensor | None,
    layers: Layers,
    order: str,
    fusion: str,
) -> Tensor:
    """The block's output for `x`, of its dtype, with a gradient; norms keep their running statistics.

    All is computed in float32, under autocast too. There is no second derivative, and asking for
    one is an error.

    Args:
        x: feature map, which `unfit` has nothing against.
        index: channels that are processed; None: those that the selector ranks highest.
        down: the selector's first layer; None: there is none, and no scores.
        up: its second.
        layers: of the core.
        order: ``"score"`` or ``"index"``, as for `pliant.MixtureOfDepths`.
        fusion: likewise.
    """
    convs, norms = layers
    tensors = [
        *(conv.weight for conv in convs),
        *(norm.weight for norm in norms),
        *(norm.bias for norm in norms),
    ]
    for norm in norms:
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked.add_(1)
    dilation = max(conv.dilation[0] for conv in convs)
    trained: Tensor = TrainedBlock.apply(x, index, down, up, norms, dilation, order, fusion, *tensors)
    return trained


class TrainedBlock(torch.autograd.Function):
    """See `train_block`."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        index: Tensor | None,
        down: Tensor | None,
        up: Tensor | None,
        norms: list[nn.BatchNorm2d],
        dilation: int,
        order: str,
        fusion: str,
        *tensors: Tensor,
    ) -> Tensor:
        """One operator, which also gives what the gradient needs."""
        by_position = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        tensors = tuple(t.contiguous() for t in tensors)
        if down is not None and up is not None:
            down, up = down.contiguous(), up.contiguous()
        n = len(norms)
        running = [norm.running_mean for norm in norms], [norm.running_var for norm in norms]
        with torch._C._AutoDispatchBelowAutograd():  # which would only look for gradients here
            out, *kept = mod_training(
                x if by_position else x.contiguous(),
                *(index, down, up, tensors[:n], tensors[n : 2 * n], tensors[2 * n :], *running),
                *([norm.eps for norm in norms], [norm.momentum for norm in norms]),
                *(dilation, by_position, order, fusion),
            )
        ctx.save_for_backward(down, up, *tensors, *kept)
        ctx.layers, ctx.dilation, ctx.by_position, ctx.fusion = n, dilation, by_position, fusion
        return cast("Tensor", out)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """One operator, which has no gradient."""
        if torch.is_grad_enabled():  # create_graph=True
            raise RuntimeError(
                "a Mixture-of-Depths block's training operator has no second derivative; in float64 and "
                "under torch.func, blocks run in PyTorch's operators, which have"
            )
        down, up, *rest = ctx.saved_tensors
        n, wants_x = ctx.layers, ctx.needs_input_grad[0]
        form = torch.channels_last if ctx.by_position else torch.contiguous_format
        with torch._C._AutoDispatchBelowAutograd():
            of_x, of_down, of_up, *of_tensors = mod_training_backward(
                grad.contiguous(memory_format=form),
                *(*rest[3 * n :], down, up, rest[:n], rest[n : 2 * n], rest[2 * n : 3 * n]),
                *(ctx.dilation, ctx.by_position, ctx.fusion, wants_x),
            )
        of_selector = (None, None) if down is None else (of_down, of_up)
        return of_x if wants_x else None, None, *of_selector, None, None, None, None, *of_tensors


def watched(modules: Sequence[nn.Module]) -> bool:
    """Whether hooks wait for one of these modules to run by itself.

    Example:
        >>> watched([nn.ReLU()])
        False
    """
    return any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
        for m in modules
    )


def flops(x: Sequence[int], _index: Any, down: Sequence[int] | None, *rest: Any, **_named: Any) -> int:
    """Operations, twice the multiply-accumulates, of the forward pass, as of the plain form."""
    batch, channels, height, width = x
    _up, weights, *_ = rest
    core: int = sum(w[0] * w[1] * w[2] * w[3] for w in weights)
    return 2 * batch * (height * width * core + (0 if down is None else 2 * channels * down[0]))


def backward_flops(
    grad: Sequence[int], _channels: Any, _kept: Any, down: Sequence[int] | None, *rest: Any, **_named: Any
) -> int:
    """Those of the backward pass: twice the forward pass's."""
    return 2 * flops(grad, None, down, *rest)


register_flop_formula(torch.ops.pliant.mod_training)(flops)
register_flop_formula(torch.ops.pliant.mod_training_backward)(backward_flops)
