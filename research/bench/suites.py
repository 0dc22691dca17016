"""The benchmark behind ``make bench``: what the methods save and cost in time, honestly.

A suite is a list of networks and of conditions. Each condition (engine, batch, dtype) is one
interleaved run of all networks, against their plain network in the same engine and, for
Mixture-of-Depths, against it at a lower resolution; the rows of an engine are written as
soon as it is done, so that a run that is stopped keeps what it had. The figures in results/
come from here and nowhere else.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pliant._files import atomic_path
from pliant.deploy.engines import ENGINES
from pliant.measuring.candidates import fresh
from pliant.measuring.latency import measure
from pliant.measuring.rows import (
    AS_BUILT,
    FORMS,
    NATIVE,
    OPTIMIZED,
    PLAIN_FORM,
    Measurement,
    grouped,
    markdown_table,
    read_rows,
    terminal_table,
    write_rows,
)
from pliant.provenance import provenance
from research.bench.speed_table import BEGIN, END, speed_table
from research.marks import put_between

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID


@dataclass(frozen=True, kw_only=True)
class Condition:
    """One interleaved run: what `measure` takes and all its networks share."""

    engine: str
    batch: int
    dtype: str = "float32"
    channels_last: bool = True

    def __str__(self) -> str:
        layout = "" if self.channels_last else ", contiguous"
        return f"{self.engine}, {self.dtype}{layout}"

    @property
    def key(self) -> tuple[str, int, str, bool]:
        """What a row of it says of it."""
        last = self.channels_last and ENGINES[self.engine].by_pytorch
        return self.engine, self.batch, self.dtype, last


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What a benchmark measures, and how long it takes at most.

    Attributes:
        models: names that timm knows.
        against: the baseline.
        lower_resolution: pixels at which the baseline is timed too, as a second baseline; None: none.
        options: of all `models`, as keywords of ``timm.create_model``.
        also: further options; each of `models` is timed once more with each of them.
        forms: of all networks, as for `measure`.
        conditions: one run each.
        rounds: of each run.
        min_run_time: seconds of one network in one round, at least.
        max_run_time: seconds after which a run begins no further round.
        max_prepare_time: seconds after which it exports or compiles no further network.
    """

    models: tuple[str, ...]
    against: str
    lower_resolution: int | None
    conditions: tuple[Condition, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    also: tuple[Mapping[str, Any], ...] = ()
    forms: tuple[str, ...] = (AS_BUILT,)
    rounds: int = 20
    min_run_time: float = 0.2
    max_run_time: float | None = 75.0
    max_prepare_time: float | None = 300.0

    def quick(self) -> Suite:
        """A rehearsal: the smallest batch alone, three rounds, the first model."""
        smallest = min(s.batch for s in self.conditions)
        conditions = tuple(s for s in self.conditions if s.batch == smallest)
        return replace(self, models=self.models[:1], conditions=conditions, rounds=3, min_run_time=0.0)

    def patient(self) -> Suite:
        """All of it, however long it takes."""
        return replace(self, max_run_time=None, max_prepare_time=None)


_RESNETS = ("resnet50_mod", "resnet75_mod", "resnet86_mod")
_SHORT: dict[str, Any] = {"min_run_time": 0.1, "max_run_time": 32.0}
_ON_GPU: dict[str, Any] = {
    "rounds": 30,
    "min_run_time": 0.05,
    "max_run_time": 8.0,
    "max_prepare_time": 150.0,
}
_BEST: dict[str, Any] = {"forms": (OPTIMIZED,), "lower_resolution": None}


def _mod(
    engines: Sequence[str],
    batches: Sequence[int],
    dtypes: Sequence[str],
    *,
    forms: tuple[str, ...] = (PLAIN_FORM, OPTIMIZED, NATIVE),
    lower_resolution: int | None = 176,
    **limits: Any,
) -> Suite:
    conditions = tuple(
        Condition(engine=e, batch=b, dtype=d) for e in engines for d in dtypes for b in batches
    )
    return Suite(
        models=_RESNETS,
        against="resnet50",
        lower_resolution=lower_resolution,
        conditions=conditions,
        forms=forms,
        **limits,
    )


# Each CondConv network with the experts of the paper's tables, and the network it is made of.
_CONDCONV = (
    ("cc_mobilenetv1_050", 8, "mobilenetv1_w050"),
    ("cc_mobilenetv1_025", 8, "mobilenetv1_w025"),
    ("cc_resnet50", 2, "resnet50"),
    ("cc_mobilenetv2_100", 8, "mobilenetv2_100"),
)


def _condconv(*conditions: Condition, **limits: Any) -> tuple[Suite, ...]:
    return tuple(
        Suite(
            models=(name,),
            against=plain,
            lower_resolution=None,
            conditions=conditions,
            options={"experts": experts},
            **limits,
        )
        for name, experts, plain in _CONDCONV
    )


# CondConv as it is deployed, in every engine; hard routing, which reads fewer experts, beside it.
# PyTorch has one form of it, engines that run files have several.
def _condconv_engines(*networks: tuple[str, int, str]) -> tuple[Suite, ...]:
    engines = {("eager", "compile"): (PLAIN_FORM,), ("onnxruntime", "openvino"): FORMS[1:]}
    return tuple(
        Suite(
            models=(name,),
            against=plain,
            lower_resolution=None,
            conditions=tuple(Condition(engine=e, batch=b) for e in several for b in (1, 32)),
            options={"experts": experts},
            also=({"active": 2},),
            forms=forms,
            rounds=15,
            min_run_time=0.1,
            max_run_time=20.0,
        )
        for name, experts, plain in networks
        for several, forms in engines.items()
    )


# The limits keep `make bench` (Mixture-of-Depths on a CPU, and training steps) under 20 minutes on 2
# cores, and CondConv under 30: AOTInductor, which compiles longest, and bfloat16 get the best form of
# blocks alone, and no baseline of lower resolution.
SUITES: dict[str, dict[str, tuple[Suite, ...]]] = {
    "mod": {
        "cpu": (
            _mod(("eager",), (1, 16), ("float32",), **_SHORT),
            _mod(("onnxruntime", "openvino"), (1, 16), ("float32",), **_SHORT),
            _mod(("compile",), (1, 16), ("float32",), **_SHORT),
            _mod(("aoti",), (1, 16), ("float32",), **_BEST, **_SHORT),
        ),
        "cuda": (
            # Eager first, and compiled networks in the form that suits it alone: compiling takes minutes,
            # and a GPU may be lent for few.
            _mod(("eager",), (1, 128), ("bfloat16", "float32"), **_ON_GPU),
            _mod(("compile",), (1, 128), ("bfloat16",), **_BEST, **_ON_GPU),
            _mod(("eager",), (16,), ("bfloat16", "float32"), **_ON_GPU),
            _mod(("compile",), (16,), ("bfloat16",), **_BEST, **_ON_GPU),
            _mod(("compile",), (1, 16, 128), ("float32",), **_BEST, **_ON_GPU),
        ),
    },
    "mod-bfloat16": {
        "cpu": (
            _mod(
                ("eager", "compile"), (1, 16), ("bfloat16",), **_BEST, **(_SHORT | {"max_run_time": 24.0})
            ),
        ),
    },
    "mod-int8": {
        "cpu": (
            _mod(
                ("onnxruntime", "openvino"),
                (1, 16),
                ("int8",),
                forms=(PLAIN_FORM, OPTIMIZED),
                **_SHORT,
            ),
        ),
    },
    "condconv": {
        "cpu": _condconv(
            *(Condition(engine="eager", batch=b, channels_last=c) for b in (1, 32) for c in (False, True)),
            *(Condition(engine="compiled", batch=b) for b in (1, 32)),
            max_run_time=25.0,
        ),
        "cuda": _condconv(
            *(
                Condition(engine=e, batch=b, dtype=d)
                for b in (1, 32, 128)
                for d in ("float32", "bfloat16")
                for e in ("eager", "compiled")
            ),
            rounds=30,
            min_run_time=0.05,
            max_run_time=10.0,
        ),
    },
    "condconv-engines": {"cpu": _condconv_engines(_CONDCONV[0], _CONDCONV[3])},
}

_STEMS = {
    "mod": "latency",
    "mod-bfloat16": "latency-bfloat16",
    "mod-int8": "latency-int8",
    "condconv": "condconv-latency",
    "condconv-engines": "condconv-engines",
}


def run_bench(
    device: str = "cpu",
    results: str | Path = "results",
    quick: bool = False,
    name: str = "mod",
    *,
    resume: bool = False,
    patient: bool = False,
    threads: int | None = None,
    suite: Suite | None = None,
    readme: str | Path | None = None,
    console: Console | None = None,
) -> list[Measurement]:
    """Run the suites of a device; write their rows, a table and a figure.

    Files: ``latency-DEVICE.csv``, ``.md`` and ``.svg`` in `results` (of other suites
    ``latency-bfloat16-DEVICE.*``, ``latency-int8-DEVICE.*`` and
    ``condconv-latency-DEVICE.*``), replaced when the first engine is done and completed after each
    further one. A rehearsal's files are ``latency-DEVICE-quick.*``, so that it never stands in for
    the real figures.

    Args:
        device: ``cpu`` or ``cuda``.
        results: folder of the files; made if missing.
        quick: a rehearsal (`Suite.quick`).
        name: ``mod`` for Mixture-of-Depths in all engines that are installed, ``mod-bfloat16``,
            ``mod-int8``, ``condconv``, or ``condconv-engines`` for CondConv in all engines.
        resume: keep the runs that the CSV file has from this commit on this machine, and
            do the others; runs with an undecided row are done again.
        patient: without limits of time (`Suite.patient`).
        threads: of PyTorch and of each engine; by default as many as PyTorch takes.
        suite: another suite than those of that name and device.
        readme: a file whose part between the speed table's marks gets that table.
        console: where rich prints progress and the table.

    Returns:
        All rows.

    Raises:
        ValueError: no suite `name` or none for `device`, or the device is missing; `readme`
            has no place for the table.
    """
    from rich.console import Console

    kind = device.partition(":")[0]
    if name not in SUITES:
        raise ValueError(f"no benchmark {name!r}; there are {', '.join(SUITES)}")
    chosen = (suite,) if suite else SUITES[name].get(kind)
    if chosen is None:
        raise ValueError(f"no benchmark for device {device!r}; there is one for {', '.join(SUITES[name])}")
    chosen = _rehearsed(chosen) if quick else chosen
    chosen = tuple(c.patient() for c in chosen) if patient else chosen
    console = console or Console()
    stem = Path(results) / f"{_STEMS[name]}-{kind}{'-quick' if quick else ''}"
    rows = _kept(Path(f"{stem}.csv"), device) if resume else []
    finished = {_key(row) for row in rows}
    with _progress(console) as progress:
        runs = [(one, conditions) for one in chosen for conditions in _together(one.conditions)]
        runs.sort(key=lambda run: run[1][0].engine != "eager")  # what is quick to prepare comes first
        overall = progress.add_task("benchmark", total=len(runs))
        for one, conditions in runs:
            left = [s for s in conditions if (*s.key, one.against) not in finished]
            for why in {ENGINES[s.engine].missing: None for s in left if ENGINES[s.engine].missing}:
                console.print(f"left out: {why}", markup=False)
            for some in _in_one_call([s for s in left if not ENGINES[s.engine].missing]):
                title = f"{one.against}, {' and '.join(dict.fromkeys(map(str, some)))}"
                task = progress.add_task(title, total=None)
                rows += _run(one, some, device, threads, partial(_advance, progress, task, title))
                write(stem, rows)
                progress.remove_task(task)
            progress.advance(overall)
    for group in grouped(rows):
        console.print(terminal_table(group, width=console.width))
    console.print(f"written: {stem}.csv, .md" + (", .svg" if _timed(rows) else ""))
    if readme is not None:
        put_between(readme, BEGIN, END, speed_table(rows))
    return rows


def write(stem: Path, rows: Sequence[Measurement]) -> None:
    """Write rows as ``STEM.csv``, tables as ``STEM.md`` and, if any has a time, ``STEM.svg``.

    Also makes table and figure anew from rows that were read.
    """
    from pliant.measuring.figure import plot_against_latency

    write_rows(f"{stem}.csv", rows)
    tables = "\n\n".join(markdown_table(group) for group in grouped(rows))
    figure = f"\n![MACs against latency]({stem.name}.svg)\n" if _timed(rows) else ""
    with atomic_path(f"{stem}.md") as temporary:
        temporary.write_text(f"# Latency\n\n{_PREFACE}\n\n{tables}\n{figure}", encoding="utf-8")
    if _timed(rows):
        plot_against_latency(rows, "macs", f"{stem}.svg")


_PREFACE = """\
Written by `python -m research bench`, from the CSV file beside it. Each table is one run, its networks
timed in turn in each round; time and MAC ratios are to the baseline in the same run. The tax is
time over that of the same network without its MoD blocks, minus one. Absolute times drift on a shared
machine; ratios are taken within a round. Exporting and compiling are not in the time. Weights are
random. Where norms are folded, they are in all networks of the table; "optimized" is a network whose
MoD blocks have the form that suits the engine, "native" one compiled for this machine, whose MoD
blocks are an operator in the engine's own layout."""


def _rehearsed(suites: Sequence[Suite]) -> tuple[Suite, ...]:
    """Each engine once, in the first suite that has it, on one network."""
    found, seen = [], set[str]()
    for suite in suites:
        conditions = tuple(s for s in suite.conditions if s.engine not in seen)
        seen |= {s.engine for s in conditions}
        found += [replace(suite, conditions=conditions).quick()] if conditions else []
    return tuple(found)


def _together(conditions: Sequence[Condition]) -> list[list[Condition]]:
    """Conditions by what shares files: in one dtype and layout, an engine of PyTorch's, or the others."""
    groups: dict[Any, list[Condition]] = {}
    for condition in conditions:
        own = condition.engine if ENGINES[condition.engine].by_pytorch else ""
        groups.setdefault((own, condition.dtype, condition.channels_last), []).append(condition)
    return list(groups.values())


def _in_one_call(conditions: Sequence[Condition]) -> list[list[Condition]]:
    """All of a group, where it is each of its engines at each of its batches; else by engine.

    A run that is resumed may have left something else.
    """
    by_engine: dict[str, list[Condition]] = {}
    for condition in conditions:
        by_engine.setdefault(condition.engine, []).append(condition)
    alike = len({tuple(s.batch for s in some) for some in by_engine.values()}) == 1
    return [list(conditions)] if alike else list(by_engine.values())


def _key(row: Measurement) -> tuple[str, int, str, bool, str]:
    """What tells the runs of a benchmark apart: a `Condition`, and the baseline."""
    return row.engine, row.batch, row.dtype, row.channels_last, row.against


def _kept(path: Path, device: str) -> list[Measurement]:
    """Rows of an earlier run that this one would give again; a run with an undecided row is timed again."""
    same = ("cpu", "cores", "gpu", "torch", "timm", "pliant", "commit", "instructions")
    now = dict(provenance(device))
    rows = read_rows(path) if path.exists() else []
    undecided = {_key(row) for row in rows if row.undecided}
    return [
        row
        for row in rows
        if _key(row) not in undecided and all(getattr(row, name) == now[name] for name in same)
    ]


def _run(
    suite: Suite, conditions: Sequence[Condition], device: str, threads: int | None, report: Any
) -> list[Measurement]:
    import torch

    models: dict[str, Any] = {}
    for options in (suite.options, *({**suite.options, **more} for more in suite.also)):
        told = "".join(f" {key}={value}" for key, value in options.items())
        for name in suite.models:
            models[f"{name}{told}"] = fresh(name, **options) if told else name
    rows = measure(
        models,
        against=suite.against,
        batch=list(dict.fromkeys(condition.batch for condition in conditions)),
        device=device,
        dtype=conditions[0].dtype,
        channels_last=conditions[0].channels_last,
        engines=list(dict.fromkeys(condition.engine for condition in conditions)),
        forms=suite.forms,
        threads=threads,
        rounds=suite.rounds,
        min_run_time=suite.min_run_time,
        max_run_time=suite.max_run_time,
        max_prepare_time=suite.max_prepare_time,
        lower_resolution=suite.lower_resolution,
        progress=report,
    )
    torch.compiler.reset()  # what was compiled is of no more use, and takes memory
    return rows


def _advance(progress: Progress, task: TaskID, condition: str, done: int, total: int, what: str) -> None:
    progress.update(task, completed=done, total=total, description=f"{condition}: {what}")


def _progress(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    text = TextColumn("{task.description}", markup=False)
    return Progress(text, BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), console=console)


def _timed(rows: Sequence[Measurement]) -> bool:
    return any(row.median_ms is not None for row in rows)
