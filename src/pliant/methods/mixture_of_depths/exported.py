"""The form of a Mixture-of-Depths block for ONNX Runtime and OpenVINO, in operators that both run well.

A `MoDBlock` gathers by broadcast indices, slices and concatenates. These engines are faster with a
selector of 1x1 convolutions, one flat gather of whole channels, and a fusion by a constant
convolution and an addition, without slices (``docs/export.md`` has the measurements).

Shapes in this file::

    B  batch             x       [B, C, H, W]       feature map
    C  channels          index   [B, k, 1, 1] or [k] channels that are processed
    k  processed         picked  [B, k, H, W]       those channels
                         y       [B, k, H, W]       the core's output
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.anatomy import Block
from pliant.methods.mixture_of_depths.selectors import ChannelSelector, RandomSelector, best
from pliant.parts import as_defined
from pliant.precision import linear

if TYPE_CHECKING:  # the block itself asks for this form
    from pliant.methods.mixture_of_depths.block import MoDBlock


class ConvSelector(nn.Module):
    """A `ChannelSelector` in 1x1 convolutions, which keep the layout of a feature map, where it can be.

    A layer that is more than its weights (an adapter, say) is called as it is.

    Args:
        selector: the selector whose weights are copied.
    """

    def __init__(self, selector: ChannelSelector) -> None:
        super().__init__()
        self.fc1, self.fc2 = _pointwise(selector.fc1), _pointwise(selector.fc2)
        self.k, self.order = selector.k, selector.order

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the k largest logits and their channels for `x`, both [B, k, 1, 1], best first."""
        wide = torch.promote_types(x.dtype, torch.float32)
        mean = x.to(wide).mean((2, 3), keepdim=True)
        return best(self.fc2(F.relu(self.fc1(mean))), self.k, "score")


class GraphMoD(Block):
    """A Mixture-of-Depths block for ONNX: flat gather, and a fusion without slices.

    Args:
        block: a block in evaluation mode, whose layers the form uses.
        batch: images of each call; None: any number.
    """

    index: Tensor | None  # constant channels; None where a selector picks them
    place: Tensor | None
    source: Tensor | None

    def __init__(self, block: MoDBlock, batch: int | None) -> None:
        super().__init__(block.channels)
        self.k, self.fusion, self.inner_shortcut = block.k, block.fusion, block.inner_shortcut
        self.core, self.last_act, self.batch = block.core, block.last_act, batch
        learned = block.selector if isinstance(block.selector, ChannelSelector) else None
        self.selector = None if learned is None else ConvSelector(learned)
        self.first_channels = block.selector is None
        index = torch.arange(self.k) if self.first_channels else None
        if isinstance(block.selector, RandomSelector):
            index = block.selector.index
        self.register_buffer("index", index)
        self.register_buffer("place", self._place())
        self.register_buffer("source", self._source())

    def forward(self, x: Tensor) -> Tensor:
        """Return the block's output for `x`, of the same shape and dtype."""
        if self.selector is None:
            assert self.index is not None
            picked = x[:, : self.k] if self.first_channels else x.index_select(1, self.index)
            return self._fuse(x, self._process(picked))
        top, index = self.selector(x)
        if self.selector.order == "index":
            top, index = _sorted_by_index(top, index)
        rows = self._rows(x, index)
        maps = x.reshape(-1, x.shape[2], x.shape[3])  # [B C, H, W]
        picked = maps.index_select(0, rows).reshape(-1, self.k, x.shape[2], x.shape[3])
        y = self._process(picked) * top.sigmoid().to(x.dtype)
        if self.fusion in ("first", "last"):
            return self._fuse(x, y)
        if self.fusion == "original":
            y = picked + y
        maps = maps.index_put((rows,), y.reshape(-1, x.shape[2], x.shape[3]))
        return maps.reshape(-1, self.channels, x.shape[2], x.shape[3])

    def _process(self, picked: Tensor) -> Tensor:
        y = self.core(picked)
        processed: Tensor = self.last_act(y + picked if self.inner_shortcut else y)
        return processed.to(picked.dtype)

    def _rows(self, x: Tensor, index: Tensor) -> Tensor:
        """The rows [B k] that `index` names in `x` as [B C, H, W]."""
        if self.batch == 1:
            return index.reshape(self.k)
        first = torch.arange(x.shape[0], device=x.device)[:, None] * self.channels
        return (index.reshape(-1, self.k) + first).reshape(-1)

    def _fuse(self, x: Tensor, y: Tensor) -> Tensor:
        """Put `y` into constant channels of `x`."""
        if self.source is not None:  # fusion="replace"
            return torch.cat((x, y), 1).index_select(1, self.source)
        assert self.place is not None
        return x + F.conv2d(y, self.place.to(y.dtype))

    def _place(self) -> Tensor | None:
        """The kernel [C, k, 1, 1] that puts the core's channels in their places."""
        where = torch.arange(self.k)
        if self.fusion == "last":
            where += self.channels - self.k
        elif self.fusion != "first":
            if self.fusion == "replace" or self.index is None:
                return None
            where = self.index.cpu()
        place = torch.zeros(self.channels, self.k, 1, 1)
        place[where, torch.arange(self.k)] = 1
        return place

    def _source(self) -> Tensor | None:
        """Where each of the C channels comes from, among the channels of x followed by those of y."""
        if self.fusion != "replace" or self.index is None:
            return None
        source = torch.arange(self.channels)
        source[self.index.cpu()] = self.channels + torch.arange(self.k)
        return source


class _Called(nn.Module):
    """A layer that is more than its weights, as it is, on a feature map of one position."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return linear(x.flatten(1), self.layer)[:, :, None, None]


def _pointwise(layer: nn.Module) -> nn.Module:
    """A linear layer as a 1x1 convolution, at least float32; as it is if it is more than its weights."""
    if not (isinstance(layer, nn.Linear) and as_defined(layer, nn.Linear)):
        return _Called(layer)
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    conv = nn.Conv2d(layer.in_features, layer.out_features, 1, bias=layer.bias is not None)
    conv.weight = nn.Parameter(layer.weight.detach()[:, :, None, None].to(dtype))
    if layer.bias is not None:
        conv.bias = nn.Parameter(layer.bias.detach().to(dtype))
    return conv.requires_grad_(False)


def _sorted_by_index(top: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
    """Both [B, k, 1, 1], in the order of the channels. Engines rank; few of them sort."""
    falling, rank = (-index.to(torch.float32)).topk(index.shape[1], dim=1, sorted=True)
    return top.gather(1, rank), (-falling).to(torch.int64)
