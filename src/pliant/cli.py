"""The command line: ``pliant COMMAND --help`` tells all.

Each command (`pliant.commands`) is a thin layer over a function of the library. What a user can
get wrong is a `ValueError` or `OSError` there, and one sentence without a traceback here.
"""

from __future__ import annotations

import logging
import sys

import typer

from pliant.commands import data, deploying, networks, reading, timing, training

app = typer.Typer(
    help="Conditional and adaptive computation for vision networks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
for command in (
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
):
    app.command()(command)


def main() -> None:
    """Run pliant's command line."""
    run(app)


def run(app: typer.Typer) -> None:
    """Run a command line; errors that a user can mend are one sentence, exit code 1."""
    # torch's own note that a machine has a CUDA compiler and no GPU, on every timing.
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    try:
        app()
    except (ValueError, OSError, RuntimeError) as error:
        typer.secho(f"pliant: {error}", fg="red", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
