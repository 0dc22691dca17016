"""Rows of results: a flat dataclass each, written to a CSV file and read back from it."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import Field, dataclass, fields
from decimal import Decimal
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from pliant._files import atomic_path
from pliant._lock import held


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a row comes from, as `pliant.provenance.provenance` tells it: its last columns.

    Attributes:
        cpu: model of the processor.
        cores: logical processors that the process might use.
        gpu: model of the GPU, empty where none was used.
        os: system and machine architecture.
        python: version, as the three below.
        torch: PyTorch, with its build (``2.11.0+cpu``).
        timm: timm.
        pliant: pliant.
        commit: of pliant's source tree, ``-dirty`` where the package differed from it;
            empty where pliant was installed rather than checked out.
        date: UTC, ISO 8601; of a training run, when it began.
        instructions: instruction sets of the processor that decide how fast networks run, and variables
            that limit them (``avx2 avx512f avx512_vnni``); two processors of one model name may differ.
        governor: how the system chooses the processor's frequency (``performance``); empty where it does
            not say, as in most virtual machines.
        load: threads of the whole machine that computed or waited to, on average over the last minute,
            this process's own among them; None where the system does not say.
        PERCENT: columns of shares in [0, 1], which a file has in percent.
        LATE: columns that a kind of row got after files of it were written: they stand behind all
            others, have defaults, and may be missing from a file.
    """

    PERCENT: ClassVar[tuple[str, ...]] = ()
    LATE: ClassVar[tuple[str, ...]] = ("instructions", "governor", "load")

    cpu: str = ""
    cores: int = 0
    gpu: str = ""
    os: str = ""
    python: str = ""
    torch: str = ""
    timm: str = ""
    pliant: str = ""
    commit: str = ""
    date: str = ""
    instructions: str = ""
    governor: str = ""
    load: float | None = None

    @property
    def hardware(self) -> str:
        """What computed: the GPU, or the processor with its cores and instruction sets.

        Example:
            >>> Origin(cpu="EPYC", cores=2, instructions="avx2").hardware
            'EPYC (2 cores, avx2)'
        """
        about = ", ".join(filter(None, [f"{self.cores} cores", self.instructions]))
        return self.gpu or (f"{self.cpu} ({about})" if self.cpu else "")

    @property
    def short_commit(self) -> str:
        """Twelve digits of the commit, and ``-dirty`` if it is."""
        return self.commit[:12] + "-dirty" * self.commit.endswith("-dirty")


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


T = TypeVar("T", bound=_Dataclass)


def columns(kind: type[_Dataclass]) -> list[str]:
    """Names of a row's columns: its own, then those of its `Origin`, then those of `Origin.LATE`.

    Example:
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Row(Origin):
        ...     network: str
        >>> columns(Row)[:3], columns(Row)[-1]
        (['network', 'cpu', 'cores'], 'load')
    """
    origin, late = [f.name for f in fields(Origin)], getattr(kind, "LATE", ())
    own = [f.name for f in fields(kind)]
    first = [name for name in own if name not in origin and name not in late]
    return [*first, *(name for name in origin if name in own and name not in late), *late]


def _lacking(header: list[str], kind: type[_Dataclass]) -> list[str] | None:
    """Columns of `Origin.LATE` that an older file has not; None if its columns are others altogether."""
    known, late = columns(kind), getattr(kind, "LATE", ())
    return (
        known[len(header) :] if header in [known[: len(known) - n] for n in range(len(late) + 1)] else None
    )


def percent(share: float) -> float:
    """A share in percent, without the digits that a multiplication by 100 would add.

    Example:
        >>> percent(0.57), 100 * 0.57
        (57.0, 56.99999999999999)
    """
    return float(_moved(share, 2))


def _moved(number: float | str, places: int) -> Decimal:
    """A number with its decimal point moved, exact in decimals, so that files give back what they got."""
    return Decimal(str(number)).scaleb(places)


def cells(row: _Dataclass, number: str = "") -> list[str]:
    """A row's cells as text, in the order of `columns`: None as ``""``, (3, 32, 32) as ``3x32x32``.

    Shares of `Origin.PERCENT` are given in percent.

    Args:
        row: of a flat dataclass.
        number: format of floats, such as ``.4f``; by default all digits.

    Example:
        >>> cells(Origin(cpu="a", cores=2))[:2]
        ['a', '2']
    """
    shares = getattr(row, "PERCENT", ())
    values = ((name, getattr(row, name)) for name in columns(type(row)))
    return [_text(_moved(v, 2) if name in shares and v is not None else v, number) for name, v in values]


