"""What stands in the place of a block or layer, and the questions it answers: `Part`.

`counting`, `deploy` and `measuring` know no method. They ask the modules that a method put into a
network. Every question has a default answer, that of a plain PyTorch module, so a part
answers only where it is special.

Shapes in this file::

    B  batch             x         whatever the part takes, mostly [B, C, H, W]
    C  channels          logits    [B, C]  relevance of the channels
    k  selected          channels  [B, k]  the selected channels, best first
    O  output channels   scale     [O]     and shift [O], of a batch norm
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, cast

from torch import Tensor, nn

from pliant.threaded import passes_along, take_over

Network = TypeVar("Network", bound=nn.Module)
Target = Literal["program", "onnx", "openvino"]


class Ranking(NamedTuple):
    """How a part selects channels, for the parity check of exported files.

    Attributes:
        k: channels that it selects.
        by_index: the selected channels are processed by their number, not best first.
        logits: from the part's input to what it ranks, [B, C].
        outcome: from logits [B, C] and channels [B, k], in the order in which they are
            processed, to what the part returns for them.
    """

    k: int
    by_index: bool
    logits: Callable[[Tensor], Tensor]
    outcome: Callable[[Tensor, Tensor], Any]


@dataclass(frozen=True)
class OnnxOperator:
    """One operator of a part's own library (`Operators.onnx_library`) that does what the part does.

    It takes a feature map and the weights, and returns a feature map of the same shape. It works
    on planes, and on ONNX Runtime's blocks of channels: its attribute ``block`` is the number of
    channels in a block, 1 for planes.

    Attributes:
        name: name of the operator, in the domain ``pliant``.
        weights: inputs after the feature map, in their order.
        attributes: besides ``block``.
        ranking: path, within the part, of the module whose logits and channels the operator gives
            as further outputs where a node names them; None: it selects nothing.
    """

    name: str
    weights: Mapping[str, Tensor]
    attributes: Mapping[str, int | str]
    ranking: str | None = None


class Operators(Protocol):
    """A module that builds and loads native operators of PyTorch."""

    def ready(self) -> bool:
        """Build and load the operators if need be; whether they are there. Warns once if not."""

    def why_not(self) -> str:
        """Why `ready` said no; empty where it said yes, or was not called yet."""

    def onnx_library(self) -> Path:
        """The shared library with `OnnxOperator`, built if need be.

        Raises:
            ValueError: it cannot be built; says why.
        """


class Part(nn.Module):
    """A module that a method put in the place of a block or layer.

    Attributes:
        switches: which of its modules run differs from forward to forward, so what one forward
            shows does not hold for all: norms in it are not folded, and no part of the network
            changes its input in place.
        mixes: whether it mixes kernels of convolutions for each image, which a compiled ONNX file keeps in
            ONNX Runtime's own layout.
        inplace: whether a fast form changes its input instead of a copy; `pliant.deploy.optimize`
            sets it where nobody else reads the input. None: it never does.
        operators: name of the Python module (`Operators`) with the native operators of its fast
            form and of its `onnx_operator`; empty: they need none.

    Example:
        >>> class Scaled(Part):
        ...     def forward(self, x: Tensor) -> Tensor:
        ...         return 2 * x
        >>> part = Scaled()
        >>> part.export_form("onnx", None) is part, part.fast_form(), part.no_export()
        (True, None, '')
    """

    switches: ClassVar[bool] = False
    mixes: ClassVar[bool] = False
    operators: ClassVar[str] = ""
    inplace: bool | None = None

    def counted(self) -> AbstractContextManager[Any]:
        """A context in which a forward does the operations that count for the part."""
        return nullcontext()

    def no_export(self) -> str:
        """Why no exported file can hold the part, as a sentence; empty if one can."""
        return ""

    def export_form(self, target: Target, batch: int | None) -> nn.Module:
        """The same function in operators that an engine runs well; by default the part itself.

        Its children keep their names where they rank (`ranking`) or are parts themselves.

        Args:
            target: what the file is made for.
            batch: images of each call; None: any number.
        """
        return self

    def fast_form(self) -> nn.Module | str | None:
        """The form for PyTorch that `pliant.deploy.optimize` puts in the part's place.

        Asked in evaluation mode, after norms were folded. A text says why this part has
        none, though others of its kind do; None: its kind has none.
        """
        return None

    def onnx_operator(self) -> OnnxOperator | str | None:
        """The part as one operator in ONNX Runtime; a text or None as for `fast_form`."""
        return None

    def ranking(self) -> Ranking | None:
        """How the part selects channels; None: it does not."""
        return None

    def takes_norm(self, output: Tensor) -> bool:
        """Whether a batch norm that follows can be folded into the part.

        Args:
            output: what the part gave in the forward that was watched.
        """
        return False

    def take_norm(self, scale: Tensor, shift: Tensor) -> None:
        """Multiply each output channel by `scale` [O] and add `shift` [O], both float64.

        Called where `takes_norm` says yes.
        """
        raise NotImplementedError(f"{type(self).__name__} takes no norm up: takes_norm must say so")


def parts(network: nn.Module) -> dict[str, Part]:
    """The parts of a network by path, each before those inside it.

    Example:
        >>> import timm, pliant
        >>> type(parts(timm.create_model("resnet20_cifar_mod"))["layer1.1"]).__name__
        'MoDBlock'
    """
    return {path: m for path, m in network.named_modules() if isinstance(m, Part)}


def substitute(network: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put `new` in all places of `old` below `network`: a module may stand at several paths.

    Example:
        >>> block = nn.ReLU()
        >>> network = nn.Sequential(block, nn.Sequential(block))
        >>> substitute(network, block, nn.Identity())
        >>> network
        Sequential(
          (0): Identity()
          (1): Sequential(
            (0): Identity()
          )
        )
    """
    for parent in list(network.modules()):
        for name in [name for name, child in parent._modules.items() if child is old]:
            setattr(parent, name, new)


