"""Replace parts of a network by methods: `plan`, `convert`.

`plan` runs the whole surgery on a weightless copy, so that
every error comes before anything is touched; `convert` then acts, and records on the
network what was done, so that a checkpoint can do it again.

A module is known by its identity: what stands at several paths is replaced at all of them. Where
the network shares a layer or a tensor that a method would replace at one place only, or twice
over, the method is refused.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, TypeVar

import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from pliant import anatomy, outside
from pliant.counting import count_macs, count_parameters
from pliant.method import Method, PassedOver, Site, Survey
from pliant.parts import copied, substitute
from pliant.threaded import passes_along, take_over

Network = TypeVar("Network", bound=nn.Module)


@dataclass(frozen=True)
class Conversion:
    """What was done to a network, recorded on it.

    Attributes:
        method: the method, with its options.
        sites: paths that it replaced.
        named: it belongs to the network's registered name (``resnet50_mod``), which
            therefore rebuilds it without being told.
    """

    method: Method
    sites: tuple[str, ...]
    named: bool = False


def conversions(model: nn.Module) -> tuple[Conversion, ...]:
    """What `convert` did to this network, oldest first."""
    record: tuple[Conversion, ...] = getattr(model, "_pliant_conversions", ())
    return record


def methods_in(model: nn.Module) -> list[Method]:
    """Methods whose replacements stand in this network, or in a network inside it, oldest first.

    Example:
        >>> import timm, pliant
        >>> model = timm.create_model("resnet20_cifar_mod_adn")
        >>> [method.name for method in methods_in(nn.Sequential(model))]
        ['MixtureOfDepths', 'AdaptiveDepth']
    """
    found: list[tuple[Method, set[str]]] = []
    for prefix, module in model.named_modules():
        for done in conversions(module):
            sites = {f"{prefix}.{site}".removeprefix(".") for site in done.sites}
            twice = any(done.method == method and sites <= others for method, others in found)
            if sites and not twice:  # a network inside this one has a record of its own
                found.append((done.method, sites))
    return [method for method, _ in found]


def networks_in(model: nn.Module) -> dict[str, nn.Module]:
    """The networks that a network is trained to be, by name; empty for most (`Method.networks`).

    Example:
        >>> import timm, pliant
        >>> list(networks_in(timm.create_model("resnet20_cifar_adn")))
        ['super-net', 'base-net']
    """
    return {k: v for method in methods_in(model) for k, v in method.networks(model).items()}


@dataclass(frozen=True)
class Replacement:
    """One row of a plan: at `path`, `before` becomes `after`."""

    method: str
    path: str
    before: str
    after: str
    detail: str


@dataclass(frozen=True)
class Plan:
    """What `convert` would do. Printing it gives the coverage report.

    Attributes:
        replacements: what is replaced.
        passed_over: ``(method, block, reason)`` of what is not.
        notes: what a method wants the user to know.
        parameters: number before and after.
        macs: multiply-accumulates of one image before and after, by `pliant.counting.count_macs`;
            None where they cannot be counted.
        input_size: channels, height and width that `macs` is for.
        uncounted: why they cannot be counted.
    """

    replacements: tuple[Replacement, ...]
    passed_over: tuple[tuple[str, PassedOver], ...]
    notes: tuple[str, ...]
    parameters: tuple[int, int]
    macs: tuple[int, int] | None
    input_size: tuple[int, int, int] | None
    uncounted: str = ""

    def __str__(self) -> str:
        lines = []
        for r in self.replacements:
            lines.append(f"{r.path}: {r.before} -> {r.after} ({r.detail})")
        if self.passed_over:
            lines.append("passed over:")
            lines += [f"  {p.path}: {p.reason}" for _, p in self.passed_over]
        before, after = self.parameters
        lines.append(f"parameters: {before:,} -> {after:,} ({after / max(before, 1):.1%})")
        if self.macs is not None and self.input_size is not None:
            before, after = self.macs
            size = "x".join(str(n) for n in self.input_size)
            lines.append(f"MACs at {size}: {before:,} -> {after:,} ({after / max(before, 1):.1%})")
        else:
            lines.append(f"MACs: not counted ({self.uncounted})")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def plan(
    model: nn.Module,
    *methods: Method,
    input_size: tuple[int, int, int] | None = None,
) -> Plan:
    """What converting `model` by `methods` would do, without doing it.

    None of the hooks on `model` runs.

    Args:
        model: a network whose stages `anatomy.stages` can read. Left as it is.
        methods: applied in this order.
        input_size: channels, height and width to count multiply-accumulates for;
            by default what the network says of itself.

    Raises:
        ValueError: no method given; a method that matches nothing; methods whose
            sites overlap in an order that would be wrong; a layer or tensor that the network
            shares and a method would not; an option that does not fit.

    Example:
        >>> import timm, pliant
        >>> print(plan(timm.create_model("resnet18"), pliant.MixtureOfDepths()).parameters)
        (11689512, 5463902)
    """
    _check_methods(methods)
    bare = skeleton(model)
    size = input_size or outside.input_size(model)
    parameters = count_parameters(bare)
    before, uncounted = _count(bare, size)
    replacements: list[Replacement] = []
    passed_over: list[tuple[str, PassedOver]] = []
    notes: list[str] = []
    for method in methods:
        survey, old = carry_out(bare, method)
        for site, kind in zip(survey.sites, old, strict=True):
            new = type(bare.get_submodule(site.path)).__name__
            detail = ", ".join(f"{k}={v}" for k, v in site.detail.items())
            replacements.append(Replacement(method.name, site.path, kind, new, detail))
        passed_over += [(method.name, p) for p in survey.passed_over]
        notes += survey.notes
    after, failed = (None, "") if before is None else _count(bare, size)
    if failed:
        uncounted = f"once converted, {failed}"
    return Plan(
        replacements=tuple(replacements),
        passed_over=tuple(passed_over),
        notes=tuple(notes),
        parameters=(parameters, count_parameters(bare)),
        macs=None if before is None or after is None else (before, after),
        input_size=size,
        uncounted=uncounted,
    )


def _count(network: nn.Module, size: tuple[int, int, int] | None) -> tuple[int | None, str]:
    """Multiply-accumulates, or None and why they cannot be counted."""
    if size is None:
        return None, "the network does not say its input size"
    try:
        return count_macs(network, size), ""
    except Exception as error:  # whatever somebody's forward raises
        why = (str(error).strip().splitlines() or [""])[0]
        shape = "x".join(str(n) for n in size)
        return None, f"it fails on the meta device, on an image of {shape}: {type(error).__name__}: {why}"


def convert(model: Network, *methods: Method, inplace: bool = False) -> Network:
    """Replace parts of a network by methods.

    Args:
        model: a timm network, or any whose stages `anatomy.stages` can read.
        methods: applied in this order, for example ``MixtureOfDepths(c=64)``.
        inplace: change `model` itself rather than a copy.

    Returns:
        The converted network, in the mode (training or evaluation), on the device, in
        the dtype and in the memory format of `model`. New parts have fresh weights,
        and learn also where `model` is frozen.

    Raises:
        ValueError: as `plan`; `model` is then untouched, also with ``inplace``.

    Example:
        >>> import timm, pliant
        >>> network = convert(timm.create_model("resnet50"), pliant.MixtureOfDepths(c=64))
        >>> sum(p.numel() for p in network.parameters())
        18105949
    """
    _check_methods(methods)
    rehearsal = skeleton(model)
    for method in methods:
        carry_out(rehearsal, method)
    network = model if inplace else copied(model)
    for method in methods:
        carry_out(network, method)
    return network


def mark_named(model: nn.Module) -> None:
    """Say that all conversions so far belong to the network's registered name."""
    _record(model, tuple(replace(c, named=True) for c in conversions(model)))