def _text(value: Any, number: str) -> str:
    if value is None:
        return ""
    if isinstance(value, tuple):
        return "x".join(map(str, value))
    if isinstance(value, Decimal):
        return format(value, number or "f")
    return format(value, number) if isinstance(value, float) else str(value)


@contextmanager
def appending(path: str | Path) -> Iterator[None]:
    """Hold a file of rows while it is read and written anew: no process loses the rows of another."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with held(path.with_name(f".{path.name}.lock"), wait=True, keep=False):
        yield


def write_records(
    path: str | Path,
    kind: type[T],
    rows: Iterable[T],
    *,
    append: bool = False,
    number: str = "",
    called: str = "",
) -> None:
    """Write rows to a CSV file, whole or not at all.

    Args:
        path: the file; its folder is made if it is missing.
        kind: the dataclass of the rows, whose fields are the columns.
        rows: may be none, which leaves the header.
        append: keep the rows that the file has, also those that another process adds at this moment;
            columns that it lacks (`Origin.LATE`) are added. A run that is repeated gives its rows
            again, and they are not added a second time.
        number: format of floats, as for `cells`.
        called: what the rows are called in an error; by default the dataclass by its name.

    Raises:
        ValueError: `append` to a file with other columns.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     for cores in (1, 2, 1):
        ...         write_records(f"{folder}/a.csv", Origin, [Origin(cores=cores)], append=True)
        ...     [row.cores for row in read_records(f"{folder}/a.csv", Origin)]
        [1, 2]
    """
    path, header = Path(path), columns(kind)
    new = [cells(row, number) for row in rows]
    with appending(path) if append else nullcontext():
        old: list[list[str]] = []
        if append and path.exists():
            with path.open(newline="", encoding="utf-8") as file:
                first, *old = list(csv.reader(file)) or [[]]
            lacking = _lacking(first, kind)
            if lacking is None:
                raise ValueError(
                    f"{path} has the columns {first}, which are not those of "
                    f"{called or f'a {kind.__name__}'}; name another file"
                )
            defaults = {f.name: f.default for f in fields(kind)}
            old = [[*row, *(_text(defaults[name], number) for name in lacking)] for row in old]
        with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(header)
            writer.writerows([*old, *(row for row in new if row not in old)])


def read_records(path: str | Path, kind: type[T], *, called: str = "") -> list[T]:
    """The rows of a CSV file whose columns are the fields of a flat dataclass.

    Args:
        path: the file.
        kind: a dataclass of ``str``, ``int``, ``float``, ``bool``, ``tuple[int, int, int]``, and
            these or None (an empty cell).
        called: what the rows are called in an error; by default the dataclass by its name.

    Raises:
        ValueError: other columns, or a cell that is not of its field's type; names file and line.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    types = {f.name: str(f.type) for f in fields(kind)}
    kinds = {name: types[name] for name in columns(kind)}
    shares = getattr(kind, "PERCENT", ())
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.reader(file, strict=True)
            header = next(reader, [])
            if _lacking(header, kind) is None:
                odd = ", ".join(sorted(set(header) ^ set(kinds))) or "they are in another order"
                what = called or f"a {kind.__name__}"
                raise ValueError(f"{path}, line 1: the columns are not those of {what}: {odd}")
            return [
                kind(**_values(kinds, shares, header, texts, f"{path}, line {reader.line_num}"))
                for texts in reader
            ]
    except (csv.Error, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no readable CSV file: {error}") from error


def _values(
    kinds: dict[str, str], shares: Sequence[str], header: list[str], texts: list[str], where: str
) -> dict[str, Any]:
    if len(texts) != len(header):
        raise ValueError(f"{where}: {len(texts)} cells, not {len(header)}; the line is damaged")
    values = {}
    for name, text in zip(header, texts, strict=True):
        try:
            value = _value(kinds[name], text)
            share = name in shares and value is not None
            values[name] = float(_moved(text, -2)) if share else value
        except ValueError:
            raise ValueError(
                f"{where}: {name} is {text!r}, which is no {kinds[name]}; the line is damaged"
            ) from None
    return values


def _value(kind: str, text: str) -> Any:
    if kind.endswith("| None"):
        if not text:
            return None
        kind = kind.removesuffix(" | None")
    if kind == "bool":
        if text not in ("True", "False"):
            raise ValueError
        return text == "True"
    if kind == "tuple[int, int, int]":
        first, second, third = map(int, text.split("x"))
        return first, second, third
    return {"int": int, "float": float, "str": str}[kind](text)
