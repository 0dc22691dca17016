"""Tables of results in Markdown files, between marks."""

from __future__ import annotations

from pathlib import Path

from pliant._files import atomic_path


def put_between(path: str | Path, begin: str, end: str, text: str) -> None:
    """Put `text` between two marks of a text file, in place of what stands there.

    Raises:
        ValueError: the file has not both marks.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "a.md"
        ...     _ = path.write_text("A table: [old]")
        ...     put_between(path, "[", "]", "new")
        ...     path.read_text().split()
        ['A', 'table:', '[', 'new', ']']
    """
    path = Path(path)
    before, first, rest = path.read_text(encoding="utf-8").partition(begin)
    _, second, after = rest.partition(end)
    if not first or not second:
        raise ValueError(f"{path} has no part between {begin} and {end} for the table; add the two lines")
    with atomic_path(path) as temporary:
        temporary.write_text(f"{before}{begin}\n{text}\n{end}{after}", encoding="utf-8")
