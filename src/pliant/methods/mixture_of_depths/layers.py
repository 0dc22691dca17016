"""What a Mixture-of-Depths block is made of: `MoDLayers`.

How it runs is elsewhere: in PyTorch (`block`), in exported files (`exported`), and as one operator
(`ops.fused`), all of which are made of these layers.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from torch import nn

from pliant.anatomy import Block

Fusion = Literal["first", "last", "original", "replace"]


class MoDLayers(Block):
    """The layers of a Mixture-of-Depths block, and how they are joined.

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
    """

    operators: ClassVar[str] = "pliant.methods.mixture_of_depths.ops.building"
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

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"channels={self.channels}, k={self.k}, fusion={self.fusion!r}"
