"""The rows of the papers' tables, from the CSV files beside this module."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path

_DATA = {"mod": "mod.csv", "condconv": "condconv.csv", "adn": "adn.csv"}


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
    """What a paper prints.

    Args:
        method: ``"mod"`` (arXiv 2409.17016), ``"condconv"`` (1904.04971) or ``"adn"``
            (2312.16392).
        tables: numbers of tables, for example ``("1", "11")``; None is all.

    Raises:
        ValueError: an unknown method, or a table that the file does not hold.

    Example:
        >>> [str(row.params_m) for row in published_rows("mod", ["8"])]
        ['25.60', '23.10', '18.11']
    """
    if method not in _DATA:
        raise ValueError(f"no published rows for {method!r}; there are rows for {', '.join(_DATA)}")
    text = Path(__file__).with_name(f"{method}.csv").read_text(encoding="utf-8")
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
        variant=raw.get("subnet", "") if experts == "0" else f"{experts} expert{'s' * (experts != '1')}",
        params_m=number("params_m"),
        macs=number("macs") or number("macs_m") or number("macs_g"),
        macs_unit=unit,
        accuracy=number("acc"),
        accuracy_kind=raw["acc_kind"],
        counts=raw["counts"],
        note=raw["note"],
    )
