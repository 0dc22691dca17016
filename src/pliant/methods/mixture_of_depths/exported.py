"""Forms of a Mixture-of-Depths block for exported files: one function in operators that engines run well.

A `MoDBlock` gathers by broadcast indices, slices and concatenates; each engine wants something
else (what was measured stands in ``docs/export.md``):

- a PyTorch program: the fusion as an addition of padded channels, which Inductor fuses;
- ONNX Runtime and OpenVINO: the selector as 1x1 convolutions, one flat gather of whole channels,
  and the fusion as a constant convolution and an addition, without slices.

Shapes in this file::

    B  batch             x       [B, C, H, W]       feature map
    C  channels          index   [B, k, 1, 1] or [k] channels that are processed
    k  processed         picked  [B, k, H, W]       those channels
                         y       [B, k, H, W]       the core's output
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.anatomy import Block
from pliant.methods.mixture_of_depths.block import MoDBlock
from pliant.methods.mixture_of_depths.selectors import (
    SELECTION,
    ChannelSelector,
    ConstantSelector,
    FirstSelector,
    RandomSelector,
    Scorer,
    SharedSelection,
    StaticSelector,
    gates,
)
from pliant.threaded import thread


class _ExportedMoD(Block):
    """What the forms of a Mixture-of-Depths block share.

    Args:
        block: in evaluation mode; its parts are used.
    """

    scale: Tensor | None

    def __init__(self, block: MoDBlock) -> None:
        super().__init__(block.channels)
        self.k, self.fusion, self.inner_shortcut = block.k, block.fusion, block.inner_shortcut
        self.core, self.last_act = block.core, block.last_act
        self.before = block.channels - block.k if block.fusion == "last" else 0
        self.gate, self.passes_on = block.gate, block.passes_on
        index = scale = None
        selector = block.selector
        if isinstance(selector, (StaticSelector, ConstantSelector)):  # constant already where optimised
            constant = selector if isinstance(selector, ConstantSelector) else selector.constant()
            index, scale = constant.index, constant.scores
        elif selector is None:
            index = torch.arange(block.k)
        elif isinstance(selector, (RandomSelector, FirstSelector)):
            index = selector.index
        # Constant channels, and their scores if they have some; None where a selector picks them.
        self.register_buffer("index", index)
        self.register_buffer("scale", None if scale is None else scale[:, None, None])

    def _process(self, y: Tensor, picked: Tensor | None) -> Tensor:
        processed: Tensor = self.last_act(y if picked is None else y + picked)
        return processed if self.scale is None else processed * self.scale.to(processed.dtype)

    def _pass_on(self, fused: Tensor, selection: tuple[Tensor | None, ...]) -> Tensor:
        return thread(fused, SELECTION, selection) if self.passes_on else fused


class ProgramMoD(_ExportedMoD):
    """A Mixture-of-Depths block for PyTorch programs: the fusion adds padded channels.

    Args:
        block: whose parts it takes.
    """

    index: Tensor | None

    def __init__(self, block: MoDBlock) -> None:
        super().__init__(block)
        # A selector of constant channels is needed for its gates, if it has some.
        self.selector = block.selector if self.index is None or self.gate == "map" else None

    def forward(self, x: Tensor) -> Tensor:
        """The block's output for `x`, of the same shape and dtype."""
        scores: Tensor | None = None
        if self.selector is not None:
            scores, chosen = self.selector(x)
        if self.index is not None:
            chosen = self.index.expand(x.shape[0], self.k)
        where = chosen[:, :, None, None].expand(-1, -1, x.shape[2], x.shape[3])
        picked = x.gather(1, where) if self.index is None else x.index_select(1, self.index)
        y = self._process(self.core(picked), picked if self.inner_shortcut else None).to(x.dtype)
        if scores is not None and self.gate == "output":
            y = y * scores.to(y.dtype)[:, :, None, None]
        if self.fusion in ("first", "last"):
            after = self.channels - self.k - self.before
            fused = x + F.pad(y, (0, 0, 0, 0, self.before, after))
        else:
            fused = x.scatter_add(1, where, y) if self.fusion == "original" else x.scatter(1, where, y)
        if scores is not None and self.gate == "map":
            fused = fused * scores.to(fused.dtype)[:, :, None, None]
        return self._pass_on(fused, (scores, chosen))


