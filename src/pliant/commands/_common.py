"""What commands share: arguments that several take, networks by name, and printing."""

from __future__ import annotations

import inspect
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from pliant.method import Method

Changes = Annotated[
    list[str] | None,
    typer.Argument(help="Changes of the recipe: key=value, such as epochs=5 model_args.c=16"),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="digits, cifar10, cifar100, folder, imagenet or shards; by default the run's own data"
    ),
]
Device = Annotated[str, typer.Option(help="cpu or cuda")]
Network = Annotated[
    str, typer.Argument(help="Network of timm, or folder that `train` or `pliant.save` wrote")
]
Pixels = Annotated[
    int | None, typer.Option(help="Height and width of the images; by default the network's own", min=1)
]
Threads = Annotated[
    int | None, typer.Option(help="CPU threads; by default as many as PyTorch takes", min=1)
]


def show(table: Table) -> None:
    """Print a table to the terminal, or whole to a pipe."""
    from rich.console import Console

    Console(width=width()).print(table)


def width() -> int:
    """Characters of a line of the terminal; what is piped is not cut to a terminal's width."""
    from rich.console import Console

    console = Console()
    return console.width if console.is_terminal else 200


def options_of(method: type[Method], changes: list[str]) -> dict[str, Any]:
    """``["c=16", "order=index"]`` as keyword arguments of a method."""
    from pliant._options import literal, refuse_unknown

    known = [*inspect.signature(method).parameters]
    options = {}
    for change in changes:
        key, equals, text = change.partition("=")
        if not equals:
            raise ValueError(f"{change!r} is no option of the method; write key=value, such as c=16")
        refuse_unknown([key], known, method.__name__)
        options[key] = literal(text)
    return options


def network_of(name: str) -> Any:
    """The network in a folder that `pliant.save` or `train` wrote; any other name as it is."""
    from pliant.checkpoint import load
    from pliant.train.run import network_folder

    folder = Path(name)
    return load(network_folder(folder)) if folder.is_dir() else name


def built(name: str, device: str = "cpu", num_classes: int | None = None) -> Any:
    """The network in a folder, or a network of timm with random weights, always the same, on `device`.

    Args:
        name: folder or network.
        device: of a network of timm.
        num_classes: classes; of a network in a folder the classifier is made anew. None: its own.
    """
    import torch

    from pliant.models._build import check_network, create

    found = network_of(name)
    if not isinstance(found, str):
        if num_classes is not None:
            found.reset_classifier(num_classes)
        return found
    check_network(found, ", and there is no such folder")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return create(found, device, num_classes=num_classes)


@contextmanager
def going_on(advice: str = "") -> Iterator[None]:
    """End on Ctrl-C or a signal with one sentence that says how to go on, and the signal's status.

    Args:
        advice: how to go on; empty: what `pliant.fit` says.
    """
    from pliant.train.fitting import Terminated

    try:
        yield
    except (KeyboardInterrupt, Terminated) as stop:
        # Statuses of their own, by which a job knows that it is to go on.
        number = signal.SIGINT if isinstance(stop, KeyboardInterrupt) else signal.SIGTERM
        told = f"stopped; {advice}" if advice else str(stop) or "interrupted"
        typer.secho(f"pliant: {told}", fg="red", err=True)
        raise typer.Exit(128 + number) from stop


@contextmanager
def progress_of(title: str, console: Console | None = None) -> Iterator[Callable[[int, int, str], None]]:
    """A progress bar for functions that report ``(done, total, what)``, as `measure` does.

    Args:
        title: what stands before the bar.
        console: where the bar is drawn; None: the error stream.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn(title), BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console or Console(stderr=True)) as progress:
        task = progress.add_task("")
        yield lambda done, total, what: progress.update(task, completed=done, total=total, description=what)
