"""CondConv: each example gets its own kernels, mixed from experts.

Yang, Bender, Le, Ngiam, *Soft Conditional Computation* (*CondConv*), arXiv 1904.04971.
A router looks at the input of a block and says how much of each expert's kernels this
example gets; the block then runs as ever. Capacity grows with the experts, the cost by
about one multiply-add for each further parameter.

Shapes in this file::

    B  batch        x        [B, C, H, W]  feature map
    E  experts      routing  [B, E], or [B, E, O] for all output channels of a block
    O  channels out
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import timm.layers
import torch
from timm.layers import Conv2dSame
from timm.models._efficientnet_blocks import CondConvResidual
from torch import Tensor, nn

from pliant import anatomy, outside
from pliant._options import Count, NotNegative, Positive, check
from pliant.anatomy import (
    Block,
    BlockInfo,
    Convolution,
    UnknownBlock,
    convolutions,
)
from pliant.method import Method, PassedOver, RecipeForms, Site, Survey
from pliant.methods.condconv.block import CondConvBlock
from pliant.methods.condconv.layers import (
    Activation,
    CondConv2d,
    CondLinear,
    Router,
    SharedRouting,
    check_experts,
)
from pliant.methods.condconv.mixing import ROUTING, Form
from pliant.methods.condconv.recipes import ABLATIONS, CONTROLS, condconv, regularized
from pliant.parts import substitute
from pliant.threaded import pass_along, passes_along

Routing = Literal["block", "layer", "single", "shared", "hierarchical"]
Layers = Literal["all", "pointwise", "depthwise"]
THREADED = ("single", "shared", "hierarchical")


@dataclass(frozen=True, kw_only=True)
class CondConv(Method):
    """Replace convolutions, and the classifier, by mixtures of experts.

    The network's *units* are numbered as in the paper: the stem is 1, then come the
    blocks, a convolution behind them if there is one, and last the classifier.

    Args:
        experts: E, from 1 to 64 (Tables 1 to 3).
        begin: number of the first unit that is replaced; all after it are too (Table 7).
            None: the first block of the two lowest resolutions, where the paper begins in
            both MobileNets (7 of 15 in MobileNetV1).
        features: replace convolutions. Off: the classifier alone (Table 8).
        classifier: replace the classifier too (Table 8); dropout on its input goes with it.
            timm's ``reset_classifier`` then gives a plain layer, to be saved with
            ``arguments={"classifier": False}``.
        layers: ``"all"`` convolutions of a block, or its ``"pointwise"`` or ``"depthwise"``
            ones alone (Table 5). Those of squeeze-and-excitation are never replaced.
        routing: who computes routings (Table 6). ``"block"``: each block, for all of its
            convolutions, and each other unit; ``"layer"``: each convolution; ``"single"``:
            the first unit, for all; ``"shared"``: every second unit, for the next one
            too; ``"hierarchical"``: each unit, from its input and the routing before.
        activation: ``"sigmoid"``, or ``"softmax"``, where experts compete (Table 6).
        hidden: a hidden layer of the router with ``hidden * C`` units and ReLU: 1/8, 1 and 8
            are the paper's small, medium and large (Table 6). None: no hidden layer.
        per_channel: a weight for each output channel of each expert (section 4.3.1), with
            ``hidden=0.5`` unless told. Not with a routing that several units share.
        active: hard routing to so many experts of each example (section 3). None: all.
        form: how a mixture is computed, as for `CondConv2d`; changes speed alone.
        upcycle: the converted network computes what the given one does. With softmax the
            experts start as copies of its layers under a random router; with sigmoid as
            scaled copies under a constant one, told apart by `noise`. Off: experts and
            router start at random, for training from the beginning; biases are the network's.
        noise: standard deviation of that noise, as a share of the copies'. It sums to
            zero over the experts.

    Raises:
        ValueError: an option is out of its range or contradicts another. When applied:
            the network has no unit `begin`.

    Example:
        >>> import timm, torch
        >>> from pliant import convert
        >>> plain = timm.create_model("resnet18").eval()
        >>> network = convert(plain, CondConv(experts=2, begin=8))
        >>> x = torch.randn(1, 3, 64, 64)
        >>> bool((network(x) - plain(x)).abs().max() < 1e-4)
        True
    """

    suffix: ClassVar[str] = "cc"
    # Named networks are trained from the beginning.
    named: ClassVar[Mapping[str, Any]] = {"upcycle": False}
    # Experts start as copies of the trained layers.
    start: ClassVar[Mapping[str, Any]] = {"upcycle": True}
    recipes: ClassVar[RecipeForms] = {
        "imagenet": {"condconv": condconv, "condconv-regularized": regularized}
    }
    paper: ClassVar[Mapping[str, str]] = {"imagenet": "condconv"}
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        name: {"model_args": options} for name, options in ABLATIONS.items()
    }

    experts: int = 8
    begin: Count | None = None
    features: bool = True
    classifier: bool = True
    layers: Layers = "all"
    routing: Routing = "block"
    activation: Activation = "sigmoid"
    hidden: Positive | None = None
    per_channel: bool = False
    active: int | None = None
    form: Form = "auto"
    upcycle: bool = True
    noise: NotNegative = 0.1

    def __post_init__(self) -> None:
        check_experts(self.experts, self.active)
        check(self)
        if not (self.features or self.classifier):
            raise ValueError("features=False with classifier=False leaves nothing to replace")
        if self.per_channel and self.routing in THREADED:
            raise ValueError(
                f"per_channel gives each unit weights of its own width; routing={self.routing!r} shares "
                f"them between units: take routing='block' or 'layer'"
            )
        if self.upcycle and self.activation == "sigmoid" and self.experts > 1:
            if self.active not in (None, self.experts):
                raise ValueError(
                    f"with active={self.active}, upcycling needs activation='softmax': under a constant "
                    f"sigmoid the same experts would be chosen for ever (or set upcycle=False)"
                )
            if self.noise == 0:
                raise ValueError("noise=0 leaves equal experts, which could never part; take noise=0.1")

    @classmethod
    def network_name(cls, plain: str) -> str:
        """The paper's names: ``cc_resnet50``, ``cc_mobilenetv1_025``; see `Method.network_name`."""
        # MobileNetV1's plain widths have a letter more, because timm took the name without.
        return f"cc_{plain.replace('mobilenetv1_w', 'mobilenetv1_')}"

    @classmethod
    def comparisons(cls) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
        """Capacity by the number of experts, and the ablations; see `Method.comparisons`."""
        return {"condconv": CONTROLS, "condconv-ablations": {"CondConv": {}, **ABLATIONS}}

    @classmethod
    def check_ablation(cls, data: str, network: str) -> Mapping[str, Any]:
        """32 experts on ImageNet, as in the tables; else the network's; see `Method.check_ablation`."""
        if data == "digits" or not network.startswith("cc_mobilenetv1_"):
            raise ValueError(
                f"the ablations are of cc_mobilenetv1_* networks, not of {network!r}, and of larger images "
                f"than digits"
            )
        return {"experts": 32} if data == "imagenet" else {}

    def survey(self, model: nn.Module) -> Survey:
        """Find the units to replace; see `Method.survey`."""
        blocks = anatomy.blocks(model)
        known = any(isinstance(block, BlockInfo) for block in blocks)
        stem, head = outside.stem_and_head(model) if known else ([], [])
        last = 1 + len(blocks) + len(head) + 1
        units = {conv.path for conv in (*stem, *head)}
        between = [(n, c) for n, c in outside.outside_blocks(model) if known and c.path not in units]
        begin = _lowest_resolutions(blocks, between) if self.begin is None else self.begin
        if begin > last:
            raise ValueError(
                f"begin={begin}, but the classifier of {type(model).__name__} is unit {last}, the last"
            )
        sites: list[Site] = []
        passed_over: list[PassedOver] = []
        seen: set[int] = set()

        def unit(number: int, path: str, kind: str, layers: list[Convolution], odd: str = "") -> None:
            if not self.features:
                odd = "features=False"
            elif number < begin:
                odd = f"unit {number}; begin={begin}"
            wanted, unwanted = self._divided(layers)
            if not (odd or wanted):
                none = "no convolution" if self.layers == "all" else f"no {self.layers} convolution"
                odd = next((f"{c.path} {reason}" for c, reason in unwanted), none)
            if odd:
                passed_over.append(PassedOver(path, odd))
                return
            detail = {"unit": number, "kind": kind, "experts": self.experts}
            if kind == "block":
                passed_over.extend(PassedOver(f"{path}.{c.path}", reason) for c, reason in unwanted)
                if self.routing == "layer":
                    detail["kind"] = "convolution"
                    new = [c for c in wanted if id(c.module) not in seen]  # two blocks may share one
                    seen.update(id(c.module) for c in new)
                    sites.extend(Site(f"{path}.{c.path}", detail) for c in new)
                    return
                detail["convolutions"] = len(wanted)
            sites.append(Site(path, detail))

        for conv in stem:
            odd = "" if len(stem) == 1 else f"one of {len(stem)} convolutions of the stem"
            unit(1, conv.path, "convolution", [conv], odd)
        for number, block in enumerate(blocks, 2):
            if isinstance(block, UnknownBlock):
                passed_over.append(PassedOver(block.path, block.reason))
            else:
                unit(number, block.path, "block", convolutions(block.module), _odd(block.module))
        for n, conv in between:
            where = "between the blocks" if 0 < n < len(blocks) else "beside blocks of no known family"
            passed_over.append(PassedOver(conv.path, f"{where}, in no unit"))
        for number, conv in enumerate(head, 2 + len(blocks)):
            unit(number, conv.path, "convolution", [conv])
        path = outside.classifier(model)
        of_blocks = range(2, 2 + len(blocks))
        behind = self.begin is not None and self.begin >= of_blocks.stop
        if self.features and not behind and not any(s.detail["unit"] in of_blocks for s in sites):
            if self.classifier and path is not None:
                ask = f"for the classifier alone, set features=False or begin={last}"
                passed_over.append(PassedOver(path, f"no block is converted; {ask}"))
            return Survey((), tuple(passed_over))
        if path is None:
            if self.classifier and (known or not self.features):
                passed_over.append(PassedOver("(classifier)", "no linear classifier found"))
        elif odd := _unmixable(model.get_submodule(path)) if self.classifier else "classifier=False":
            passed_over.append(PassedOver(path, odd))
        else:
            sites.append(Site(path, {"unit": last, "kind": "classifier", "experts": self.experts}))
        if self.routing in THREADED:
            self._check_places(model, sites)
        note = "experts and routers start at random; biases and norms are the network's"
        if self.upcycle:
            note = "starts as the given network: experts are copies of its layers (upcycle=False: afresh)"
        return Survey(tuple(self._with_sources(sites)), tuple(passed_over), (note,))

    def _check_places(self, model: nn.Module, sites: list[Site]) -> None:
        """Refuse units that run at several places: each has one source of its routing."""
        everywhere = list(model.named_modules(remove_duplicate=False))
        for site in sites:
            module = model.get_submodule(site.path)
            if others := [path for path, m in everywhere if m is module and path != site.path]:
                raise ValueError(
                    f"{site.path} stands at {', '.join(others)} too, and routing={self.routing!r} gives a "
                    f"unit one source of its routing; take routing='block' or 'layer', or begin later"
                )

    def _divided(
        self, layers: list[Convolution]
    ) -> tuple[list[Convolution], list[tuple[Convolution, str]]]:
        """Layers of the kind asked for: those that can be mixed, and the others, with the reason."""
        reasons = [
            (c, f"lies in a {c.inside}" if c.inside else _unmixable(c.module))
            for c in layers
            if self.layers in ("all", c.kind)
        ]
        return [c for c, why in reasons if not why], [(c, why) for c, why in reasons if why]

    def _with_sources(self, sites: list[Site]) -> list[Site]:
        """Say of each site where its routing comes from, and whether the next one gets it."""
        sources = ["own"] * len(sites)
        for n in range(1, len(sites)):
            if self.routing == "hierarchical":
                sources[n] = "own, with the one before"
            elif self.routing == "single" or (self.routing == "shared" and n % 2):
                sources[n] = "the one before"
        result = []
        for n, site in enumerate(sites):
            passes_on = {} if sources[n + 1 : n + 2] in ([], ["own"]) else {"passes_on": True}
            result.append(Site(site.path, {**site.detail, "routing": sources[n], **passes_on}))
        return result

    def replace(self, module: nn.Module, site: Site) -> nn.Module:
        """Build what stands at one site; see `Method.replace`."""
        like = next(module.parameters())
        with torch.device(like.device):
            if site.detail["kind"] == "block":
                return self._block(module, site)
            assert isinstance(module, (nn.Conv2d, nn.Linear))
            router = self._router(*_channels(module), site)
            # Keeps logits as large as one layer's: m weights of a half, or of 1/m under softmax.
            m = self.active or self.experts
            scale = m**0.5 if self.activation == "softmax" else 2 / m**0.5
            new = self._layer(module, router, scale if site.detail["kind"] == "classifier" else 1.0)
            new.passes_on = "passes_on" in site.detail
            return new.to(like.dtype)

    def finish(self, model: nn.Module, sites: tuple[Site, ...]) -> None:
        """See to what lies between the units; see `Method.finish`."""
        paths = [site.path for site in sites]
        if self.routing in THREADED:
            pass_along(_outside(model, paths), ROUTING)
        for site in sites:
            if site.detail["kind"] == "classifier":
                new = model.get_submodule(site.path)
                assert isinstance(new, CondLinear)
                new.drop = outside.take_dropout(model, site.path)

    def why_fresh(self) -> str:
        """Experts that start at random take nothing over; see `Method.why_fresh`."""
        if self.upcycle:
            return ""
        return "this one's experts start at random; let them start as its copies: model_args.upcycle=true"

    def _block(self, block: nn.Module, site: Site) -> CondConvBlock:
        layers, _ = self._divided(convolutions(block))
        channels, out_channels, stride = anatomy.shape_of(block)
        widths = [_channels(layer.module)[1] for layer in layers]
        router = self._router(channels, sum(widths), site).to(layers[0].module.weight.dtype)
        for layer in layers:
            new = self._layer(layer.module, None).train(block.training)
            substitute(block, layer.module, new)
        return CondConvBlock(
            block,
            router,
            {layer.path: width for layer, width in zip(layers, widths, strict=True)},
            (channels, out_channels, stride),
            passes_on="passes_on" in site.detail,
        )

    def _router(self, channels: int, out: int, site: Site) -> nn.Module:
        if site.detail["routing"] == "the one before":
            return SharedRouting()
        hidden = 0.5 if self.hidden is None and self.per_channel else self.hidden
        router = Router(
            channels,
            self.experts,
            hidden=None if hidden is None else max(1, int(channels * hidden)),
            activation=self.activation,
            outputs=out if self.per_channel else None,
            active=self.active,
            previous=site.detail["routing"] == "own, with the one before",
        )
        if self.upcycle and self.activation == "sigmoid":
            router.start_constant()
        return router

    def _layer(
        self, layer: nn.Conv2d | nn.Linear, router: nn.Module | None, scale: float = 1.0
    ) -> CondConv2d | CondLinear:
        """The conditional form of a layer; `scale` is for experts that start at random."""
        channels, out = _channels(layer)
        options: dict[str, Any] = {"experts": self.experts, "router": router, "form": self.form}
        options["bias"] = None if layer.bias is None else "shared"
        options["active"] = self.active
        new: CondConv2d | CondLinear
        if isinstance(layer, nn.Linear):
            new = CondLinear(channels, out, **options)
        else:
            for name in ("kernel_size", "stride", "dilation", "groups"):
                options[name] = getattr(layer, name)
            options["padding"] = "same" if isinstance(layer, Conv2dSame) else layer.padding
            new = CondConv2d(channels, out, **options)
        new.to(layer.weight.dtype)
        with torch.no_grad():
            new.weight.copy_(self._start(layer.weight.flatten(1), scale))
            if new.bias is not None and layer.bias is not None:
                new.bias.copy_(layer.bias)
        return new

    def _start(self, weight: Tensor, scale: float) -> Tensor:
        """Experts [E, ...] from a layer's weight, as `upcycle` says."""
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        copies = weight.expand(self.experts, *weight.shape)
        size = weight.std(correction=0)
        # Of a layer that starts at zero or at one value, PyTorch's start: its copies could never part.
        size = torch.where(weight.amax() > weight.amin(), size, (3 * weight.shape[1]) ** -0.5)
        if not self.upcycle:
            return torch.randn_like(copies) * (scale * size)
        if self.activation == "softmax":
            return copies
        copies = copies / (0.5 * self.experts)
        noise = torch.randn_like(copies) * (self.noise * size / (0.5 * self.experts))
        return copies + noise - noise.mean(0)


