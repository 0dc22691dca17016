"""Layers whose weights are mixed for each example, and the routers that say how.

Section 3 of arXiv 1904.04971: ``(r_1 W_1 + ... + r_E W_E) * x`` with ``r = router(x)``.

Shapes in this file::

    B  batch           x        [B, C, H, W]  feature map, or [B, ..., C] for linear layers
    E  experts         routing  [B, E], or [B, E, O] with a weight for each channel
    C  channels in     weight   [E, O, C/g h w] or [E, O, C]
    O  channels out    bias     [O], shared by the experts, or [E, O]
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
import torch.nn.functional as F
from timm.layers import pad_same
from torch import Tensor, nn

from pliant.methods.condconv.exported import EachImage, OneImage, SideBySideLinear, needs_loop
from pliant.methods.condconv.mixing import (
    ROUTING,
    Form,
    Geometry,
    conditional_conv2d,
    conditional_linear,
)
from pliant.parts import Part, Target
from pliant.precision import full_precision, linear, pooled
from pliant.threaded import arrived, thread

Activation = Literal["sigmoid", "softmax"]
Bias = Literal["shared", "experts"]

MOST_EXPERTS = 64  # the paper's largest


class Router(nn.Module):
    """Say from a feature map how much of each expert an example gets.

    GAP -> Linear -> sigmoid, or with a hidden layer GAP -> Linear -> ReLU -> Linear
    (sections 3 and 4.3). At least float32, under autocast too.

    Args:
        channels: C of the feature map.
        experts: E.
        hidden: units of a hidden layer; None: no such layer.
        activation: ``"sigmoid"``: experts do not compete; ``"softmax"``: weights sum to one.
        outputs: O for a weight for each output channel (section 4.3.1); None: one for each
            expert.
        active: hard routing: all but the `active` experts with the highest weights get
            none (section 3). Softmax is then taken over these alone. None: all.
        previous: the weights of the block before come as further inputs ("hierarchical",
            section 4.3.3).

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> router = Router(16, experts=4, active=2)
        >>> (router(torch.randn(3, 16, 8, 8)) > 0).sum(1)
        tensor([2, 2, 2])
    """

    gives = ROUTING

    def __init__(
        self,
        channels: int,
        experts: int,
        *,
        hidden: int | None = None,
        activation: Activation = "sigmoid",
        outputs: int | None = None,
        active: int | None = None,
        previous: bool = False,
    ) -> None:
        super().__init__()
        check_experts(experts, active)
        if activation not in get_args(Activation):
            choices = ", ".join(get_args(Activation))
            raise ValueError(f"activation must be one of {choices}; not {activation!r}")
        for name, value in (("channels", channels), ("hidden", hidden), ("outputs", outputs)):
            if value is not None or name == "channels":
                _check_whole(name, value)
        self.channels, self.experts, self.outputs, self.active = channels, experts, outputs, active
        self.activation, self.previous = activation, previous
        inputs = channels + experts * previous
        self.fc1 = nn.Linear(inputs, hidden) if hidden else None
        self.fc2 = nn.Linear(hidden or inputs, experts * (outputs or 1))

    @property
    def takes(self) -> str:
        """Name of the threaded value that it reads; empty for none (`pliant.threaded.borrowed`)."""
        return ROUTING if self.previous else ""

    def forward(self, x: Tensor) -> Tensor:
        """Routing [B, E] or [B, E, O] for `x` [B, C, H, W] (or [B, C]).

        Raises:
            RuntimeError: it needs the routing of the block before, and none arrived.
        """
        with full_precision(x):
            features = pooled(x)
            if self.previous:
                features = torch.cat((features, arrived(x, ROUTING).to(features.dtype)), 1)
            if self.fc1 is not None:
                features = F.relu(linear(features, self.fc1))
            logits = linear(features, self.fc2)
            if self.outputs is not None:
                logits = logits.reshape(-1, self.experts, self.outputs)
            return self._weights(logits)

    def _weights(self, logits: Tensor) -> Tensor:
        if self.active is None or self.active == self.experts:
            return logits.sigmoid() if self.activation == "sigmoid" else logits.softmax(1)
        chosen = torch.zeros_like(logits).scatter(1, logits.topk(self.active, dim=1).indices, 1.0)
        if self.activation == "sigmoid":
            return logits.sigmoid() * chosen
        return logits.masked_fill(chosen == 0, float("-inf")).softmax(1)

    def start_constant(self) -> float:
        """Give every expert of every example the same weight; returns their sum.

        A router can only leave such a start where the experts differ.
        """
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)
        return 1.0 if self.activation == "softmax" else 0.5 * self.experts

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"experts={self.experts}, activation={self.activation!r}, active={self.active}"


class SharedRouting(nn.Module):
    """No router: the routing that an earlier block threaded through the forward."""

    takes = ROUTING

    def forward(self, x: Tensor) -> Tensor:
        """The routing [B, E] that came with `x`.

        Raises:
            RuntimeError: none arrived.
        """
        routing: Tensor = arrived(x, ROUTING)
        return routing


class _Conditional(Part):
    """What the two layers share: experts' weights, a bias, a router and a form."""

    bias: Tensor | None
    mixes = True
    in_float = True  # neither a routing nor a kernel that is mixed anew has one range for all images
    _kernels: tuple[int, ...]  # shape of all experts' kernels

    def __init__(
        self,
        shape: tuple[int, ...],
        channels: tuple[str, int],
        experts: int,
        bias: Bias | None,
        router: nn.Module | None,
        form: Form,
        active: int | None,
    ) -> None:
        super().__init__()
        check_experts(experts, active)
        if form not in get_args(Form):
            raise ValueError(f"form must be one of {', '.join(get_args(Form))}; not {form!r}")
        if bias not in (None, *get_args(Bias)):
            raise ValueError(f"bias must be None, 'shared' or 'experts', not {bias!r}")
        outputs, given = getattr(router, "outputs", None), getattr(router, "experts", experts)
        if given != experts or outputs not in (None, shape[0]):
            raise ValueError(
                f"the router gives weights for {given} experts"
                f"{'' if outputs is None else f' of {outputs} channels'}; the layer has {experts} "
                f"experts of {shape[0]} channels"
            )
        name, here = channels
        taken = getattr(router, "channels", here)
        if taken != here:
            raise ValueError(f"the router takes {taken} channels, but the layer's {name} is {here}")
        self.experts, self.form, self.router, self.active = experts, form, router, active
        self.passes_on = False
        # A filter is kept flat: of five dimensions, `Module.to(memory_format=channels_last)` fails.
        self.weight = nn.Parameter(torch.empty(experts, shape[0], math.prod(shape[1:])))
        if bias is None:
            self.register_parameter("bias", None)
        else:
            self.bias = nn.Parameter(torch.empty((experts, shape[0]) if bias == "experts" else shape[:1]))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start each expert as PyTorch starts a layer of its shape."""
        bound = 1 / math.sqrt(self.weight.shape[2])
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def _routing(self, x: Tensor, routing: Tensor | None) -> Tensor:
        """The routing given, or the router's; checked."""
        if routing is None:
            if self.router is None:
                raise ValueError("this layer has no router: call it with a routing of [batch, experts]")
            routing = self.router(x)
        experts, out = self.weight.shape[:2]
        fits = (x.shape[0], experts), (x.shape[0], experts, out)
        if routing.shape != fits[0] and routing.shape != fits[1]:
            raise ValueError(
                f"a routing of shape {tuple(routing.shape)} does not fit: {x.shape[0]} examples and "
                f"{experts} experts want {fits[0]}, or {fits[1]} with a weight for each channel"
            )
        return routing

    @contextmanager
    def counted(self) -> Iterator[None]:
        """``form="auto"`` counts as fused, the method's own cost, of all experts; see `Part.counted`."""
        form, active = self.form, self.active
        self.form, self.active = ("fused" if form == "auto" else form), None
        try:
            yield
        finally:
            self.form, self.active = form, active

    def takes_norm(self, output: Tensor) -> bool:
        """Unless each expert has a bias: routing mixes those, but not what a norm adds."""
        return self.bias is None or self.bias.dim() == 1

    def take_norm(self, scale: Tensor, shift: Tensor) -> None:
        """Scale every expert's kernels; see `Part.take_norm`."""
        bias = torch.zeros_like(shift) if self.bias is None else self.bias.detach().double()
        for name, value in (
            ("weight", self.weight.detach().double() * scale[:, None]),
            ("bias", bias * scale + shift),
        ):
            new = nn.Parameter(value.to(self.weight.dtype), self.weight.requires_grad)
            setattr(self, name, new)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        key = f"{prefix}weight"  # timm keeps each expert flat: [E, O C/g h w]
        if key in state_dict and state_dict[key].shape == self.weight.flatten(1).shape:
            state_dict[key] = state_dict[key].view_as(self.weight)
        super()._load_from_state_dict(state_dict, prefix, *args)


