"""A CondConv layer for exported files that run one image at a time.

Shapes in this file::

    x        [1, C, H, W]  feature map
    routing  [1, E]        weights of E experts
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch.nn.functional as F
from timm.layers import pad_same
from torch import Tensor, nn

from pliant.methods.condconv.mixing import ROUTING, mix
from pliant.threaded import thread

if TYPE_CHECKING:  # the layer itself asks for this form
    from pliant.methods.condconv.layers import CondConv2d


class OneImageConv(nn.Module):
    """A `CondConv2d` for one image at a time: it mixes a kernel and convolves with it.

    Args:
        layer: whose weights and router it takes.
    """

    def __init__(self, layer: CondConv2d) -> None:
        super().__init__()
        self.layer = layer

    @property
    def stride(self) -> tuple[int, int]:
        """As of the layer."""
        return self.layer.stride

    def forward(self, x: Tensor, routing: Tensor | None = None) -> Tensor:
        """What the layer gives for `x` [1, C, H, W]."""
        layer = self.layer
        routing = layer._routing(x, routing)
        if layer.same:
            x = pad_same(x, layer.kernel_size, layer.geometry.stride, layer.geometry.dilation)
        kernel = mix(layer.weight.view(layer._kernels), routing)[0].to(x.dtype)
        bias = layer.bias
        if bias is not None:
            bias = (mix(bias, routing)[0] if bias.dim() == 2 else bias).to(x.dtype)
        y = F.conv2d(x, kernel, bias, *layer.geometry)
        return thread(y, ROUTING, routing) if layer.passes_on else y
