"""Rows of a dataclass read back from the CSV file that they were written to."""

from __future__ import annotations

import csv
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")


def read_records(path: str | Path, kind: type[T], *, added: Collection[str] = ()) -> list[T]:
    """The rows of a CSV file whose columns are the fields of a flat dataclass.

    Args:
        path: the file.
        kind: a dataclass of ``str``, ``int``, ``float``, ``bool``, and these or None (an empty cell).
        added: fields that older files have no columns of; rows of these get their defaults. A file
            has all of them or none.

    Raises:
        ValueError: other columns, or a cell that is not of its field's type; names file and line.
        FileNotFoundError: no such file.
    """
    path = Path(path)
    kinds = {f.name: str(f.type) for f in fields(kind)}  # type: ignore[arg-type]
    found = []
    with path.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file, strict=True)
        if list(reader.fieldnames or []) not in (list(kinds), [n for n in kinds if n not in added]):
            raise ValueError(f"{path}: its columns are not those of a {kind.__name__}")
        for row in reader:
            try:
                if None in row or None in row.values():
                    raise ValueError("it has not as many cells as there are columns")
                found.append(kind(**{name: _value(kinds[name], text) for name, text in row.items()}))
            except ValueError as error:
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
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
