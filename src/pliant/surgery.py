"""Replace parts of a network by methods: `plan`, `convert`.

`plan` runs the whole surgery on a weightless copy, so that
every error comes before anything is touched; `convert` then acts, and records on the
network what was done, so that a checkpoint can do it again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from pliant import anatomy
from pliant.counting import count_macs, count_parameters
from pliant.method import Method, PassedOver, Site, Survey
from pliant.threaded import take_over

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
    return [done.method for module in model.modules() for done in conversions(module) if done.sites]


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
            None where the network does not say its input size.
        input_size: channels, height and width that `macs` is for.
    """

    replacements: tuple[Replacement, ...]
    passed_over: tuple[tuple[str, PassedOver], ...]
    notes: tuple[str, ...]
    parameters: tuple[int, int]
    macs: tuple[int, int] | None
    input_size: tuple[int, int, int] | None

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
            lines.append("MACs: not counted (the network does not say its input size)")
        return "\n".join(lines + [f"note: {note}" for note in self.notes])


def plan(
    model: nn.Module,
    *methods: Method,
    input_size: tuple[int, int, int] | None = None,
) -> Plan:
    """What converting `model` by `methods` would do, without doing it.

    Args:
        model: a network whose stages `anatomy.stages` can read. Left as it is.
        methods: applied in this order.
        input_size: channels, height and width to count multiply-accumulates for;
            by default what the network says of itself.

    Raises:
        ValueError: no method given; a method that matches nothing; methods whose
            sites overlap in an order that would be wrong; an option that does not fit.

    Example:
        >>> import timm, pliant
        >>> print(plan(timm.create_model("resnet18"), pliant.MixtureOfDepths()).parameters)
        (11689512, 5463902)
    """
    _check_methods(methods)
    bare = skeleton(model)
    size = input_size or anatomy.input_size(model)
    parameters = count_parameters(bare)
    macs = count_macs(bare, size) if size else 0
    replacements: list[Replacement] = []
    passed_over: list[tuple[str, PassedOver]] = []
    notes: list[str] = []
    for method in methods:
        old = {path: _type_name(m) for path, m in bare.named_modules()}
        survey = _apply(bare, method)
        for site in survey.sites:
            new = _type_name(bare.get_submodule(site.path))
            detail = ", ".join(f"{k}={v}" for k, v in site.detail.items())
            replacements.append(Replacement(method.name, site.path, old[site.path], new, detail))
        passed_over += [(method.name, p) for p in survey.passed_over]
        notes += survey.notes
    return Plan(
        replacements=tuple(replacements),
        passed_over=tuple(passed_over),
        notes=tuple(notes),
        parameters=(parameters, count_parameters(bare)),
        macs=(macs, count_macs(bare, size)) if size else None,
        input_size=size,
    )


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
        _apply(rehearsal, method)
    network = model if inplace else copy.deepcopy(model)
    for method in methods:
        _apply(network, method)
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
    """Record that `method` was carried out on `model`, at `sites`."""
    if method.dissolves:
        sites = ()
        for network in model.modules():
            if conversions(network):
                gone = (c.method.name == method.dissolves for c in conversions(network))
                done = zip(conversions(network), gone, strict=True)
                _record(network, tuple(replace(c, sites=()) if g else c for c, g in done))
    _record(model, (*conversions(model), Conversion(method, tuple(sites))))


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


def _apply(model: nn.Module, method: Method) -> Survey:
    """Carry out one method on `model` itself; all of its sites, or none."""
    for earlier in conversions(model):
        if earlier.sites and earlier.method.wraps and not method.wraps:
            raise ValueError(
                f"{method.name} goes inside the blocks of {earlier.method.name}, which was applied before "
                f"it; apply {method.name} first, then {earlier.method.name}"
            )
    survey = method.survey(model)
    if not survey.sites:
        reasons = "".join(f"\n  {p.path}: {p.reason}" for p in survey.passed_over)
        known = ", ".join(anatomy.block_families())
        why = reasons or f" no block of a known family (known: {known})"
        raise ValueError(f"{method.name} matches nothing in {type(model).__name__}:{why}")
    _refuse_overlaps(model, method, survey.sites)
    if any(not site.path for site in survey.sites):
        raise ValueError(
            f"{method.name} would replace the whole network, a {type(model).__name__}; put it into a "
            f"container, for example nn.Sequential(network)"
        )
    channels_last = anatomy.is_channels_last(model)
    new = [method.replace(model.get_submodule(s.path), s) for s in survey.sites]
    for site, module in zip(survey.sites, new, strict=True):
        old = model.get_submodule(site.path)
        if channels_last:
            module = module.to(memory_format=torch.channels_last)
        modes = [(kept, kept.training) for kept in old.modules()]
        model.set_submodule(site.path, module.train(old.training))
        take_over(module, old)
        for kept, training in modes:  # a frozen norm in a block that trains, say
            kept.training = training
    method.finish(model, survey.sites)
    record_conversion(model, method, [site.path for site in survey.sites])
    return survey


def _refuse_overlaps(model: nn.Module, method: Method, sites: Iterable[Site]) -> None:
    paths = [site.path for site in sites]
    for path in paths:
        if paths.count(path) > 1 or any(path.startswith(f"{p}.") for p in paths):
            raise ValueError(f"{method.name} names the site {path} twice, or one inside another")
    # A network inside this one (a backbone) keeps its own record.
    earlier_sites = [
        (earlier, f"{prefix}.{path}" if prefix else path)
        for prefix, module in model.named_modules()
        for earlier in conversions(module)
        for path in earlier.sites
    ]
    for earlier, there in earlier_sites:
        for here in paths:
            inside = here == there or here.startswith(f"{there}.")
            around = here == there or there.startswith(f"{here}.")
            if (inside or around) and not (around and method.wraps and method.name != earlier.method.name):
                raise ValueError(
                    f"{method.name} at {here} overlaps {earlier.method.name} at {there}, "
                    f"which was applied before it and would be undone or broken; apply "
                    f"{method.name} first, or to other stages"
                )


def skeleton(model: Network) -> Network:
    """A copy of `model` without weights (on the meta device): cheap to operate on and to count.

    Example:
        >>> skeleton(nn.Linear(2, 2)).weight.is_meta
        True
    """
    memo: dict[int, Any] = {}
    for p in model.parameters():
        memo[id(p)] = nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
    for b in model.buffers():
        memo[id(b)] = torch.empty_like(b, device="meta")
    return copy.deepcopy(model, memo)


def _type_name(module: nn.Module) -> str:
    return type(module).__name__
