"""A paper's counts beside ours: what agrees, what does not, and the tables that say so."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import ROUND_HALF_UP, Decimal
from typing import TYPE_CHECKING, Any

from pliant import tables
from research.published.printed import PublishedRow

if TYPE_CHECKING:
    from rich.table import Table

_UNITS = {"M": 10**6, "G": 10**9, "T": 10**12}


@dataclass(frozen=True)
class CountRow:
    """A published row beside what our network counts.

    Attributes:
        published: the paper's row.
        network: the name that `timm.create_model` knows.
        options: keyword arguments that go with it.
        parameters: ours.
        macs: ours, the honest figure: convolutions and matrix products of one image.
        convention: how this row of the paper counts, a key of `Paper.conventions`.
        convention_macs: ours in that convention; None where its counter is missing.
        counter_step: what the paper's counter rounds to, in the row's unit, where that is
            coarser than the digits printed.
    """

    published: PublishedRow
    network: str
    options: dict[str, Any]
    parameters: int
    macs: int
    convention: str
    convention_macs: int | None
    counter_step: Decimal | None = None

    @property
    def parameters_m(self) -> Decimal:
        """Our parameters in millions, with as many digits as the paper prints."""
        assert self.published.params_m is not None
        return _rounded(self.parameters, "M", _last_digit(self.published.params_m))

    @property
    def printed_macs(self) -> Decimal | None:
        """Our MACs in the row's convention and unit, with as many digits as the paper."""
        assert self.published.macs is not None
        if self.convention_macs is None:
            return None
        step = self.counter_step or _last_digit(self.published.macs)
        return _rounded(self.convention_macs, self.published.macs_unit, step)

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
class Paper:
    """A paper whose counts are reproduced.

    Attributes:
        title: its name.
        conventions: name and description of each of its ways to count.
        count: a published row beside ours, or why it cannot be counted.
        uncounted: what to say where MACs could not be counted for want of a counter.
    """

    title: str
    conventions: Mapping[str, str]
    count: Callable[[PublishedRow], CountRow | str]
    uncounted: str = ""


@dataclass(frozen=True)
class CountReport:
    """What `reproduce_counts` found.

    Attributes:
        paper: whose counts these are.
        rows: published beside ours.
        left_out: rows that pliant cannot build or that print no count, with the reason.
    """

    paper: Paper
    rows: tuple[CountRow, ...]
    left_out: tuple[tuple[PublishedRow, str], ...]

    @property
    def notes(self) -> list[str]:
        """What a reader of the table has to know, a sentence a line."""
        used = {row.convention for row in self.rows}
        notes = [f"{name}: {text}" for name, text in self.paper.conventions.items() if name in used]
        notes.append("honest MACs: convolutions and matrix products of one image, nothing else")
        if any(row.convention_macs is None for row in self.rows):
            notes.append(self.paper.uncounted)
        for row in self.rows:
            p = row.published
            said = "; ".join(text for text in (p.counts, p.note) if text)
            if row.verdict != "match" or (said and p.counts != "exact"):
                notes.append(
                    f"{_name(p)}, {p.task} (Table {p.table}): {row.verdict}; the data file says: {said}"
                )
        reasons: dict[str, list[str]] = {}
        for p, reason in self.left_out:
            name = p.model.removeprefix("rival ").split()[0]
            reasons.setdefault(reason, []).append(f"{name} (Table {p.table})")
        return notes + [f"left out, {why}: {', '.join(dict.fromkeys(who))}" for why, who in reasons.items()]


def _last_digit(printed: Decimal) -> Decimal:
    """What one more in the last digit of `printed` would add."""
    return Decimal(1).scaleb(int(printed.as_tuple().exponent))


def _rounded(value: int, unit: str, step: Decimal) -> Decimal:
    """`value` in `unit`, rounded to a multiple of `step`."""
    return (Decimal(value) / _UNITS[unit] / step).quantize(Decimal(1), ROUND_HALF_UP) * step


def _name(p: PublishedRow) -> str:
    """The row's network, with its variant where it has one."""
    return f"{p.model}, {p.variant}" if p.variant else p.model


HEADINGS = ("Table", "Network", "Params", "ours", "MACs", "ours", "honest", "Verdict")
TEXT = ("Table", "Network", "Verdict")


def cells(report: CountReport) -> list[tuple[str, ...]]:
    """Cells of the report's table, whose headings are `HEADINGS`, in the order of the paper's tables."""
    return [_cells(row) for row in sorted(report.rows, key=lambda row: int(row.published.table))]


def _cells(row: CountRow) -> tuple[str, ...]:
    p = row.published
    assert p.macs is not None
    step = Decimal("0.001") if p.macs_unit == "G" else _last_digit(p.macs)
    return (
        p.table,
        _name(p) if p.task == "imagenet" else f"{_name(p)}/{p.task}",
        str(p.params_m),
        str(row.parameters_m),
        f"{p.macs} {p.macs_unit}",
        "not counted" if row.printed_macs is None else f"{row.printed_macs} {p.macs_unit}",
        f"{_rounded(row.macs, p.macs_unit, step)} {p.macs_unit}",
        row.verdict if row.verdict in ("match", "parameters match") else "differs",
    )


def render(report: CountReport) -> Table:
    """The report as a table for a terminal. Print ``report.notes`` below it."""
    title = f"{report.paper.title}: counts published and ours (parameters in millions)"
    return tables.terminal(HEADINGS, cells(report), TEXT, title=title)


def markdown(report: CountReport) -> str:
    """The report as a Markdown table, its notes as a list below it."""
    notes = "\n".join(f"- {note}" for note in report.notes)
    return f"{tables.markdown(HEADINGS, cells(report), TEXT)}\n\n{notes}\n"
