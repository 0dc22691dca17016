"""The benchmark behind ``make bench``: what Mixture-of-Depths saves in time, honestly.

A suite is a list of networks and of settings. Each setting (engine, batch, dtype) is one
interleaved run of all networks, against plain ResNet-50 in the same engine and against
it at a lower resolution; its rows are written as soon as it ends, so that a run that
is stopped keeps what it had. The figures in results/ come from here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pliant._files import atomic_path
from pliant.measuring.latency import measure
from pliant.measuring.provenance import provenance
from pliant.measuring.rows import Measurement, markdown_table, read_rows, terminal_table, write_rows

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One interleaved run: what `measure` takes and all its networks share."""

    engine: str
    batch: int
    dtype: str = "float32"
    channels_last: bool = True

    def __str__(self) -> str:
        return f"{self.engine}, batch {self.batch}, {self.dtype}"


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What a benchmark measures, and how long it takes at most.

    Attributes:
        models: names that timm knows.
        against: the baseline.
        lower_resolution: pixels at which the baseline is a rival to itself.
        settings: one run each.
        rounds: of each run.
        min_run_time: seconds of one network in one round, at least.
        max_run_time: seconds after which a run begins no further round.
        max_prepare_time: seconds after which it compiles no further network.
    """

    models: tuple[str, ...]
    against: str
    lower_resolution: int
    settings: tuple[Setting, ...]
    rounds: int = 20
    min_run_time: float = 0.2
    max_run_time: float = 75.0
    max_prepare_time: float = 300.0

    def quick(self) -> Suite:
        """A rehearsal: the smallest batch alone, three rounds, the first model."""
        smallest = min(s.batch for s in self.settings)
        settings = tuple(s for s in self.settings if s.batch == smallest)
        return replace(self, models=self.models[:1], settings=settings, rounds=3, min_run_time=0.0)


_RESNETS = ("resnet50_mod", "resnet75_mod", "resnet86_mod")

# The limits keep it under 20 minutes on 2 cores, where compiling takes most of the time.
SUITES: dict[str, Suite] = {
    "cpu": Suite(
        models=_RESNETS,
        against="resnet50",
        lower_resolution=176,
        settings=tuple(Setting(engine=e, batch=b) for e in ("eager", "compiled") for b in (1, 16)),
    ),
    "cuda": Suite(
        models=_RESNETS,
        against="resnet50",
        lower_resolution=176,
        settings=tuple(
            Setting(engine=e, batch=b, dtype=d)
            for b in (1, 16, 128)
            for d in ("float32", "bfloat16")
            for e in ("eager", "compiled")
        ),
        rounds=30,
        min_run_time=0.05,
        max_run_time=20.0,
    ),
}


def run_bench(
    device: str = "cpu",
    results: str | Path = "results",
    quick: bool = False,
    *,
    resume: bool = False,
    suite: Suite | None = None,
    console: Console | None = None,
) -> list[Measurement]:
    """Run the suite of a device; write its rows, a table and a figure.

    Files: ``latency-DEVICE.csv``, ``.md`` and ``.svg`` in `results`, replaced when the
    first run ends and completed after each further one. A rehearsal's files are
    ``latency-DEVICE-quick.*``, so that it never stands in for the real figures.

    Args:
        device: ``cpu`` or ``cuda``.
        results: folder of the files; made if missing.
        quick: a rehearsal of about two minutes (`Suite.quick`).
        resume: keep the runs that the CSV file has from this commit on this machine, and
            do the others.
        suite: another suite than that of the device.
        console: where rich prints progress and the table.

    Returns:
        All rows.

    Raises:
        ValueError: no suite for `device`, or the device is missing.
    """
    from rich.console import Console

    kind = device.partition(":")[0]
    chosen = suite or SUITES.get(kind)
    if chosen is None:
        raise ValueError(f"no benchmark for device {device!r}; there is one for {', '.join(SUITES)}")
    chosen = chosen.quick() if quick else chosen
    console = console or Console()
    stem = Path(results) / f"latency-{kind}{'-quick' if quick else ''}"
    rows = _kept(Path(f"{stem}.csv"), device) if resume else []
    finished = {_key(row) for row in rows}
    with _progress(console) as progress:
        overall = progress.add_task("benchmark", total=len(chosen.settings))
        for setting in chosen.settings:
            if (setting.engine, setting.batch, setting.dtype, setting.channels_last) in finished:
                progress.advance(overall)
                continue
            task = progress.add_task(str(setting), total=None)
            rows += _run(chosen, setting, device, partial(_advance, progress, task, str(setting)))
            write(stem, rows)
            progress.remove_task(task)
            progress.advance(overall)
    for group in grouped(rows):
        console.print(terminal_table(group))
    console.print(f"written: {stem}.csv, .md" + (", .svg" if _timed(rows) else ""))
    return rows


def write(stem: Path, rows: Sequence[Measurement]) -> None:
    """Write rows as ``STEM.csv``, tables as ``STEM.md`` and, if any has a time, ``STEM.svg``.

    Also makes table and figure anew from rows that were read.
    """
    from pliant.analysis.plots import plot_against_latency

    write_rows(f"{stem}.csv", rows)
    tables = "\n\n".join(markdown_table(group) for group in grouped(rows))
    figure = f"\n![MACs against latency]({stem.name}.svg)\n" if _timed(rows) else ""
    with atomic_path(f"{stem}.md") as temporary:
        temporary.write_text(f"# Latency\n\n{_PREFACE}\n\n{tables}\n{figure}", encoding="utf-8")
    if _timed(rows):
        plot_against_latency(rows, "macs", f"{stem}.svg")


_PREFACE = """\
Written by `python -m pliant bench`, from the CSV file beside it. Each table is one run, its networks
timed in turn in each round; time and MAC ratios are to the baseline in the same run. The MoD tax is
time over that of the same network without its MoD blocks, minus one. Absolute times drift on a shared
machine; ratios are taken within a round. Compiling is not in the time. Weights are random."""


def grouped(rows: Sequence[Measurement]) -> list[list[Measurement]]:
    """Rows by the run that they come from, in order."""
    groups: dict[Any, list[Measurement]] = {}
    for row in rows:
        groups.setdefault((row.device, row.threads, *_key(row)), []).append(row)
    return list(groups.values())


def _key(row: Measurement) -> tuple[str, int, str, bool]:
    """What tells the runs of a suite apart, as in a `Setting`."""
    return row.engine, row.batch, row.dtype, row.channels_last


def _kept(path: Path, device: str) -> list[Measurement]:
    """Rows of an earlier run that this one would give again."""
    same = ("cpu", "cores", "gpu", "torch", "timm", "pliant", "commit")
    now = dict(provenance(device))
    rows = read_rows(path) if path.exists() else []
    return [row for row in rows if all(getattr(row, name) == now[name] for name in same)]


def _run(suite: Suite, setting: Setting, device: str, report: Any) -> list[Measurement]:
    import torch

    rows = measure(
        suite.models,
        against=suite.against,
        batch=setting.batch,
        device=device,
        dtype=setting.dtype,
        channels_last=setting.channels_last,
        engine=setting.engine,
        rounds=suite.rounds,
        min_run_time=suite.min_run_time,
        max_run_time=suite.max_run_time,
        max_prepare_time=suite.max_prepare_time,
        lower_resolution=suite.lower_resolution,
        progress=report,
    )
    torch.compiler.reset()  # what was compiled is of no more use, and takes memory
    return rows


def _advance(progress: Progress, task: TaskID, setting: str, done: int, total: int, what: str) -> None:
    progress.update(task, completed=done, total=total, description=f"{setting}: {what}")


def _progress(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.description}", markup=False)
    return Progress(text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console)


def _timed(rows: Sequence[Measurement]) -> bool:
    return any(row.median_ms is not None for row in rows)