def _odd(block: nn.Module) -> str:
    """Why a block is not converted, though it may hold convolutions; or empty."""
    if isinstance(block, Block):
        return f"already another method's {type(block).__name__}"
    if isinstance(block, CondConvResidual):  # of timm's own CondConv networks
        return f"{anatomy.type_name(block)} mixes its kernels for each example already"
    return ""


def _lowest_resolutions(
    blocks: list[BlockInfo | UnknownBlock], between: list[tuple[int, Convolution]]
) -> int:
    """Number of the first unit of the two lowest resolutions."""
    before = {n for n, conv in between if _stride(conv.module) > 1}
    strided = [n for n, block in enumerate(blocks) if _strides(block) or n in before]
    return 2 if len(strided) < 2 else 2 + strided[-2]


def _strides(block: BlockInfo | UnknownBlock) -> bool:
    """Whether a block lowers the resolution; of an unknown one, whether a convolution in it does."""
    if isinstance(block, BlockInfo):
        return block.stride > 1
    keeps = getattr(block.module, "has_skip", False)  # attention may stride inside, as MobileNetV4's does
    return not keeps and any(_stride(layer) > 1 for layer in block.module.modules())


def _stride(layer: nn.Module) -> int:
    return max(layer.stride) if isinstance(layer, nn.Conv2d) else 1


