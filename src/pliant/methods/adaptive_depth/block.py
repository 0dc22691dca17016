"""What stands in the place of an adaptive network's blocks and norms.

*Specialization of Sub-paths for Adaptive Depth Networks*, arXiv 2312.16392, section 3.1.

Shapes in this file::

    x     [B, C, H, W] feature map, or [B, tokens, C]; a block that can be skipped keeps it
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pliant.anatomy import Block
from pliant.methods.adaptive_depth.norms import learnable_norm
from pliant.methods.adaptive_depth.switch import Depth, Switched
from pliant.parts import Part
from pliant.threaded import Bound, between, thread, threaded

DEPTH = "depth"  # the name under which flags are threaded, by number; None: two depths


class SwitchableNorm(Part):
    """A norm for the full stage, and its copy for the stage that skips.

    Args:
        norm: of the full stage; the other one starts as its copy, and learns also where
            this one is frozen.
    """

    switches: ClassVar[bool] = True

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.full = norm
        self.base = learnable_norm(norm)

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        """Normalise `x`, of any shape that the norm takes, for one of the two depths."""
        y: Tensor = self.base(x) if skip else self.full(x)
        return y


class AdaptiveBlock(Block, Switched):
    """A block of a stage that can skip its last blocks.

    The stage's first block reads the flag; the others get it along the feature map, so that
    one forward has one depth, whatever is switched meanwhile.

    Args:
        block: what runs, with `SwitchableNorm` in place of the norms that the flag chooses.
        flag: number of the stage's flag.
        skippable: the flag skips this block; otherwise it chooses its norms.
        shape: channels in and out, stride.
    """

    def __init__(
        self,
        block: nn.Module,
        flag: int,
        skippable: bool,
        shape: tuple[int, int, int],
    ) -> None:
        super().__init__(*shape)
        self.block, self.flag, self.skippable = block, flag, skippable
        self.first = False
        self._depth: tuple[Depth, ...] = ()
        everywhere = block.named_modules(remove_duplicate=False)
        self._norms = frozenset(path for path, m in everywhere if isinstance(m, SwitchableNorm))
        self._between = between(self._norms)

    def read_from(self, depth: Depth, *, owner: bool, first: bool) -> None:
        """Say where the flags are; `owner` registers `depth`, `first` is a stage's first block."""
        self.first = first
        self._depth = (depth,)  # in a tuple, so no part of this block: all read the same one
        if owner:
            self.depth = depth

    def forward(self, x: Tensor, *args: Any, **options: Any) -> Tensor:
        """The block's output for `x`, or `x` itself where the block is skipped.

        What else the block takes, such as a mask, goes through.
        """
        flags = self._read(x)
        skip = flags[self.flag]
        if self.skippable and skip:
            return x
        if skip and self._norms:
            y = Bound(self.block, self._norms, self._between, _run_base)(x, *args, **options)
        else:
            y = self.block(x, *args, **options)
        result: Tensor = thread(y, DEPTH, flags)
        return result

    def _read(self, x: Tensor) -> dict[int, bool | None]:
        """All flags by number, those that `x` carries or those that hold here; its own is no None."""
        known: dict[int, bool | None] = threaded(x, DEPTH) or {}
        skip = known.get(self.flag)
        if skip is not None and not self.first:
            return known
        if _recomputing():  # gradient checkpointing runs this block again
            if skip is None:
                raise RuntimeError(_TWO if self.flag in known else _LOST)
            return known
        now: dict[int, bool | None] = dict(enumerate(self._depth[0].current()))
        if torch.is_grad_enabled():
            thread(x, DEPTH, {n: s if known.get(n, s) is s else None for n, s in now.items()})
        return now

    def _replicate_for_data_parallel(self) -> AdaptiveBlock:
        """A replica for a thread of `nn.DataParallel`, at the depth that holds for its caller."""
        replicate: Callable[[], AdaptiveBlock] = super()._replicate_for_data_parallel
        replica = replicate()
        replica._depth = (Depth(self._depth[0].current()),)
        return replica

    def extra_repr(self) -> str:
        """What `print` shows."""
        part = "skippable" if self.skippable else "mandatory"
        return f"{super().extra_repr()}, flag={self.flag}, {part}"


def _run_base(_path: str, norm: nn.Module, x: Tensor) -> Tensor:
    y: Tensor = norm(x, True)
    return y


def _recomputing() -> bool:
    """Whether this forward is part of a backward: of gradient checkpointing."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


_LOST = (
    "the depth of this forward is lost, because gradient checkpointing runs it again on other tensors; "
    "use torch.utils.checkpoint with use_reentrant=False, and full backward hooks not on blocks but on the "
    "layers inside them"
)
_TWO = (
    "one feature map went into a stage at two depths, and gradient checkpointing runs one of them again "
    "without knowing which; give each its own, x.clone()"
)
