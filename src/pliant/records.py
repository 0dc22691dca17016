"""Rows of results: a flat dataclass each, written to a CSV file and read back from it."""

from __future__ import annotations

import csv
from collections.abc import Collection
from dataclasses import Field, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar


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


def read_records(
    path: str | Path, kind: type[T], *, called: str = "", added: Collection[str] = ()
) -> list[T]:
    """The rows of a CSV file whose columns are the fields of a flat dataclass.

    Args:
        path: the file.
        kind: a dataclass of ``str``, ``int``, ``float``, ``bool``, and these or None (an empty cell).
        called: what the rows are called in an error; by default the dataclass by its name.
        added: fields that older files have no columns of; rows of these get their defaults. A file
            has all of them or none.

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
        if list(reader.fieldnames or []) not in (list(kinds), [n for n in kinds if n not in added]):
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
