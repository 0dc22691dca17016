"""Rows of results: a flat dataclass each, written to a CSV file and read back from it."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar

from pliant._files import atomic_path


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
    """

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

    @property
    def short_commit(self) -> str:
        """Twelve digits of the commit, and ``-dirty`` if it is."""
        return self.commit[:12] + "-dirty" * self.commit.endswith("-dirty")


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


T = TypeVar("T", bound=_Dataclass)


def columns(kind: type[_Dataclass]) -> list[str]:
    """Names of a row's columns: its own, then those of its `Origin`.

    Example:
        >>> @dataclass(frozen=True, kw_only=True)
        ... class Row(Origin):
        ...     network: str
        >>> columns(Row)[:3], columns(Row)[-1]
        (['network', 'cpu', 'cores'], 'date')
    """
    origin = [f.name for f in fields(Origin)]
    own = [f.name for f in fields(kind)]
    return [name for name in own if name not in origin] + [name for name in origin if name in own]


def cells(row: _Dataclass, number: str = "") -> list[str]:
    """A row's cells as text, in the order of `columns`; None gives an empty one.

    Args:
        row: of a flat dataclass.
        number: format of floats, such as ``.4f``; by default all digits.

    Example:
        >>> cells(Origin(cpu="a", cores=2))[:2]
        ['a', '2']
    """
    values = (getattr(row, name) for name in columns(type(row)))
    return [format(v, number) if isinstance(v, float) else "" if v is None else str(v) for v in values]


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
        append: keep the rows that the file has. A run that is repeated gives its rows again, and
            they are not added a second time.
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
    old: list[list[str]] = []
    if append and path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            first, *old = list(csv.reader(file)) or [[]]
        if first != header:
            raise ValueError(
                f"{path} has the columns {first}, which are not those of {called or f'a {kind.__name__}'}; "
                f"name another file"
            )
    new = [cells(row, number) for row in rows]
    with atomic_path(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows([*old, *(row for row in new if row not in old)])


def read_records(path: str | Path, kind: type[T], *, called: str = "") -> list[T]:
    """The rows of a CSV file whose columns are the fields of a flat dataclass.

    Args:
        path: the file.
        kind: a dataclass of ``str``, ``int``, ``float``, ``bool``, and these or None (an empty cell).
        called: what the rows are called in an error; by default the dataclass by its name.

    Raises:
        ValueError: other columns, or a cell that is not of its field's type; names file and line.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    types = {f.name: str(f.type) for f in fields(kind)}
    kinds = {name: types[name] for name in columns(kind)}
    found = []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, strict=True)
        if list(reader.fieldnames or []) != list(kinds):
            raise ValueError(f"{path}: the columns are not those of {called or f'a {kind.__name__}'}")
        for row in reader:
            try:
                if None in row or None in row.values():
                    raise ValueError("it has not as many cells as there are columns")
                found.append(kind(**{name: _value(kinds[name], text) for name, text in row.items()}))
            except ValueError as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}; the line is damaged") from error
    return found


def _value(kind: str, text: str) -> Any:
    if kind.endswith("| None"):
        if not text:
            return None
        kind = kind.removesuffix(" | None")
    if kind == "bool":
        if text not in ("True", "False"):
            raise ValueError(f"{text!r} is neither True nor False")
        return text == "True"
    return {"int": int, "float": float, "str": str}[kind](text)
