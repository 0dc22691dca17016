"""A Mixture-of-Depths block: select, process, scale, fuse.

Shapes in this file::

    B  batch             x       [B, C, H, W]    feature map
    C  channels          scores  [B, k]          sigmoids of the selected channels' logits
    k  processed         index   [B, k] or [k]   channels that are processed
                         y       [B, k, H, W]    the core's output
"""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from pliant.anatomy import RemovedBlock
from pliant.methods.mixture_of_depths.exported import GraphMoD, ProgramMoD
from pliant.methods.mixture_of_depths.layers import MoDLayers
from pliant.methods.mixture_of_depths.ops.fused import FusedMoDBlock, fusable
from pliant.methods.mixture_of_depths.selectors import ChannelSelector, RandomSelector
from pliant.methods.mixture_of_depths.training import At, fuse, gather, pool, usual
from pliant.parts import OnnxOperator, Target, copied, substitute

Network = TypeVar("Network", bound=nn.Module)


class MoDBlock(MoDLayers):
    """One Mixture-of-Depths block: select, process, scale, fuse (sections 3.1 to 3.3).

    Its arguments are those of `MoDLayers`.

    Example:
        >>> selector = ChannelSelector(channels=8, k=2, hidden=4)
        >>> block = MoDBlock(nn.Conv2d(2, 2, 3, padding=1), selector, channels=8, k=2)
        >>> block(torch.rand(1, 8, 5, 5)).shape
        torch.Size([1, 8, 5, 5])
    """

    def forward(self, x: Tensor) -> Tensor:
        """Process k channels of `x` [B, C, H, W]; the same shape and dtype come back."""
        return self._trained(x) if usual() else self.written(x)

    def written(self, x: Tensor) -> Tensor:
        """`forward` as the paper has it, in plain operators: what compilers and exporters see."""
        if self.selector is None:
            return self._fuse(x, self._process(x[:, : self.k]), None)
        scores, index = self.selector(x)
        picked = x.index_select(1, index) if index.dim() == 1 else x.gather(1, _spread(index, x))
        y = self._process(picked)
        if scores is not None:
            y = y * scores.to(y.dtype)[:, :, None, None]
        return self._fuse(x, y, index)

    def _trained(self, x: Tensor) -> Tensor:
        """`forward` in operators whose gradients take fewer passes over `x`."""
        at: At = 0
        scores, means = None, x
        if isinstance(self.selector, ChannelSelector):
            means, x = pool(x)
        if self.selector is not None:
            scores, index = self.selector(means)
            at = index.expand(x.shape[0], self.k)
        picked, x = gather(x, at, self.k)
        y = self._process(picked)
        if self.fusion in ("first", "last"):
            at = 0 if self.fusion == "first" else self.channels - self.k
        return fuse(x, y, scores, at, self.fusion == "replace")

    def _process(self, picked: Tensor) -> Tensor:
        y = self.core(picked)
        y = self.last_act(y + picked if self.inner_shortcut else y)
        processed: Tensor = self.drop_path(y)
        return processed

    def _fuse(self, x: Tensor, y: Tensor, index: Tensor | None) -> Tensor:
        k, y = self.k, y.to(x.dtype)
        if self.fusion == "first":
            return torch.cat((x[:, :k] + y, x[:, k:]), 1)
        if self.fusion == "last":
            return torch.cat((x[:, :-k], x[:, -k:] + y), 1)
        if index is None:
            index = torch.arange(k, device=x.device)
        where = _spread(index.expand(x.shape[0], k), x)
        return x.scatter_add(1, where, y) if self.fusion == "original" else x.scatter(1, where, y)

    def no_export(self) -> str:
        """A block that draws anew in each forward cannot be compared; see `Part.no_export`."""
        if isinstance(self.selector, RandomSelector) and self.selector.index is None:
            return (
                "has selection='random': it draws other channels in each forward, so no file can be "
                "compared with it; selection='fixed' is random too, and drawn once"
            )
        return ""

    def export_form(self, target: Target, batch: int | None) -> nn.Module:
        """The form for what runs the file; see `Part.export_form`."""
        return ProgramMoD(self) if target == "program" else GraphMoD(self, batch)

    def fast_form(self) -> nn.Module | str:
        """The block as one operator, or why not; see `Part.fast_form`."""
        return fusable(self) or FusedMoDBlock(self)

    def onnx_operator(self) -> OnnxOperator | str:
        """The operator of the fast form; see `Part.onnx_operator`."""
        return fusable(self) or FusedMoDBlock(self).onnx_operator()


def without_mod_blocks(model: Network) -> Network:
    """Return a copy of a network with its Mixture-of-Depths blocks removed.

    It is the control of the MoD tax: no MoD block can be cheaper than none.

    Raises:
        ValueError: the network has no Mixture-of-Depths block.

    Example:
        >>> import timm
        >>> without_mod_blocks(timm.create_model("resnet20_cifar_mod")).layer1[1]
        RemovedBlock(channels=16)
    """
    model = copied(model)
    blocks = [m for m in model.modules() if isinstance(m, MoDBlock)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no Mixture-of-Depths block to remove")
    for block in blocks:
        substitute(model, block, RemovedBlock(block.channels))
    return model


def _spread(index: Tensor, x: Tensor) -> Tensor:
    """`index` [B, k] as [B, k, H, W], to gather and scatter whole channels of `x`."""
    return index[:, :, None, None].expand(-1, -1, x.shape[2], x.shape[3])
