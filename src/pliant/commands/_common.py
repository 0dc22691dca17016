"""What commands share: arguments that several take, and what they print."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from pliant.surgery import Method

Changes = Annotated[
    list[str] | None, typer.Argument(help="key=value changes, such as epochs=5 seed=1 model_args.c=16")
]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
Threads = Annotated[int | None, typer.Option(help="of PyTorch; by default as many as it takes")]


def show(table: Table) -> None:
    """Print a table to the terminal, or whole to a pipe."""
    from rich.console import Console

    console = Console()
    # What is piped is not cut to a terminal's width.
    (console if console.is_terminal else Console(width=200)).print(table)


def options_of(method: type[Method], changes: list[str]) -> dict[str, Any]:
    """``["c=16", "order=index"]`` as keyword arguments of a method."""
    from pliant._options import literal

    known = inspect.signature(method).parameters
    options = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"{change!r} is not of the form key=value, such as c=16")
        if key not in known:
            raise ValueError(f"{method.__name__} has no option {key!r}; it has {', '.join(sorted(known))}")
        options[key] = literal(text)
    return options


def network_of(name: str) -> Any:
    """A folder that `save` or `train` wrote, as its network; any other name as it is."""
    from pliant.checkpoint import load
    from pliant.train.run import BEST

    folder = Path(name)
    if not folder.is_dir():
        return name
    return load(folder / BEST if (folder / BEST).is_dir() else folder)


@contextmanager
def progress_bar(console: Console, title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar for functions that report ``(done, total, what)``, as `measure` does."""
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(title), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("")
        yield lambda done, total, what: progress.update(task, completed=done, total=total, description=what)


@contextmanager
def progress_of(title: str) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar for functions that report ``(done, total, what)``."""
    from rich.console import Console

    with progress_bar(Console(stderr=True), title) as step:
        yield step
