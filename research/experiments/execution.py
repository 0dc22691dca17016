"""Run what an experiment plans: what is in the rows is not run again.

A row is written as soon as its run has finished, and identifies the run. So an experiment goes on from its
rows alone, on another machine and without the folders of its runs. A run that was interrupted goes on from
its checkpoint, where its folder is still there. Several processes that share these folders share the runs:
none takes a run that another one holds.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from pliant._lock import FolderInUseError, held, in_use, locks_in
from pliant.compare import Score, compare, read_scores, run_folder, write_scores
from research.experiments.plans import PlannedRun, key_of

DONE, TRAINED, INTERRUPTED, WAITING = "done", "trained, not scored", "interrupted", "not begun"
RUNNING = "running in a process"


@dataclass(frozen=True)
class State:
    """Where a run stands: `DONE`, `TRAINED`, `RUNNING`, `INTERRUPTED` or `WAITING`.

    Attributes:
        kind: one of these.
        epochs: that are finished.
    """

    kind: str
    epochs: int = 0

    def __str__(self) -> str:
        half = self.kind in (RUNNING, INTERRUPTED)
        return f"{self.kind} after {self.epochs} epochs" if half else self.kind


def scores_in(path: str | Path) -> list[Score]:
    """The rows of an experiment; none where there is no file yet."""
    return read_scores(path) if Path(path).exists() else []


def states(runs: Iterable[PlannedRun], rows: Iterable[Score], folder: str | Path) -> list[State]:
    """Where each run stands.

    Args:
        runs: of the experiment.
        rows: that are there.
        folder: of the experiment's runs.
    """
    from pliant.train.run import LOCK, METRICS, RECIPE, RESULT

    there = {key_of(row) for row in rows}
    found = []
    for run in runs:
        place = run_folder(_parent(run, folder), run.label, run.recipe)
        if there.issuperset(run.keys):
            found.append(State(DONE))
        elif (place / RESULT).is_file():
            found.append(State(TRAINED, run.recipe.epochs))
        elif (place / RECIPE).is_file():
            kind = RUNNING if in_use(place / LOCK) else INTERRUPTED
            found.append(State(kind, _epochs(place / METRICS)))
        else:
            found.append(State(WAITING))
    return found


def execute(
    runs: Sequence[PlannedRun],
    rows: str | Path,
    folder: str | Path,
    *,
    limit: float | None = None,
    progress: bool = False,
    tell: Callable[[str], None] | None = None,
) -> list[Score]:
    """Run what the rows do not have, one run after another.

    Args:
        runs: what to run, the most important first.
        rows: CSV file of `pliant.compare.Score`, which gets the row of each run when it has finished.
        folder: of the runs. A run that another process holds there is skipped.
        limit: seconds after which no further run begins; the one that runs ends.
        progress: show `fit`'s progress bar.
        tell: gets a line for each run.

    Returns:
        The rows that were added.

    Raises:
        ValueError: `rows` holds something else.
        FileNotFoundError: the images are not there.
        KeyboardInterrupt: Ctrl-C; call it again to go on.
        RuntimeError: the loss of some runs became NaN or infinite; the others were run.
    """
    from pliant.train.tasks import NonFiniteLossError

    tell = tell or (lambda _: None)
    begin = time.monotonic()
    added: list[Score] = []
    lost: list[str] = []
    elsewhere = 0

    def done(run: PlannedRun) -> bool:  # read anew each time: another process may have written its rows
        return {key_of(row) for row in scores_in(rows)}.issuperset(run.keys)

    for number, run in enumerate(runs, 1):
        name = f"{number} of {len(runs)}: {run.network}, {run.label}, seed {run.recipe.seed}"
        if done(run):
            continue
        if limit is not None and time.monotonic() - begin >= limit:
            tell(f"{name}: not begun, the time is up; the same command goes on from here")
            break
        place = run_folder(_parent(run, folder), run.label, run.recipe)
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            with held(place.with_name(f"{place.name}.lock")):
                if done(run):  # between the first look and the lock
                    continue
                tell(name)
                found = compare({run.label: run.recipe}, place.parent, progress=progress)
                scores = [score for score, _ in found.values()]
                write_scores(rows, scores, append=True)
        except FolderInUseError:
            elsewhere += 1
            continue
        except NonFiniteLossError as error:
            lost.append(f"{run.label}, seed {run.recipe.seed}")
            tell(f"{name}: failed: {error}")
            continue
        added += scores
        tell(f"{name}: {_told(scores)}")
    if elsewhere:
        tell(f"skipped, because other processes run them: {elsewhere}")
    if lost:
        raise RuntimeError(f"the loss of {'; '.join(lost)} became NaN or infinite; see their folders")
    return added


def execute_together(
    runs: Sequence[PlannedRun],
    rows: str | Path,
    folder: str | Path,
    processes: int,
    *,
    limit: float | None = None,
) -> list[Score]:
    """`execute` in several processes at once, which share the runs; they print what they do.

    Small networks leave a GPU, or many cores, idle between their kernels. With ``threads=1`` each
    process takes one core. They are spawned, so a script calls this below
    ``if __name__ == "__main__":``. None of them outlives this process, or an interrupt: interrupted
    runs go on from their last checkpoint with the next call.

    Args:
        runs: as for `execute`.
        rows: as for `execute`.
        folder: as for `execute`.
        processes: how many.
        limit: seconds, for each process.

    Returns:
        The rows that were added in the meantime.

    Raises:
        ValueError: fewer than one process, or the folder's file system has no locks to share by.
        RuntimeError: some processes failed; what the others ran is in the rows.
        KeyboardInterrupt: Ctrl-C.
    """
    if processes < 1:
        raise ValueError(f"processes must be at least 1, not {processes}")
    if processes > 1 and not locks_in(folder):
        raise ValueError(
            f"files in {folder} cannot be locked, so several processes would train the same networks: "
            f"take one process, or a folder on another file system"
        )
    before = scores_in(rows)
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    workers = [
        context.Process(target=_work, args=(runs, rows, folder, limit), name=f"worker {n}")
        for n in range(processes)
    ]
    try:
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()
    finally:
        left = [worker for worker in workers if worker.is_alive()]
        for worker in left:  # this process was interrupted: a run that is ended so keeps its last step
            worker.terminate()
        for worker in left:
            worker.join()
    added = [row for row in scores_in(rows) if row not in before]
    if failed := sum(worker.exitcode != 0 for worker in workers):
        raise RuntimeError(
            f"{failed} of {processes} processes failed, for the reasons above; {len(added)} rows were added"
        )
    return added


def _work(runs: Sequence[PlannedRun], rows: str | Path, folder: str | Path, limit: float | None) -> None:
    """What each of several processes does, while the one that began them lives."""
    threading.Thread(target=_follow, daemon=True).start()
    try:
        execute(runs, rows, folder, limit=limit, tell=partial(print, flush=True))
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError, RuntimeError) as error:
        sys.exit(f"pliant: {error}")


def _follow() -> None:
    """Wait for the end of the process that began this one, and end this one too."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _told(scores: Sequence[Score]) -> str:
    first = scores[0]
    tests = ", ".join("-" if s.test_accuracy is None else f"{100 * s.test_accuracy:.2f} %" for s in scores)
    return f"test {tests}; {first.seconds / first.epochs:.1f} s an epoch, {first.seconds:.0f} s in all"


def _parent(run: PlannedRun, folder: str | Path) -> Path:
    """Folder of the runs of one recipe and length: others have the same labels."""
    return Path(folder, f"{run.recipe.name}-{run.recipe.epochs}")


def _epochs(metrics: Path) -> int:
    """How many whole epochs an interrupted run has finished."""
    if not metrics.is_file():
        return 0
    return len(metrics.read_text(encoding="utf-8").splitlines()) - 1