def inherit_conversions(model: nn.Module, source: nn.Module) -> None:
    """Record on `model`, which took submodules of `source` over, what was done to these."""
    here = {path for path, _ in model.named_modules()}

    def now(path: str) -> str:
        flat = path.replace(".", "_", 1)  # timm's name of a stage taken out of a Sequential
        return flat if flat in here else path

    kept = (replace(c, sites=tuple(now(s) for s in c.sites if now(s) in here)) for c in conversions(source))
    _record(model, tuple(c for c in kept if c.sites))


def record_conversion(model: nn.Module, method: Method, sites: Iterable[str]) -> None:
    """Record that `method` was carried out on `model`, at `sites`.

    A network inside `model` that holds some of them, such as one in `nn.DataParallel`, records its
    own: it may be taken out of `model` and saved.
    """
    sites = () if method.dissolves else tuple(sites)
    for network in model.modules():
        done = conversions(network)
        if any(c.method.name == method.dissolves for c in done):
            kept = tuple(replace(c, sites=()) if c.method.name == method.dissolves else c for c in done)
            _record(network, kept if network is model else (*kept, Conversion(method, ())))
    _record(model, (*conversions(model), Conversion(method, sites)))
    for network, inner in _networks_inside(model, sites):
        _record(network, (*conversions(network), Conversion(method, inner)))


