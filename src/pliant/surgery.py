"""Replace parts of a network: `Method`, `plan`, `convert`.

A method says which *sites* of a network it changes and what takes the place of one. A
site is one submodule: a single module (a block, a convolution) or the container of a
run of blocks (a stage). `plan` runs the whole surgery on a weightless copy, so that
every error comes before anything is touched; `convert` then acts, and records on the
network what was done, so that a checkpoint can do it again.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from pliant import anatomy
from pliant.counting import count_macs, count_parameters
from pliant.objectives import Objective
from pliant.threaded import take_over

Network = TypeVar("Network", bound=nn.Module)
Made = TypeVar("Made", bound="Method")
# Data set -> form -> a function from a network's name to settings of a recipe.
RecipeForms = Mapping[str, Mapping[str, Callable[[str], Mapping[str, Any]]]]


@dataclass(frozen=True)
class Site:
    """One place where a method acts.

    Attributes:
        path: dotted path of the submodule that is replaced. For a run of blocks it is
            their container, whose replacement keeps the blocks' names.
        detail: what the method found out about the site (``{"C": 256, "k": 4}``);
            handed back to it in `Method.replace`, and printed in the plan.
    """

    path: str
    detail: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PassedOver:
    """A block that a method could have changed and did not, with the reason."""

    path: str
    reason: str


@dataclass(frozen=True)
class Survey:
    """A method's answer to "which sites?"."""

    sites: tuple[Site, ...]
    passed_over: tuple[PassedOver, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Gone:
    """An option, or some values of one, that a method had in an earlier version.

    Attributes:
        name: name of the option.
        default: the option's former default.
        tag: git tag of the last commit that has it.
        values: the values that are gone, if the option itself stays.
    """

    name: str
    default: Any
    tag: str
    values: tuple[Any, ...] = ()


class Method(ABC):
    """A way to change a network: a frozen, keyword-only dataclass of hyper-parameters.

    Adding a method is one file or folder with a subclass and its layers, and one line in
    `pliant.methods` or an entry point of another package (CONTRIBUTING.md). Options are plain
    values (numbers, strings, tuples, None), so that a checkpoint can hold them as JSON.

    `survey` and `replace` are what a method has to have. Everything else answers a question
    that the rest of the library asks, and has a default.

    Attributes:
        suffix: ending of the names of its networks, ``"mod"`` for ``resnet50_mod``. Empty: the
            method has no named networks.
        wraps: the method keeps what stands at its sites, so replacements of earlier methods may
            lie there. Every other overlap is refused, because it would silently undo one of the two.
        dissolves: the method that this one takes out of the network again, leaving plain
            modules; neither is then in the way of others.
        objectives: objectives that the method brings, by the name that recipes use.
        objective: name of the objective that trains all of its network; empty: the loss of the
            plain network does.
        named: options of its named networks (which `create_model` can change).
        narrow: options of named networks whose first stage has 16 channels.
        start: options by which a conversion keeps what it can of a trained network.
        recipes: recipes of the method's paper, for every network: data set -> form -> a function
            from timm's name of the network to settings of `pliant.train.recipe.Recipe`.
        paper: which of them the form ``paper`` of its own networks is, by data set.
        ablations: ablations of the method's paper: name -> changes of a recipe; ``model_args`` adds
            to those of the recipe.
        gone: options of earlier versions, which checkpoints may still name.
    """

    suffix: ClassVar[str] = ""
    wraps: ClassVar[bool] = False
    dissolves: ClassVar[str] = ""
    objectives: ClassVar[Mapping[str, type[Objective]]] = {}
    objective: ClassVar[str] = ""
    named: ClassVar[Mapping[str, Any]] = {}
    narrow: ClassVar[Mapping[str, Any]] = {}
    start: ClassVar[Mapping[str, Any]] = {}
    recipes: ClassVar[RecipeForms] = {}
    paper: ClassVar[Mapping[str, str]] = {}
    ablations: ClassVar[Mapping[str, Mapping[str, Any]]] = {}
    gone: ClassVar[tuple[Gone, ...]] = ()

    def __new__(cls: type[Made], *_: Any, **options: Any) -> Made:
        """Refuse options that are gone by their name: a dataclass would call them unexpected."""
        cls.current_options(options)
        return super().__new__(cls)

    @property
    def name(self) -> str:
        """The method's name in messages and checkpoints: that of its class."""
        return type(self).__name__

    @classmethod
    def current_options(cls, options: Mapping[str, Any]) -> dict[str, Any]:
        """Return options of this or an earlier version without those of `gone` at their default.

        Raises:
            ValueError: an option that is gone has another value; the message names both and the tag.

        Example:
            >>> from pliant import MixtureOfDepths
            >>> MixtureOfDepths.current_options({"c": 4, "gate": "output"})
            {'c': 4}
        """
        current = dict(options)
        for old in cls.gone:
            if old.name not in current:
                continue
            value = current[old.name]
            if value in old.values or (not old.values and value != old.default):
                raise ValueError(
                    f"{cls.__name__} no longer has {old.name}={value!r}; leave it out, or use pliant at "
                    f"the git tag {old.tag}, which has it"
                )
            if not old.values:
                del current[old.name]
        return current

    @abstractmethod
    def survey(self, model: nn.Module) -> Survey:
        """Find the sites in `model`, which must be left as it is.

        Raises:
            ValueError: an option does not fit this network; the message names the
                block and the value.
        """

    @abstractmethod
    def replace(self, module: nn.Module, site: Site) -> nn.Module:
        """What takes the place of `module`, found at `site`.

        On the device and in the dtype of `module`, whose parts may be used again.
        """

    def finish(self, model: nn.Module, sites: tuple[Site, ...]) -> None:  # noqa: B027
        """What is left to do to the network as a whole, once all `sites` are replaced."""

    @classmethod
    def network_name(cls, plain: str) -> str:
        """Name of the converted form of a plain network.

        A method of another package keeps this form: its networks are registered before the package
        is imported.

        Args:
            plain: name of the plain network, as timm or recipes know it.

        Example:
            >>> import pliant
            >>> pliant.MixtureOfDepths.network_name("resnet20_cifar")
            'resnet20_cifar_mod'
        """
        return f"{plain}_{cls.suffix}"

    @classmethod
    def comparisons(cls) -> Mapping[str, Mapping[str, Mapping[str, Any]]]:
        """What `pliant.compare` trains beside the plain network.

        Returns:
            Name of the comparison (``--method`` of the command) -> label -> options of the method.
            By default one comparison, named after the suffix, of the method as it is.
        """
        return {cls.suffix: {cls.__name__: {}}} if cls.suffix else {}

    @classmethod
    def baselines(cls, model: str, model_args: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
        """Further plain networks that the converted one is compared with.

        Args:
            model: timm's name of the plain network.
            model_args: its arguments.

        Returns:
            Label -> arguments of the plain network.
        """
        return {}

    @classmethod
    def check_ablation(cls, data: str, network: str) -> Mapping[str, Any]:
        """Options that all `ablations` of a network share.

        Args:
            data: name of the data set.
            network: name of the converted network, as recipes know it.

        Raises:
            ValueError: the ablations are not of this network, or not of this data set.
        """
        return {}

    def take_plain(self, model: nn.Module, fill: Callable[[nn.Module], str]) -> bool:
        """Start `model`, which the method converted, from weights of the network before it.

        A named network, and one whose method copies weights in `replace`, needs no rule: it is
        converted anew from the plain network with its weights.

        Args:
            model: the converted network.
            fill: loads the weights into a network, and returns how they differ from those of the
                network, empty if they do not. It may be called with a network that shares the
                tensors of `model`.

        Returns:
            Whether `model` has the weights.
        """
        return False

    def why_fresh(self) -> str:
        """Why the method starts at random whatever weights the plain network has, and what to do.

        Empty: it starts from them.
        """
        return ""

    def networks(self, model: nn.Module) -> Mapping[str, nn.Module]:
        """The networks that `model`, which the method converted, is trained to be.

        Returns:
            Plain forms by name, the one that `model` runs as first. Empty: `model` is one network.
        """
        return {}

    def without(self, model: nn.Module) -> nn.Module | None:
        """A copy of `model` without what this method put into it: the control of a measurement.

        Args:
            model: a network that was converted by this method; it stays as it is.

        Returns:
            The control; None where the method has none, which is the default, or where it left
            nothing in this network.
        """
        return None

    @property
    def without_label(self) -> str:
        """What rows and figures call the control: ``without`` and what the method puts in."""
        return f"without {self.name}"


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
