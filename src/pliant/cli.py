"""The command line: ``pliant COMMAND --help`` describes each command.

Each command (`pliant.commands`) is a thin layer over functions of the library, which it imports
when it runs: help needs no torch. A mistake that a user can mend is a `ValueError`, `OSError` or
`ImportError` there, and one sentence without a traceback here.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from pliant._version import __version__
from pliant.commands import data, deploying, networks, reading, timing, training


def assemble(about: str, *commands: Callable[..., None]) -> typer.Typer:
    """A command line of these commands, which answers ``--help``, ``-h`` and ``--version``.

    Args:
        about: what the help says first.
        commands: functions whose parameters Typer reads.
    """
    app = typer.Typer(
        no_args_is_help=True,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback(help=about)(_options)
    for command in commands:
        first = (command.__doc__ or "").partition("\n")[0]  # Typer would cut it off at 45 characters
        app.command(short_help=first)(command)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pliant {__version__}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print pliant's version"),
    ] = False,
) -> None: ...


app = assemble(
    "Conditional and adaptive computation for vision networks.",
    networks.models,
    networks.plan,
    deploying.export,
    timing.measure,
    timing.depths,
    data.shards,
    training.recipes,
    training.train,
    training.evaluate,
    reading.inspect,
    training.compare,
)


def main() -> None:
    """Run pliant's command line."""
    run(app)


def run(app: typer.Typer) -> None:
    """Run a command line; an error that a user can mend is one sentence, with exit status 1."""
    # PyTorch warns at each timing on a machine that has a CUDA compiler and no GPU.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        app()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        typer.secho(f"pliant: {error}", fg="red", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
