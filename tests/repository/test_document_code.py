"""The code of the documents runs, prints what they show, and names commands that there are."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
from functools import partial
from pathlib import Path

import pytest
import timm
import typer.main

from _repository import ROOT, tracked
from pliant import cli
from pliant.recipes import get_recipe
from pliant.train import override
from research import commands

# A block, and the comment before it that says why it is not run.
_BLOCK = re.compile(r"(<!-- not run: .+ -->\n)?^```(\w+)\n(.*?)^```$", re.M | re.S)
APPS = {"pliant": cli.app, "research": commands.app}


def blocks(page: Path) -> list[tuple[str, str, bool]]:
    """Language and code of each block of a page, and whether it is to be run."""
    return [(language, code, not why) for why, language, code in _BLOCK.findall(page.read_text())]


PAGES = sorted(f for f in tracked() if f.suffix == ".md" and "golden" not in f.parts)
# The README's blocks are files of examples/, which test_examples.py runs; CONTRIBUTING's has its own test.
WITH_CODE = [
    page
    for page in PAGES
    if page.is_relative_to(ROOT / "docs") and ("python", True) in {(b[0], b[2]) for b in blocks(page)}
]
COMMANDS = sorted(
    {
        (app, arguments)
        for page in PAGES
        for language, code, _ in blocks(page)
        if language == "console"
        for app, arguments in re.findall(
            r"^\$ .*?\b(pliant|research) (.+?)(?: +#.*)?$", code.replace("\\\n", ""), re.M
        )
    }
)


def name(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", WITH_CODE, ids=name)
def test_the_code_of_a_page_runs_and_prints_what_it_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if page.name in ("export.md", "pick-a-depth.md"):  # they show no counts: fewer blocks will do
        monkeypatch.setattr(timm, "create_model", partial(timm.create_model, layers=(2, 2, 2)))
    variables: dict[str, object] = {"__name__": "__main__"}
    printed = ""
    ran = 0
    for language, code, run in blocks(page):
        if language == "python" and run:
            ran += 1
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(compile(code, f"{page.name}, block {ran}", "exec"), variables)
            printed = out.getvalue()
        elif language == "text" and printed:
            options = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            assert doctest.OutputChecker().check_output(code, printed, options), printed
            printed = ""
    assert ran


@pytest.mark.parametrize(("app", "arguments"), COMMANDS)
def test_a_command_of_the_documents_is_one_that_there_is(app, arguments):
    name, *options = shlex.split(arguments)
    there = typer.main.get_command(APPS[app]).commands
    assert name in there
    given = there[name].make_context(name, options).params  # a UsageError names what there is not
    if "recipe" in given:
        override(get_recipe(given["recipe"]), given["changes"] or [])


def test_the_documents_show_every_command():
    shown = {(app, arguments.split()[0]) for app, arguments in COMMANDS}
    for app, command_line in APPS.items():
        for command in typer.main.get_command(command_line).commands:
            assert (app, command) in shown, f"no page shows {app} {command}"
