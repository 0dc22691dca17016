"""CNN Mixture-of-Depths: every second block processes only the channels that matter.

Cakaj, Mehnert, Yang, *CNN Mixture-of-Depths*, arXiv 2409.17016. A small selector
ranks the channels of a feature map; the top k go through a narrow copy of the block
that stood here, are scaled by their scores and added to the first k channels. All
shapes are fixed, so the graph is static.

Shapes in this file::

    B  batch             x       [B, C, H, W]  feature map
    C  channels          scores  [B, k]        sigmoid scores, best first
    k  processed, C // c index   [B, k] or [k] channels that are processed
    r  reduction         y       [B, k, H, W]  the core's output
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.anatomy import Block, BlockInfo, RemovedBlock, stages
from pliant.methods import routed
from pliant.methods.narrow import core_width, last_activation, narrow_core, unfit
from pliant.methods.precision import full_precision, linear, pooled
from pliant.surgery import Method, PassedOver, Site, Survey

Network = TypeVar("Network", bound=nn.Module)

Selection = Literal["learned", "random", "fixed", "first", "none"]
Order = Literal["score", "index"]
Fusion = Literal["first", "last", "original", "replace"]


@dataclass(frozen=True, kw_only=True)
class MixtureOfDepths(Method):
    """Replace every second block by one that processes the top k of its channels.

    Where the paper leaves something open, it is an option here and the default is the
    reading that reproduces its parameter and MAC counts.

    Args:
        c: k = C // c channels of C are processed (section 3.2). None: the width of
            the network's first block, the largest that is legal (64 for ResNet-50).
        reduction: r of the selector, C -> C // r -> C (section 3.1; 16 in the paper). A
            selector with one hidden unit ranks the channels alike for every input (or, silent, not at all).
        selection: which channels. ``"learned"`` by the selector; ``"random"`` fresh
            for each sample and forward, from torch's default generator, in evaluation
            too (the paper's MoD50-rand); ``"fixed"`` random, drawn once; ``"first"``
            the first k; ``"none"`` removes the block, the control that the paper
            leaves out. Only ``"learned"`` has a selector and scores.
        order: in which order the channels reach the core. ``"score"`` best first, the
            literal reading; ``"index"`` as they stand in `x`, a steadier input for
            each filter of the core.
        fusion: where the core's output goes. ``"first"`` is added to the first k
            channels (equation 1); ``"last"`` to the last k (Table 8); ``"original"``
            to the channels it came from (Table 9); ``"replace"`` overwrites those
            (appendix E, where it did worse).
        blocks: ``"odd"``: 0-based odd blocks of every stage (section 3.4); ``"all"``:
            all but each stage's first; or the paths of the blocks, ``("layer3.1",)``.
        stages: numbers of the stages to change, 0-based; None is all of them. Not
            together with paths in `blocks`.
        inner_shortcut: add the core's input to its output. Off: equation 1 adds
            `x` already.
        last_act: end with the replaced block's activation, behind the inner shortcut if
            there is one, as in the block itself. Off for residual families.
        zero_init_last: start the core's last norm at zero, so that the converted
            network begins as the network without these blocks; the useful start for
            a trained network. (Not with ``fusion="replace"``, which then overwrites k
            channels by zeros, nor with `inner_shortcut`, which adds them again.) Refused
            with `last_act` alone: gradients would be zero for ever.

    Raises:
        ValueError: an option is out of its range. When applied: `c` leaves a block
            without a channel (named with C and c), or a block named in `blocks`
            changes width or resolution, or has no core.

    Example:
        >>> import timm
        >>> from pliant import convert
        >>> model = convert(timm.create_model("resnet34"), MixtureOfDepths(c=16, order="index"))
        >>> model.layer1[1].k
        4
    """

    c: int | None = None
    reduction: int = 16
    selection: Selection = "learned"
    order: Order = "score"
    fusion: Fusion = "first"
    blocks: Literal["odd", "all"] | tuple[str, ...] = "odd"
    stages: tuple[int, ...] | None = None
    inner_shortcut: bool = False
    last_act: bool = False
    zero_init_last: bool = False

    def __post_init__(self) -> None:
        for name, value in (("c", 1 if self.c is None else self.c), ("reduction", self.reduction)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, not {value!r}")
        for name, kind in (("selection", Selection), ("order", Order), ("fusion", Fusion)):
            if getattr(self, name) not in get_args(kind):
                choices = ", ".join(get_args(kind))
                raise ValueError(f"{name} must be one of {choices}; not {getattr(self, name)!r}")
        for name in ("inner_shortcut", "last_act", "zero_init_last"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} must be True or False, not {getattr(self, name)!r}")
        # A checkpoint's JSON knows lists only.
        if self.blocks not in ("odd", "all"):
            if not _all_of(str, self.blocks):
                raise ValueError(f"blocks must be 'odd', 'all' or a tuple of paths, not {self.blocks!r}")
            object.__setattr__(self, "blocks", tuple(self.blocks))
            if self.stages is not None:
                raise ValueError(
                    f"blocks={self.blocks!r} says which already; stages={self.stages!r} goes with "
                    f"blocks='odd' or 'all' only"
                )
        if self.stages is not None:
            if not _all_of(int, self.stages):
                raise ValueError(f"stages must be a tuple of whole numbers or None, not {self.stages!r}")
            object.__setattr__(self, "stages", tuple(self.stages))
        if self.last_act and self.zero_init_last and not self.inner_shortcut:
            raise ValueError(
                "last_act with zero_init_last and without inner_shortcut gives the core and the "
                "selector a gradient of zero for ever; drop one of the two"
            )

    def survey(self, model: nn.Module) -> Survey:
        """Find the blocks to replace; see `Method.survey`."""
        found = stages(model)
        for n in self.stages or ():
            if not 0 <= n < len(found):
                raise ValueError(f"stages holds {n}, but {type(model).__name__} has {len(found)} stages")
        every = {block.path: block for stage in found for block in stage.blocks}
        wanted = self._wanted(every)
        c = self.c
        if c is None and found:
            first = found[0].blocks[0]
            c = min(first.in_channels, first.out_channels)
        sites, passed_over = [], []
        for n, stage in enumerate(found):
            for i, block in enumerate(stage.blocks):
                if wanted is not None:
                    take, why = block.path in wanted, "not named in blocks"
                elif self.stages is not None and n not in self.stages:
                    take, why = False, f"stage {n} is not in stages={self.stages}"
                elif i == 0:
                    take, why = False, "a stage's first block stays"
                else:
                    take, why = self.blocks == "all" or i % 2 == 1, "an even block stays"
                if take:
                    why = unfit(block)
                    take = not why
                    if why and wanted is not None:
                        raise ValueError(f"blocks names {block.path}, which cannot be replaced: {why}")
                if take:
                    assert c is not None
                    sites.append(Site(block.path, self._detail(block, c)))
                else:
                    passed_over.append(PassedOver(block.path, why))
        notes = []
        begins_without = self.zero_init_last and self.fusion != "replace" and not self.inner_shortcut
        if self.selection != "none" and not begins_without:
            notes.append(
                "the new blocks are narrow and start fresh: a trained network has to be trained "
                "again; zero_init_last=True starts as the network without them (but not with "
                "fusion='replace' or inner_shortcut)"
            )
        constant = [s.path for s in sites if self.selection == "learned" and s.detail["hidden"] == 1]
        if constant:
            notes.append(
                f"one hidden unit ranks the channels alike for every input, so the selection of "
                f"{', '.join(constant)} is constant; choose a smaller reduction than {self.reduction}"
            )
        return Survey(tuple(sites), tuple(passed_over), tuple(notes))

    def replace(self, module: nn.Module, site: Site) -> nn.Module:
        """Build the block for one site; see `Method.replace`."""
        if self.selection == "none":
            return RemovedBlock(site.detail["C"])
        channels, k = site.detail["C"], site.detail["k"]
        core = narrow_core(module, channels, k, zero_init_last=self.zero_init_last)
        return MoDBlock(module, core, channels, k, self)

    def _wanted(self, every: dict[str, BlockInfo]) -> set[str] | None:
        if isinstance(self.blocks, str):
            return None
        for path in self.blocks:
            if path not in every:
                raise ValueError(f"blocks names {path!r}, which is no block; blocks: {', '.join(every)}")
            block = every[path]
            if block.stride != 1 or block.in_channels != block.out_channels:
                raise ValueError(
                    f"{path} has stride {block.stride} and goes from {block.in_channels} to "
                    f"{block.out_channels} channels; a Mixture-of-Depths block keeps both, so it "
                    f"can only take the place of a block of stride 1 and constant width"
                )
        return set(self.blocks)

    def _detail(self, block: BlockInfo, c: int) -> dict[str, int]:
        channels = block.in_channels
        k = channels // c
        if self.selection == "none":
            return {"C": channels}
        narrowest = min(k, core_width(block.module, channels, k))
        if narrowest < 1:
            raise ValueError(
                f"{block.path}: C = {channels} channels with c = {c} leave k = {k} for the selector "
                f"and {narrowest} inside its core; choose a smaller c"
            )
        detail = {"C": channels, "c": c, "k": k}
        if self.selection == "learned":
            detail["hidden"] = max(1, channels // self.reduction)
        return detail


class ChannelSelector(nn.Module):
    """Rank the channels of a feature map and pick the best k (section 3.1, figure 2).

    GAP -> Linear(C, C // r) -> ReLU -> Linear(C // r, C) -> top k -> sigmoid, without
    bias or norm. Ranks the logits: saturated sigmoids tie. Half and bfloat16 are
    promoted to float32, under autocast too, because ranking needs the digits.

    Weights start as PyTorch's, but each hidden unit's sign is chosen so that its weights
    sum to at least zero: pooled activations are not negative, so it starts active. Of the
    few units that a narrow block has, otherwise all are often silent for every input, and
    then nothing is ever learned.

    Args:
        channels: C.
        k: how many are picked.
        hidden: width of the hidden layer.
        order: ``"score"`` or ``"index"``.
    """

    def __init__(self, channels: int, k: int, hidden: int, order: Order = "score") -> None:
        super().__init__()
        self.k, self.order = k, order
        self.fc1 = nn.Linear(channels, hidden, bias=False)
        self.fc2 = nn.Linear(hidden, channels, bias=False)
        with torch.no_grad():
            total = self.fc1.weight.sum(1, keepdim=True)
            self.fc1.weight.copy_(torch.where(total < 0, -self.fc1.weight, self.fc1.weight))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return scores [B, k], at least float32, and index [B, k], int64, for `x`.

        `x` is a feature map [B, C, H, W], or its means [B, C].
        """
        logits = self.logits(x)
        # sorted=True: unsorted, engines return different orders for the same values.
        top, index = logits.topk(self.k, dim=1, sorted=True)
        if self.order == "index":
            index, rank = index.sort(dim=1)
            top = top.gather(1, rank)
        return top.sigmoid(), index

    def logits(self, x: Tensor) -> Tensor:
        """The channels' relevance before the sigmoid, [B, C], at least float32."""
        with full_precision(x):
            return linear(F.relu(linear(pooled(x), self.fc1)), self.fc2)

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"k={self.k}, order={self.order!r}"


class RandomSelector(nn.Module):
    """Pick k channels at random, without scores: the paper's MoD50-rand.

    Args:
        channels: C.
        k: how many are picked.
        fixed: draw once, now, instead of afresh for each sample and forward.
        order: ``"score"`` keeps the random order, ``"index"`` sorts.
    """

    index: Tensor | None

    def __init__(self, channels: int, k: int, fixed: bool, order: Order = "score") -> None:
        super().__init__()
        self.channels, self.k, self.order = channels, k, order
        drawn = torch.randperm(channels)[:k] if fixed else None
        if drawn is not None and order == "index":
            drawn = drawn.sort().values
        self.register_buffer("index", drawn)

    def forward(self, x: Tensor) -> tuple[None, Tensor]:
        """Return no scores, and index [k] when fixed, else [B, k]."""
        if self.index is not None:
            return None, self.index
        # The default generator: one of our own would break graphs.
        index = torch.rand(x.shape[0], self.channels, device=x.device).topk(self.k, dim=1).indices
        return None, index.sort(dim=1).values if self.order == "index" else index

    def extra_repr(self) -> str:
        """What `print` shows."""
        return f"k={self.k}, fixed={self.index is not None}, order={self.order!r}"


class MoDBlock(Block):
    """One Mixture-of-Depths block: select, process, scale, fuse (sections 3.1 to 3.3).

    Args:
        replaced: the block whose place it takes; gives device, dtype, drop path and, if asked
            for, its last activation.
        core: the narrow block, [B, k, H, W] to [B, k, H, W].
        channels: C.
        k: channels that are processed.
        config: the method's options.
    """

    selector: nn.Module | None

    def __init__(
        self, replaced: nn.Module, core: nn.Module, channels: int, k: int, config: MixtureOfDepths
    ) -> None:
        super().__init__(channels)
        self.k = k
        self.fusion: Fusion = config.fusion
        self.inner_shortcut = config.inner_shortcut
        like = next(replaced.parameters())
        with torch.device(like.device):
            if config.selection == "learned":
                hidden = max(1, channels // config.reduction)
                self.selector = ChannelSelector(channels, k, hidden, config.order).to(like.dtype)
            elif config.selection == "first":
                self.selector = None
            else:
                fixed = config.selection == "fixed"
                self.selector = RandomSelector(channels, k, fixed, config.order)
        self.core = core
        self.last_act = last_activation(replaced) if config.last_act else nn.Identity()
        drop_path = getattr(replaced, "drop_path", None)
        self.drop_path = nn.Identity() if drop_path is None else copy.deepcopy(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Process k channels of `x` [B, C, H, W]; the same shape and dtype come back."""
        if routed.usual():
            return self._trained(x)
        if self.selector is None:
            return self._fuse(x, self._process(x[:, : self.k]), None)
        scores, index = self.selector(x)
        if index.dim() == 1:
            return self._fuse(x, self._process(x.index_select(1, index)), index)
        y = self._process(x.gather(1, _spread(index, x)))
        if scores is not None:
            y = y * scores.to(y.dtype)[:, :, None, None]
        return self._fuse(x, y, index)

    def _trained(self, x: Tensor) -> Tensor:
        """The same, by operators whose gradients take fewer passes over `x`."""
        if (native := self._native(x)) is not None:
            return native
        scores, at = None, cast("routed.At", 0)
        if isinstance(self.selector, ChannelSelector):
            means, x = routed.pool(x)
            scores, at = self.selector(means)
        elif self.selector is not None:
            at = self.selector(x)[1].expand(x.shape[0], self.k)
        picked, x = routed.gather(x, at, self.k)
        y = self._process(picked)
        if self.fusion in ("first", "last"):
            at = 0 if self.fusion == "first" else self.channels - self.k
        return routed.fuse(x, y, scores, at, self.fusion == "replace")

    def _native(self, x: Tensor) -> Tensor | None:
        """The same by one operator, where it is there and knows this block."""
        from pliant.ops import mod_training as native  # on use: few processes train on a CPU

        selector: Any = self.selector
        learned = type(selector) is ChannelSelector
        if (
            native.unfit(x)
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
            down, up = selector.fc1.weight, selector.fc2.weight
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


def _all_of(kind: type, values: object) -> bool:
    """Whether `values` is a tuple or list of that; True and False are no numbers."""
    return isinstance(values, (tuple, list)) and all(
        isinstance(v, kind) and not isinstance(v, bool) for v in values
    )


def _spread(index: Tensor, x: Tensor) -> Tensor:
    """`index` [B, k] as [B, k, H, W], to gather and scatter whole channels of `x`."""
    return index[:, :, None, None].expand(-1, -1, x.shape[2], x.shape[3])
