"""CondConv for exported files.

An engine's convolution has one kernel for all images of a call. A file for one image mixes a kernel
and convolves with it. A file for any number mixes the kernels of all images by one matrix product;
a loop over the images (ONNX's ``Scan``) then runs each block with them. Pointwise layers that stand alone
need no loop, only a batched matrix product.

Shapes in this file::

    B  batch             x        [B, C, H, W], or [B, ..., C] for linear layers
    E  experts           routing  [B, E] or [B, E, O]
    O  output channels   kernel   [O, C/g, h, w] or [O, C], of one image
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from pliant.methods.condconv.mixing import ROUTING, mix, mix_of_one
from pliant.parts import Target
from pliant.threaded import thread

if TYPE_CHECKING:  # these ask for their own forms
    from pliant.methods.condconv.block import CondConvBlock
    from pliant.methods.condconv.layers import CondConv2d, CondLinear


def each_image(run: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """What `run` gives for each image, as a loop that a graph keeps.

    Args:
        run: gets one image's share of each tensor, without the batch's dimension.
        given: tensors [B, ...].

    Returns:
        [B, ...].

    Example:
        >>> import torch
        >>> each_image(lambda x, y: x * y, torch.arange(3.0), torch.full((3,), 2.0))
        tensor([0., 2., 4.])
    """
    from torch._higher_order_ops.scan import scan  # on use: it imports the compiler

    def step(carry: Tensor, some: list[Tensor]) -> tuple[Tensor, Tensor]:
        return carry.clone(), run(*some)

    # A scan wants to carry something along.
    _, found = scan(step, given[0].new_zeros(()), list(given))
    assert isinstance(found, Tensor)
    return found


def needs_loop(layer: CondConv2d | CondLinear, target: Target, batch: int | None) -> bool:
    """Whether a file runs the layer image by image.

    So it is where a kernel has several positions, which no matrix product applies, and with hard
    routing, so that only the chosen experts are read.
    """
    if target == "program" or batch == 1 or layer.form == "experts":
        return False
    return layer.active is not None or not layer.pointwise


class OneImage(nn.Module):
    """A conditional layer for one image at a time: it mixes a kernel and runs a plain layer with it.

    Args:
        layer: whose weights and router it takes.
    """

    def __init__(self, layer: CondConv2d | CondLinear) -> None:
        super().__init__()
        self.layer = layer
        self.stride = getattr(layer, "stride", None)  # of a convolution: blocks are read by it

    def forward(self, x: Tensor, routing: Tensor | None = None) -> Tensor:
        """What the layer gives for `x` [1, ...]."""
        layer = self.layer
        routing = layer._routing(x, routing)
        y = _of_one(layer, x, *(t[0] for t in _needs(layer, routing)))
        return thread(y, ROUTING, routing) if layer.passes_on else y


class EachImage(OneImage):
    """A conditional layer for any number of images, by a loop over them."""

    def forward(self, x: Tensor, routing: Tensor | None = None) -> Tensor:
        """What the layer gives for `x` [B, ...]."""
        layer = self.layer
        routing = layer._routing(x, routing)

        def run(image: Tensor, *needs: Tensor) -> Tensor:
            return _of_one(layer, image[None], *needs).squeeze(0)

        y = each_image(run, x, *_needs(layer, routing))
        return thread(y, ROUTING, routing) if layer.passes_on else y


class EachImageBlock(nn.Module):
    """A block with mixed kernels for any number of images, by one loop over them.

    Args:
        made: the block, whose layers and router it takes.
    """

    def __init__(self, made: CondConvBlock) -> None:
        super().__init__()
        self.made = made

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """What the block gives for `x` [B, C, H, W]; what else it takes goes through."""
        made = self.made
        routing = made.router(x)
        needs = {path: _needs(layer, made.share(path, routing)) for path, layer in made.layers().items()}

        def run(image: Tensor, *flat: Tensor) -> Tensor:
            left = iter(flat)
            own = {path: [next(left) for _ in some] for path, some in needs.items()}

            def call(path: str, layer: Any, given: Tensor) -> Tensor:
                return _of_one(layer, given, *own[path])

            y: Tensor = made.bound(call)(image[None], *args, **options)
            return y.squeeze(0)  # indexing would copy

        y = each_image(run, x, *(tensor for some in needs.values() for tensor in some))
        return thread(y, ROUTING, routing) if made.passes_on else y


class SideBySideLinear(nn.Module):
    """A classifier's experts side by side, in one matrix product with the inputs weighted before.

    ``(r_1 W_1 + ... + r_E W_E) x`` is ``[W_1 ... W_E]`` times the vectors ``r_e x`` below one another.

    Args:
        layer: whose weights and router it takes.

    Example:
        >>> import torch
        >>> from pliant.methods.condconv import CondLinear
        >>> layer = CondLinear(4, 6, "shared", experts=3)
        >>> x, routing = torch.randn(2, 4), torch.rand(2, 3)
        >>> torch.allclose(SideBySideLinear(layer)(x, routing), layer(x, routing), atol=1e-5)
        True
    """

    def __init__(self, layer: CondLinear) -> None:
        super().__init__()
        self.layer = layer
        self.weight = nn.Parameter(layer.weight.detach().transpose(0, 1).flatten(1))  # [O, E C]

    def forward(self, x: Tensor, routing: Tensor | None = None) -> Tensor:
        """What the layer gives for `x` [B, C]; of tokens, and of weights by channel, by itself."""
        layer = self.layer
        routing = layer._routing(x, routing)
        if x.dim() > 2 or routing.dim() == 3:
            own: Tensor = layer(x, routing)
            return own
        weighted = (routing[:, :, None].to(x.dtype) * x[:, None]).flatten(1)
        shared = layer.bias is not None and layer.bias.dim() == 1
        y = F.linear(weighted, self.weight, layer.bias if shared else None)
        if layer.bias is not None and not shared:
            y = y + mix(layer.bias, routing).to(y.dtype)
        return thread(y, ROUTING, routing) if layer.passes_on else y


def _needs(layer: CondConv2d | CondLinear, routing: Tensor) -> tuple[Tensor, ...]:
    """What `_of_one` needs of each example, [B, ...]: its routing, or what is mixed by it already."""
    if layer.active is not None:
        return (routing,)
    mixed = (mix(layer.weight.view(layer._kernels), routing),)
    return mixed if layer.bias is None or layer.bias.dim() == 1 else (*mixed, mix(layer.bias, routing))


def _of_one(layer: CondConv2d | CondLinear, x: Tensor, *needs: Tensor) -> Tensor:
    """What a layer gives for one image `x` [1, ...], by what `_needs` says of it."""
    bias = layer.bias
    if layer.active is not None:
        (routing,) = needs
        kernel = mix_of_one(layer.weight.view(layer._kernels), routing, layer.active)
        if bias is not None and bias.dim() == 2:
            bias = mix(bias, routing[None]).squeeze(0)
    else:
        kernel, bias = needs if len(needs) == 2 else (needs[0], bias)
    return layer.plain(x, kernel.to(x.dtype), None if bias is None else bias.to(x.dtype))
