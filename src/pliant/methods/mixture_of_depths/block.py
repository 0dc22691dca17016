"""A Mixture-of-Depths block: select, process, scale, fuse.

Shapes in this file::

    B  batch             x       [B, C, H, W]  feature map
    C  channels          scores  [B, k], [k]   sigmoid scores, best first; of a gate [B, C]
    k  processed, C // c index   [B, k] or [k] channels that are processed
    r  reduction         y       [B, k, H, W]  the core's output
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeVar, cast

import torch
from torch import Tensor, nn

from pliant.anatomy import Block, RemovedBlock
from pliant.methods.mixture_of_depths import training as routed
from pliant.methods.mixture_of_depths.cores import last_activation
from pliant.methods.mixture_of_depths.selectors import (
    SELECTION,
    ChannelSelector,
    ConstantSelector,
    Gate,
    RandomSelector,
    Scorer,
    SharedSelection,
    StaticSelector,
    relaxed,
)
from pliant.parts import OnnxOperator, Target
from pliant.threaded import thread

if TYPE_CHECKING:
    from pliant.methods.mixture_of_depths.method import MixtureOfDepths

Network = TypeVar("Network", bound=nn.Module)

Fusion = Literal["first", "last", "original", "replace"]

# Whose scores or channels the native operator of training cannot be given.
_NOT_NATIVE = (StaticSelector, ConstantSelector, SharedSelection)


class MoDBlock(Block):
    """One Mixture-of-Depths block: select, process, scale, fuse (sections 3.1 to 3.3).

    Args:
        replaced: the block whose place it takes; gives device, dtype, drop path and, if asked
            for, its last activation.
        core: the narrow block, [B, k, H, W] to [B, k, H, W].
        channels: C.
        k: channels that are processed.
        config: the method's options.
        shared: takes the selection that comes with the feature map, and has no selector of its own.
        passes_on: threads its selection to the blocks that follow.
    """

    operators: ClassVar[str] = "pliant.methods.mixture_of_depths.ops.building"
    selector: nn.Module | None

    def __init__(
        self,
        replaced: nn.Module,
        core: nn.Module,
        channels: int,
        k: int,
        config: MixtureOfDepths,
        *,
        shared: bool = False,
        passes_on: bool = False,
    ) -> None:
        super().__init__(channels)
        self.k = k
        self.fusion: Fusion = config.fusion
        self.gate: Gate = config.gate
        self.straight_through = config.straight_through
        self.inner_shortcut, self.passes_on = config.inner_shortcut, passes_on
        like = next(replaced.parameters())
        with torch.device(like.device):
            selector = SharedSelection() if shared else config.selector(channels, k)
        self.selector = None if selector is None else selector.to(like.dtype)
        self.core = core
        self.last_act = last_activation(replaced) if config.last_act else nn.Identity()
        drop_path = getattr(replaced, "drop_path", None)
        self.drop_path = nn.Identity() if drop_path is None else copy.deepcopy(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Process k channels of `x` [B, C, H, W]; the same shape and dtype come back."""
        return self._trained(x) if routed.usual() else self.written(x)

    def written(self, x: Tensor) -> Tensor:
        """`forward` as the paper has it, in plain operators: what compilers and exporters see."""
        if self.selector is None:
            return self._fuse(x, self._process(x[:, : self.k]), None)
        scores, index = self.selector(x)
        picked = x.index_select(1, index) if index.dim() == 1 else x.gather(1, _spread(index, x))
        y = self._process(self._straight(picked, x, x, index))
        if scores is not None and self.gate == "output":
            y = y * scores.to(y.dtype)[..., None, None]
        return self._pass_on(self._gated(self._fuse(x, y, index), scores), scores, index)

    def _trained(self, x: Tensor) -> Tensor:
        """The same, by operators whose gradients take fewer passes over `x`."""
        if (native := self._native(x)) is not None:
            return native
        scores, index, means, at = None, None, x, cast("routed.At", 0)
        if isinstance(self.selector, Scorer):
            means, x = routed.pool(x)
        if self.selector is not None:
            scores, index = self.selector(means)
            at = index.expand(x.shape[0], self.k)
        picked, x = routed.gather(x, at, self.k)
        y = self._process(self._straight(picked, x, means, at))
        if self.fusion in ("first", "last"):
            at = 0 if self.fusion == "first" else self.channels - self.k
        of_core = scores if self.gate == "output" else None
        if of_core is not None:
            of_core = of_core.expand(x.shape[0], self.k)
        fused = self._gated(routed.fuse(x, y, of_core, at, self.fusion == "replace"), scores)
        return fused if index is None else self._pass_on(fused, scores, index)

    def _straight(self, picked: Tensor, x: Tensor, seen: Tensor, index: routed.At) -> Tensor:
        """`picked`, with the gradient of a soft ranking where that is wanted.

        The soft ranking minus itself is zero, times `x`: nothing is added but a gradient.
        """
        selector, wanted = self.selector, self.straight_through and self.training
        if not (wanted and torch.is_grad_enabled() and isinstance(selector, (Scorer, StaticSelector))):
            return picked
        logits = selector.logits(seen)
        ranked = cast("Tensor", index).view(-1, self.k)[: len(logits)]
        soft = relaxed(logits, ranked)
        nothing = (soft - soft.detach()).to(x.dtype).expand(x.shape[0], -1, -1)
        return picked + torch.einsum("bkc,bchw->bkhw", nothing, x.detach()).to(picked.dtype)

    def _gated(self, fused: Tensor, scores: Tensor | None) -> Tensor:
        """Every channel times its gate, if there are gates."""
        if scores is None or self.gate != "map":
            return fused
        return fused * scores.to(fused.dtype)[:, :, None, None]

    def _pass_on(self, fused: Tensor, scores: Tensor | None, index: Tensor) -> Tensor:
        return thread(fused, SELECTION, (scores, index)) if self.passes_on else fused

    def _native(self, x: Tensor) -> Tensor | None:
        """The same by one operator, where it is there and knows this block."""
        from pliant.methods.mixture_of_depths.ops import (
            mod_training as native,  # on use: few processes train on a CPU
        )

        selector: Any = self.selector
        learned = type(selector) is ChannelSelector
        if (
            native.unfit(x)
            or self.gate != "output"
            or self.passes_on
            or (self.straight_through and self.training)
            or isinstance(selector, _NOT_NATIVE)
            or (learned and selector.fc2.bias is not None)
            or self.inner_shortcut
            or type(self.last_act) is not nn.Identity
            or type(self.drop_path) is not nn.Identity
            or isinstance(layers := native.layers_of(self.core), str)
            or (learned and selector.fc1.weight.dtype != torch.float32)
            or native.watched([self.core, *self.core.children(), *([] if selector is None else [selector])])
            or not native.ready()
        ):
            return None
        index = down = up = None
        if learned:
            down, (up, _) = selector.fc1.weight, selector.upper()
        elif selector is None:
            index = torch.arange(self.k).expand(x.shape[0], self.k)
        else:
            index = selector(x)[1].expand(x.shape[0], self.k)
        order = selector.order if learned else "score"
        return native.train_block(x, index, down, up, layers, order, self.fusion)

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
        from pliant.methods.mixture_of_depths.exported import GraphMoD, ProgramMoD  # made of this

        return ProgramMoD(self) if target == "program" else GraphMoD(self, batch)

    def fast_form(self) -> nn.Module | str:
        """The block as one operator, or why not; see `Part.fast_form`."""
        from pliant.methods.mixture_of_depths.ops.fused import FusedMoDBlock, fusable  # made of this

        return fusable(self) or FusedMoDBlock(self)

    def onnx_operator(self) -> OnnxOperator | str:
        """That of its fast form; see `Part.onnx_operator`."""
        from pliant.methods.mixture_of_depths.ops.fused import FusedMoDBlock, fusable  # made of this

        return fusable(self) or FusedMoDBlock(self).onnx_operator()

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"channels={self.channels}, k={self.k}, fusion={self.fusion!r}"


def without_mod_blocks(model: Network) -> Network:
    """A copy of a network with its Mixture-of-Depths blocks removed.

    The base line of the MoD tax: no MoD block can be cheaper than none.

    Raises:
        ValueError: the network has no Mixture-of-Depths block.
    """
    model = copy.deepcopy(model)
    blocks = [(path, m) for path, m in model.named_modules() if isinstance(m, MoDBlock)]
    if not blocks:
        raise ValueError(f"{type(model).__name__} has no Mixture-of-Depths block to remove")
    for path, block in blocks:
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, RemovedBlock(block.channels))
    return model


def _spread(index: Tensor, x: Tensor) -> Tensor:
    """`index` [B, k] as [B, k, H, W], to gather and scatter whole channels of `x`."""
    return index[:, :, None, None].expand(-1, -1, x.shape[2], x.shape[3])
