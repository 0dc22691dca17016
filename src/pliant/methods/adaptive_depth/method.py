"""Adaptive depth: stages whose last blocks can be skipped, 2^N networks in one set of weights.

*Specialization of Sub-paths for Adaptive Depth Networks*, arXiv 2312.16392. Each stage keeps
its first blocks and can skip its last ones; a flag for each stage says whether it does. The
norms of the blocks that stay exist twice, once for each depth of their stage.

Shapes in this file::

    x     [B, C, H, W] feature map, or [B, tokens, C]; a block that can be skipped keeps it
    skip  one flag for each stage that can skip, first stage first; True skips
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from pliant import anatomy
from pliant._options import Count, Numbers, check
from pliant.anatomy import BlockInfo, RemovedBlock, stages
from pliant.counting import count_parameters
from pliant.method import Method, PassedOver, RecipeForms, Site, Survey
from pliant.methods.adaptive_depth import norms
from pliant.methods.adaptive_depth.block import AdaptiveBlock, SwitchableNorm
from pliant.methods.adaptive_depth.objectives import Joint, Specialization
from pliant.methods.adaptive_depth.recipes import ABLATIONS, BASE_ALONE, adn
from pliant.methods.adaptive_depth.switch import (
    Depth,
    Skip,
    SkipLike,
    check_skip,
    depth_role,
    find_depth,
)
from pliant.models._build import create
from pliant.objectives import Objective
from pliant.parts import copied, substitute
from pliant.surgery import convert, record_conversion
from pliant.threaded import borrowed

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True, kw_only=True)
class AdaptiveDepth(Method):
    """Make the last blocks of each stage skippable, by a flag for each stage.

    Args:
        skippable: how many blocks each stage can skip, a number for each stage of the
            network, 0 included. None: half of a stage's blocks, rounded down, as in the
            paper (ResNet-50's 3 4 6 3 blocks can skip 1 2 3 1), of those that add their
            input to their output.
        groups: stages that a transformer's blocks are divided into, which are one run of
            blocks otherwise. None: 4, as in the paper (ViT's 12 blocks are 4 groups of 3), or as many
            below as divide the blocks, two and more in a group.
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

    suffix: ClassVar[str] = "adn"
    wraps: ClassVar[bool] = True
    objectives: ClassVar[Mapping[str, type[Objective]]] = {"joint": Joint, "specialize": Specialization}
    objective: ClassVar[str] = "specialize"
    recipes: ClassVar[RecipeForms] = {"imagenet": {"adn": adn}}
    paper: ClassVar[Mapping[str, str]] = {"imagenet": "adn"}
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = ABLATIONS

    skippable: Numbers | None = None
    groups: Count | None = None
    switchable_norms: bool = True

    def __post_init__(self) -> None:
        check(self)
        if self.skippable is not None and not any(self.skippable):
            raise ValueError(f"skippable={self.skippable} lets no stage skip a block")

    @classmethod
    def comparisons(cls) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
        """The method beside both of its ends, trained alone; see `Method.comparisons`."""
        return {"adn": {"ADN": {}}}

    @classmethod
    def baselines(cls, model: str, model_args: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """The plain network of the base network's depth; see `Method.baselines`."""
        return {BASE_ALONE: base_arguments(model, model_args)}

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
        single: list[str] = []
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
                    detail["norms"] = len(norms.norms(block.module))
                    single += [f"{block.path}.{path}" for path in norms.unknown_norms(block.module)]
                sites.append(Site(block.path, detail))
            flag += 1
        _check_borrowed(model, sites)
        _check_tied(model, sites)
        notes = [f"{flag} flags: {2**flag} depths; train it so that all work (the base network is new)"]
        if single:
            kinds = {anatomy.type_name(model.get_submodule(path)) for path in single}
            notes.append(
                f"both depths share {len(single)} norms of a kind that cannot be switched, {single[0]} to "
                f"{single[-1]}: {', '.join(sorted(kinds))}"
            )
        return Survey(tuple(sites), tuple(passed_over), tuple(notes) if sites else ())

    def _stages(self, model: nn.Module) -> list[tuple[BlockInfo, ...]]:
        """The blocks of each stage; a transformer's runs of blocks are divided into groups."""
        result: list[tuple[BlockInfo, ...]] = []
        for stage in anatomy.stages(model):
            blocks = stage.blocks
            if not anatomy.is_transformer(blocks[0].module):
                result.append(blocks)
                continue
            groups = _most_groups(len(blocks)) if self.groups is None else self.groups
            if len(blocks) % groups:
                fit = [str(n) for n in range(1, len(blocks) + 1) if len(blocks) % n == 0]
                raise ValueError(
                    f"{len(blocks)} blocks of {stage.path} make no {groups} equal groups; take groups="
                    f"{' or '.join(fit)}, or leave groups out for what fits each run of blocks"
                )
            size = len(blocks) // groups
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
        switchable = norms.norms(module) if self.switchable_norms and not skippable else []
        shape = anatomy.shape_of(module)
        for path in switchable:
            norm = module.get_submodule(path)
            substitute(module, norm, SwitchableNorm(norm))
        return AdaptiveBlock(module, site.detail["flag"], skippable, shape)

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

    def take_plain(self, model: nn.Module, fill: Callable[[nn.Module], str]) -> bool:
        """Give both norms of a pair the weights of the one norm that there was.

        The whole network then gives what the plain one gave; see `Method.take_plain`.
        """
        # On the same tensors, under the names that they have without the method.
        if fill(subnet(model, (False,) * len(find_depth(model).skip), share=True)):
            return False
        for norm in model.modules():
            if isinstance(norm, SwitchableNorm):
                norm.base.load_state_dict(norm.full.state_dict())
        return True

    def networks(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """The two depths that are trained: the super-net and the base-net; see `Method.networks`."""
        flags = len(find_depth(model).skip)
        skips = ((False,) * flags, (True,) * flags)
        return {f"{depth_role(skip)}-net": subnet(model, skip) for skip in skips}


@dataclass(frozen=True, kw_only=True)
class Subnet(Method):
    """Cut one depth out of an adaptive network: what is left is plain.

    `pliant.subnet` cuts a network at hand; as a method this is for recipes (the paper's
    individual base network is ``AdaptiveDepth(), Subnet(skip=...)``) and for checkpoints.

    Args:
        skip: the depth, as of `pliant.set_depth`: ``"TTFF"``, or booleans; kept as booleans.

    Raises:
        ValueError: no flags. When applied: the network has no adaptive depth, or another
            number of flags.

    Example:
        >>> import timm
        >>> from pliant import convert
        >>> base = Subnet(skip="TTTT")
        >>> model = convert(timm.create_model("resnet50"), AdaptiveDepth(), base)
        >>> sum(p.numel() for p in model.parameters())
        17112360
    """

    wraps: ClassVar[bool] = True
    dissolves: ClassVar[str] = "AdaptiveDepth"

    skip: Skip

    def __init__(self, *, skip: SkipLike) -> None:
        object.__setattr__(self, "skip", check_skip(skip))

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
        for norm in list(plain.modules()):
            if isinstance(norm, SwitchableNorm):
                substitute(plain, norm, norm.base if skip else norm.full)
        return plain


def subnet(model: Network, skip: SkipLike, *, share: bool = False) -> Network:
    """Cut one depth out: a plain network, without what it does not use.

    Its outputs are those of `model` at that depth, bit by bit. It can be saved and loaded,
    exported without the weights of other depths, and converted by further methods.

    Args:
        model: a network converted by `AdaptiveDepth`; it stays as it is.
        skip: the depth, as of `pliant.set_depth`.
        share: build it on the tensors of `model` instead of copies, so that all depths
            served at once take the memory of one. Training one then trains the other. Move or
            cast `model` before, not one of them afterwards: that would part their buffers.

    Raises:
        ValueError: the network has no adaptive depth, or another number of flags.

    Example:
        >>> import timm, pliant
        >>> model = pliant.convert(timm.create_model("resnet50"), pliant.AdaptiveDepth())
        >>> sum(p.numel() for p in subnet(model, "TTTT").parameters())
        17112360
    """
    return cut_out(model, skip, share=share)[0]


def cut_out(
    model: Network, skip: SkipLike, *, share: bool = False
) -> tuple[Network, list[tuple[nn.Module, nn.Module]]]:
    """What `subnet` gives, and the modules in it, each with that of `model` which it is a copy of."""
    flags = check_skip(skip, len(find_depth(model).skip))
    memo: dict[int, Any] = {}
    if share:
        memo = {id(t): t for t in (*model.parameters(), *model.buffers())}
    cut = copied(model, memo)
    copies = [(memo[id(module)], module) for module in model.modules()]
    # Not by `convert`, which may copy weights, and lays them out in one memory format.
    for site in (method := Subnet(skip=flags)).survey(cut).sites:
        block = cut.get_submodule(site.path)
        substitute(cut, block, method.replace(block, site))
    record_conversion(cut, method, ())
    left = set(cut.modules())
    return cut, [pair for pair in copies if pair[0] in left]


def base_arguments(model: str, model_args: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments that give a plain network the depth of its adaptive form's base network.

    Trained by itself it is the paper's control ("individual", Table 1).

    Args:
        model: timm's name of a plain network.
        model_args: its arguments.

    Raises:
        ValueError: its blocks are not counted by an argument that is known here.

    Example:
        >>> base_arguments("resnet50", {"in_chans": 1})
        {'in_chans': 1, 'layers': [2, 2, 3, 2]}
    """
    with torch.device("meta"):
        plain = create(model, "meta", **model_args)
        network = convert(plain, AdaptiveDepth())
        cut = subnet(network, (True,) * len(find_depth(network).skip), share=True)
        left = [
            sum(not isinstance(cut.get_submodule(block.path), RemovedBlock) for block in stage.blocks)
            for stage in stages(plain)
        ]
        # By timm's names: of ResNet, of ConvNeXt, of vision transformers.
        for name, value in (("layers", left), ("depths", left), ("depth", left[0])):
            found = {**model_args, name: value}
            try:
                alone = create(model, "meta", **found)
            except (TypeError, AssertionError):  # RegNet's builder asserts
                continue
            if count_parameters(alone) == count_parameters(cut):
                return found
    raise ValueError(f"{model} has no argument that gives it the base network's {sum(left)} blocks")


def _check_borrowed(model: nn.Module, sites: Sequence[Site]) -> None:
    """Refuse to skip a block that computes what others, which are not skipped with it, use."""
    flags = {s.path: s.detail["flag"] if s.detail["part"] == "skippable" else None for s in sites}

    def within(path: str) -> str:
        """The block that a module lies in."""
        return next((block for block in flags if f"{path}.".startswith(f"{block}.")), path)

    for name, source, user in borrowed(model):
        block, other = within(source), within(user)
        if flags.get(block) not in (None, flags.get(other)):
            raise ValueError(
                f"{block} cannot be skipped: its {name} is that of {other} too; name other blocks in "
                f"skippable, or let each block compute its own {name}"
            )


def _check_tied(model: nn.Module, sites: Sequence[Site]) -> None:
    """Refuse norms that share a tensor with another layer: their second form would not."""
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values())
    for site in sites:
        block = model.get_submodule(site.path)
        for path in norms.norms(block) if site.detail.get("norms") else ():
            for name, p in block.get_submodule(path).named_parameters():
                if owners[id(p)] > 1:
                    raise ValueError(
                        f"{site.path}.{path}.{name} is another layer's tensor too, and that of the base "
                        f"network's norm would not be; set switchable_norms=False, or share them afterwards"
                    )


def _sizes(stages: Sequence[Sequence[object]]) -> str:
    return " ".join(str(len(stage)) for stage in stages) + " blocks"


def _most_groups(blocks: int) -> int:
    """The largest number of groups, up to the paper's 4, of two blocks or more each."""
    return next((n for n in (4, 3, 2) if blocks % n == 0 and blocks >= 2 * n), 1)
