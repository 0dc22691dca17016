"""What the methods cover of timm: each of its modules, network by network.

A network is built and converted without weights. It counts as converted only if its forward then
runs; where the plain network itself does not run without weights, both run with them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import timm
import torch
from torch import nn

from pliant import AdaptiveDepth, CondConv, MixtureOfDepths, anatomy
from pliant.counting import run_once
from pliant.method import Method
from pliant.provenance import provenance
from pliant.records import Origin, read_records, write_records
from pliant.surgery import Plan, convert, plan
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


def default_names(rows: Iterable[CoverageRow] = ()) -> list[str]:
    """The networks of `rows`, and of each further module of timm's the first two."""
    given = list(dict.fromkeys(row.network for row in rows))
    covered = {row.module for row in rows}
    for module in timm.list_modules():
        if module not in covered:
            given += timm.list_models(module=module)[:2]
    return given


def module_of(name: str) -> str:
    """Timm's module that a network is of.

    Example:
        >>> module_of("wide_resnet50_2")
        'resnet'
    """
    return timm.model_entrypoint(name).__module__.rpartition(".")[2]


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
    blocks = anatomy.blocks(model)
    origin = asdict(provenance())
    rows = []
    for method in methods:
        outcome, replaced, reason = _outcome(name, model, method)
        rows.append(
            CoverageRow(
                module=module_of(name),
                network=name,
                method=method.name,
                outcome=outcome,
                replaced=replaced,
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


def _outcome(name: str, model: nn.Module, method: Method) -> tuple[Outcome, int, str]:
    """The outcome, how many blocks are replaced, and the reason."""
    try:
        made = plan(model, method)
    except ValueError as error:
        return "refused", 0, _first_reason(str(error))
    except Exception as error:  # what a plan must not raise is what is looked for
        return "fails", 0, f"{type(error).__name__}: {error}"
    failed = made.uncounted if made.uncounted.startswith("once converted") else ""
    if made.uncounted and not failed:
        failed = _fails_with_weights(name, method)
    return "fails" if failed else "converted", _replaced(model, made), failed


def _fails_with_weights(name: str, method: Method) -> str:
    """Why a converted network's forward fails where the plain network's does not; or empty."""
    model = build(name, "cpu")
    size = anatomy.input_size(model) or (3, 224, 224)
    try:
        run_once(model, size)
    except Exception as error:  # nobody's fault but the network's, or the size's
        return f"not even the plain network runs: {type(error).__name__}: {error}"
    try:
        run_once(convert(model, method, inplace=True), size)
    except Exception as error:  # as above
        return f"{type(error).__name__}: {error}"
    return ""


def _replaced(model: nn.Module, made: Plan) -> int:
    paths = [f"{replacement.path}." for replacement in made.replacements]
    blocks = [f"{block.path}." for block in anatomy.blocks(model)]
    return sum(any(p.startswith(block) or block.startswith(p) for p in paths) for block in blocks)


def _first_reason(error: str) -> str:
    """Of an error that lists reasons block by block, the last; otherwise its first line."""
    lines = [line for line in error.splitlines() if line.startswith("  ")]
    return lines[-1].partition(": ")[2] if lines else error.splitlines()[0]


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
            "it replaces, from the least to the most. The other blocks stay, and the plan names each with the "
            "reason. `no` means that every network is refused, with the reason. "
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
