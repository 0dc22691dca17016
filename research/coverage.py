"""What the methods cover of timm: each of its modules, network by network.

A network is built, converted and run without weights, or with them where it does not run without.
It counts as converted only if its forward then runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from torch import nn

from pliant import AdaptiveDepth, CondConv, MixtureOfDepths, anatomy
from pliant.counting import run_once
from pliant.method import Method
from pliant.provenance import provenance
from pliant.records import Origin, read_records, write_records
from pliant.surgery import conversions, convert
from pliant.tables import markdown

METHODS: tuple[Method, ...] = (MixtureOfDepths(), CondConv(experts=2), AdaptiveDepth())
Outcome = Literal["converted", "refused", "fails"]


@dataclass(frozen=True, kw_only=True)
class CoverageRow(Origin):
    """What one method makes of one network.

    Attributes:
        module: timm's module of the network.
        network: its name.
        method: name of the method, used with its default options.
        outcome: ``"converted"``, ``"refused"`` (an error with a reason), or ``"fails"``: any other
            error, or a converted network whose forward fails.
        replaced: blocks that are replaced, or have a part replaced.
        known: blocks that pliant can read.
        blocks: blocks in all.
        reason: why the network is refused, or what fails.
    """

    module: str
    network: str
    method: str
    outcome: str
    replaced: int
    known: int
    blocks: int
    reason: str = ""


def networks_of_timm() -> dict[str, list[str]]:
    """The names of timm's own networks, by the module that they are of.

    Example:
        >>> networks_of_timm()["tresnet"][:2]
        ['tresnet_l', 'tresnet_m']
    """
    found: dict[str, list[str]] = {}
    for name in timm.list_models():
        package, _, module = timm.model_entrypoint(name).__module__.rpartition(".")
        if package.startswith("timm"):
            found.setdefault(module, []).append(name)
    return found


def default_names(rows: Iterable[CoverageRow] = ()) -> list[str]:
    """The networks of `rows`, and of each module so many more that it has two."""
    given = {row.network: row.module for row in rows}
    names = list(given)
    for module, networks in networks_of_timm().items():
        missing = 2 - list(given.values()).count(module)
        names += [name for name in networks if name not in given][: max(missing, 0)]
    return names


def module_of(model: nn.Module) -> str:
    """The module of timm that a network is of, also if it was built by a name that timm has renamed.

    Example:
        >>> module_of(build("wide_resnet50_2"))
        'resnet'
    """
    config: Any = model.pretrained_cfg
    return str(timm.model_entrypoint(config["architecture"]).__module__).rpartition(".")[2]


def cover(names: Sequence[str], path: Path, told: Callable[[str], None] = print) -> list[CoverageRow]:
    """Survey networks, and append a row for each method to a file; those that have rows are left out.

    Args:
        names: networks of timm's.
        path: CSV file of the rows. A run that was interrupted goes on from it.
        told: gets a line for each network.

    Returns:
        All rows of the file.
    """
    done = {row.network for row in read_records(path, CoverageRow)} if path.exists() else set()
    for name in names:
        if name not in done:
            rows = survey(name)
            write_records(path, CoverageRow, rows, append=True)
            told(f"{name}: {', '.join(f'{row.method} {row.outcome}' for row in rows)}")
    return read_records(path, CoverageRow)


def survey(name: str, methods: Iterable[Method] = METHODS) -> list[CoverageRow]:
    """What each method makes of a network.

    Example:
        >>> [(row.outcome, row.replaced, row.blocks) for row in survey("resnet18")]
        [('converted', 4, 8), ('converted', 4, 8), ('converted', 8, 8)]
    """
    model = build(name)
    plain = _failure(model)
    if plain:  # it computes with values, which there are none of without weights
        model = build(name, "cpu")
        plain = _failure(model)
    blocks = anatomy.blocks(model)
    origin = provenance()
    rows = []
    for method in methods:
        outcome, sites, reason = _outcome(model, method, plain)
        rows.append(
            CoverageRow(
                module=module_of(model),
                network=name,
                method=method.name,
                outcome=outcome,
                replaced=_replaced(blocks, sites),
                known=sum(isinstance(block, anatomy.BlockInfo) for block in blocks),
                blocks=len(blocks),
                reason=reason,
                **origin,
            )
        )
    return rows


def build(name: str, device: str = "meta") -> nn.Module:
    """A network with random weights, or on the meta device, if it can be built there."""
    try:
        with torch.device(device):
            model: nn.Module = timm.create_model(name)
    except (NotImplementedError, RuntimeError):  # an initialisation that computes with weights
        model = timm.create_model(name)
    return model.eval()


def _outcome(model: nn.Module, method: Method, plain: str) -> tuple[Outcome, tuple[str, ...], str]:
    """The outcome, the paths that are replaced, and the reason."""
    try:
        new = convert(model, method)
    except ValueError as error:
        return "refused", (), _first_reason(str(error))
    except Exception as error:  # what a conversion must not raise is what is looked for
        return "fails", (), f"{type(error).__name__}: {error}"
    failure = "" if plain else _failure(new)
    return "fails" if failure else "converted", conversions(new)[-1].sites, failure or plain


def _failure(model: nn.Module) -> str:
    """Why the forward of a network fails; empty if it does not."""
    try:
        run_once(model, anatomy.input_size(model) or (3, 224, 224))
    except Exception as error:  # whatever a forward may raise
        return f"its forward fails: {type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return ""


def _replaced(blocks: Iterable[anatomy.BlockInfo | anatomy.UnknownBlock], sites: Sequence[str]) -> int:
    paths = [f"{site}." for site in sites]
    return sum(
        any(path.startswith(f"{block.path}.") or f"{block.path}.".startswith(path) for path in paths)
        for block in blocks
    )


def _first_reason(error: str) -> str:
    r"""Of an error that lists reasons block by block, that of an unknown block, else the last one.

    Example:
        >>> _first_reason("X:\n  fc: a reason\n  a.0: Y is no block of a known family")
        'Y is no block of a known family'
    """
    reasons = [line.partition(": ")[2] for line in error.splitlines() if line.startswith("  ")]
    unknown = (reason for reason in reasons if reason.endswith("no block of a known family"))
    return next(unknown, reasons[-1] if reasons else error.splitlines()[0])


ABOUT = "What each method converts of timm's networks, module by module."


def coverage_page(rows: Sequence[CoverageRow]) -> str:
    """The page `docs/coverage.md`."""
    methods = list(dict.fromkeys(row.method for row in rows))
    modules = sorted({row.module for row in rows})
    networks = len({row.network for row in rows})
    timms = sorted({row.timm for row in rows})
    totals = [
        (
            method,
            *(str(len(_chosen(rows, method=method, outcome=o))) for o in ("converted", "refused", "fails")),
        )
        for method in methods
    ]
    table = [
        (
            module,
            str(len({row.network for row in rows if row.module == module})),
            *(_cell(_chosen(rows, module=module, method=method)) for method in methods),
        )
        for module in modules
    ]
    reasons = [
        (module, "; ".join(dict.fromkeys(f"{r.method}: {r.reason}" for r in found)))
        for module in modules
        if (found := [r for r in rows if r.module == module and r.outcome == "fails"])
    ]
    headings = ("module", "why")
    failing = ["## What fails", "", markdown(headings, reasons, headings), ""] if reasons else []
    return "\n".join(
        [
            "# Coverage of timm",
            "",
            f"{ABOUT} {networks} networks of all {len(modules)} modules of timm {', '.join(timms)} were "
            "converted with each method's default options, and run.",
            "",
            markdown(("method", "converted", "refused, with the reason", "fails"), totals),
            "",
            "A cell says how many of a module's networks a method converts, and how many of their blocks "
            "it replaces, from the least to the most. The other blocks stay, and the plan names each with "
            "the reason. `no` means that every network is refused, with the reason. "
            "`pliant plan NETWORK` shows a network block by block.",
            "",
            markdown(("module", "networks", *methods), table, text=("module", *methods)),
            "",
            *failing,
            "Written by `python -m research coverage` from `results/coverage.csv`.",
            "",
        ]
    )


def _chosen(rows: Iterable[CoverageRow], **wanted: str) -> list[CoverageRow]:
    return [row for row in rows if all(getattr(row, name) == value for name, value in wanted.items())]


def _cell(rows: Sequence[CoverageRow]) -> str:
    """How many of a module's networks are converted, and which share of their blocks is replaced.

    Example:
        >>> about = {"module": "resnet", "network": "a", "method": "CondConv", "outcome": "converted"}
        >>> _cell([CoverageRow(**about, replaced=4, known=8, blocks=8)])
        'all, 50 % of blocks'
    """
    converted = [row for row in rows if row.outcome == "converted"]
    if not converted:
        return "no"
    shares = sorted(round(100 * row.replaced / max(row.blocks, 1)) for row in converted)
    share = f"{shares[0]}" if shares[0] == shares[-1] else f"{shares[0]} to {shares[-1]}"
    many = "all" if len(converted) == len(rows) else f"{len(converted)} of {len(rows)}"
    return f"{many}, {share} % of blocks"
