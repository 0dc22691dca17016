"""Rows of a dataclass read back from the CSV file that they were written to."""

from __future__ import annotations

import csv
from collections.abc import Collection
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol, TypeVar


class _Dataclass(Protocol):
    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]


T = TypeVar("T", bound=_Dataclass)


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
    kinds = {f.name: str(f.type) for f in fields(kind)}
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
