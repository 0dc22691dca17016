"""What is timed in a run: networks by name, the baseline, and the variants of each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn

from pliant import anatomy
from pliant.deploy.loading import engine_of, is_export, read_facts
from pliant.measuring.clock import Clock
from pliant.measuring.rows import AS_BUILT, AS_IS, LOWER_RESOLUTION, NATIVE, OF_PARTS, OPTIMIZED, PLAIN_FORM
from pliant.models._build import check_network
from pliant.parts import parts
from pliant.surgery import conversions

Size = tuple[int, int, int]
Model = str | nn.Module  # a name that timm knows, the path of an exported file, or a network


class EngineError(RuntimeError):
    """What went wrong in an engine: the message says all."""


@dataclass
class Candidate:
    """One variant of one network, on its way through a run; what a row has too is as in `Measurement`.

    Attributes:
        network: the network, until it is prepared.
        size: channels, height, width of its images.
        file: exported file in the place of a network.
        engine: engine of that file; empty for a network, which the run's engine gets.
        precision: precision of that file.
        clock: times the network, once it is prepared.
        calls: forwards in each round.
        seconds: time of one forward, a value for each round.
        error: why the candidate is out of the run; empty while it is in.
    """

    model: str
    variant: str
    form: str = AS_BUILT
    network: nn.Module | None = None
    size: Size | None = None
    parameters: int | None = None
    macs: int | None = None
    clock: Clock | None = None
    calls: int = 1
    seconds: list[float] = field(default_factory=list)
    note: str = ""
    error: str = ""
    file: Path | None = None
    engine: str = ""
    precision: str = ""

    @property
    def label(self) -> str:
        """Name, variant and form, for progress."""
        told = (self.model, self.variant * (self.variant != AS_IS), self.form * (self.form in OF_PARTS))
        return ", ".join(filter(None, told))

    @property
    def reference_form(self) -> str:
        """Form of the baseline and the control that this one is compared with."""
        return PLAIN_FORM if self.form in OF_PARTS else self.form


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
    return model if isinstance(model, str) else anatomy.name_of(model)


def _check_known(model: Model) -> None:
    if isinstance(model, str) and not is_export(model):
        check_network(model)


def variants(
    name: str,
    model: Model,
    input_size: int | Size | None,
    low: int | None,
    tax: bool,
    forms: Sequence[str] = (AS_BUILT,),
) -> list[Candidate]:
    """A network in its forms, and what is timed beside it: its lower resolution, its controls.

    A network whose parts have no optimized or native form is plain where that is asked for.
    """
    if isinstance(model, str) and is_export(model):
        return [_of_file(name, Path(model))]
    plain = list(dict.fromkeys(PLAIN_FORM if form in OF_PARTS else form for form in forms))
    first = Candidate(name, AS_IS, plain[0])
    attempt(first, lambda e: setattr(e, "network", fresh(model) if isinstance(model, str) else model))
    network = first.network
    if network is None:
        return [replace(first, form=form) for form in plain]
    size = channels, height, _ = _size(name, network, input_size)
    own: list[str] = []
    controls: dict[str, nn.Module] = {}

    def ask(_: Candidate) -> None:
        own.extend(dict.fromkeys(form if _has_form(network, form) else PLAIN_FORM for form in forms))
        controls.update(controls_of(network) if tax else {})

    attempt(first, ask)
    if first.error:  # a part or a method failed to answer
        return [replace(first, form=form, size=size) for form in plain]
    candidates = [Candidate(name, AS_IS, form, network, size) for form in own]
    if low is not None:
        if not 0 < low < height:
            raise ValueError(f"lower_resolution must be below the {height} px of {name}, not {low}")
        candidates += [
            Candidate(name, LOWER_RESOLUTION, form, network, (channels, low, low)) for form in plain
        ]
    candidates += [
        Candidate(name, label, form, bare, size) for label, bare in controls.items() for form in plain
    ]
    return candidates


def _of_file(name: str, path: Path) -> Candidate:
    facts = read_facts(path)
    return Candidate(
        name, AS_IS, file=path, engine=engine_of(facts), precision=facts.precision, size=facts.input_size
    )


def _has_form(network: nn.Module, form: str) -> bool:
    """Whether `form` is one of every network, or parts of this one have it."""
    found = parts(network).values()
    if form == OPTIMIZED:
        return any(p.fast_form() is not None or p.export_form("onnx", None) is not p for p in found)
    return form != NATIVE or any(p.mixes or p.onnx_operator() is not None for p in found)


def controls_of(network: nn.Module) -> dict[str, nn.Module]:
    """The controls of a network by name: the network without the parts of one method, for each method.

    Example:
        >>> list(controls_of(timm.create_model("resnet20_cifar_mod")))
        ['without MoD blocks']
    """
    methods = [c.method for module in network.modules() for c in conversions(module)]
    found = {method.without_label: method.without(network) for method in methods}
    return {label: control for label, control in found.items() if control is not None}


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


def attempt(candidate: Candidate, step: Callable[[Candidate], None]) -> None:
    """Do a step for a candidate that is still in the run; a failure takes it out."""
    if candidate.error:
        return
    try:
        step(candidate)
    except Exception as e:
        # Anything may go wrong in a network or a compiler, and only that row is lost.
        candidate.error = reason(e)
        candidate.network = candidate.clock = None
        candidate.seconds.clear()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()  # what failed was perhaps too large: leave room for the rest


def reason(error: Exception) -> str:
    """An error on one line, without folders of this machine: rows are published."""
    if "InvalidCxxCompiler" in str(error):
        return "no C++ compiler found; torch.compile needs one, for example g++"
    lines = str(error).strip().splitlines() or [""]
    text = re.sub(r"(?<![\w.])(?:/[\w.+-]+)+/", "", lines[0])[:200]
    kind = type(error).__name__
    if isinstance(error, EngineError):
        return text
    return f"{kind}: {text}" if text else kind
