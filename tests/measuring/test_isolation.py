"""Engines in a process of their own: what one that fails costs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from _engines import conv, use
from _measure import SMALL, kind, stand_in
from pliant.measuring.candidates import EngineError
from pliant.measuring.isolation import Isolated
from pliant.measuring.latency import measure

ANSWER = """
kinds = {}

def answer(request):
    if request["do"] == "write":
        path = Path(request["folder"], "network")
        path.write_text(kind_of(request["given"]))
        return {"path": str(path)}
    if request["do"] == "load":
        kinds[request["number"]] = kind = Path(request["path"]).read_text()
        if kind == "dies":
            os._exit(139)
        if kind == "hangs":
            time.sleep(600)
        if kind == "raises":
            raise RuntimeError("no luck")
    elif kinds[request["number"]] == "dies in a round":
        os.kill(os.getpid(), signal.SIGSEGV)
    return {"seconds": 0.01}
"""


def test_an_engine_that_fails_costs_its_row(fakes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = use(fakes.Fake(), monkeypatch)
    monkeypatch.setattr("pliant.measuring.writing.FEW", 6)  # one child is enough here
    monkeypatch.setattr("pliant.measuring.isolation.COMMAND", stand_in(ANSWER))
    kinds = ("well", "dies", "hangs", "raises", "dies in a round", "well too")
    models = {name: kind(name, width) for width, name in enumerate(kinds, 1)}
    limits = {"rounds": 2, "min_run_time": 0, "timeout": 2}
    rows = measure(models, against="well", input_size=SMALL, engines=[name], threads=1, **limits)
    assert {r.model: r.error.partition(" (")[0] for r in rows} == {
        "well": "",
        "dies": "fake died: SIGSEGV",
        "hangs": "fake did not answer within 2 s",
        "raises": "RuntimeError: no luck",
        "dies in a round": "fake died: SIGSEGV",
        "well too": "",
    }
    assert [r.rounds for r in rows] == [2, 0, 0, 0, 0, 2]
    assert [r.time_ratio is not None for r in rows] == [not r.error for r in rows]
    assert all(r.macs == (i + 1) * rows[0].macs for i, r in enumerate(rows))


@pytest.mark.slow
def test_so_it_is_with_real_children(fakes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = use(fakes.Fails(), monkeypatch)
    monkeypatch.setattr("pliant.measuring.writing.FEW", 6)  # one child is enough here
    # Between those that are well: dies as it loads, hangs, raises, dies in a round.
    models = {letter: conv(width) for width, letter in enumerate("abcdef", 1)}
    limits = {"rounds": 2, "min_run_time": 0, "timeout": 4}
    rows = measure(models, against="a", input_size=SMALL, engines=[name], threads=1, **limits)
    assert [r.error.partition(" (")[0] for r in rows] == [
        "",
        "fails died: SIGSEGV",
        "fails did not answer within 4 s",
        "RuntimeError: no luck in file.py",
        "fails died: SIGSEGV",
        "",
    ]
    assert [r.rounds for r in rows] == [2, 0, 0, 0, 0, 2]


def test_an_engine_that_cannot_be_imported_in_its_process(
    fakes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = use(fakes.Fake(), monkeypatch)
    (tmp_path / "pliant_test_fakes.py").write_text("raise ImportError('libfake.so.1 is not there')")
    rows = measure({"a": conv(), "b": conv()}, input_size=SMALL, engines=[name], rounds=1)
    assert [r.error for r in rows] == ["ImportError: libfake.so.1 is not there"] * 2


def test_a_process_that_does_not_even_start(fakes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = "import sys; sys.exit('no torch in /home/someone/x')"
    monkeypatch.setattr("pliant.measuring.isolation.COMMAND", (sys.executable, "-c", broken))
    with Isolated(fakes.Fake(), 5) as child:
        for _ in range(2):
            with pytest.raises(EngineError, match=r"fake died: exit status 1 \(no torch in"):
                child.load(Path("x"), torch.zeros(1, *SMALL), "float32", 1)


def test_one_child_runs_all_and_ends(fakes: Any, tmp_path: Path) -> None:
    (tmp_path / "network").write_text("1")
    with Isolated(fakes.Fake(), 60) as child:
        loaded = [child.load(tmp_path / "network", torch.zeros(1, *SMALL), "float32", 1)[0] for _ in "ab"]
        process = child._child
        assert loaded == [0, 1]
        assert all(child.time(n, 2) > 0 for n in loaded)
        assert child._child is process
    assert process is not None
    assert process.returncode is not None


@pytest.mark.slow
def test_a_worker_by_hand(tmp_path: Path, fakes: Any) -> None:
    (tmp_path / "network").write_text("1")
    load = {
        "do": "load",
        "number": 0,
        "engine": "pliant_test_fakes:Fake",
        "path": str(tmp_path / "network"),
    }
    load |= {"shape": [1, 1, 2, 2], "strides": [4, 4, 2, 1], "dtype": "float32", "device": "cpu"}
    lines = [{**load, "precision": "float32", "threads": 1}, {"do": "time", "number": 7, "calls": 1}]
    done = subprocess.run(
        [sys.executable, "-m", "pliant.measuring.worker"],
        input="".join(json.dumps(line) + "\n" for line in lines),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    ready, loaded, failed = map(json.loads, done.stdout.splitlines())
    assert ready == {}
    assert loaded["seconds"] > 0
    assert failed == {"error": "KeyError: 7"}
    assert "noise on standard output" in done.stderr
