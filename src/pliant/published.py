"""Counts that the papers print, beside what our networks count.

The printed rows are data of the package (``data/*.csv``), with their exceptions. Each
paper counts multiply-accumulates in its own way; a count that is held against a paper
uses that paper's convention, here and nowhere else. For *CNN Mixture-of-Depths* it is
what the public counter ptflops says (`CONVENTIONS`).
"""

from __future__ import annotations

import csv
import importlib.util
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.measuring.macs import count_macs, count_parameters
from pliant.methods.mixture_of_depths import ChannelSelector, MoDBlock

if TYPE_CHECKING:
    from rich.table import Table

Convention = Literal["ptflops", "ptflops, functional", "conv and linear"]

CONVENTIONS: dict[Convention, str] = {
    "ptflops": (
        "ptflops 0.7.5: conv and linear with bias, norms 2 per element; nn.ReLU, nn.MaxPool2d and "
        "nn.AdaptiveAvgPool2d count twice, as modules and as the functions they call"
    ),
    "ptflops, functional": (
        "the same, but ReLU and the last pool once: networks that call F.relu and F.avg_pool2d (CIFAR)"
    ),
    "conv and linear": "convolutions and matrix products only, our own figure (ResNet-101 in Table 1)",
}

INSTALL_COUNTS = "pip install 'pliant[counts]'"

