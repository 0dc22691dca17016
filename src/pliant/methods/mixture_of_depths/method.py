"""CNN Mixture-of-Depths: every second block processes only the channels that matter.

Cakaj, Mehnert, Yang, *CNN Mixture-of-Depths*, arXiv 2409.17016. A small selector
ranks the channels of a feature map; the top k go through a narrow copy of the block
that stood here, are scaled by their scores and added to the first k channels. All
shapes are fixed, so the graph is static.

This file has the method. Beside it stand the block (`block`), the selectors that choose and score
channels (`selectors`), the narrow copies of the replaced blocks (`cores`), the block's gradients
(`training`), its forms for exported files (`exported`) and its native operators (`ops`).

Shapes in this file: a feature map has C channels, of which k = C // c are processed.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import PlainValidator
from torch import nn

from pliant._options import Count, Numbers, check
from pliant.anatomy import BlockInfo, RemovedBlock, Stage, stages
from pliant.method import Gone, Method, PassedOver, RecipeForms, Site, Survey
from pliant.methods.mixture_of_depths.block import MoDBlock, without_mod_blocks
from pliant.methods.mixture_of_depths.cores import core_width, last_activation, narrow_core, unfit
from pliant.methods.mixture_of_depths.recipes import CONTROLS, cifar, imagenet
from pliant.methods.mixture_of_depths.selectors import ChannelSelector, Fusion, Order, RandomSelector

Selection = Literal["learned", "random", "fixed", "first", "none"]

NO_BLOCKS = "without MoD blocks"  # the control, in rows

_TAG = "before-house"  # the last commit that has the variants below; see docs/variants.md


def _one_or_each(c: Any) -> Any:
    """Check `c`; the JSON of a checkpoint knows lists only."""
    if isinstance(c, (tuple, list)):
        if c and all(type(n) is int and n >= 0 for n in c):
            return tuple(c)
    elif c is None or (type(c) is int and c > 0):
        return c
    raise ValueError(f"give a whole number from 1, or one from 0 for each stage, not {c!r}")


def _rule_or_paths(blocks: Any) -> Any:
    """Check `blocks`."""
    if blocks in ("odd", "all"):
        return blocks
    if isinstance(blocks, (tuple, list)) and all(isinstance(path, str) for path in blocks):
        return tuple(blocks)
    raise ValueError(f"give 'odd', 'all' or a tuple of paths, not {blocks!r}")


@dataclass(frozen=True, kw_only=True)
class MixtureOfDepths(Method):
    """Replace every second block by one that processes the top k of its channels.

    Where the paper leaves something open, it is an option here and the default is the
    reading that reproduces its parameter and MAC counts.

    Args:
        c: k = C // c channels of C are processed (section 3.2). None: the width of the network's
            first block (64 for ResNet-50), or the largest c that leaves every block a channel. A
            tuple has one value for each stage of the network; 0 removes that stage's blocks.
        reduction: r of the selector, C -> C // r -> C (section 3.1; 16 in the paper). A
            selector with one hidden unit ranks the channels alike for every input.
        selection: which channels are processed. ``"learned"``: the selector's choice;
            ``"random"``: drawn for each sample and forward from torch's default generator, in
            evaluation too (the paper's MoD50-rand); ``"fixed"``: drawn once; ``"first"``: the
            first k; ``"none"`` removes the block, the control that the paper leaves out.
        order: in which order the channels reach the core. ``"score"``: best first, the
            literal reading; ``"index"``: as they stand in `x`, a steadier input for each
            filter of the core.
        fusion: where the core's output goes. ``"first"``: added to the first k channels
            (equation 1); ``"last"``: added to the last k (Table 8); ``"original"``: added to
            the channels it came from (Table 9); ``"replace"`` overwrites those (appendix E,
            where it did worse).
        blocks: ``"odd"``: 0-based odd blocks of every stage (section 3.4); ``"all"``: all
            but each stage's first; or the paths of the blocks, ``("layer3.1",)``.
        stages: numbers of the stages to change, 0-based; None: all. Not together with paths
            in `blocks`.
        inner_shortcut: add the core's input to its output. Off: equation 1 adds `x` already.
        last_act: end with the replaced block's activation, behind the inner shortcut if there
            is one, as in the block itself. Off for residual families.
        zero_init_last: start the core's last norm at zero, so that the converted network
            begins as the network without these blocks; the useful start for a trained
            network. (Not with ``fusion="replace"``, which then overwrites k channels by zeros,
            nor with `inner_shortcut`, which adds them again.) Refused with `last_act` alone:
            gradients would be zero for ever.

    Raises:
        ValueError: an option is out of its range, or is one of `gone`. When applied: `c` leaves
            a block without a channel (named with C and c), or a block named in `blocks` changes
            width or resolution, or has no core.

    Example:
        >>> import timm
        >>> from pliant import convert
        >>> model = convert(timm.create_model("resnet34"), MixtureOfDepths(c=16, order="index"))
        >>> model.layer1[1].k
        4
    """

    suffix: ClassVar[str] = "mod"
    # At r = 16, blocks of 16 and 32 channels would have one and two hidden units.
    narrow: ClassVar[Mapping[str, Any]] = {"reduction": 4}
    # Blocks start as no blocks, so that nothing untrained is added.
    start: ClassVar[Mapping[str, Any]] = {"zero_init_last": True}
    recipes: ClassVar[RecipeForms] = {
        "imagenet": {"paper": imagenet},
        "cifar10": {"paper": cifar},
        "cifar100": {"paper": cifar},
    }
    gone: ClassVar[tuple[Gone, ...]] = (
        Gone("gate", "output", _TAG),
        Gone("temperature", 1.0, _TAG),
        Gone("straight_through", False, _TAG),
        Gone("selector_bias", False, _TAG),
        Gone("share_selection", False, _TAG),
        Gone("core", "block", _TAG),
        Gone("selection", "learned", _TAG, values=("static",)),
    )

    c: Annotated[int | tuple[int, ...] | None, PlainValidator(_one_or_each)] = None
    reduction: Count = 16
    selection: Selection = "learned"
    order: Order = "score"
    fusion: Fusion = "first"
    blocks: Annotated[Literal["odd", "all"] | tuple[str, ...], PlainValidator(_rule_or_paths)] = "odd"
    stages: Numbers | None = None
    inner_shortcut: bool = False
    last_act: bool = False
    zero_init_last: bool = False

    def __post_init__(self) -> None:
        check(self)
        if self.stages is not None and not isinstance(self.blocks, str):
            raise ValueError(
                f"blocks={self.blocks!r} says which already; stages={self.stages!r} goes with "
                f"blocks='odd' or 'all' only"
            )
        if self.last_act and self.zero_init_last and not self.inner_shortcut:
            raise ValueError(
                "last_act with zero_init_last and without inner_shortcut gives the core and the "
                "selector a gradient of zero for ever; drop one of the two"
            )

    @classmethod
    def comparisons(cls) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
        """The method and all forms of it that do not learn what to select; see `Method.comparisons`."""
        return {"mod": CONTROLS}

    def survey(self, model: nn.Module) -> Survey:
        """Find the blocks to replace; see `Method.survey`."""
        found = stages(model)
        for n in self.stages or ():
            if n >= len(found):
                raise ValueError(f"stages holds {n}, but {type(model).__name__} has {len(found)} stages")
        if not isinstance(self.blocks, str):
            _check_named(self.blocks, {block.path: block for stage in found for block in stage.blocks})
        chosen: list[tuple[int, BlockInfo]] = []
        passed_over = []
        for n, stage in enumerate(found):
            for i, block in enumerate(stage.blocks):
                if why := self._left_out(n, i, block.path) or unfit(block):
                    passed_over.append(PassedOver(block.path, why))
                else:
                    chosen.append((n, block))
        most = min((_largest_c(block) for _, block in chosen), default=1)
        c = self._by_stage(found, type(model).__name__, most)
        sites = [Site(block.path, self._detail(block, c[n], most)) for n, block in chosen]
        notes = []
        begins_without = self.zero_init_last and self.fusion != "replace" and not self.inner_shortcut
        if self.selection != "none" and not begins_without:
            notes.append(
                "the new blocks are narrow and start fresh: a trained network has to be trained "
                "again; zero_init_last=True starts as the network without them (but not with "
                "fusion='replace' or inner_shortcut)"
            )
        constant = [site.path for site in sites if site.detail.get("hidden") == 1]
        if constant:
            notes.append(
                f"one hidden unit ranks the channels alike for every input, so the selection of "
                f"{', '.join(constant)} is constant; choose a smaller reduction than {self.reduction}"
            )
        return Survey(tuple(sites), tuple(passed_over), tuple(notes))

    def replace(self, module: nn.Module, site: Site) -> nn.Module:
        """Build the block for one site; see `Method.replace`."""
        if "k" not in site.detail:
            return RemovedBlock(site.detail["C"])
        channels, k = site.detail["C"], site.detail["k"]
        core = narrow_core(module, channels, k, zero_init_last=self.zero_init_last)
        like = next(module.parameters())
        with torch.device(like.device):
            selector = self._selector(channels, k)
        return MoDBlock(
            core,
            None if selector is None else selector.to(like.dtype),
            channels,
            k,
            fusion=self.fusion,
            inner_shortcut=self.inner_shortcut,
            last_act=last_activation(module) if self.last_act else None,
            drop_path=copy.deepcopy(getattr(module, "drop_path", None)),
        )

    def without(self, model: nn.Module) -> nn.Module | None:
        """The network without its blocks, the base line of the MoD tax; see `Method.without`."""
        found = any(isinstance(m, MoDBlock) for m in model.modules())
        return without_mod_blocks(model) if found else None

    @property
    def without_label(self) -> str:
        """See `Method.without_label`."""
        return NO_BLOCKS

    def _left_out(self, stage: int, position: int, path: str) -> str:
        """Why the options leave a block out; empty if they do not."""
        if not isinstance(self.blocks, str):
            return "" if path in self.blocks else "not named in blocks"
        if self.stages is not None and stage not in self.stages:
            return f"stage {stage} is not in stages={self.stages}"
        if position == 0:
            return "a stage's first block stays"
        return "" if self.blocks == "all" or position % 2 == 1 else "an even block stays"

    def _by_stage(self, found: Sequence[Stage], network: str, most: int) -> tuple[int, ...]:
        """The c of each stage, unless told at most `most`; 0: no blocks."""
        if isinstance(self.c, tuple):
            if len(self.c) != len(found):
                raise ValueError(f"c={self.c} is for {len(self.c)} stages, but {network} has {len(found)}")
            return self.c
        if self.c is not None or not found:
            return (self.c or most,) * len(found)
        first = found[0].blocks[0]
        return (min(first.in_channels, first.out_channels, most),) * len(found)

    def _detail(self, block: BlockInfo, c: int, most: int) -> dict[str, int]:
        channels = block.in_channels
        if self.selection == "none" or c == 0:
            return {"C": channels}
        k, narrowest = _widths(block, c)
        if narrowest < 1:
            raise ValueError(
                f"{block.path}: C = {channels} channels with c = {c} leave k = {k} for the selector "
                f"and {narrowest} inside its core; choose a c of at most {most}, or leave the block out"
            )
        detail = {"C": channels, "c": c, "k": k}
        if self.selection == "learned":
            detail["hidden"] = max(1, channels // self.reduction)
        return detail

    def _selector(self, channels: int, k: int) -> nn.Module | None:
        """A selector of k of C channels; None: the first k, without scores."""
        if self.selection == "first":
            return None
        if self.selection == "learned":
            return ChannelSelector(channels, k, max(1, channels // self.reduction), self.order)
        return RandomSelector(channels, k, self.selection == "fixed", self.order)


def _widths(block: BlockInfo, c: int) -> tuple[int, int]:
    """K of a block for a given c, and the least number of channels in the selection and its core."""
    k = block.in_channels // c
    return k, min(k, core_width(block.module, block.in_channels, k))


def _largest_c(block: BlockInfo) -> int:
    """The largest c that leaves a block a channel everywhere."""
    return next((c for c in range(block.in_channels, 1, -1) if _widths(block, c)[1] >= 1), 1)


def _check_named(paths: Sequence[str], every: Mapping[str, BlockInfo]) -> None:
    """Refuse paths that name no block of the network, or one that cannot be replaced."""
    for path in paths:
        if path not in every:
            raise ValueError(f"blocks names {path!r}, which is no block; blocks: {', '.join(every)}")
        block = every[path]
        if block.stride != 1 or block.in_channels != block.out_channels:
            raise ValueError(
                f"{path} has stride {block.stride} and goes from {block.in_channels} to "
                f"{block.out_channels} channels; a Mixture-of-Depths block keeps both, so it "
                f"can only take the place of a block of stride 1 and constant width"
            )
        if why := unfit(block):
            raise ValueError(f"blocks names {path}, which cannot be replaced: {why}")
