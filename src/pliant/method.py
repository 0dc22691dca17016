"""What a method is: `Method`, and what it says of a network.

A method says which *sites* of a network it changes and what takes the place of one. A
site is one submodule: a single module (a block, a convolution) or the container of a
run of blocks (a stage). `pliant.surgery` carries methods out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from torch import nn

from pliant.objectives import Objective

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
