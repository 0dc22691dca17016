"""A block whose convolutions are mixed for each example: `CondConvBlock`.

Shapes: x [B, C, H, W]; routing [B, E], or [B, E, O] for all output channels of a block.
"""

from __future__ import annotations

from functools import partial
from itertools import accumulate, pairwise
from typing import Any, cast

from torch import Tensor, nn

from pliant.anatomy import Block
from pliant.methods.condconv.exported import EachImageBlock, needs_loop
from pliant.methods.condconv.layers import CondConv2d, CondLinear
from pliant.methods.condconv.mixing import ROUTING
from pliant.parts import Target
from pliant.threaded import Bound, Call, between, thread


class CondConvBlock(Block):
    """A block whose convolutions are mixed for each example, by one router.

    The block's own forward runs; its conditional layers get the routing in addition.

    Args:
        block: with conditional layers in place of its convolutions.
        router: gives the routing of the block's input.
        widths: path and output channels of each conditional layer in `block`.
        shape: channels in and out, stride.
        passes_on: thread the routing to the blocks that follow.
    """

    in_float = True  # as its layers, whose kernels an exported block mixes

    def __init__(
        self,
        block: nn.Module,
        router: nn.Module,
        widths: dict[str, int],
        shape: tuple[int, int, int],
        passes_on: bool = False,
    ) -> None:
        super().__init__(*shape)
        self.block, self.router, self.passes_on = block, router, passes_on
        slices = dict(zip(widths, pairwise(accumulate(widths.values(), initial=0)), strict=True))
        # A layer may stand at several paths of the block, and is called by any of them.
        of = {id(block.get_submodule(path)): part for path, part in slices.items()}
        everywhere = block.named_modules(remove_duplicate=False)
        self._parts = {path: of[id(module)] for path, module in everywhere if id(module) in of}
        self._leaves, self._between = frozenset(self._parts), between(self._parts)

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """Run the block on `x` [B, C, H, W], with kernels for each of the B examples.

        What else the block takes goes through.
        """
        routing = self.router(x)
        y: Tensor = self.bound(partial(self._call, routing))(x, *args, **options)
        return thread(y, ROUTING, routing) if self.passes_on else y

    def _call(self, routing: Tensor, path: str, layer: nn.Module, x: Tensor) -> Any:
        return layer(x, self.share(path, routing))

    def bound(self, call: Call) -> Bound:
        """The block, its conditional layers called by `call` (`pliant.threaded.Bound`)."""
        return Bound(self.block, self._leaves, self._between, call)

    def layers(self) -> dict[str, CondConv2d | CondLinear]:
        """The conditional layers by their paths in the block."""
        return {
            path: cast("CondConv2d | CondLinear", self.block.get_submodule(path)) for path in self._parts
        }

    def share(self, path: str, routing: Tensor) -> Tensor:
        """What a layer gets of the block's routing."""
        if routing.dim() == 2:
            return routing
        start, end = self._parts[path]  # weights of all layers' channels, side by side
        return routing[:, :, start:end]

    def export_form(self, target: Target, batch: int | None) -> nn.Module:
        """One loop over the images, where a layer needs one; see `Part.export_form`."""
        looped = any(needs_loop(layer, target, batch) for layer in self.layers().values())
        return EachImageBlock(self) if looped else self
