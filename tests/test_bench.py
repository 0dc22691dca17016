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

from pliant import bench, cli
from pliant.bench import SUITES, Setting, Suite, run_bench
from pliant.measuring.rows import NO_BLOCKS, Measurement, read_rows

TINY = Suite(
    models=("resnet20_cifar_mod",),
    against="resnet20_cifar",
    lower_resolution=16,
    settings=(Setting(engine="eager", batch=2), Setting(engine="eager", batch=1, channels_last=False)),
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
    assert ">resnet20_cifar_mod<" in (folder / "latency-cpu.svg").read_text()
    printed = console.export_text()
    assert "2/2" in printed  # the progress bar
    assert "MoD" in printed
    assert "latency-cpu.csv, .md, .svg" in printed.replace("\n", "")


def test_rows_are_kept_when_a_later_run_is_stopped(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs: list[int] = []

    def stopped(*args: Any, **options: Any) -> list[Measurement]:
        runs.append(options["batch"])
        if len(runs) == 2:
            raise KeyboardInterrupt
        return [Measurement(model="a", batch=options["batch"], median_ms=1.0, macs=1)]

    monkeypatch.setattr(bench, "measure", stopped)
    with pytest.raises(KeyboardInterrupt):
        run_bench(results=tmp_path, suite=TINY, console=console)
    assert [row.batch for row in read_rows(tmp_path / "latency-cpu.csv")] == [2]


def test_resume_does_only_what_is_missing(
    tmp_path: Path, console: Console, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = replace(TINY, models=("resnet20_cifar",), settings=TINY.settings[:1])
    first = run_bench(results=tmp_path, suite=small, console=console)
    runs: list[int] = []

    def counted(*args: Any, **options: Any) -> list[Measurement]:
        runs.append(options["batch"])
        return [replace(first[0], batch=options["batch"], channels_last=options["channels_last"])]

    monkeypatch.setattr(bench, "measure", counted)
    rows = run_bench(results=tmp_path, suite=TINY, console=console, resume=True)
    assert runs == [1]
    assert rows[: len(first)] == first
    assert read_rows(tmp_path / "latency-cpu.csv") == rows

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
        assert len(set(suite.settings)) == len(suite.settings)
    for (suite,) in SUITES["mod"].values():
        assert suite.models == ("resnet50_mod", "resnet75_mod", "resnet86_mod")
        assert (suite.against, suite.lower_resolution) == ("resnet50", 176)
    assert {(s.engine, s.batch, s.dtype) for s in SUITES["mod"]["cpu"][0].settings} == {
        (e, b, "float32") for e in ("eager", "compiled") for b in (1, 16)
    }
    assert {(s.engine, s.batch, s.dtype) for s in SUITES["mod"]["cuda"][0].settings} == {
        (e, b, d) for e in ("eager", "compiled") for b in (1, 16, 128) for d in ("float32", "bfloat16")
    }
    for device in ("cpu", "cuda"):
        suites = SUITES["condconv"][device]
        assert [(s.models, s.options, s.against) for s in suites] == [
            (("cc_mobilenetv1_050",), {"experts": 8}, "mobilenetv1_w050"),
            (("cc_mobilenetv1_025",), {"experts": 8}, "mobilenetv1_w025"),
            (("cc_resnet50",), {"experts": 2}, "resnet50"),
            (("cc_mobilenetv2_100",), {"experts": 8}, "mobilenetv2_100"),
        ]
        assert all({1, 32} <= {s.batch for s in suite.settings} for suite in suites)


def test_no_suite_for_a_device_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no benchmark for device 'tpu'; there is one for cpu, cuda"):
        run_bench("tpu", tmp_path)
    with pytest.raises(ValueError, match="no benchmark 'adn'; there are mod, condconv"):
        run_bench("cpu", tmp_path, name="adn")
    assert list(tmp_path.iterdir()) == []


def test_the_command_names_all_suites_and_refuses_what_one_does_not_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unwanted(*args: Any, **options: Any) -> None:
        raise AssertionError("something was timed")

    monkeypatch.setattr("pliant.measuring.forms.run_forms", unwanted)
    monkeypatch.setattr(bench, "run_bench", unwanted)

    def said(*options: str) -> str:
        command = ["bench", "--results", str(tmp_path), *options]
        return str(CliRunner().invoke(cli.app, command).exception)

    assert said("--suite", "form") == "no benchmark 'form'; there are mod, condconv, forms, steps"
    assert said("--suite", "forms", "--resume").startswith("--resume is for networks")
    for suite in ("mod", "condconv", "forms"):
        assert said("--suite", suite) == "something was timed"
    assert said("--suite", "condconv", "--resume") == "something was timed"


def test_a_suite_of_converted_networks_names_their_options(tmp_path: Path, console: Console) -> None:
    tiny = Suite(
        models=("cc_resnet20_cifar",),
        against="resnet20_cifar",
        lower_resolution=None,
        settings=(Setting(engine="eager", batch=1),),
        options={"experts": 2},
        rounds=1,
        min_run_time=0.0,
    )
    rows = run_bench(results=tmp_path, suite=tiny, console=console, name="condconv")
    assert [row.label for row in rows] == ["resnet20_cifar", "cc_resnet20_cifar experts=2"]
    assert rows[1].parameters > rows[0].parameters
    assert rows[1].time_ratio is not None
    assert read_rows(tmp_path / "condconv-latency-cpu.csv") == rows
    # The same settings against another network are another run.
    more = replace(tiny, models=("cc_resnet56_cifar",), against="resnet56_cifar")
    again = run_bench(results=tmp_path, suite=more, console=console, name="condconv", resume=True)
    assert [row.against for row in again] == ["resnet20_cifar"] * 2 + ["resnet56_cifar"] * 2


@pytest.mark.gpu
def test_a_suite_on_a_gpu(tmp_path: Path, console: Console) -> None:
    rows = run_bench("cuda", tmp_path, suite=TINY, console=console)
    assert [row.error for row in rows] == [""] * 8
    assert all(row.gpu for row in rows)
    assert (tmp_path / "latency-cuda.svg").exists()
