"""Run the command line in this process: what it prints, or with which error it ends."""

from __future__ import annotations

import sys

import pytest
from typer.testing import CliRunner

from pliant import cli


def run(*arguments, app=cli.app, code=0):
    """What a command prints that ends with exit status `code`."""
    result = CliRunner().invoke(app, list(map(str, arguments)))
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result.output


def fails(monkeypatch, capsys, *arguments, app=cli.app):
    """What is printed when a command ends with an error; no traceback."""
    monkeypatch.setattr(sys, "argv", ["pliant", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.run(app)
    assert ended.value.code != 0
    error = capsys.readouterr().err
    assert "Traceback" not in error
    return error
