"""A Mixture-of-Depths block: select, process, scale, fuse.

Shapes in this file::

    B  batch             x       [B, C, H, W]    feature map
    C  channels          scores  [B, k]          sigmoids of the selected channels' logits
    k  processed         index   [B, k] or [k]   channels that are processed
                         y       [B, k, H, W]    the core's output
"""

from __future__ import annotations

from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.anatomy import Block, RemovedBlock
from pliant.methods.mixture_of_depths.exported import GraphMoD
from pliant.methods.mixture_of_depths.ops.fused import FusedMoDBlock, fusable
from pliant.methods.mixture_of_depths.selectors import ChannelSelector, Fusion, RandomSelector
from pliant.methods.mixture_of_depths.training import At, Fuse, Gather, Pool, everywhere, usual
from pliant.parts import OnnxOperator, Target, copied, substitute

Network = TypeVar("Network", bound=nn.Module)


class MoDBlock(Block):
    """One Mixture-of-Depths block: select, process, scale, fuse (sections 3.1 to 3.3).

    Args:
        core: the narrow block, [B, k, H, W] to [B, k, H, W].
        selector: gives scores [B, k] or None, and index [B, k] or [k], for a feature map or its
            means; None processes the first k channels, without scores.
        channels: C.
        k: number of channels that are processed.
        fusion: where the core's output goes; see `pliant.MixtureOfDepths`.
        inner_shortcut: add the core's input to its output.
        last_act: activation behind that sum; None: none.
        drop_path: drops whole samples of the core's output in training; None: none.

    Example:
        >>> selector = ChannelSelector(channels=8, k=2, hidden=4)
        >>> block = MoDBlock(nn.Conv2d(2, 2, 3, padding=1), selector, channels=8, k=2)
        >>> block(torch.rand(1, 8, 5, 5)).shape
        torch.Size([1, 8, 5, 5])
    """

    operators: ClassVar[str] = FusedMoDBlock.operators
    selector: nn.Module | None

    def __init__(
        self,
        core: nn.Module,
        selector: nn.Module | None,
        channels: int,
        k: int,
        *,
        fusion: Fusion = "first",
        inner_shortcut: bool = False,
        last_act: nn.Module | None = None,
        drop_path: nn.Module | None = None,
    ) -> None:
        super().__init__(channels)
        self.k, self.fusion, self.inner_shortcut = k, fusion, inner_shortcut
        self.selector = selector
        self.core = core
        self.last_act = nn.Identity() if last_act is None else last_act
        self.drop_path = nn.Identity() if drop_path is None else drop_path

    def forward(self, x: Tensor) -> Tensor:
        """Process k channels of `x` [B, C, H, W]; the same shape and dtype come back."""
        return self._trained(x) if usual() else self.written(x)

    def written(self, x: Tensor) -> Tensor:
        """`forward` as the paper has it, in plain operators: what compilers and exporters see."""
        if self.selector is None:
            return self._fuse(x, self._process(x[:, : self.k]), None)
        scores, index = self.selector(x)
        picked = x.index_select(1, index) if index.dim() == 1 else x.gather(1, everywhere(index, x))
        y = self._process(picked)
        if scores is not None:
            y = y * scores.to(y.dtype)[:, :, None, None]
        return self._fuse(x, y, index)

    def _trained(self, x: Tensor) -> Tensor:
        """`forward` in operators whose gradients take fewer passes over `x`."""
        at: At = 0
        scores, means = None, x
        if isinstance(self.selector, ChannelSelector):
            means, x = Pool.apply(x)
        if self.selector is not None:
            scores, index = self.selector(means)
            at = index.expand(x.shape[0], self.k)
        picked, x = Gather.apply(x, at, self.k)
        y = self._process(picked)
        if self.fusion in ("first", "last"):
            at = 0 if self.fusion == "first" else self.channels - self.k
        fused: Tensor = Fuse.apply(x, y, scores, at, self.fusion == "replace")
        return fused

    def _process(self, picked: Tensor) -> Tensor:
        y = self.core(picked)
        y = self.last_act(y + picked if self.inner_shortcut else y)
        processed: Tensor = self.drop_path(y)
        return processed

    def _fuse(self, x: Tensor, y: Tensor, index: Tensor | None) -> Tensor:
        k, y = self.k, y.to(x.dtype)
        if self.fusion in ("first", "last"):
            first = self.fusion == "first"
            if torch.compiler.is_exporting():  # Inductor fuses an addition of padded channels
                rest = self.channels - k
                return x + F.pad(y, (0, 0, 0, 0, *((0, rest) if first else (rest, 0))))
            return torch.cat((x[:, :k] + y, x[:, k:]) if first else (x[:, :-k], x[:, -k:] + y), 1)
        if index is None:
            index = torch.arange(k, device=x.device)
        where = everywhere(index.expand(x.shape[0], k), x)
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
        return self if target == "program" else GraphMoD(self, batch)

    def fast_form(self) -> nn.Module | str:
        """The block as one operator, or why not; see `Part.fast_form`."""
        return fusable(self) or FusedMoDBlock(self)

    def onnx_operator(self) -> OnnxOperator | str:
        """The operator of the fast form; see `Part.onnx_operator`."""
        return fusable(self) or FusedMoDBlock(self).onnx_operator()

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"channels={self.channels}, k={self.k}, fusion={self.fusion!r}"


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
