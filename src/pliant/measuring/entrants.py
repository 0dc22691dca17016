"""Who takes part in a run: networks by name, the baseline, and variants of them."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import timm
import torch
from torch import nn

from pliant import anatomy
from pliant.measuring.rows import AS_IS, LOWER_RESOLUTION, NO_BLOCKS
from pliant.methods.mixture_of_depths import MoDBlock, without_mod_blocks

if TYPE_CHECKING:
    from torch.utils.benchmark import Timer

Size = tuple[int, int, int]
Model = str | nn.Module  # a name that timm knows, or a network


@dataclass
class Entrant:
    """One variant of one network, on its way through a run.

    Attributes:
        model: the network's name.
        variant: one of those that `Measurement` names.
        network: it, until it is prepared.
        size: channels, height, width of its images.
        parameters: counted when it is prepared, as `macs`.
        macs: multiply-accumulates of one image.
        timer: runs it, from when it is prepared.
        calls: forwards in each round.
        seconds: of one forward, a value for each round.
        error: why it is out of the run; empty while it is in.
    """

    model: str
    variant: str
    network: nn.Module | None = None
    size: Size | None = None
    parameters: int | None = None
    macs: int | None = None
    timer: Timer | None = None
    calls: int = 1
    seconds: list[float] = field(default_factory=list)
    error: str = ""

    @property
    def label(self) -> str:
        """Name and variant, for progress."""
        return self.model if self.variant == AS_IS else f"{self.model}, {self.variant}"


def by_name(models: Model | Iterable[Model] | Mapping[str, Model]) -> dict[str, Model]:
    """Models by name. A network is named after its architecture, or else its class."""
    if isinstance(models, Mapping):
        pairs = list(models.items())
    else:
        several = [models] if isinstance(models, (str, nn.Module)) else list(models)
        pairs = [(_name(m), m) for m in several]
    if not pairs:
        raise ValueError("no model given; name one, for example 'resnet50_mod'")
    for i, (name, model) in enumerate(pairs):
        if any(name == other for other, _ in pairs[:i]):
            raise ValueError(f"two models are named {name!r}; pass a mapping of names to models")
        _check_known(model)
    return dict(pairs)


def add_baseline(named: dict[str, Model], against: Model) -> str:
    """The baseline's name; it is put first in `named` if it is not there."""
    for name, model in named.items():
        if model is against or name == against:
            return name
    name = _name(against)
    if name in named:
        raise ValueError(f"the baseline and another model are both named {name!r}; pass a mapping")
    _check_known(against)
    others = dict(named)
    named.clear()
    named |= {name: against, **others}
    return name


def _name(model: Model) -> str:
    if isinstance(model, str):
        return model
    config = getattr(model, "pretrained_cfg", None) or {}
    return str(config.get("architecture") or type(model).__name__)


def _check_known(model: Model) -> None:
    if isinstance(model, str) and not timm.is_model(model):
        near = difflib.get_close_matches(model, timm.list_models(), n=3)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ValueError(f"timm knows no model {model!r}{hint}")


def variants(
    name: str, model: Model, input_size: int | Size | None, low: int | None, tax: bool
) -> list[Entrant]:
    """A network, and what is timed beside it for its sake."""
    first = Entrant(name, AS_IS)
    entrants = [first]
    attempt(first, lambda e: setattr(e, "network", fresh(model) if isinstance(model, str) else model))
    network = first.network
    if network is None:
        return entrants
    first.size = channels, height, _ = _size(name, network, input_size)
    if low is not None:
        if not 0 < low < height:
            raise ValueError(f"lower_resolution must be below the {height} px of {name}, not {low}")
        entrants.append(Entrant(name, LOWER_RESOLUTION, network, (channels, low, low)))
    if tax and any(isinstance(m, MoDBlock) for m in network.modules()):
        entrants.append(Entrant(name, NO_BLOCKS, without_mod_blocks(network), first.size))
    return entrants


def fresh(name: str, **options: Any) -> nn.Module:
    """A network with random weights, none of its norms' scales zero.

    The options are keywords of ``timm.create_model``.

    timm starts the last norm of each residual branch at zero, so that whole branches
    give zeros: data as no trained network has them, and cheap for a GPU to move.
    """
    network: nn.Module = timm.create_model(name, **options)
    for key, p in network.named_parameters():
        if p.dim() == 1 and key.endswith("weight") and not p.any():
            nn.init.constant_(p, 0.2)  # small, that deep networks do not overflow
    return network


def _size(name: str, network: nn.Module, given: int | Size | None) -> Size:
    if isinstance(given, tuple):
        if len(given) != 3 or min(given) < 1:
            raise ValueError(f"input_size must be (channels, height, width), not {given}")
        return given
    own = anatomy.input_size(network)
    if own is None:
        raise ValueError(f"{name} does not say its input size; give input_size=(channels, height, width)")
    if given is None:
        return own
    if given < 1:
        raise ValueError(f"input_size must be at least 1 pixel, not {given}")
    return own[0], given, given


def attempt(entrant: Entrant, step: Callable[[Entrant], None]) -> None:
    """Do a step for an entrant that is still in the run; a failure takes it out."""
    if entrant.error:
        return
    try:
        step(entrant)
    except Exception as e:
        # Anything may go wrong in a network or a compiler, and only that row is lost.
        entrant.error = _reason(e)
        entrant.network = entrant.timer = None
        entrant.seconds.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what failed was perhaps too large: leave room for the rest


def _reason(error: Exception) -> str:
    """An error on one line, without folders of this machine: rows are published."""
    if "InvalidCxxCompiler" in str(error):
        return "no C++ compiler found; torch.compile needs one, for example g++"
    lines = str(error).strip().splitlines() or [""]
    text = re.sub(r"(?<![\w.])(?:/[\w.+-]+)+/", "", lines[0])[:200]
    kind = type(error).__name__
    return f"{kind}: {text}" if text else kind