def _networks_inside(model: nn.Module, sites: Iterable[str]) -> list[tuple[nn.Module, tuple[str, ...]]]:
    """The networks inside `model` that hold sites, with the paths of these in them."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    wrapped = unwrap_model(model)
    for site in sites:
        names = site.split(".")
        for n in range(1, len(names)):
            module = model.get_submodule(".".join(names[:n]))
            if module is wrapped or getattr(module, "pretrained_cfg", None):
                found.setdefault(id(module), (module, []))[1].append(".".join(names[n:]))
    return [(network, tuple(inner)) for network, inner in found.values()]


def _record(model: nn.Module, done: tuple[Conversion, ...]) -> None:
    # Its attributes are typed as tensors and modules; this one is a note.
    model._pliant_conversions = done  # type: ignore[assignment]


def _check_methods(methods: tuple[object, ...]) -> None:
    if not methods:
        raise ValueError("no method given; pass one, for example MixtureOfDepths()")
    for method in methods:
        if not isinstance(method, Method):
            name = method.__name__ if isinstance(method, type) else "MixtureOfDepths"
            raise ValueError(f"{method!r} is no method; pass an instance, for example {name}()")


def carry_out(model: nn.Module, method: Method) -> tuple[Survey, list[str]]:
    """Carry out one method on `model` itself; all of its sites, or none.

    Returns:
        The survey, every block of the network named in it; the types that stood at its sites.
    """
    for earlier in conversions(model):
        if earlier.sites and earlier.method.wraps and not method.wraps:
            raise ValueError(
                f"{method.name} goes inside the blocks of {earlier.method.name}, which was applied before "
                f"it; apply {method.name} first, then {earlier.method.name}"
            )
    survey = method.survey(model)
    passed_over = survey.passed_over
    if not method.dissolves:
        passed_over += tuple(_unknown_blocks(model, survey))
    if not survey.sites:
        raise ValueError(_no_match(model, method, passed_over))
    _refuse_overlaps(model, method, survey.sites)
    if any(not site.path for site in survey.sites):
        raise ValueError(
            f"{method.name} would replace the whole network, a {type(model).__name__}; put it into a "
            f"container, for example nn.Sequential(network)"
        )
    channels_last = outside.is_channels_last(model)
    shared = _shared(model)
    old = [model.get_submodule(site.path) for site in survey.sites]
    site_of = {id(module): block for block in old for module in block.modules()}
    hooked = [
        (f"{site.path}.{path}".removesuffix("."), module)
        for site, block in zip(survey.sites, old, strict=True)
        for path, module in block.named_modules()
        if _has_hooks(module)
    ]
    new = [method.replace(module, site) for module, site in zip(old, survey.sites, strict=True)]
    for before, module in zip(old, new, strict=True):
        if channels_last:
            module = module.to(memory_format=torch.channels_last)
        modes = [(kept, kept.training) for kept in before.modules()]
        substitute(model, before, module.train(before.training))
        take_over(module, before)
        for kept, training in modes:  # a frozen norm in a block that trains, say
            kept.training = training
    method.finish(model, survey.sites)
    if not method.dissolves:  # what that leaves stays shared
        _refuse_parting(model, method, shared, site_of)
    record_conversion(model, method, [site.path for site in survey.sites])
    left = {id(module) for module in model.modules()}
    gone = [path for path, module in hooked if id(module) not in left]
    notes = survey.notes
    if gone:
        notes += (f"hooks go with what is replaced, those of {', '.join(gone)}; register them anew",)
    return replace(survey, passed_over=passed_over, notes=notes), [type(m).__name__ for m in old]


def _unknown_blocks(model: nn.Module, survey: Survey) -> Iterator[PassedOver]:
    """The unknown blocks of a network that a survey does not name."""
    named = [site.path for site in survey.sites] + [left.path for left in survey.passed_over]
    for block in anatomy.blocks(model):
        if isinstance(block, anatomy.UnknownBlock) and not any(
            f"{block.path}.".startswith(f"{n}.") or n.startswith(f"{block.path}.") for n in named
        ):
            yield PassedOver(block.path, block.reason)


def _no_match(model: nn.Module, method: Method, passed_over: Sequence[PassedOver]) -> str:
    """The error of a method without a site, with all reasons; those of many blocks on one line."""
    lines = []
    for reason, places in groupby(passed_over, key=lambda place: place.reason):
        paths = [place.path for place in places]
        if len(paths) > 4:
            paths = [f"{paths[0]} to {paths[-1]} ({len(paths)} places)"]
        lines += [f"\n  {path}: {reason}" for path in paths]
    known = f"(known: timm's {', '.join(anatomy.block_families())})"
    if not lines:
        lines = [f" no block of a known family {known}"]
    elif any(isinstance(block, anatomy.UnknownBlock) for block in anatomy.blocks(model)):
        lines.append(f"\n{known}")
    return f"{method.name} matches nothing in {type(model).__name__}:{''.join(lines)}"


# Where PyTorch keeps the hooks of a module that run in its forward and backward.
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _has_hooks(module: nn.Module) -> bool:
    """Whether a module has hooks of the user's."""
    return any(not passes_along(hook) for kind in _HOOKS for hook in getattr(module, kind).values())


