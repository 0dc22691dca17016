"""Adaptive depth: stages whose last blocks can be skipped, 2^N networks in one set of weights.

*Specialization of Sub-paths for Adaptive Depth Networks*, arXiv 2312.16392. Each stage keeps
its first blocks and can skip its last ones; a flag for each stage says whether it does. The
norms of the blocks that stay exist twice, once for each depth of their stage.

Shapes in this file::

    x     [B, C, H, W] feature map, or [B, tokens, C]; a block that can be skipped keeps it
    skip  one flag for each stage that can skip, first stage first; True skips
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pliant import anatomy
from pliant.anatomy import Block, BlockInfo, RemovedBlock
from pliant.methods.adaptive_depth.switch import Depth, Skip, check_skip, find_depth
from pliant.methods.condconv.layers import Router, SharedRouting
from pliant.parts import Part
from pliant.surgery import Method, PassedOver, Site, Survey
from pliant.threaded import Bound, between, thread, threaded

DEPTH = "depth"  # the name under which flags are threaded, by number; None: two depths


@dataclass(frozen=True, kw_only=True)
class AdaptiveDepth(Method):
    """Make the last blocks of each stage skippable, by a flag for each stage.

    Args:
        skippable: how many blocks each stage can skip, a number for each stage of the
            network, 0 included. None: half of a stage's blocks, rounded down, as in the
            paper (ResNet-50's 3 4 6 3 blocks can skip 1 2 3 1), of those that add their
            input to their output.
        groups: stages that a transformer's blocks are divided into, which are one run of
            blocks otherwise (ViT in the paper: 12 blocks in 4 groups of 3).
        switchable_norms: the norms of the blocks that stay exist twice, and the stage's
            flag chooses. Off: Table 3 without them.

    Raises:
        ValueError: an option is out of its range. When applied: `skippable` has another
            number of stages than the network, or names a block that cannot be skipped.

    Example:
        >>> import timm
        >>> from pliant import convert
        >>> model = convert(timm.create_model("resnet50"), AdaptiveDepth())
        >>> sum(p.numel() for p in model.parameters())
        25583144
    """

    wraps: ClassVar[tuple[str, ...]] = ("MixtureOfDepths", "CondConv")

    skippable: tuple[int, ...] | None = None
    groups: int = 4
    switchable_norms: bool = True

    def __post_init__(self) -> None:
        if self.skippable is not None:
            if not isinstance(self.skippable, (tuple, list)) or not all(
                _whole(n, 0) for n in self.skippable
            ):
                raise ValueError(
                    f"skippable must hold a number of blocks for each stage, or be None; not "
                    f"{self.skippable!r}"
                )
            object.__setattr__(self, "skippable", tuple(self.skippable))  # JSON knows lists only
            if not any(self.skippable):
                raise ValueError(f"skippable={self.skippable} lets no stage skip a block")
        if not _whole(self.groups, 1):
            raise ValueError(f"groups must be a whole number of at least 1, not {self.groups!r}")
        if not isinstance(self.switchable_norms, bool):
            raise ValueError(f"switchable_norms must be True or False, not {self.switchable_norms!r}")

    def survey(self, model: nn.Module) -> Survey:
        """Find the stages' blocks; see `Method.survey`."""
        stages = self._stages(model)
        if self.skippable is not None and len(self.skippable) != len(stages):
            raise ValueError(
                f"skippable={self.skippable} is for {len(self.skippable)} stages; "
                f"{type(model).__name__} has {len(stages)}: {_sizes(stages)}"
            )
        sites: list[Site] = []
        passed_over: list[PassedOver] = []
        flag = 0
        for n, blocks in enumerate(stages):
            skipped = self._skipped(n, blocks)
            if not skipped:
                passed_over += [PassedOver(b.path, f"stage {n} has nothing to skip") for b in blocks]
                continue
            for i, block in enumerate(blocks):
                part = "skippable" if i >= len(blocks) - skipped else "mandatory"
                detail: dict[str, Any] = {"flag": flag, "part": part}
                if part == "mandatory" and self.switchable_norms:
                    detail["norms"] = len(anatomy.norms(block.module))
                sites.append(Site(block.path, detail))
            flag += 1
        _check_routings(model, sites)
        note = f"{flag} flags: {2**flag} depths; train it so that all work (the base network is new)"
        return Survey(tuple(sites), tuple(passed_over), (note,) if sites else ())

    def _stages(self, model: nn.Module) -> list[tuple[BlockInfo, ...]]:
        """The blocks of each stage; a transformer's one run is divided into groups."""
        result: list[tuple[BlockInfo, ...]] = []
        for stage in anatomy.stages(model):
            blocks = stage.blocks
            if not anatomy.is_transformer(blocks[0].module):
                result.append(blocks)
                continue
            if len(blocks) % self.groups:
                raise ValueError(f"{len(blocks)} blocks of {stage.path} make no {self.groups} equal groups")
            size = len(blocks) // self.groups
            result += [blocks[i : i + size] for i in range(0, len(blocks), size)]
        return result

    def _skipped(self, n: int, blocks: tuple[BlockInfo, ...]) -> int:
        """How many of a stage's blocks, its last ones, can be skipped."""
        if self.skippable is None:
            wanted = len(blocks) // 2
            fit = 0
            while fit < wanted and anatomy.is_residual(blocks[-1 - fit].module):
                fit += 1
            return fit
        wanted = self.skippable[n]
        if wanted >= len(blocks) and wanted:
            raise ValueError(
                f"stage {n} has {len(blocks)} blocks and cannot skip {wanted}: its first block stays"
            )
        for block in blocks[len(blocks) - wanted :]:
            if not anatomy.is_residual(block.module):
                raise ValueError(
                    f"{block.path} cannot be skipped: it does not add its input to its output "
                    f"({block.in_channels} to {block.out_channels} channels, stride {block.stride})"
                )
        return wanted

    def replace(self, module: nn.Module, site: Site) -> nn.Module:
        """Build what stands at one site; see `Method.replace`."""
        skippable = site.detail["part"] == "skippable"
        norms = anatomy.norms(module) if self.switchable_norms and not skippable else []
        shape = anatomy.shape_of(module)
        for path in norms:
            parent, _, name = path.rpartition(".")
            setattr(module.get_submodule(parent), name, SwitchableNorm(module.get_submodule(path)))
        return AdaptiveBlock(module, site.detail["flag"], skippable, norms, shape)

    def finish(self, model: nn.Module, sites: tuple[Site, ...]) -> None:
        """Give all blocks one depth to read; see `Method.finish`."""
        depth = Depth((False,) * (1 + max(site.detail["flag"] for site in sites)))
        seen: set[int] = set()
        for site in sites:
            block = model.get_submodule(site.path)
            assert isinstance(block, AdaptiveBlock)
            block.read_from(depth, owner=not seen, first=block.flag not in seen)
            seen.add(block.flag)
            for norm in block.modules():
                if isinstance(norm, SwitchableNorm):
                    norm.base.train(norm.full.training)


@dataclass(frozen=True, kw_only=True)
class Subnet(Method):
    """Cut one depth out of an adaptive network: what is left is plain.

    `pliant.subnet` cuts a network at hand; as a method this is for recipes (the paper's
    individual base network is ``AdaptiveDepth(), Subnet(skip=...)``) and for checkpoints.

    Args:
        skip: the depth, a flag for each stage that can skip.

    Raises:
        ValueError: no flags. When applied: the network has no adaptive depth, or another
            number of flags.

    Example:
        >>> import timm
        >>> from pliant import convert
        >>> base = Subnet(skip=(True,) * 4)
        >>> model = convert(timm.create_model("resnet50"), AdaptiveDepth(), base)
        >>> sum(p.numel() for p in model.parameters())
        17112360
    """

    wraps: ClassVar[tuple[str, ...]] = ("AdaptiveDepth", "MixtureOfDepths", "CondConv")
    dissolves: ClassVar[str] = "AdaptiveDepth"

    skip: Skip

    def __post_init__(self) -> None:
        object.__setattr__(self, "skip", check_skip(self.skip))

    def survey(self, model: nn.Module) -> Survey:
        """Find the blocks; see `Method.survey`."""
        check_skip(self.skip, len(find_depth(model).skip))
        return Survey(
            tuple(
                Site(
                    path, {"left": "nothing" if block.skippable and self.skip[block.flag] else "the block"}
                )
                for path, block in model.named_modules()
                if isinstance(block, AdaptiveBlock)
            )
        )

    def replace(self, module: nn.Module, site: Site) -> nn.Module:
        """What a block is at its depth, without anything to switch; see `Method.replace`."""
        assert isinstance(module, AdaptiveBlock)
        skip = self.skip[module.flag]
        if skip and module.skippable:
            return RemovedBlock(module.channels)
        plain: nn.Module = module.block
        for path, norm in list(plain.named_modules()):
            if isinstance(norm, SwitchableNorm):
                parent, _, name = path.rpartition(".")
                setattr(plain.get_submodule(parent), name, norm.base if skip else norm.full)
        return plain


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
        self.base = copy.deepcopy(norm).requires_grad_(True)

    def forward(self, x: Tensor, skip: bool = False) -> Tensor:
        """Normalise `x`, of any shape that the norm takes, for one of the two depths."""
        y: Tensor = self.base(x) if skip else self.full(x)
        return y


class AdaptiveBlock(Block):
    """A block of a stage that can skip its last blocks.

    The stage's first block reads the flag; the others get it along the feature map, so that
    one forward has one depth, whatever is switched meanwhile.

    Args:
        block: what runs.
        flag: number of the stage's flag.
        skippable: the flag skips this block; otherwise it chooses its norms.
        norms: paths of the block's switchable norms.
        shape: channels in and out, stride.
    """

    def __init__(
        self,
        block: nn.Module,
        flag: int,
        skippable: bool,
        norms: Sequence[str],
        shape: tuple[int, int, int],
    ) -> None:
        super().__init__(*shape)
        self.block, self.flag, self.skippable = block, flag, skippable
        self.first = False
        self._depth: tuple[Depth, ...] = ()
        self._norms = frozenset(norms)
        self._between = between(norms)

    def read_from(self, depth: Depth, *, owner: bool, first: bool) -> None:
        """Say where the flags are; `owner` registers `depth`, `first` is a stage's first block."""
        self.first = first
        self._depth = (depth,)  # in a tuple, so no part of this block: all read the same one
        if owner:
            self.depth = depth

    def forward(self, x: Tensor) -> Tensor:
        """The block's output for `x`, or `x` itself where the block is skipped."""
        flags = self._read(x)
        skip = flags[self.flag]
        if self.skippable and skip:
            return x
        if skip and self._norms:
            y = Bound(self.block, self._norms, self._between, _run_base)(x)
        else:
            y = self.block(x)
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


def _check_routings(model: nn.Module, sites: Sequence[Site]) -> None:
    """Refuse to skip a block of CondConv that computes the routing of others, which are not."""
    flags = {site.path: site.detail["flag"] for site in sites if site.detail["part"] == "skippable"}

    def skipped_by(path: str) -> int | None:
        return next((flag for block, flag in flags.items() if f"{path}.".startswith(f"{block}.")), None)

    source = ""
    for path, module in model.named_modules():
        if isinstance(module, SharedRouting) or (isinstance(module, Router) and module.previous):
            if skipped_by(source) not in (None, skipped_by(path)):
                raise ValueError(
                    f"{source.removesuffix('.router')} cannot be skipped: its routing is that of "
                    f"{path.removesuffix('.router')} too; name other blocks in skippable, or take CondConv "
                    f"with routing='block'"
                )
        elif isinstance(module, Router):
            source = path


_LOST = (
    "the depth of this forward is lost, because gradient checkpointing runs it again on other tensors; "
    "use torch.utils.checkpoint with use_reentrant=False"
)
_TWO = (
    "one feature map went into a stage at two depths, and gradient checkpointing runs one of them again "
    "without knowing which; give each its own, x.clone()"
)


def _sizes(stages: Sequence[Sequence[object]]) -> str:
    return " ".join(str(len(stage)) for stage in stages) + " blocks"


def _whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least
