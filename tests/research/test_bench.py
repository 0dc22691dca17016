"""The benchmark suite, on networks that take milliseconds."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
from rich.console import Console
from typer.testing import CliRunner

from pliant.deploy.engines import named
from pliant.measuring.rows import LOWER_RESOLUTION, Measurement, read_rows, write_rows
from pliant.methods.mixture_of_depths.method import NO_BLOCKS
from research.bench import suites as bench
from research.bench.speed_table import BEGIN, END, speed_table
from research.bench.suites import SUITES, Condition, Suite, run_bench
from research.commands import app

ROOT = Path(__file__).resolve().parents[2]

TINY = Suite(
    models=("resnet20_cifar_mod",),
    against="resnet20_cifar",
    lower_resolution=16,
    conditions=(
        Condition(engine="eager", batch=2),
        Condition(engine="eager", batch=1, channels_last=False),
    ),
    rounds=2,
    min_run_time=0.0,
)


@pytest.fixture
def console() -> Console:
    return Console(file=io.StringIO(), width=100, record=True)


def test_a_suite_end_to_end(tmp_path: Path, console: Console) -> None:
    rows = run_bench(results=tmp_path / "results", suite=TINY, console=console)
    names = ["resnet20_cifar", "resnet20_cifar at 16 px"]
    for name in TINY.models:
        names += [name, f"{name} {NO_BLOCKS}"]
    assert [row.label for row in rows] == names * 2
    assert [(row.batch, row.channels_last) for row in rows] == [(2, True)] * 4 + [(1, False)] * 4
    assert all(row.rounds == 2 and not row.error for row in rows)
    assert all((row.tax is not None) == (row.label in TINY.models) for row in rows)

    folder = tmp_path / "results"
    assert sorted(p.name for p in folder.iterdir()) == [f"latency-cpu.{e}" for e in ("csv", "md", "svg")]
    assert read_rows(folder / "latency-cpu.csv") == rows
    text = (folder / "latency-cpu.md").read_text()
    assert text.count("| resnet20_cifar_mod |") == 2
    assert "batch 2" in text
    assert "memory format contiguous" in text
    assert "![MACs against latency](latency-cpu.svg)" in text
    assert ">resnet20_cifar_mod" in (folder / "latency-cpu.svg").read_text()  # undecided, perhaps
    printed = console.export_text()
    assert "2/2" in printed  # the progress bar
    assert "MoD" in printed
    assert "latency-cpu.csv, .md, .svg" in printed.replace("\n", "")


def test_rows_are_kept_when_a_later_run_is_stopped(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[list[int]] = []

    def stopped(*args: Any, **options: Any) -> list[Measurement]:
        runs.append(options["batch"])
        if len(runs) == 2:
            raise KeyboardInterrupt
        return [Measurement(model="a", batch=options["batch"][0], median_ms=1.0, macs=1)]

    monkeypatch.setattr(bench, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_bench(results=tmp_path, suite=TINY, console=console)
    assert [row.batch for row in read_rows(tmp_path / "latency-cpu.csv")] == [2]


def test_resume_does_only_what_is_missing(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(TINY, models=("resnet20_cifar",), conditions=TINY.conditions[:1])
    measured = run_bench(results=tmp_path, suite=small, console=console)
    # Decided, however busy this machine is.
    first = [replace(row, iqr_ms=0.0, time_ratio_iqr=0.0) for row in measured]
    write_rows(tmp_path / "latency-cpu.csv", first)
    runs: list[int] = []

    def counted(*args: Any, **options: Any) -> list[Measurement]:
        runs.extend(options["batch"])
        last = options["channels_last"]
        return [replace(first[0], batch=batch, channels_last=last) for batch in options["batch"]]

    monkeypatch.setattr(bench, "measure", counted)
    rows = run_bench(results=tmp_path, suite=TINY, console=console, resume=True)
    assert runs == [1]
    assert rows[: len(first)] == first
    assert read_rows(tmp_path / "latency-cpu.csv") == rows

    # A run with an undecided row is done again.
    busy = [replace(row, iqr_ms=row.median_ms) for row in rows if row.batch == 1]
    write_rows(tmp_path / "latency-cpu.csv", [*first, *busy])
    run_bench(results=tmp_path, suite=TINY, console=console, resume=True)
    assert runs == [1, 1]
    runs.pop()

    # Rows of another commit are no part of this run.
    monkeypatch.setattr(bench, "provenance", lambda device: {**vars(first[0]), "commit": "another"})
    run_bench(results=tmp_path, suite=TINY, console=console, resume=True)
    assert runs == [1, 2, 1]

    # Nor are any without `resume`.
    run_bench(results=tmp_path, suite=TINY, console=console)
    assert runs == [1, 2, 1, 2, 1]


def test_a_rehearsal_is_small_and_has_files_of_its_own(tmp_path: Path, console: Console) -> None:
    rows = run_bench(results=tmp_path, suite=TINY, console=console, quick=True)
    assert {row.batch for row in rows} == {1}
    assert {row.model for row in rows} == {"resnet20_cifar", "resnet20_cifar_mod"}
    assert {row.rounds for row in rows} == {3}
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        f"latency-cpu-quick.{e}" for e in ("csv", "md", "svg")
    ]


def test_a_rehearsal_sees_each_engine_once() -> None:
    for name, engines in (("mod", {e.name for e in named("all")}), ("condconv", {"eager", "compiled"})):
        rehearsed = bench._rehearsed(SUITES[name]["cpu"])
        conditions = [s for suite in rehearsed for s in suite.conditions]
        assert {(s.engine, s.batch) for s in conditions} == {(e, 1) for e in engines}
        assert all(len(suite.models) == 1 for suite in rehearsed)


def test_a_suite_in_which_nothing_can_be_timed_says_so(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    failed = Measurement(model="a", error="no C++ compiler found")
    monkeypatch.setattr(bench, "measure", lambda *args, **options: [failed])
    run_bench(results=tmp_path, suite=TINY, console=console)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latency-cpu.csv", "latency-cpu.md"]
    text = (tmp_path / "latency-cpu.md").read_text()
    assert "not measured: no C++ compiler found" in text
    assert "svg" not in text


def test_suites_name_networks_and_settings_that_exist() -> None:
    for suite in (suite for suites in SUITES.values() for some in suites.values() for suite in some):
        assert all(timm.is_model(name) for name in (*suite.models, suite.against))
        assert len(set(suite.conditions)) == len(suite.conditions)
    for suite in (
        s for name in ("mod", "mod-bfloat16", "mod-int8") for some in SUITES[name].values() for s in some
    ):
        assert set(suite.models) == {"resnet50_mod", "resnet75_mod", "resnet86_mod"}
        assert suite.against == "resnet50"
        assert "optimized" in suite.forms
    for suite in (s for some in SUITES["mod"].values() for s in some):
        assert suite.lower_resolution == (None if suite.forms == ("optimized",) else 176)
    conditions = {
        device: [(s.engine, s.batch, s.dtype) for suite in suites for s in suite.conditions]
        for device, suites in SUITES["mod"].items()
    }
    assert all(len(set(some)) == len(some) for some in conditions.values())
    assert set(conditions["cpu"]) == {(e.name, b, "float32") for e in named("all") for b in (1, 16)}
    assert set(conditions["cuda"]) == {
        (e, b, d) for e in ("eager", "compile") for b in (1, 16, 128) for d in ("float32", "bfloat16")
    }
    for device in ("cpu", "cuda"):
        suites = SUITES["condconv"][device]
        assert [(s.models, s.options, s.against) for s in suites] == [
            (("cc_mobilenetv1_050",), {"experts": 8}, "mobilenetv1_w050"),
            (("cc_mobilenetv1_025",), {"experts": 8}, "mobilenetv1_w025"),
            (("cc_resnet50",), {"experts": 2}, "resnet50"),
            (("cc_mobilenetv2_100",), {"experts": 8}, "mobilenetv2_100"),
        ]
        assert all({1, 32} <= {s.batch for s in suite.conditions} for suite in suites)


def test_no_suite_for_a_device_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no benchmark for device 'tpu'; there is one for cpu, cuda"):
        run_bench("tpu", tmp_path)
    names = "mod, mod-bfloat16, mod-int8, condconv, condconv-engines"
    with pytest.raises(ValueError, match=f"no benchmark 'adn'; there are {names}"):
        run_bench("cpu", tmp_path, name="adn")
    assert list(tmp_path.iterdir()) == []


def test_the_command_names_all_suites_and_refuses_what_one_does_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwanted(*args: Any, **options: Any) -> None:
        raise AssertionError("something was timed")

    monkeypatch.setattr("research.bench.mixing_forms.run_forms", unwanted)
    monkeypatch.setattr(bench, "run_bench", unwanted)

    def said(*options: str) -> str:
        command = ["bench", "--results", str(tmp_path), *options]
        return str(CliRunner().invoke(app, command).exception)

    suites = "mod, mod-bfloat16, mod-int8, condconv, condconv-engines, forms, steps, loader, depths, switch"
    assert said("--suite", "form") == f"no benchmark 'form'; there are {suites}"
    assert said("--suite", "steps", "--patient") == "--patient has no effect on --suite steps; remove it"
    assert said("--suite", "forms", "--resume").startswith("--resume has no effect")
    for suite in ("mod", "condconv", "forms"):
        assert said("--suite", suite) == "something was timed"
    assert said("--suite", "condconv", "--resume") == "something was timed"


def test_a_suite_of_converted_networks_names_their_options(tmp_path: Path, console: Console) -> None:
    tiny = Suite(
        models=("cc_resnet20_cifar",),
        against="resnet20_cifar",
        lower_resolution=None,
        conditions=(Condition(engine="eager", batch=1),),
        options={"experts": 2},
        rounds=1,
        min_run_time=0.0,
    )
    rows = run_bench(results=tmp_path, suite=tiny, console=console, name="condconv")
    assert [row.label for row in rows] == ["resnet20_cifar", "cc_resnet20_cifar experts=2"]
    assert rows[1].parameters > rows[0].parameters
    assert rows[1].time_ratio is not None
    assert read_rows(tmp_path / "condconv-latency-cpu.csv") == rows
    # The same conditions against another network are another run.
    more = replace(tiny, models=("cc_resnet56_cifar",), against="resnet56_cifar")
    again = run_bench(results=tmp_path, suite=more, console=console, name="condconv", resume=True)
    assert [row.against for row in again] == ["resnet20_cifar"] * 2 + ["resnet56_cifar"] * 2


def test_engines_that_are_not_installed_are_named_and_left_out(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    conditions = tuple(Condition(engine=e, batch=1) for e in ("openvino", "eager"))
    rows = run_bench(results=tmp_path, suite=replace(TINY, conditions=conditions), console=console)
    assert {row.engine for row in rows} == {"eager"}
    told = " ".join(console.export_text().split())
    assert 'onnxruntime and openvino not installed: pip install ".[openvino]"' in told


def test_patience_lifts_the_limits_and_threads_are_passed_on(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[dict[str, Any]] = []

    def noted(*args: Any, **options: Any) -> list[Measurement]:
        given.append(options)
        return [Measurement(model="a", error="no")]

    monkeypatch.setattr(bench, "measure", noted)
    suite = replace(TINY, forms=("plain", "optimized"))
    for patient in (False, True):
        run_bench(results=tmp_path, suite=suite, console=console, patient=patient, threads=3)
    assert [(g["max_run_time"], g["max_prepare_time"]) for g in given] == [(75.0, 300.0)] * 2 + [
        (None, None)
    ] * 2
    assert {g["threads"] for g in given} == {3}
    assert {g["forms"] for g in given} == {("plain", "optimized")}
    assert [g["batch"] for g in given] == [[2], [1]] * 2


BASE = Measurement(
    model="net", against="net", time_ratio=1.0, median_ms=40.0, threads=2, cpu="Some CPU", cores=2
)


def speeds(**same: Any) -> list[Measurement]:
    low = replace(BASE, variant=LOWER_RESOLUTION, input_size=(3, 9, 9), time_ratio=0.625, **same)
    plain = replace(BASE, model="net_mod", time_ratio=0.8, tax=0.1, form="plain", **same)
    best = replace(plain, form="optimized", time_ratio=0.75, tax=-0.004)
    return [replace(BASE, **same), low, plain, best, replace(plain, variant=NO_BLOCKS, tax=None)]


def test_the_speed_table_has_a_third_step_where_there_is_a_native_form() -> None:
    native = replace(speeds()[3], form="native", time_ratio=0.5, tax=0.01)
    head, _, *table = speed_table([*speeds(), native]).splitlines()
    assert head.endswith("plain blocks → optimized → native")
    assert table[-1].endswith("| 1.25x (10 %) → 1.33x (0 %) → 2.00x (1 %) |")


def test_the_speed_table_has_a_line_for_each_engine_and_batch() -> None:
    rows = [*speeds(), *speeds(batch=16), *speeds(engine="openvino")[:2]]
    failed = {"median_ms": None, "time_ratio": None, "error": "died"}
    rows.append(replace(rows[0], model="net_mod", engine="openvino", **failed))
    head, blank, *table = speed_table(rows).splitlines()
    assert head == (
        "Some CPU (2 cores) · device cpu · threads 2 · "
        "speed-up over net (MoD tax); plain blocks → optimized"
    )
    assert blank == ""
    assert table == [
        "| engine | batch | net, ms | net at 9 px | net_mod |",
        "|---|---:|---:|---:|---:|",
        "| eager | 1 | 40.0 | 1.60x | 1.25x (10 %) → 1.33x (0 %) |",
        "| eager | 16 | 40.0 | 1.60x | 1.25x (10 %) → 1.33x (0 %) |",
        "| openvino | 1 | 40.0 | 1.60x | not measured |",
    ]
    with pytest.raises(ValueError, match="none of 1 rows has a tax"):
        speed_table([BASE])


def test_the_bench_puts_the_table_into_a_file_with_marks(tmp_path: Path, console: Console) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"Before\n{BEGIN}\nold\n{END}\nAfter\n")
    rows = run_bench(results=tmp_path, suite=TINY, console=console, readme=page)
    assert page.read_text() == f"Before\n{BEGIN}\n{speed_table(rows)}\n{END}\nAfter\n"


def test_the_table_of_speed_is_what_the_rows_give() -> None:
    stated = (ROOT / "docs" / "mod-tax.md").read_text().partition(f"{BEGIN}\n")[2].partition(f"\n{END}")[0]
    assert stated == speed_table(read_rows(ROOT / "results" / "latency-cpu.csv"))


@pytest.mark.gpu
def test_a_suite_on_a_gpu(tmp_path: Path, console: Console) -> None:
    rows = run_bench("cuda", tmp_path, suite=TINY, console=console)
    assert [row.error for row in rows] == [""] * 8
    assert all(row.gpu for row in rows)
    assert (tmp_path / "latency-cuda.svg").exists()
