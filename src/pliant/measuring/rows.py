"""Rows of measurements: `Measurement`, to CSV and back, and as tables to read.

CSV keeps everything. Tables keep what the figures can bear: ratios to two decimals and
the tax in percent, both with their spread, and times to the digit where their spread
begins. What is the same in all rows (threads, batch, engine, pixels, ...) stands once
above the table; what differs is a column.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pliant import tables
from pliant.records import Origin, appending, percent, read_records, write_records

if TYPE_CHECKING:
    from rich.table import Table

AS_IS = "network"
LOWER_RESOLUTION = "lower resolution"

# Forms: what was done to a network before an engine got it.
AS_BUILT = "as built"
PLAIN_FORM = "plain"
OPTIMIZED = "optimized"
NATIVE = "native"
FORMS = (AS_BUILT, PLAIN_FORM, OPTIMIZED, NATIVE)
OF_PARTS = (OPTIMIZED, NATIVE)  # which only networks have whose parts have such forms


def is_control(variant: str) -> bool:
    """Whether a variant is a network without the parts of its method (`Method.without_label`).

    Example:
        >>> is_control("without MoD blocks"), is_control(AS_IS)
        (True, False)
    """
    return variant.startswith("without ")


@dataclass(frozen=True, kw_only=True)
class Measurement(Origin):
    """One row: one network in one engine, timed beside the others of its run.

    Times are for a whole batch. A spread (``_iqr``) is the interquartile range over
    rounds. Ratios and the tax are taken within each round and then their median, so
    that a drift of the machine cancels. None: not applicable, or not measured.

    Attributes:
        model: the network's name.
        variant: ``network``, ``lower resolution``, or the control's name, such as
            ``without MoD blocks``.
        parameters: learnable values.
        macs: multiply-accumulates of one image.
        input_size: channels, height, width.
        batch: images a forward.
        device: ``cpu`` or ``cuda``.
        engine: name in `pliant.deploy.engines.ENGINES`.
        dtype: in which it computes; of weights and images too where PyTorch runs it.
        channels_last: memory format of both; False where the engine chooses it itself.
        threads: threads of PyTorch's pool, or of the engine's.
        rounds: rounds that were timed.
        median_ms: median time of a forward over rounds.
        iqr_ms: its spread.
        min_ms: time of a forward in the fastest round.
        max_ms: time of a forward in the slowest round.
        against: name of the baseline.
        time_ratio: time over the baseline's.
        time_ratio_iqr: its spread.
        mac_ratio: multiply-accumulates over the baseline's.
        tax: time over that of the control, minus one; of several controls, the first.
        tax_iqr: its spread.
        accuracy: top-1, a share in [0, 1] (percent in tables and files), where somebody has measured it
            (`dataclasses.replace`).
        note: what a reader must know, for example that operations fell and time did not.
        error: why there are no times.
        form: ``as built``; ``plain``: its norms folded into the layers before them;
            ``optimized``: that, and the parts of its methods in the engine's best form; or
            ``native``: these as operators in the engine's own layout, for this machine.
        runtime: the engine and its version, where it is not PyTorch.
    """

    PERCENT: ClassVar[tuple[str, ...]] = ("accuracy",)
    LATE: ClassVar[tuple[str, ...]] = ("form", "runtime", *Origin.LATE)

    model: str
    variant: str = AS_IS
    parameters: int | None = None
    macs: int | None = None
    input_size: tuple[int, int, int] | None = None
    batch: int = 1
    device: str = "cpu"
    engine: str = "eager"
    dtype: str = "float32"
    channels_last: bool = False
    threads: int = 1
    rounds: int = 0
    median_ms: float | None = None
    iqr_ms: float | None = None
    min_ms: float | None = None
    max_ms: float | None = None
    against: str = ""
    time_ratio: float | None = None
    time_ratio_iqr: float | None = None
    mac_ratio: float | None = None
    tax: float | None = None
    tax_iqr: float | None = None
    accuracy: float | None = None
    note: str = ""
    error: str = ""
    form: str = AS_BUILT
    runtime: str = ""

    @property
    def speedup(self) -> float | None:
        """The baseline's time over this one's."""
        return None if self.time_ratio is None else 1 / self.time_ratio

    @property
    def undecided(self) -> bool:
        """Whether a spread is so large (`pliant.tables.LIMIT`) that the row has to be measured again.

        Example:
            >>> Measurement(model="a", tax=5.99, tax_iqr=8.6).undecided
            True
        """
        taxed = None if self.tax is None else 1 + self.tax
        figures = (
            (self.median_ms, self.iqr_ms),
            (self.time_ratio, self.time_ratio_iqr),
            (taxed, self.tax_iqr),
        )
        return any(tables.undecided(*figure) for figure in figures)

    @property
    def label(self) -> str:
        """Name for tables and plots: the model, and what was changed in it or at it.

        Example:
            >>> Measurement(model="resnet50", variant="lower resolution", input_size=(3, 176, 176)).label
            'resnet50 at 176 px'
        """
        if self.variant == AS_IS:
            return f"{self.model}, {self.form}" if self.form in OF_PARTS else self.model
        if self.variant == LOWER_RESOLUTION:
            return f"{self.model} at {_pixels(self.input_size)} px"
        return f"{self.model} {self.variant}"


def write_rows(path: str | Path, rows: Iterable[Measurement], append: bool = False) -> None:
    """Write rows to a CSV file with a header; the file is replaced whole or not at all.

    Args:
        path: the file; its folder is made if missing.
        rows: may be none, which leaves the header.
        append: keep the rows that the file has, also those that another process adds at this moment.

    Raises:
        ValueError: `append` to a file that `read_rows` refuses.
    """
    with appending(path) if append else nullcontext():
        kept = read_rows(path) if append and Path(path).exists() else []
        write_records(path, Measurement, [*kept, *rows])


def read_rows(path: str | Path) -> list[Measurement]:
    """Rows that `write_rows` wrote, exactly as they were.

    Raises:
        ValueError: a damaged or foreign file; the message names file and line.
        FileNotFoundError: no such file.
    """
    return read_records(path, Measurement, called="measurements")


def grouped(rows: Iterable[Measurement]) -> list[list[Measurement]]:
    """Rows by the run that they come from, in order; one run is one table.

    Example:
        >>> rows = [Measurement(model=m, batch=b) for b in (1, 16) for m in ("resnet50", "resnet50_mod")]
        >>> [len(group) for group in grouped(rows)]
        [2, 2]
    """
    groups: dict[Any, list[Measurement]] = {}
    for r in rows:
        machine = (r.cpu, r.cores, r.gpu, r.instructions)
        run = (*machine, r.device, r.threads, r.engine, r.batch, r.dtype, r.channels_last, r.against)
        groups.setdefault(run, []).append(r)
    return list(groups.values())


Text = Callable[[Measurement], str]

# name of a column: heading, and what a row says in it (empty: nothing).
COLUMNS: dict[str, tuple[str, Text]] = {
    "label": ("network", lambda r: r.label),
    "parameters": ("params, M", lambda r: _scaled(r.parameters, 1e6)),
    "macs": ("MACs, G", lambda r: _scaled(r.macs, 1e9)),
    "time": ("time, ms", lambda r: tables.with_spread(r.median_ms, r.iqr_ms, None)),
    "time_ratio": ("time ratio", lambda r: tables.with_spread(r.time_ratio, r.time_ratio_iqr, 2)),
    "mac_ratio": ("MAC ratio", lambda r: tables.with_spread(r.mac_ratio, None, 2)),
    "speedup": ("speed-up", lambda r: _speedup(r)),
    "tax": ("tax", lambda r: tax_text(r)),
    "accuracy": ("top-1, %", lambda r: "" if r.accuracy is None else f"{percent(r.accuracy):.2f}"),
    "note": ("note", lambda r: _note(r)),
}

# What a figure depends on: above the table where all rows agree, else a column.
CONDITIONS: dict[str, tuple[str, Text]] = {
    "hardware": ("hardware", lambda r: r.hardware),
    "device": ("device", lambda r: r.device),
    "threads": ("threads", lambda r: str(r.threads)),
    "engine": ("engine", lambda r: r.engine),
    "norms": ("norms", lambda r: "" if r.form == AS_BUILT else "folded"),
    "batch": ("batch", lambda r: str(r.batch)),
    "pixels": ("pixels", lambda r: _pixels(r.input_size)),
    "dtype": ("dtype", lambda r: r.dtype),
    "layout": ("memory format", lambda r: "channels_last" if r.channels_last else "contiguous"),
    "rounds": ("rounds", lambda r: str(r.rounds)),
    "against": ("ratios against", lambda r: r.against),
}

# Always above the table, all that occur.
ORIGINS: dict[str, tuple[str, Text]] = {
    "torch": ("torch", lambda r: r.torch),
    "runtime": ("by", lambda r: r.runtime),
    "commit": ("commit", lambda r: r.short_commit),
    "date": ("measured", lambda r: r.date[:10]),
    "governor": ("governor", lambda r: r.governor),
    "load": ("load", lambda r: "" if r.load is None else f"{r.load:.1f}"),
}
LEGEND = "in brackets: interquartile range over rounds"


def markdown_table(
    rows: Sequence[Measurement],
    columns: Sequence[str] | None = None,
    leave_out: Sequence[str] = (),
) -> str:
    """Rows as a Markdown table under a line that states the conditions they share.

    Args:
        rows: measurements, in the order they shall have.
        columns: names in `COLUMNS`; by default all that say something in these rows.
            Conditions on which rows differ are shown too.
        leave_out: names in `CONDITIONS` that are not, because a reader sees them anyhow.

    Raises:
        ValueError: a column that does not exist.

    Example:
        >>> print(markdown_table([Measurement(model="a", median_ms=2.51, iqr_ms=0.2)], ["label", "time"]))
        device cpu · threads 1 · engine eager · batch 1 · ...
        <BLANKLINE>
        | network | time, ms |
        |---|---:|
        | a | 2.5 (0.2) |
    """
    shared, headings, body = layout(rows, columns, leave_out)
    return f"{shared}\n\n{tables.markdown(headings, body, _LEFT)}"


def terminal_table(
    rows: Sequence[Measurement],
    columns: Sequence[str] | None = None,
    leave_out: Sequence[str] = (),
    width: int | None = None,
) -> Table:
    """As `markdown_table`, for `rich.print`, and narrower: notes stand below, speed-ups do not.

    Args:
        rows: as for `markdown_table`; so are `columns` and `leave_out`.
        columns: names in `COLUMNS`.
        leave_out: names in `CONDITIONS`.
        width: characters of a line; columns of `SPARE` are left out until the table fits, rather than
            cut short. None: all stay.
    """
    notes = [f"{r.label}: {text}" for r in rows if (text := COLUMNS["note"][1](r))] if not columns else []
    if columns is None:
        told = [n for n, (_, text) in COLUMNS.items() if any(map(text, rows))]
        columns = [n for n in told if n not in ("speedup", "note")]
    spare = iter(SPARE)
    while True:
        shared, headings, body = layout(rows, columns, leave_out)
        headings = [heading.replace(" ", "\n") for heading in headings]
        table = tables.terminal(headings, body, _LEFT, caption="\n".join([*notes, shared]))
        if width is None or tables.narrowest(table) <= width or (less := next(spare, None)) is None:
            return table
        columns = [name for name in columns if name != less]


SPARE = (
    "mac_ratio",
    "time",
    "parameters",
    "accuracy",
)  # what a narrow terminal does without, the first first
_LEFT = {heading for name in ("label", "note") for heading in [COLUMNS[name][0]]}


def layout(
    rows: Sequence[Measurement], columns: Sequence[str] | None, leave_out: Sequence[str] = ()
) -> tuple[str, list[str], list[list[str]]]:
    """What every table of rows says, for whoever draws one.

    Args:
        rows: measurements.
        columns: as for `markdown_table`.
        leave_out: as for `markdown_table`.

    Returns:
        A line of the conditions that all rows share, the headings, and each row's cells.

    Raises:
        ValueError: a column that does not exist.
    """
    for name in columns or ():
        if name not in COLUMNS:
            raise ValueError(f"no column {name!r}; the columns are {', '.join(COLUMNS)}")
    shared, differing = [], {}
    for name, (heading, text) in CONDITIONS.items():
        told = {text(r) for r in rows if not _silent(r, name)} - {""}
        if name in leave_out:
            continue
        if len(told) > 1:
            differing[name] = (heading, text)
        elif told and (name, told) != ("rounds", {"0"}):
            shared.append(f"{heading} {told.pop()}")
    for heading, text in ORIGINS.values():
        if all_told := sorted({text(r) for r in rows} - {""}):
            shared.append(f"{heading} {', '.join(all_told)}")
    if any(r.iqr_ms is not None for r in rows):
        shared.append(LEGEND)
    if any(r.undecided for r in rows):
        shared.append(tables.WHY_UNDECIDED)
    if any(r.tax is not None for r in rows):
        first = {r.model: r for r in reversed(rows) if is_control(r.variant)}.values()
        shared.append(f"tax: time over that {' or '.join(controls(first)) or 'of the control'}")
    wanted = columns or [n for n, (_, text) in COLUMNS.items() if n == "label" or any(map(text, rows))]
    chosen = [COLUMNS[n] for n in wanted]
    at = list(wanted).index("label") + 1 if "label" in wanted else 0
    chosen[at:at] = differing.values()
    return " · ".join(shared), [h for h, _ in chosen], [[text(r) for _, text in chosen] for r in rows]


def controls(rows: Iterable[Measurement]) -> list[str]:
    """What the controls among rows are called, each once."""
    return list(dict.fromkeys(r.variant for r in rows if is_control(r.variant)))


def _silent(row: Measurement, condition: str) -> bool:
    """Rows without times say nothing of rounds; a lower resolution stands in the name."""
    return (
        bool(row.error)
        if condition == "rounds"
        else condition == "pixels" and row.variant == LOWER_RESOLUTION
    )


def _pixels(size: tuple[int, int, int] | None) -> str:
    if size is None:
        return ""
    return str(size[1]) if size[1] == size[2] else f"{size[1]}x{size[2]}"


def _scaled(value: int | None, unit: float) -> str:
    """A count in its unit, to three digits: 25.6, 0.0406. Counts are exact in the CSV."""
    if value is None:
        return ""
    if value == 0:
        return "0"
    decimals = max(0, 2 - math.floor(math.log10(value / unit)))
    return f"{value / unit:.{min(decimals, 6)}f}"


def tax_text(row: Measurement) -> str:
    """The tax in percent with its spread, as tables say it; empty where there is none."""
    tax, spread = (None if share is None else 100 * share for share in (row.tax, row.tax_iqr))
    return tables.with_spread(tax, spread, 0, " %", over=100)


def _speedup(row: Measurement) -> str:
    if tables.undecided(row.time_ratio, row.time_ratio_iqr):
        return tables.UNDECIDED
    return "" if row.speedup is None else f"{row.speedup:.2f}x"


def _note(row: Measurement) -> str:
    if row.error:
        return f"not measured: {row.error}"
    return "; ".join(filter(None, [tables.MACHINE_BUSY * row.undecided, row.note]))