_DATA = {"mod": "mod.csv", "condconv": "condconv.csv", "adn": "adn.csv"}
_UNITS = {"M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class PublishedRow:
    """One row of a paper's table. Decimals keep the printed digits.

    Attributes:
        method: ``"mod"``, ``"condconv"`` or ``"adn"``: the paper.
        table: number of the table in the paper.
        model: the network, as the data file names it.
        task: ``"imagenet"``, ``"cifar10"``, ...
        variant: which form of the network (experts, subnet); may be empty.
        params_m: parameters in millions; None where not printed.
        macs: multiply-accumulates in `macs_unit`; None where not printed.
        macs_unit: ``"M"``, ``"G"`` or ``"T"``.
        accuracy: in per cent, of the kind `accuracy_kind`.
        accuracy_kind: ``"top1"``, ``"mIoU"``, ``"mAP"``.
        counts: whether the counts can be reproduced, and if not exactly, how not.
        note: what the paper's figure hides.
    """

    method: str
    table: str
    model: str
    task: str
    variant: str
    params_m: Decimal | None
    macs: Decimal | None
    macs_unit: str
    accuracy: Decimal | None
    accuracy_kind: str
    counts: str
    note: str


def published_rows(method: str = "mod", tables: Sequence[str] | None = None) -> list[PublishedRow]:
    """What a paper prints, as shipped with the package.

    Args:
        method: ``"mod"`` (arXiv 2409.17016), ``"condconv"`` (1904.04971) or ``"adn"``
            (adaptive depth networks).
        tables: numbers of tables, for example ``("1", "11")``; None is all.

    Raises:
        ValueError: an unknown method, or a table that the file does not hold.

    Example:
        >>> [str(row.params_m) for row in published_rows("mod", ["8"])]
        ['25.60', '23.10', '18.11']
    """
    if method not in _DATA:
        raise ValueError(f"no published rows for {method!r}; there are rows for {', '.join(_DATA)}")
    text = (resources.files("pliant") / "data" / _DATA[method]).read_text(encoding="utf-8")
    rows = [_published(method, raw) for raw in csv.DictReader(io.StringIO(text))]
    if tables is None:
        return rows
    known = {row.table for row in rows}
    for table in tables:
        if table not in known:
            there = ", ".join(sorted(known, key=lambda t: (len(t), t)))
            raise ValueError(f"{_DATA[method]} holds no table {table!r}; it holds {there}")
    return [row for row in rows if row.table in tables]


def _published(method: str, raw: dict[str, str]) -> PublishedRow:
    def number(name: str) -> Decimal | None:
        return Decimal(raw[name]) if raw.get(name) else None

    unit = raw.get("macs_unit", "") or ("M" if "macs_m" in raw else "G" if "macs_g" in raw else "")
    experts = raw.get("experts", "0")
    return PublishedRow(
        method=method,
        table=raw["table"],
        model=raw["model"],
        task=raw.get("task", "imagenet"),
        variant=raw.get("subnet", "") if experts == "0" else f"{experts} experts",
        params_m=number("params_m"),
        macs=number("macs") or number("macs_m") or number("macs_g"),
        macs_unit=unit,
        accuracy=number("acc"),
        accuracy_kind=raw["acc_kind"],
        counts=raw["counts"],
        note=raw["note"],
    )


@dataclass(frozen=True)
class CountRow:
    """A published row beside what our network counts.

    Attributes:
        published: the paper's row.
        network: the name that `timm.create_model` knows.
        options: keyword arguments that go with it.
        parameters: ours.
        macs: ours, the honest figure: convolutions and matrix products of one image.
        convention: how this row of the paper counts.
        convention_macs: ours in that convention; None where its counter is missing.
    """

    published: PublishedRow
    network: str
    options: dict[str, Any]
    parameters: int
    macs: int
    convention: Convention
    convention_macs: int | None

    @property
    def parameters_m(self) -> Decimal:
        """Our parameters in millions, with as many digits as the paper prints."""
        assert self.published.params_m is not None
        return _as_printed(self.parameters, self.published.params_m, "M")

    @property
    def printed_macs(self) -> Decimal | None:
        """Our MACs in the row's convention and unit, with as many digits as the paper."""
        assert self.published.macs is not None
        if self.convention_macs is None:
            return None
        return _as_printed(self.convention_macs, self.published.macs, self.published.macs_unit)

    @property
    def parameters_agree(self) -> bool:
        """Whether the parameters are the paper's at its printed precision."""
        return self.parameters_m == self.published.params_m

    @property
    def macs_agree(self) -> bool | None:
        """Whether the MACs are the paper's; None where they could not be counted."""
        return None if self.printed_macs is None else self.printed_macs == self.published.macs

    @property
    def verdict(self) -> str:
        """``"match"``, ``"parameters match"`` (MACs not counted) or what differs."""
        differs = [
            what
            for what, agrees in (("parameters", self.parameters_agree), ("MACs", self.macs_agree))
            if agrees is False
        ]
        if differs:
            return f"{' and '.join(differs)} differ"
        return "match" if self.macs_agree else "parameters match"


@dataclass(frozen=True)
class CountReport:
    """What `reproduce_counts` found.

    Attributes:
        rows: published beside ours.
        left_out: rows that pliant cannot build or that print no count, with the reason.
    """

    rows: tuple[CountRow, ...]
    left_out: tuple[tuple[PublishedRow, str], ...]

    @property
    def notes(self) -> list[str]:
        """What a reader of the table has to know, a sentence a line."""
        used = dict.fromkeys(row.convention for row in self.rows)
        notes = [f"{name}: {CONVENTIONS[name]}" for name in used]
        notes.append("honest MACs: convolutions and matrix products of one image, nothing else")
        if any(row.convention_macs is None for row in self.rows):
            notes.append(f"ptflops is not installed, so most MACs were not compared: {INSTALL_COUNTS}")
        for row in self.rows:
            if row.verdict != "match":
                p = row.published
                said = "; ".join(text for text in (p.counts, p.note) if text and text != "exact")
                notes.append(
                    f"{p.model}, {p.task} (Table {p.table}): {row.verdict}; the data file says: {said}"
                )
        reasons: dict[str, list[str]] = {}
        for p, reason in self.left_out:
            name = p.model.removeprefix("rival ").split()[0]
            reasons.setdefault(reason, []).append(f"{name} (Table {p.table})")
        return notes + [f"left out, {why}: {', '.join(dict.fromkeys(who))}" for why, who in reasons.items()]


def has_ptflops() -> bool:
    """Whether the counter of the paper's convention is installed."""
    return importlib.util.find_spec("ptflops") is not None


def reproduce_counts(
    tables: Sequence[str] | None = None, progress: Callable[[CountRow], None] | None = None
) -> CountReport:
    """Count our networks as *CNN Mixture-of-Depths* does, beside what it prints.

    Networks are built without weights (on the meta device), so nothing is computed.

    Args:
        tables: numbers of tables, for example ``("1", "11")``; None is all.
        progress: called with each row as it is done.

    Raises:
        ValueError: a table that the paper's file does not hold.

    Example:
        >>> row = reproduce_counts(["8"]).rows[-1]
        >>> row.published.model, row.parameters, row.verdict
        ('resnet50_mod_lastk', 18105949, 'match')
    """
    rows: list[CountRow] = []
    left_out: list[tuple[PublishedRow, str]] = []
    for published in published_rows("mod", tables):
        network, options = _network(published)
        reason = _why_not(published, network)
        if reason:
            left_out.append((published, reason))
            continue
        rows.append(_count(published, network, options))
        if progress is not None:
            progress(rows[-1])
    return CountReport(tuple(rows), tuple(left_out))


def _network(row: PublishedRow) -> tuple[str, dict[str, Any]]:
    """Name and options of the timm network that a row of the Mixture-of-Depths paper is."""
    name, options = row.model, dict[str, Any]()
    for suffix, option in (("_lastk", {"fusion": "last"}), ("_random", {"selection": "random"})):
        if name.endswith(suffix):
            name, options = name.removesuffix(suffix), option
    if row.task.startswith("cifar"):
        base = name.removesuffix("_mod")
        name = f"{base}_cifar{name.removeprefix(base)}"
        options["num_classes"] = int(row.task.removeprefix("cifar"))
    elif "10-class head" in row.counts:
        options["num_classes"] = 10
    return name, options


def _why_not(row: PublishedRow, network: str) -> str:
    """Why a row cannot be counted; empty when it can."""
    if row.counts == "not ours":
        return "another paper's network"
    if row.params_m is None or row.macs is None:
        return "the paper prints no count"
    if row.task not in ("imagenet", "cifar10", "cifar100") or not timm.is_model(network):
        return "pliant does not have it yet"
    return ""


def _count(row: PublishedRow, network: str, options: dict[str, Any]) -> CountRow:
    with torch.device("meta"):
        model = timm.create_model(network, **options)
    size = (3, 224, 224) if row.task == "imagenet" else (3, 32, 32)
    macs = count_macs(model, size)
    parameters = count_parameters(model)
    convention: Convention = "ptflops" if row.task == "imagenet" else "ptflops, functional"
    if row.table == "1" and row.model == "resnet101":  # 7.80; the others' convention gives 7.87
        convention = "conv and linear"
    theirs: int | None = None
    if convention == "conv and linear":
        theirs = macs
    elif has_ptflops():
        theirs = ptflops_macs(model, size, functional=row.task != "imagenet")
    return CountRow(row, network, options, parameters, macs, convention, theirs)


class _SelectorOfModules(nn.Module):
    """A `ChannelSelector` spelled in modules, the only spelling that ptflops can count."""

    def __init__(self, selector: ChannelSelector) -> None:
        super().__init__()
        self.k = selector.k
        self.logits = nn.Sequential(
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), selector.fc1, nn.ReLU(), selector.fc2
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        top, index = self.logits(x).topk(self.k, dim=1)
        return top.sigmoid(), index


class _FunctionalPool(nn.Module):
    """The pool before the classifier, as a function."""

    def forward(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(x, (x.shape[2], x.shape[3])).flatten(1)


def ptflops_macs(model: nn.Module, input_size: tuple[int, int, int], *, functional: bool = False) -> int:
    """MACs of one image as the public counter ptflops counts them.

    Args:
        model: any network; ptflops hangs counters on it, so do not use it further.
            Selectors of Mixture-of-Depths blocks are counted as the modules that
            they stand for.
        input_size: channels, height, width.
        functional: count each ReLU and the last pool once, as in a network that calls
            ``F.relu`` and ``F.avg_pool2d`` where timm's has modules.

    Raises:
        ImportError: ptflops is not installed.
        RuntimeError: ptflops could not run the network.

    Example:
        >>> ptflops_macs(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU()), (3, 10, 10))
        4800
    """
    try:
        from ptflops import get_model_complexity_info
    except ImportError as error:
        raise ImportError(f"counting in the paper's convention needs ptflops: {INSTALL_COUNTS}") from error
    for block in model.modules():
        if isinstance(block, MoDBlock) and isinstance(block.selector, ChannelSelector):
            block.selector = _SelectorOfModules(block.selector)
    if functional:
        model.global_pool = _FunctionalPool()
    macs, _ = get_model_complexity_info(
        model,
        input_size,
        as_strings=False,
        print_per_layer_stat=False,
        backend="pytorch",
        # Not counted as a module, a ReLU still counts as the function that it calls.
        ignore_modules=[nn.ReLU] if functional else [],
    )
    if macs is None:
        raise RuntimeError(f"ptflops could not run {type(model).__name__} at {input_size}")
    return int(macs)


def _as_printed(value: int, like: Decimal, unit: str) -> Decimal:
    """`value` in `unit`, rounded to the last digit that `like` was printed with."""
    step = Decimal(1).scaleb(int(like.as_tuple().exponent))
    if unit == "M" and like >= 1000:
        step = Decimal(10)  # the counter says "1.16 GMac", which the paper prints as 1160 M
    return (Decimal(value) / _UNITS[unit] / step).quantize(Decimal(1), ROUND_HALF_UP) * step


_COLUMNS = ("Table", "Network", "Params", "ours", "MACs", "ours", "honest", "Verdict")
_NUMBERS = range(2, 7)


def _cells(row: CountRow) -> tuple[str, ...]:
    p = row.published
    assert p.macs is not None
    honest = Decimal(row.macs) / _UNITS[p.macs_unit]
    return (
        p.table,
        p.model if p.task == "imagenet" else f"{p.model}/{p.task}",
        str(p.params_m),
        str(row.parameters_m),
        f"{p.macs} {p.macs_unit}",
        "not counted" if row.printed_macs is None else f"{row.printed_macs} {p.macs_unit}",
        f"{honest:.3f} {p.macs_unit}" if p.macs_unit == "G" else f"{honest:.0f} {p.macs_unit}",
        row.verdict if row.verdict in ("match", "parameters match") else "differs",
    )


def render(report: CountReport) -> Table:
    """The report as a table for a terminal. Print ``report.notes`` below it."""
    from rich import box
    from rich.table import Table

    title = "CNN Mixture-of-Depths: counts published and ours (parameters in millions)"
    table = Table(title=title, box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for n, name in enumerate(_COLUMNS):
        table.add_column(name, justify="right" if n in _NUMBERS else "left", no_wrap=n == 1)
    for row in report.rows:
        table.add_row(*_cells(row), style=None if row.verdict == "match" else "yellow")
    return table


def markdown(report: CountReport) -> str:
    """The report as a Markdown table, its notes as a list below it."""
    lines = [_COLUMNS, tuple("---:" if n in _NUMBERS else "---" for n in range(len(_COLUMNS)))]
    lines += [_cells(row) for row in report.rows]
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in lines)
    return table + "\n\n" + "\n".join(f"- {note}" for note in report.notes) + "\n"