class CondConv2d(_Conditional):
    """A convolution whose kernel is mixed for each example from experts' kernels.

    Args:
        in_channels: C, a multiple of `groups`.
        out_channels: O, a multiple of `groups`.
        kernel_size: height and width, or one number for both; so the next three.
        stride: of the convolution.
        padding: zeros on each side, or ``"same"`` for TensorFlow's, which depends on the
            input's size.
        dilation: of the kernel.
        groups: g; C for a depthwise convolution.
        bias: None, ``"shared"`` by the experts, or ``"experts"``: one each, mixed too.
        experts: E, from 1 to 64.
        router: gives the routing of an input; None: the caller gives it.
        form: ``"fused"`` mixes kernels, ``"experts"`` mixes outputs; the same function.
            ``"auto"`` takes what is faster for the shapes at hand (`choose_form`).
        active: experts of an example whose weights are not zero, at most (hard routing). Of few
            examples, only these experts are read. None: all.

    Raises:
        ValueError: an argument is out of its range, or the router does not fit.

    Example:
        >>> layer = CondConv2d(16, 32, 3, padding=1, experts=4, router=Router(16, 4))
        >>> layer(torch.randn(2, 16, 8, 8)).shape
        torch.Size([2, 32, 8, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | Literal["same"] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: Bias | None = None,
        *,
        experts: int = 8,
        router: nn.Module | None = None,
        form: Form = "auto",
        active: int | None = None,
    ) -> None:
        _check_whole("groups", groups)
        for name, channels in (("in_channels", in_channels), ("out_channels", out_channels)):
            _check_whole(name, channels)
            if channels % groups:
                raise ValueError(f"{name} must be a multiple of groups = {groups}, not {channels}")
        if isinstance(padding, str) and padding != "same":
            raise ValueError(f"padding must be numbers or 'same', not {padding!r}")
        size = _pair("kernel_size", kernel_size)
        geometry = Geometry(
            _pair("stride", stride),
            (0, 0) if padding == "same" else _pair("padding", padding, least=0),
            _pair("dilation", dilation),
            groups,
        )
        shape = (out_channels, in_channels // groups, *size)
        super().__init__(shape, ("in_channels", in_channels), experts, bias, router, form, active)
        self.in_channels, self.out_channels, self.kernel_size = in_channels, out_channels, size
        self._kernels = (experts, out_channels, in_channels // groups, *size)
        self.same, self.geometry = padding == "same", geometry

    @property
    def stride(self) -> tuple[int, int]:
        """As of `nn.Conv2d`: the blocks of timm are read by their convolutions' strides."""
        return self.geometry.stride

    def forward(self, x: Tensor, routing: Tensor | None = None) -> Tensor:
        """Convolve `x` [B, C, H, W] to [B, O, H', W'], by `routing` or the router's.

        Raises:
            ValueError: another number of channels or a routing that does not fit; or there
                is neither a routing nor a router.
        """
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            raise ValueError(f"wanted images of [B, {self.in_channels}, H, W], not {tuple(x.shape)}")
        routing = self._routing(x, routing)
        x = self._padded(x)
        kernels = self.weight.view(self._kernels)
        y = conditional_conv2d(x, kernels, routing, self.bias, self.geometry, self.form, self.active)
        return thread(y, ROUTING, routing) if self.passes_on else y

    def _padded(self, x: Tensor) -> Tensor:
        if not self.same:
            return x
        padded: Tensor = pad_same(x, self.kernel_size, self.geometry.stride, self.geometry.dilation)
        return padded

    def plain(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        """A plain convolution of `x` with one `kernel` [O, C/g, h, w]."""
        return F.conv2d(self._padded(x), kernel, bias, *self.geometry)

    @property
    def pointwise(self) -> bool:
        """Whether it is a matrix product at each position."""
        g = self.geometry
        return self.kernel_size == (1, 1) and g.padding == (0, 0) and g.groups == 1

    def export_form(self, target: Target, batch: int | None) -> nn.Module:
        """One image at a time, unless a matrix product does for all; see `Part.export_form`."""
        if batch == 1:
            return OneImage(self)
        return EachImage(self) if needs_loop(self, target, batch) else self

    def extra_repr(self) -> str:
        """What `print` shows."""
        g = self.geometry
        padding = "same" if self.same else g.padding
        return (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={g.stride}, "
            f"padding={padding}, dilation={g.dilation}, groups={g.groups}, experts={self.experts}, "
            f"form={self.form!r}"
        )


class CondLinear(_Conditional):
    """A linear layer whose matrix is mixed for each example: a 1x1 `CondConv2d`.

    Args:
        in_features: C.
        out_features: O.
        bias: as for `CondConv2d`.
        experts: as for `CondConv2d`.
        router: as for `CondConv2d`; it sees the input before dropout.
        form: as for `CondConv2d`.
        active: as for `CondConv2d`.
        drop: dropout rate on the layer's input (section 4.1), from 0 to 1.

    Raises:
        ValueError: as `CondConv2d`.

    Example:
        >>> classifier = CondLinear(64, 10, "shared", experts=4, router=Router(64, 4), drop=0.2)
        >>> classifier(torch.randn(2, 64)).shape
        torch.Size([2, 10])
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: Bias | None = None,
        *,
        experts: int = 8,
        router: nn.Module | None = None,
        form: Form = "auto",
        active: int | None = None,
        drop: float = 0.0,
    ) -> None:
        _check_whole("in_features", in_features)
        _check_whole("out_features", out_features)
        if not isinstance(drop, (int, float)) or isinstance(drop, bool) or not 0 <= drop <= 1:
            raise ValueError(f"drop must be a number from 0 to 1, not {drop!r}")
        shape = (out_features, in_features)
        super().__init__(shape, ("in_features", in_features), experts, bias, router, form, active)
        self.in_features, self.out_features, self.drop = in_features, out_features, drop
        self._kernels = (experts, *shape)

    def forward(self, x: Tensor, routing: Tensor | None = None) -> Tensor:
        """Map `x` [B, ..., C] to [B, ..., O], by `routing` or the router's.

        Raises:
            ValueError: as `CondConv2d.forward`.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"wanted inputs of [B, ..., {self.in_features}], not {tuple(x.shape)}")
        routing = self._routing(x, routing)
        if self.drop:
            x = F.dropout(x, self.drop, self.training)
        y = conditional_linear(x, self.weight, routing, self.bias, self.form, self.active)
        return thread(y, ROUTING, routing) if self.passes_on else y

    @property
    def pointwise(self) -> bool:
        """Always: a matrix product at each position."""
        return True

    def _routing(self, x: Tensor, routing: Tensor | None) -> Tensor:
        if routing is None and x.dim() > 2 and isinstance(self.router, Router):
            routing = self.router(x.flatten(1, -2).mean(1))  # channels come last here
        return super()._routing(x, routing)

    def plain(self, x: Tensor, kernel: Tensor, bias: Tensor | None) -> Tensor:
        """A plain linear layer with one matrix `kernel` [O, C]."""
        return F.linear(x, kernel, bias)

    def export_form(self, target: Target, batch: int | None) -> nn.Module:
        """One matrix product for all images, or one image at a time; see `Part.export_form`."""
        if target == "program" or self.form == "experts":
            return self
        if self.active is None:
            return SideBySideLinear(self)
        return OneImage(self) if batch == 1 else EachImage(self)

    def takes_norm(self, output: Tensor) -> bool:
        """Not of tokens: a norm works on their second dimension, this layer on the last."""
        return output.dim() == 2 and super().takes_norm(output)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return (
            f"{self.in_features}, {self.out_features}, experts={self.experts}, form={self.form!r}, "
            f"drop={self.drop}"
        )


def check_experts(experts: Any, active: Any = None) -> None:
    """Refuse numbers of experts that make no sense.

    Raises:
        ValueError: not a whole number from 1 to 64, or `active` is not from 1 to it.
    """
    for name, value, most in (("experts", experts, MOST_EXPERTS), ("active", active, experts)):
        if value is None and name == "active":
            continue
        if not _whole(value, 1) or value > most:
            raise ValueError(f"{name} must be a whole number from 1 to {most}, not {value!r}")


def _check_whole(name: str, value: object) -> None:
    if not _whole(value, 1):
        raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _pair(name: str, value: object, least: int = 1) -> tuple[int, int]:
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, value)
    if len(pair) != 2 or not all(_whole(n, least) for n in pair):
        raise ValueError(f"{name} must be one or two whole numbers of at least {least}, not {value!r}")
    return pair[0], pair[1]