class ConvScorer(nn.Module):
    """`Scorer` in 1x1 convolutions, which keep the layout of a feature map.

    Args:
        scorer: whose weights it takes.
    """

    def __init__(self, scorer: Scorer) -> None:
        super().__init__()
        self.fc1, self.fc2 = _pointwise(scorer.fc1.weight), _pointwise(*scorer.upper())
        self.k = scorer.k if isinstance(scorer, ChannelSelector) else 0

    def forward(self, x: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """The k largest logits and their channels for `x`, both [B, k, 1, 1], best first; and all.

        Of a scorer that does not rank, all [B, C, 1, 1] alone.
        """
        wide = torch.promote_types(x.dtype, torch.float32)
        mean = x.to(wide).mean((2, 3), keepdim=True)
        logits = self.fc2(F.relu(self.fc1(mean)))
        top, index = logits.topk(self.k, dim=1, sorted=True) if self.k else (None, None)
        return top, index, logits


class GraphMoD(_ExportedMoD):
    """A Mixture-of-Depths block for ONNX: flat gather, and a fusion without slices.

    Args:
        block: whose parts it takes.
        batch: images of each call; None: any number.
    """

    index: Tensor | None
    place: Tensor | None
    source: Tensor | None

    def __init__(self, block: MoDBlock, batch: int | None) -> None:
        super().__init__(block)
        self.batch = batch
        self.first_channels = block.selector is None or isinstance(block.selector, FirstSelector)
        self.by_index = getattr(block.selector, "order", "score") == "index"
        shared = block.selector if isinstance(block.selector, SharedSelection) else None
        self.selector = ConvScorer(block.selector) if isinstance(block.selector, Scorer) else shared
        self.register_buffer("place", self._place())
        self.register_buffer("source", self._source())

    def forward(self, x: Tensor) -> Tensor:
        """The block's output for `x`, of the same shape and dtype."""
        top = index = logits = None
        if self.selector is not None:
            top, index, logits = self.selector(x)
            if self.by_index and top is not None and index is not None:
                top, index = _sorted_by_index(top, index)
        if top is None or index is None:
            assert self.index is not None
            picked = x[:, : self.k] if self.first_channels else x.index_select(1, self.index)
            y = self._process(self.core(picked), picked if self.inner_shortcut else None).to(x.dtype)
            fused = self._fuse(x, y)
        else:
            fused = self._selected(x, top, index)
        if self.gate == "map" and logits is not None:
            fused = fused * gates(logits).to(x.dtype)
        return self._pass_on(fused, (top, index, logits))

    def _selected(self, x: Tensor, top: Tensor, index: Tensor) -> Tensor:
        """`x` with what the core gives for the channels `index` [B, k, 1, 1], whose logits are `top`."""
        picked = _gather(x, self._flat(x, index), self.k)
        y = self._process(self.core(picked), picked if self.inner_shortcut else None).to(x.dtype)
        if self.gate == "output":
            y = y * top.sigmoid().to(x.dtype)
        return self._fuse_selected(x, y, picked, index)

    def _flat(self, x: Tensor, index: Tensor) -> Tensor:
        """Rows of `x` as [B C, H, W] that `index` names: [B k]."""
        if self.batch == 1:
            return index.reshape(self.k)
        first = torch.arange(x.shape[0], device=x.device)[:, None] * self.channels
        return (index.reshape(-1, self.k) + first).reshape(-1)

    def _fuse_selected(self, x: Tensor, y: Tensor, picked: Tensor, index: Tensor) -> Tensor:
        if self.fusion in ("first", "last"):
            return self._fuse(x, y)
        if self.fusion == "original":
            y = picked + y
        rows = x.reshape(-1, x.shape[2], x.shape[3])
        rows = rows.index_put((self._flat(x, index),), y.reshape(-1, x.shape[2], x.shape[3]))
        return rows.reshape(-1, self.channels, x.shape[2], x.shape[3])

    def _fuse(self, x: Tensor, y: Tensor) -> Tensor:
        """`y` into constant channels of `x`."""
        if self.source is not None:  # to take their place
            return torch.cat((x, y), 1).index_select(1, self.source)
        assert self.place is not None
        return x + F.conv2d(y, self.place.to(y.dtype))

    def _place(self) -> Tensor | None:
        """The kernel [C, k, 1, 1] that puts the core's channels in their places."""
        if self.fusion == "replace" or (self.fusion == "original" and self.index is None):
            return None
        where = torch.arange(self.k) + self.before
        if self.fusion == "original":
            assert self.index is not None
            where = self.index.cpu()
        place = torch.zeros(self.channels, self.k, 1, 1)
        place[where, torch.arange(self.k)] = 1
        return place

    def _source(self) -> Tensor | None:
        """Where each of C channels comes from, in those of x followed by those of y."""
        if self.fusion != "replace" or self.index is None:
            return None
        source = torch.arange(self.channels)
        source[self.index.cpu()] = self.channels + torch.arange(self.k)
        return source


def _pointwise(weight: Tensor, bias: Tensor | None = None) -> nn.Conv2d:
    """A linear layer as a 1x1 convolution, at least float32."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], 1, bias=bias is not None)
    conv.weight = nn.Parameter(weight.detach()[:, :, None, None].to(dtype), requires_grad=False)
    if bias is not None:
        conv.bias = nn.Parameter(bias.detach().to(dtype), requires_grad=False)
    return conv


def _sorted_by_index(top: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Both [B, k, 1, 1], in the order of the channels. Engines rank; few of them sort."""
    falling, rank = (-index.to(torch.float32)).topk(index.shape[1], dim=1, sorted=True)
    return top.gather(1, rank), (-falling).to(torch.int64)


def _gather(x: Tensor, flat: Tensor, k: int) -> Tensor:
    """The channels `flat` [B k] of `x` as [B C, H, W], as [B, k, H, W]."""
    size = x.shape[2], x.shape[3]
    return x.reshape(-1, *size).index_select(0, flat).reshape(-1, k, *size)