def copied(module: Network, memo: dict[int, Any] | None = None) -> Network:
    """A deep copy, also of a module whose weight a hook computes (pruning, `weight_norm`).

    PyTorch refuses to copy such a weight, because gradients flow through it. The hook computes that
    of the copy in the next forward.

    Args:
        module: a module, with all that is in it.
        memo: as of `copy.deepcopy`: what stands for objects in the copy, by their `id`. Afterwards it also
            holds what was copied.

    Example:
        >>> from torch.nn.utils import prune
        >>> pruned = prune.l1_unstructured(nn.Linear(4, 4), "weight", amount=0.5)
        >>> copied(pruned).weight.shape
        torch.Size([4, 4])
    """
    computed = (v for m in module.modules() for v in vars(m).values() if isinstance(v, Tensor))
    memo = {} if memo is None else memo
    for value in computed:
        if not value.is_leaf and id(value) not in memo:
            memo[id(value)] = value.detach().clone()
    return copy.deepcopy(module, memo)


def replace_parts(network: Network, form: Callable[[str, Part], nn.Module | None]) -> Network:
    """Put other forms in the places of parts, in `network` itself.

    Args:
        network: a network, or a part by itself.
        form: from a part's path and the part to what takes its place, in evaluation mode; None,
            or the part itself: it stays. Not asked of parts inside one that has gone.

    Returns:
        `network`; the new form, if the network is one part that was replaced.
    """
    for path, part in parts(network).items():
        if not _stands(network, path, part):
            continue
        new = form(path, part)
        if new is None or new is part:
            continue
        take_over(new.eval(), part)
        if path:
            substitute(network, part, new)
        else:
            network = cast("Network", new)
    return network


def _stands(network: nn.Module, path: str, part: Part) -> bool:
    try:
        return network.get_submodule(path) is part
    except AttributeError:  # a form that took the place of a module around it has no such child
        return False


def as_defined(layer: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a layer is exactly of one of these classes, and a call of it does nothing more.

    Only then its weights may be read in place of the call. An adapter (LoRA), a parametrization, a hook
    and a quantised weight would be left out otherwise.

    Example:
        >>> plain, watched = nn.Linear(2, 2), nn.Linear(2, 2)
        >>> handle = watched.register_forward_hook(print)
        >>> as_defined(plain, nn.Linear), as_defined(watched, nn.Linear), as_defined(plain, nn.Conv2d)
        (True, False, False)
    """
    kept = (Tensor, nn.Parameter)
    return (
        type(layer) in kinds
        and "forward" not in vars(layer)
        and not hooked(layer)
        and all(value is None or type(value) in kept for value in layer._parameters.values())
    )


def hooked(module: nn.Module) -> str:
    """Why forward hooks forbid to put another form in the place of a module; empty if there are none."""
    inside = [*module.modules()]
    hooks = [h for m in inside for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]
    return "" if all(map(passes_along, hooks)) else "it has hooks, which another form would not run"


def operators_of(network: nn.Module) -> list[Operators]:
    """The native operators that a network's parts need."""
    return named_operators({p.operators for p in parts(network).values()})


def named_operators(names: Iterable[str]) -> list[Operators]:
    """Native operators by the names of their modules (`Part.operators`); empty names are skipped."""
    return [cast("Operators", importlib.import_module(name)) for name in sorted(set(names)) if name]