def _idle_hook(*_: Any) -> None:
    """What stands for a user's hook in a copy without weights."""


@dataclass(frozen=True)
class _Places:
    """A layer or a tensor that a network has at several places.

    Attributes:
        what: the module or parameter itself.
        owners: at each place, the module that directly holds it.
        names: the name under which it does.
        paths: from the network's root.
    """

    what: nn.Module | Tensor
    owners: list[nn.Module]
    names: list[str]
    paths: list[str]


def _shared(model: nn.Module) -> list[_Places]:
    """What stands at several places of a network: modules, and the parameters of several modules."""
    found: dict[int, _Places] = {}
    for path, owner in model.named_modules():
        for name, what in (*owner._modules.items(), *owner._parameters.items()):
            if what is not None:
                places = found.setdefault(id(what), _Places(what, [], [], []))
                places.owners.append(owner)
                places.names.append(name)
                places.paths.append(f"{path}.{name}".removeprefix("."))
    return [places for places in found.values() if len(places.paths) > 1]


def _refuse_parting(
    model: nn.Module, method: Method, shared: Iterable[_Places], site_of: Mapping[int, nn.Module]
) -> None:
    """Refuse a conversion after which `shared` things are no longer one at all of their places.

    Args:
        model: the converted network.
        method: that converted it.
        shared: what stood at several places before.
        site_of: what stood at a site, for each module in it, by the module's `id`.
    """
    left = {id(module) for module in model.modules()}
    for places in shared:
        kept = [place for place in zip(places.owners, places.names, strict=True) if id(place[0]) in left]
        gone = [site_of.get(id(owner), model) for owner in places.owners if id(owner) not in left]
        # What one block shares within itself may go with it.
        whole = not kept and len({id(site) for site in gone}) == 1 and id(gone[0]) not in left
        learns = isinstance(places.what, Tensor) or any(True for _ in places.what.parameters())
        now = {id(getattr(owner, name, None)) for owner, name in kept}
        if len(now) > 1 or (learns and gone and not whole):
            kind = "tensor" if isinstance(places.what, Tensor) else type(places.what).__name__
            raise ValueError(
                f"{' and '.join(places.paths)} are one {kind} in {type(model).__name__}, and {method.name} "
                f"would part them; leave out the blocks that share it, or convert first and share later"
            )


def _refuse_overlaps(model: nn.Module, method: Method, sites: Iterable[Site]) -> None:
    paths = [site.path for site in sites]
    inside = {path: {id(m) for m in model.get_submodule(path).modules()} for path in paths}
    for path in paths:
        here = id(model.get_submodule(path))
        if paths.count(path) > 1 or any(here in ids for other, ids in inside.items() if other != path):
            raise ValueError(f"{method.name} names the site {path} twice, or one inside another")
    # A network inside this one (a backbone) keeps its own record.
    earlier_sites = [
        (earlier, f"{prefix}.{path}".removeprefix("."), module.get_submodule(path))
        for prefix, module in model.named_modules()
        for earlier in conversions(module)
        for path in earlier.sites
    ]
    for earlier, there, old in earlier_sites:
        within = {id(module) for module in old.modules()}
        for path in paths:
            around = id(old) in inside[path]
            if (id(model.get_submodule(path)) in within or around) and not (
                around and method.wraps and method.name != earlier.method.name
            ):
                raise ValueError(
                    f"{method.name} at {path} overlaps {earlier.method.name} at {there}, "
                    f"which was applied before it and would be undone or broken; apply "
                    f"{method.name} first, or to other stages"
                )


def skeleton(model: Network) -> Network:
    """A copy of `model` without weights (on the meta device): cheap to operate on and to count.

    The user's hooks are kept as marks that do nothing, so that a survey sees where they are.

    Example:
        >>> skeleton(nn.Linear(2, 2)).weight.is_meta
        True
    """
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    for module in model.modules():
        for kind in _HOOKS:
            hooks = getattr(module, kind)
            memo[id(hooks)] = OrderedDict(
                (key, hook if passes_along(hook) else _idle_hook) for key, hook in hooks.items()
            )
        for value in vars(module).values():
            if isinstance(value, Tensor) and value.dim():  # computed by a hook, say
                memo[id(value)] = torch.empty_like(value, device="meta").detach()
    return copy.deepcopy(model, memo)
