"""The Makefile and what continuous integration runs."""

from __future__ import annotations

import re

import pytest

from _repository import ROOT, run

TARGETS = ("help", "setup", "quickstart", "lint", "check", "test", "test-all", "test-lowest")
TARGETS += ("docs", "bench", "gpu", "clean")


def test_makefile_has_the_targets():
    makefile = (ROOT / "Makefile").read_text()
    for target in TARGETS:
        assert re.search(rf"^{target}:.*## \S", makefile, re.M), target
    phony = re.search(r"^\.PHONY: (.*)$", makefile, re.M)
    assert phony is not None
    assert set(phony[1].split()) == set(TARGETS)


def test_make_alone_prints_help():
    done = run("make", "--no-print-directory")
    assert done.returncode == 0
    assert tuple(re.findall(r"^make ([a-z-]+) ", done.stdout, re.M)) == TARGETS


def test_setup_names_a_python_that_is_not_there(tmp_path):
    done = run("make", "setup", "PYTHON=no-such-python", f"VENV={tmp_path / 'v'}")
    assert done.returncode != 0
    assert "There is no no-such-python here" in done.stderr
    assert not (tmp_path / "v").exists()


def test_setup_refuses_an_old_python(tmp_path):
    old = tmp_path / "python-old"
    old.write_text('#!/bin/sh\nif [ "$1" = -V ]; then echo Python 3.9.1; else exit 1; fi\n')
    old.chmod(0o755)
    done = run("make", "setup", f"PYTHON={old}", f"VENV={tmp_path / 'v'}")
    assert done.returncode != 0
    assert f"pliant needs Python 3.10 or newer, and {old} is Python 3.9.1" in done.stderr
    assert not (tmp_path / "v").exists()


def test_setup_says_when_venv_is_missing(tmp_path):
    bare = tmp_path / "python-bare"
    bare.write_text('#!/bin/sh\ncase "$2" in *ensurepip*) exit 1;; esac\n')
    bare.chmod(0o755)
    done = run("make", "setup", f"PYTHON={bare}", f"VENV={tmp_path / 'v'}")
    assert done.returncode != 0
    assert "cannot make virtual environments" in done.stderr


def test_gpu_runs_every_step_and_fails_if_one_did(tmp_path):
    """With a Python whose second step fails: all are run, the status tells."""
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n[ "$3" != bench ]\n')
    python.chmod(0o755)
    done = run("make", "gpu", f"PYTHON={python}", "DATA=cifar")
    calls = (tmp_path / "calls").read_text().splitlines()
    trained = "path=cifar threads=1 workers=0 --device cuda --processes 8"
    assert calls[0] == "-c import xdist"
    assert calls[1].startswith("-m pytest -m gpu -n 8 --dist worksteal tests/")
    assert calls[2:] == [
        "-m research bench --device cuda --suite steps",
        "-m research bench --device cuda --suite mod",
        "-m research bench --device cuda --suite condconv",
        "-m research bench --device cuda --suite forms",
        f"-m research experiment cifar10-controls --network resnet20 {trained}",
        "-m research experiment cifar10-controls --device cuda --network resnet20 --measure --engine eager",
        f"-m research experiment cifar10-controls --network resnet18 --network resnet50 {trained}",
    ]
    assert done.returncode != 0
    assert "bench --device cuda" in done.stderr
    assert "-m pytest" not in done.stderr


def test_gpu_tests_run_one_by_one_without_xdist(tmp_path):
    python = tmp_path / "python"
    python.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n[ "$1" != -c ]\n')
    python.chmod(0o755)
    done = run("make", "gpu", f"PYTHON={python}")
    assert done.returncode == 0
    assert (tmp_path / "calls").read_text().splitlines()[1].startswith("-m pytest -m gpu tests/")


@pytest.mark.parametrize(
    ("summary", "status"), [("12 passed, 3 skipped", 0), ("3 skipped", 1), ("no tests ran", 1)]
)
def test_ci_fails_when_no_test_ran(tmp_path, summary, status):
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_text((ROOT / ".ci" / "run").read_text())
    (tmp_path / "Makefile").write_text(
        f"test:\n\t@echo 'All checks passed!'\n\t@echo '{summary} in 1.2s'\n"
    )
    done = run("bash", tmp_path / ".ci" / "run")
    assert done.returncode == status
    assert ("no test ran" in done.stderr) == bool(status)


def test_ci_fails_when_make_test_fails(tmp_path):
    (tmp_path / ".ci").mkdir()
    (tmp_path / ".ci" / "run").write_text((ROOT / ".ci" / "run").read_text())
    (tmp_path / "Makefile").write_text("test:\n\t@echo '1 failed, 12 passed in 1.2s'; exit 1\n")
    done = run("bash", tmp_path / ".ci" / "run")
    assert done.returncode != 0
