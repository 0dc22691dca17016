"""A convolution whose kernel is mixed for each example: two forms of one function.

*Fused* mixes the kernels and convolves once for each example; *experts* convolves with
every expert and mixes the outputs (section 3 and figure 1 of arXiv 1904.04971).

Shapes in this file::

    B  batch                 x        [B, C, H, W]       feature map
    E  experts               weight   [E, O, C/g, h, w]  experts' kernels
    C  channels in           routing  [B, E] or [B, E, O]
    O  channels out          bias     [O] or [E, O]
    g  groups                result   [B, O, H', W']
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Form = Literal["auto", "fused", "experts"]


class Geometry(NamedTuple):
    """What a convolution does beside its weights."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


def mix(experts: Tensor, routing: Tensor) -> Tensor:
    """The experts' values summed with each example's weights.

    Args:
        experts: [E, O, ...].
        routing: [B, E], or [B, E, O] with a weight for each output channel.

    Returns:
        [B, O, ...].

    Example:
        >>> mix(torch.tensor([[1.0, 2.0], [10.0, 20.0]]), torch.tensor([[0.5, 1.0]]))
        tensor([[10.5000, 21.0000]])
    """
    routing = routing.to(experts.dtype)
    flat = experts.flatten(1) if routing.dim() == 2 else experts.flatten(2)
    if routing.dim() == 2:
        mixed = routing @ flat
    else:  # a product for each channel: [O, B, E] @ [O, E, P]
        flat = experts.reshape(*experts.shape[:2], -1)
        mixed = torch.bmm(routing.permute(2, 0, 1), flat.transpose(0, 1)).transpose(0, 1)
    return mixed.reshape(routing.shape[0], *experts.shape[1:])


def conditional_conv2d(
    x: Tensor,
    weight: Tensor,
    routing: Tensor,
    bias: Tensor | None = None,
    geometry: Geometry = Geometry(),  # noqa: B008
    form: Form = "auto",
) -> Tensor:
    """Convolve each example with its own mixture of kernels.

    Args:
        x: [B, C, H, W].
        weight: [E, O, C/g, h, w].
        routing: [B, E] or [B, E, O].
        bias: [O], the same for every example, or [E, O], mixed as the kernels are.
        geometry: stride, padding, dilation, groups.
        form: ``"fused"``, ``"experts"``, or the one that `choose_form` says.

    Returns:
        [B, O, H', W'].

    Example:
        >>> x, weight = torch.randn(2, 3, 8, 8), torch.randn(4, 6, 3, 3, 3)
        >>> conditional_conv2d(x, weight, torch.rand(2, 4)).shape
        torch.Size([2, 6, 6, 6])
    """
    if form == "auto":
        form = choose_form(x, weight, geometry)
    run = _fused if form == "fused" else _experts
    y = run(x, weight, routing, geometry)
    if bias is None:
        return y
    if bias.dim() == 2:
        return y + mix(bias, routing)[:, :, None, None].to(y.dtype)
    return y + bias[:, None, None].to(y.dtype)


def conditional_linear(
    x: Tensor,
    weight: Tensor,
    routing: Tensor,
    bias: Tensor | None = None,
    form: Form = "auto",
) -> Tensor:
    """Map the last dimension by each example's own mixture of matrices.

    Args:
        x: [B, ..., C].
        weight: [E, O, C].
        routing: [B, E] or [B, E, O].
        bias: [O] or [E, O].
        form: as for `conditional_conv2d`.

    Returns:
        [B, ..., O].

    Example:
        >>> x, weight = torch.randn(2, 5, 5, 3), torch.randn(4, 6, 3)
        >>> conditional_linear(x, weight, torch.rand(2, 4)).shape
        torch.Size([2, 5, 5, 6])
    """
    experts, out = weight.shape[:2]
    tokens = x.flatten(1, -2) if x.dim() > 2 else x[:, None]  # [B, N, C]
    if form == "auto":
        # One vector an example: its matrix would be used once, and mixing costs as much.
        positions = tokens.transpose(1, 2)[..., None]
        form = "experts" if x.dim() == 2 else choose_form(positions, weight, Geometry())
    if form == "fused":
        y = torch.bmm(tokens, mix(weight, routing).to(tokens.dtype).transpose(1, 2))
    else:
        every = F.linear(tokens, weight.reshape(experts * out, -1))
        every = every.reshape(*tokens.shape[:2], experts, out)
        y = (every * _per_channel(routing, out, every.dtype)[:, None]).sum(2)
    if bias is not None:
        y = y + (mix(bias, routing)[:, None] if bias.dim() == 2 else bias).to(y.dtype)
    return y.reshape(*x.shape[:-1], out)


def choose_form(x: Tensor, weight: Tensor, geometry: Geometry) -> Literal["fused", "experts"]:
    """The form that is faster for these shapes (a rule from measurements)."""
    return "fused"


def _dynamic(x: Tensor) -> bool:
    """Whether the batch is not a number yet, so that no shape of a graph may hold it."""
    return torch.compiler.is_exporting() or torch._C._get_tracing_state() is not None


def _fused(x: Tensor, weight: Tensor, routing: Tensor, geometry: Geometry) -> Tensor:
    kernels = mix(weight, routing).to(x.dtype)  # [B, O, C/g, h, w]
    stride, padding, dilation, groups = geometry
    batch, out, _, height, width = kernels.shape
    if height == width == groups == 1 and padding == (0, 0):
        x = x[:, :, :: stride[0], :: stride[1]]
        return torch.bmm(kernels.flatten(2), x.flatten(2)).reshape(batch, out, *x.shape[2:])
    if _dynamic(x):
        size = [
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, p, d, k, s in zip(x.shape[2:], padding, dilation, (height, width), stride, strict=True)
        ]
        patches = F.unfold(x, (height, width), dilation, padding, stride)  # [B, C h w, H'W']
        patches = patches.reshape(batch, groups, -1, patches.shape[2])
        grouped = kernels.reshape(batch, groups, out // groups, patches.shape[2])
        return torch.matmul(grouped, patches).reshape(batch, out, *size)
    if batch == 1:
        return F.conv2d(x, kernels[0], None, stride, padding, dilation, groups)
    side_by_side = x.reshape(1, -1, *x.shape[2:])
    y = F.conv2d(side_by_side, kernels.flatten(0, 1), None, stride, padding, dilation, batch * groups)
    return y.reshape(batch, out, *y.shape[2:])


def _experts(x: Tensor, weight: Tensor, routing: Tensor, geometry: Geometry) -> Tensor:
    experts, out = weight.shape[:2]
    groups = geometry.groups
    # Group-major: the outputs of a group lie together, as a grouped convolution wants.
    kernels = weight.reshape(experts, groups, -1, *weight.shape[2:]).transpose(0, 1).flatten(0, 2)
    y = F.conv2d(x, kernels, None, *geometry)
    y = y.reshape(x.shape[0], groups, experts, out // groups, *y.shape[2:])
    share = _per_channel(routing, out, y.dtype)  # [B, E, O]
    share = share.reshape(x.shape[0], experts, groups, -1).transpose(1, 2)  # [B, g, E, O/g]
    mixed: Tensor = (y * share[..., None, None]).sum(2).flatten(1, 2)
    return mixed


def _per_channel(routing: Tensor, out: int, dtype: torch.dtype) -> Tensor:
    routing = routing.to(dtype)
    return routing if routing.dim() == 3 else routing[:, :, None].expand(-1, -1, out)
