"""The benchmark behind ``make bench``: what the methods save and cost in time, honestly.

A suite is a list of networks and of settings. Each setting (engine, batch, dtype) is one
interleaved run of all networks, against their plain network in the same engine and, for
Mixture-of-Depths, against it at a lower resolution; its rows are written as soon as it
ends, so that a run that is stopped keeps what it had. The figures in results/ come from
here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pliant._files import atomic_path
from pliant.measuring.entrants import fresh
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
        layout = "" if self.channels_last else ", contiguous"
        return f"{self.engine}, batch {self.batch}, {self.dtype}{layout}"


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What a benchmark measures, and how long it takes at most.

    Attributes:
        models: names that timm knows.
        against: the baseline.
        lower_resolution: pixels at which the baseline is a rival to itself; None: none.
        options: of all `models`, as keywords of ``timm.create_model``.
        settings: one run each.
        rounds: of each run.
        min_run_time: seconds of one network in one round, at least.
        max_run_time: seconds after which a run begins no further round.
        max_prepare_time: seconds after which it compiles no further network.
    """

    models: tuple[str, ...]
    against: str
    lower_resolution: int | None
    settings: tuple[Setting, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
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

# Each CondConv network with the experts of the paper's tables, and the network it is made of.
_CONDCONV = (
    ("cc_mobilenetv1_050", 8, "mobilenetv1_w050"),
    ("cc_mobilenetv1_025", 8, "mobilenetv1_w025"),
    ("cc_resnet50", 2, "resnet50"),
    ("cc_mobilenetv2_100", 8, "mobilenetv2_100"),
)


def _condconv(*settings: Setting, **limits: Any) -> tuple[Suite, ...]:
    return tuple(
        Suite(
            models=(name,),
            against=plain,
            lower_resolution=None,
            settings=settings,
            options={"experts": experts},
            **limits,
        )
        for name, experts, plain in _CONDCONV
    )


# The limits keep Mixture-of-Depths on a CPU under 20 minutes on 2 cores, and CondConv under
# 30: compiling takes most of the time.
SUITES: dict[str, dict[str, tuple[Suite, ...]]] = {
    "mod": {
        "cpu": (
            Suite(
                models=_RESNETS,
                against="resnet50",
                lower_resolution=176,
                settings=tuple(Setting(engine=e, batch=b) for e in ("eager", "compiled") for b in (1, 16)),
            ),
        ),
        "cuda": (
            Suite(
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
        ),
    },
    "condconv": {
        "cpu": _condconv(
            *(Setting(engine="eager", batch=b, channels_last=c) for b in (1, 32) for c in (False, True)),
            *(Setting(engine="compiled", batch=b) for b in (1, 32)),
            max_run_time=25.0,
        ),
        "cuda": _condconv(
            *(
                Setting(engine=e, batch=b, dtype=d)
                for b in (1, 32, 128)
                for d in ("float32", "bfloat16")
                for e in ("eager", "compiled")
            ),
            rounds=30,
            min_run_time=0.05,
            max_run_time=10.0,
        ),
    },
}

_STEMS = {"mod": "latency", "condconv": "condconv-latency"}


def run_bench(
    device: str = "cpu",
    results: str | Path = "results",
    quick: bool = False,
    name: str = "mod",
    *,
    resume: bool = False,
    suite: Suite | None = None,
    console: Console | None = None,
) -> list[Measurement]:
    """Run the suites of a device; write their rows, a table and a figure.

    Files: ``latency-DEVICE.csv``, ``.md`` and ``.svg`` in `results` (for CondConv
    ``condconv-latency-DEVICE.*``), replaced when the first run ends and completed after
    each further one. A rehearsal's files are ``latency-DEVICE-quick.*``, so that it never
    stands in for the real figures.

    Args:
        device: ``cpu`` or ``cuda``.
        results: folder of the files; made if missing.
        quick: a rehearsal of about two minutes (`Suite.quick`).
        name: ``mod`` for Mixture-of-Depths, or ``condconv``.
        resume: keep the runs that the CSV file has from this commit on this machine, and
            do the others.
        suite: another suite than those of that name and device.
        console: where rich prints progress and the table.

    Returns:
        All rows.

    Raises:
        ValueError: no suite `name` or none for `device`, or the device is missing.
    """
    from rich.console import Console

    kind = device.partition(":")[0]
    if name not in SUITES:
        raise ValueError(f"no benchmark {name!r}; there are {', '.join(SUITES)}")
    chosen = (suite,) if suite else SUITES[name].get(kind)
    if chosen is None:
        raise ValueError(f"no benchmark for device {device!r}; there is one for {', '.join(SUITES[name])}")
    chosen = tuple(c.quick() for c in chosen[:1]) if quick else chosen
    console = console or Console()
    stem = Path(results) / f"{_STEMS[name]}-{kind}{'-quick' if quick else ''}"
    rows = _kept(Path(f"{stem}.csv"), device) if resume else []
    finished = {_key(row) for row in rows}
    with _progress(console) as progress:
        runs = [(one, setting) for one in chosen for setting in one.settings]
        runs.sort(key=lambda run: run[1].engine != "eager")  # what is quick to prepare comes first
        overall = progress.add_task("benchmark", total=len(runs))
        for one, setting in runs:
            key = setting.engine, setting.batch, setting.dtype, setting.channels_last, one.against
            if key in finished:
                progress.advance(overall)
                continue
            title = f"{one.against}, {setting}"
            task = progress.add_task(title, total=None)
            rows += _run(one, setting, device, partial(_advance, progress, task, title))
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


def _key(row: Measurement) -> tuple[str, int, str, bool, str]:
    """What tells the runs of a benchmark apart: a `Setting`, and the baseline."""
    return row.engine, row.batch, row.dtype, row.channels_last, row.against


def _kept(path: Path, device: str) -> list[Measurement]:
    """Rows of an earlier run that this one would give again."""
    same = ("cpu", "cores", "gpu", "torch", "timm", "pliant", "commit")
    now = dict(provenance(device))
    rows = read_rows(path) if path.exists() else []
    return [row for row in rows if all(getattr(row, name) == now[name] for name in same)]


def _run(suite: Suite, setting: Setting, device: str, report: Any) -> list[Measurement]:
    import torch

    told = "".join(f" {key}={value}" for key, value in suite.options.items())
    models = {f"{name}{told}": fresh(name, **suite.options) if told else name for name in suite.models}
    rows = measure(
        models,
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