def _unmixable(layer: nn.Module) -> str:
    """Why a layer is more than its weight and a convolution, with zeros around it; or empty."""
    plain = type(layer) in (nn.Linear, timm.layers.Linear)  # MobileNetV3's classifier is timm's
    if type(layer) in (nn.Conv2d, Conv2dSame):
        plain = layer.padding_mode == "zeros" and not isinstance(layer.padding, str)
    if not plain:
        return f"is a {type(layer).__name__} that cannot be mixed"
    hooks = (*layer._forward_hooks.values(), *layer._forward_pre_hooks.values())
    if not all(passes_along(hook) for hook in hooks):
        return "has forward hooks (pruning and spectral_norm have), which a mixture would lose"
    return ""


def _channels(layer: nn.Conv2d | nn.Linear) -> tuple[int, int]:
    if isinstance(layer, nn.Linear):
        return layer.in_features, layer.out_features
    return layer.in_channels, layer.out_channels


def _outside(model: nn.Module, sites: list[str]) -> list[nn.Module]:
    """All modules after the first site that lie in no block and no site."""
    units = [model.get_submodule(path) for path in sites]
    own = {id(unit) for unit in units}
    closed = (*units, *(block.module for block in anatomy.blocks(model)))
    inside = {id(module) for outer in closed for module in outer.modules() if module is not outer}
    skipped = own | inside
    found, begun = [], False
    for module in model.modules():
        begun = begun or id(module) in own
        if begun and id(module) not in skipped:
            found.append(module)
    return found
