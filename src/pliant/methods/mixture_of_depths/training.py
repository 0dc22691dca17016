"""What a Mixture-of-Depths block does to its feature map in training: pool, gather, fuse.

With PyTorch's own operators, the backward pass goes over the feature map four to six times: zeros
to scatter into, the mean's gradient spread over all positions, slices and their concatenation, and
three gradients to add. Here each step hands the feature map on to the next, so that its gradient
is one tensor, which each step adds to in the memory format that it has.

Incoming gradients are never changed: a residual connection gives the same tensor to two branches.

Shapes in this file::

    B  batch             x       [B, C, H, W]  feature map
    C  channels          scores  [B, k]
    k  processed         at      [B, k] channels, or a number: the first of k neighbours
                         y       [B, k, H, W]  the core's output
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from pliant.precision import pooled

At = Tensor | int


def usual() -> bool:
    """Whether autograd alone takes the gradients: backward and eagerly.

    Elsewhere the plain operators are needed: a compiler fuses their passes by itself, programs and
    traces are made of them, and `torch.func` and forward-mode gradients know them.

    Example:
        >>> usual(), torch.func.vmap(lambda x: x * usual())(torch.ones(1))
        (True, tensor([0.]))
    """
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
        and not torch._C._is_tracing()
    )


class Pool(torch.autograd.Function):
    """The means over positions, [B, C] in at least float32; and the map to go on with.

    Example:
        >>> means, x = Pool.apply(torch.ones(1, 2, 4, 4, requires_grad=True))
        >>> (means.sum() + x.sum()).backward()
        >>> means
        tensor([[1., 1.]], grad_fn=<PoolBackward>)
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the means, and the same tensor; nothing is kept."""
        ctx.set_materialize_grads(False)
        ctx.shape, ctx.dtype = x.shape, x.dtype
        return pooled(x), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> Tensor | None:
        """Add each channel's share of its mean's gradient to the map's gradient, in one pass."""
        of_means, of_map = grads
        shape: torch.Size = ctx.shape
        if of_means is None:
            return of_map
        share: Tensor = (of_means / (shape[2] * shape[3])).to(ctx.dtype)
        if of_map is None:
            return share[:, :, None, None].expand(shape)
        if not _by_position(of_map):
            return of_map + share[:, :, None, None]
        # Whole rows of pixels: PyTorch is slow to repeat along few channels.
        batch, channels, height, width = of_map.shape
        rows = of_map.permute(0, 2, 3, 1).reshape(batch, height, width * channels)
        rows = rows + share.repeat(1, width)[:, None, :]
        return rows.view(batch, height, width, channels).permute(0, 3, 1, 2)


class Gather(torch.autograd.Function):
    """The `k` channels of a map at `at`, [B, k, H, W]; and the map to go on with.

    Example:
        >>> Gather.apply(torch.arange(3.0).view(1, 3, 1, 1), torch.tensor([[2, 0]]), 2)[0].flatten()
        tensor([2., 0.])
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, at: At, k: int) -> tuple[Tensor, Tensor]:
        """Return the channels, and the same tensor; only their numbers are kept."""
        ctx.set_materialize_grads(False)
        _keep(ctx, at)
        ctx.shape = x.shape
        return taken(x, at, k), x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        """Add the gradient of the channels to a copy of the map's gradient."""
        of_picked, of_map = grads
        if of_picked is None:
            return of_map, None, None
        if of_map is None:
            of_map = of_picked.new_zeros(ctx.shape)
        (at,) = _kept(ctx)
        return joined(of_map, of_picked, at), None, None


class Fuse(torch.autograd.Function):
    """A copy of `x` with `y` times its scores added to the channels at `at`, or in their place (`replace`).

    `y` may have any floating dtype; the result has that of `x`. Scores are [B, k]; None: all are one.
    A tensor `at` names each channel at most once in a sample.

    Example:
        >>> x, y = torch.ones(1, 2, 1, 1), torch.ones(1, 1, 1, 1)
        >>> Fuse.apply(x, y, torch.tensor([[0.5]]), 1, False).flatten()
        tensor([1.0000, 1.5000])
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scores: Tensor | None, at: At, replace: bool) -> Tensor:
        """Return a copy of the map with the channels changed; `y` is kept if there are scores."""
        ctx.dtype, ctx.k, ctx.replace = y.dtype, y.shape[1], replace
        ctx.scored = scores is not None
        _keep(ctx, at, *((y, scores) if scores is not None else ()))
        if scores is not None:
            y = y * scores.to(y.dtype)[:, :, None, None]
        y = y.to(x.dtype)
        return joined(x, y, at, replace)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Pass the map's gradient on as it is, unless channels were overwritten."""
        (of_map,) = grads
        at, *factors = _kept(ctx)
        of_y = taken(of_map, at, ctx.k).to(ctx.dtype)
        of_scores = None
        if ctx.scored:
            y, scores = factors
            of_scores = (of_y.to(scores.dtype) * y).sum((2, 3))
            of_y = of_y * scores.to(of_y.dtype)[:, :, None, None]
        if ctx.replace:
            of_map = joined(of_map, torch.zeros_like(of_y, dtype=of_map.dtype), at, replace=True)
        return of_map, of_y, of_scores, None, None


def taken(x: Tensor, at: At, k: int) -> Tensor:
    """Return a copy of the `k` channels of `x` at `at`, in the memory format of `x`."""
    if isinstance(at, int):
        return x.narrow(1, at, k).clone(memory_format=_format(x))
    if not _by_position(x):
        return x.gather(1, everywhere(at, x))
    positions, index = _positions(x), _per_position(at, x)
    return _as_map(positions.gather(2, index), x)


def joined(x: Tensor, y: Tensor, at: At, replace: bool = False) -> Tensor:
    """Return a copy of `x` with `y` added to its channels at `at`, or in their place."""
    out = x.clone()
    if isinstance(at, int):
        here = out.narrow(1, at, y.shape[1])
        here.copy_(y) if replace else here.add_(y)
        return out
    dim, target, index = 1, out, everywhere(at, out)
    if _by_position(out):
        dim, target, index, y = 2, _positions(out), _per_position(at, out), _positions(y)
    target.scatter_(dim, index, y) if replace else target.scatter_add_(dim, index, y)
    return out


def _keep(ctx: Any, at: At, *tensors: Tensor) -> None:
    """Remember `at`, of either kind, and tensors."""
    ctx.start = at if isinstance(at, int) else None
    ctx.save_for_backward(*(() if isinstance(at, int) else (at,)), *tensors)


def _kept(ctx: Any) -> tuple[Any, ...]:
    saved: tuple[Any, ...] = ctx.saved_tensors
    return saved if ctx.start is None else (ctx.start, *saved)


def _format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if _by_position(x) else torch.contiguous_format


def _by_position(x: Tensor) -> bool:
    """Whether the channels of a position are neighbours in memory (channels_last)."""
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def _positions(x: Tensor) -> Tensor:
    """[B, H * W, C]; a view where the memory format is channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _as_map(positions: Tensor, like: Tensor) -> Tensor:
    """Back to [B, k, H, W]."""
    return positions.view(len(positions), *like.shape[2:], -1).permute(0, 3, 1, 2)


def _per_position(at: Tensor, x: Tensor) -> Tensor:
    return at[:, None, :].expand(-1, x.shape[2] * x.shape[3], -1)


def everywhere(at: Tensor, x: Tensor) -> Tensor:
    """`at` [B, k] as [B, k, H, W], to gather and scatter whole channels of `x`."""
    return at[:, :, None, None].expand(-1, -1, x.shape[2], x.shape[3])
