"""Several processes that share the runs of an experiment."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from _experiment import PLAIN, REMOVED, TINY, command, executed
from pliant._lock import held, in_use
from pliant.compare import read_scores
from research import experiments
from research.experiments import EXPERIMENTS, execute, execute_together, execution, states
from research.experiments.plans import key_of


@pytest.mark.slow
def test_several_processes_share_the_runs(tmp_path):
    runs = [PLAIN, REMOVED]
    added = execute_together(runs, tmp_path / "rows.csv", tmp_path / "runs", 2)
    rows = read_scores(tmp_path / "rows.csv")
    assert sorted(map(key_of, rows)) == sorted(key for run in runs for key in run.keys)
    assert sorted(map(key_of, added)) == sorted(map(key_of, rows))
    # What the processes share gives the same rows as one process does.
    execute(runs, tmp_path / "alone.csv", tmp_path / "alone")
    alone = read_scores(tmp_path / "alone.csv")
    accuracies = [{key_of(row): row.test_accuracy for row in found} for found in (rows, alone)]
    assert accuracies[0] == accuracies[1]


@pytest.mark.slow
def test_a_process_that_fails_is_told_of_and_the_rows_of_others_are_kept(tmp_path):
    execute([PLAIN], tmp_path / "rows.csv", tmp_path / "runs")
    rows = read_scores(tmp_path / "rows.csv")
    broken = replace(PLAIN, label="broken", recipe=replace(TINY, model="snow"))
    with pytest.raises(RuntimeError, match=r"[12] of 2 processes failed, for the reasons above; 0 rows"):
        execute_together([broken], tmp_path / "rows.csv", tmp_path / "runs", 2)
    assert read_scores(tmp_path / "rows.csv") == rows


def test_processes_that_cannot_share_are_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="processes must be at least 1, not 0"):
        execute_together([PLAIN], tmp_path / "rows.csv", tmp_path, 0)
    monkeypatch.setattr(execution, "locks_in", lambda folder: False)
    with pytest.raises(ValueError, match="cannot be locked, so several processes would train the same"):
        execute_together([PLAIN], tmp_path / "rows.csv", tmp_path, 2)


LONG = """
from pathlib import Path
from dataclasses import replace
from _experiment import PLAIN
from research.experiments import execute_together
if __name__ == "__main__":
    long = [replace(PLAIN, recipe=replace(PLAIN.recipe, epochs=1000, seed=n)) for n in range(2)]
    execute_together(long, Path("rows.csv"), Path("runs"), 2)
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_process_outlives_the_one_that_began_it(how, tmp_path):
    (tmp_path / "long.py").write_text(LONG)
    root = Path(__file__).parents[2]
    path = os.pathsep.join(map(str, (root / "src", root, root / "tests")))
    begun = subprocess.Popen(
        [sys.executable, "long.py"], cwd=tmp_path, env=os.environ | {"PYTHONPATH": path}, text=True
    )
    metrics = [tmp_path / "runs" / "tiny-1000" / f"plain-s{n}" / "metrics.csv" for n in range(2)]
    wait_for(lambda: all(path.is_file() for path in metrics))
    begun.send_signal(how)
    assert begun.wait(60) != 0
    locks = [path.with_name("run.lock") for path in metrics]
    wait_for(lambda: not any(in_use(path) for path in locks))
    runs = [replace(PLAIN, recipe=replace(TINY, epochs=1000, seed=n)) for n in range(2)]
    assert [s.kind for s in states(runs, [], tmp_path / "runs")] == ["interrupted"] * 2


def wait_for(what):
    end = time.monotonic() + 120
    while not what():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_a_run_in_progress_is_listed_as_running(tmp_path):
    place = tmp_path / "tiny-1" / "plain-s0"
    place.mkdir(parents=True)
    (place / "recipe.json").write_text("{}")
    with held(place / "run.lock"):
        (state,) = states([PLAIN], [], tmp_path)
        assert str(state) == "running in a process after 0 epochs"
    (state,) = states([PLAIN], [], tmp_path)
    assert str(state) == "interrupted after 0 epochs"


def test_a_lock_can_be_waited_for(tmp_path):
    got = []

    def wait():
        with held(tmp_path / "lock", wait=True):
            got.append("second")

    with held(tmp_path / "lock"):
        thread = threading.Thread(target=wait)
        thread.start()
        thread.join(0.2)
        got.append("first")
    thread.join()
    assert got == ["first", "second"]


def test_a_run_of_another_process_is_skipped(tmp_path):
    place = tmp_path / "runs" / "tiny-1"
    place.mkdir(parents=True)
    with held(place / "plain-s0.lock"):
        added, told = executed([PLAIN, REMOVED], tmp_path)
    assert added == ["blocks removed"]
    assert told[-1] == "skipped, because other processes run them: 1"
    assert executed([PLAIN, REMOVED], tmp_path)[0] == ["plain"]


def test_the_command_runs_several_processes(tmp_path, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "tiny", lambda device: [PLAIN])
    seen = []
    monkeypatch.setattr(experiments, "execute_together", lambda *a, **o: seen.append((a, o)) or [1, 2])
    place = ("--results", tmp_path / "results", "--folder", tmp_path / "runs")
    assert "2 rows added" in command("tiny", "--processes", 2, "--limit-minutes", 1, *place)
    ((runs, rows, folder, processes), options) = seen[0]
    assert ([c.label for c in runs], folder, processes) == (["plain"], tmp_path / "runs", 2)
    assert (rows.name, options) == ("tiny-cpu.csv", {"limit": 60.0})
