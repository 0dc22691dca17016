"""Rows of measurements: files of them, tables, plots, and where their figures come from."""

from __future__ import annotations

import csv
import io
import re
import subprocess
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from rich.console import Console

import pliant
from _measure import SMALL, conv
from pliant import provenance, tables
from pliant.measuring.figure import plot_against_latency
from pliant.measuring.latency import NOT_FASTER, measure
from pliant.measuring.page import write_page
from pliant.measuring.rows import (
    LOWER_RESOLUTION,
    Measurement,
    grouped,
    markdown_table,
    read_rows,
    terminal_table,
    write_rows,
)
from pliant.methods.mixture_of_depths.method import NO_BLOCKS

ROW = Measurement(
    model="resnet50_mod",
    parameters=18_105_949,
    macs=2_519_827_456,
    input_size=(3, 224, 192),
    batch=16,
    channels_last=True,
    threads=2,
    rounds=15,
    median_ms=28.71234,
    iqr_ms=0.4321,
    min_ms=28.1,
    max_ms=1 / 3,
    against="resnet50",
    time_ratio=0.7178,
    time_ratio_iqr=0.0123,
    mac_ratio=0.616,
    tax=0.1049,
    tax_iqr=0.0149,
    note='a, "quoted" note | and\na line',
    cpu="Some CPU @ 2.0 GHz",
    cores=2,
    torch="2.15.0",
    commit="0123456789abcdef0123456789abcdef01234567-dirty",
    date="2026-01-02T03:04:05+00:00",
    instructions="avx2 avx512f",
    governor="performance",
    load=1.87,
)


def test_rows_come_back_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    failed = Measurement(model="x", error="RuntimeError: no", device="cuda")
    write_rows(path, [ROW])
    write_rows(path, [failed], append=True)
    assert read_rows(path) == [ROW, failed]
    write_rows(path, [failed])
    assert read_rows(path) == [failed]
    assert [p.name for p in path.parent.iterdir()] == ["rows.csv"]


@pytest.mark.parametrize("lacking", range(1, len(Measurement.LATE) + 1))
def test_rows_that_were_written_before_a_column_are_read_and_added_to(tmp_path: Path, lacking: int) -> None:
    path, names = tmp_path / "rows.csv", Measurement.LATE[-lacking:]
    write_rows(path, [ROW])
    with path.open(newline="") as file:
        old = [cells[:-lacking] for cells in csv.reader(file)]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(old)
    defaults = {f.name: f.default for f in fields(Measurement)}
    before = replace(ROW, **{name: defaults[name] for name in names})
    assert read_rows(path) == [before]
    write_rows(path, [ROW], append=True)
    assert read_rows(path) == [before, ROW]


def test_the_rows_of_results_are_read() -> None:
    files = sorted((Path(__file__).resolve().parents[2] / "results").glob("*latency*.csv"))
    assert len(files) > 3
    assert all(row.model for file in files for row in read_rows(file))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "model,variant",
            "name,variant",
            r"rows.csv, line 1: the columns are not those of measurements: model, name",
        ),
        ("model,variant", "variant,model", "rows.csv, line 1: .*they are in another order"),
        ("28.71234", "28.7x", r"rows.csv, line 3: median_ms is '28.7x', which is no float | None"),
        ("3x224x192", "3x224", "rows.csv, line 3: input_size is '3x224'"),
        (",True,", ",yes,", "rows.csv, line 3: channels_last is 'yes'"),
        (",2026-01-02T03:04:05+00:00", "", "rows.csv, line 3: 39 cells, not 40"),
    ],
)
def test_damaged_or_foreign_rows_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    path = tmp_path / "rows.csv"
    write_rows(path, [ROW])
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    damaged = path.read_text()
    with pytest.raises(ValueError, match=message):
        read_rows(path)
    with pytest.raises(ValueError, match=message):
        write_rows(path, [ROW], append=True)
    assert path.read_text() == damaged  # nothing is lost


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_bytes(b"\x89PNG\r\n\x1a\n\xff\xfe")
    with pytest.raises(ValueError, match=r"rows\.csv is no readable CSV file"):
        read_rows(path)


def test_markdown_shows_no_false_digits() -> None:
    text = markdown_table([replace(ROW, note=""), Measurement(model="x", error="no | luck", cpu="c")])
    assert "| resnet50_mod |" in text
    assert " 28.7 (0.4) | 0.72 (0.01) | 0.62 | 1.39x | 10 % (1) | " in text
    assert "| 18.1 | 2.52 |" in text
    assert r"not measured: no \| luck |" in text
    # What differs is a column; what is shared is said once.
    assert "| network | hardware | threads | batch | memory format | ratios against |" not in text
    head = text.splitlines()[2]
    assert "threads" in head
    assert "batch" in head
    assert "engine eager" in text.splitlines()[0]
    assert "pixels 224x192" in text.splitlines()[0]


def test_tables_state_the_conditions() -> None:
    first, blank, *_ = markdown_table([ROW]).splitlines()
    for told in (
        "hardware Some CPU @ 2.0 GHz (2 cores, avx2 avx512f)",
        "governor performance",
        "load 1.9",
        "threads 2",
        "engine eager",
        "batch 16",
        "pixels 224x192",
        "memory format channels_last",
        "ratios against resnet50",
        "commit 0123456789ab-dirty",
        "measured 2026-01-02",
        "in brackets: interquartile range",
    ):
        assert told in first
    assert blank == ""


@pytest.mark.parametrize(
    ("value", "spread", "text"),
    [
        (28.71, 0.43, "28.7 (0.4)"),
        (1234.5, 40.0, "1234 (40)"),
        (0.01234, 0.00021, "0.0123 (0.0002)"),
        (5.0, None, "5.00"),
        (123.456, None, "123"),
    ],
)
def test_times_are_shown_to_the_digit_of_their_spread(
    value: float, spread: float | None, text: str
) -> None:
    row = Measurement(model="x", median_ms=value, iqr_ms=spread)
    assert markdown_table([row], ["time"]).splitlines()[-1] == f"| {text} |"


def test_an_unknown_column_is_refused() -> None:
    with pytest.raises(ValueError, match="no column 'speed'; the columns are label,"):
        markdown_table([ROW], ["label", "speed"])


def test_terminal_table_fits_eighty_characters() -> None:
    rows = [replace(ROW, note=NOT_FASTER), replace(ROW, variant=NO_BLOCKS, note="", tax=None, tax_iqr=None)]
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal_table(rows))
    text = console.export_text()
    for cell in ("resnet50_mod", "28.7 (0.4)", "0.72 (0.01)", "0.62", "10 % (1)", "18.1", "2.52"):
        assert cell in text
    assert f"resnet50_mod: {NOT_FASTER}" in text
    assert max(map(len, text.splitlines())) <= 80


BUSY = [
    replace(ROW, model="resnet50", time_ratio=1.0, time_ratio_iqr=0.0, tax=None, tax_iqr=None),
    replace(ROW, note="", time_ratio_iqr=0.3, tax=5.99, tax_iqr=8.6, iqr_ms=9.0),
    replace(ROW, variant=LOWER_RESOLUTION, note="", tax=None, tax_iqr=None),
]


def test_a_spread_over_the_limit_is_undecided_in_tables_and_findings(tmp_path: Path) -> None:
    text = markdown_table(BUSY)
    assert tables.WHY_UNDECIDED in text.splitlines()[0]
    decided, busy, lower = text.splitlines()[-3:]
    assert tables.UNDECIDED not in decided + lower
    assert busy.count(" undecided |") == 4  # time, ratio, speed-up, tax
    assert "undecided, machine busy" in busy
    assert "599" not in text
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal_table(BUSY))
    assert "resnet50_mod: undecided, machine busy" in console.export_text()
    page = write_page(tmp_path / "page.html", BUSY).read_text()
    assert "Undecided, machine busy: resnet50_mod (eager, batch 16, float32)." in page
    quiet = markdown_table([BUSY[0], ROW])
    assert tables.UNDECIDED not in quiet


def test_a_spread_over_the_limit_is_undecided_in_figures(tmp_path: Path) -> None:
    text = plot_against_latency(BUSY, "macs", tmp_path / "figure.svg").read_text()
    assert text.count("resnet50_mod (undecided, machine busy)") == 1
    assert text.count("undecided") == 1


def test_an_undecided_time_is_no_finding(clock: SimpleNamespace) -> None:
    clock.times = lambda entrant, turn: 1.0 if entrant == 0 else (0.5, 1.0, 3.0)[max(turn, 0)]
    base, row = measure({"wide": conv(8), "narrow": conv(4)}, against="wide", input_size=SMALL, rounds=3)
    assert (row.undecided, row.note, base.undecided) == (True, "", False)


def test_two_processors_of_one_name_have_a_table_each() -> None:
    assert len(grouped([ROW, replace(ROW, instructions="avx2")])) == 2


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_widest_figures_fit_the_terminal(width: int) -> None:
    row = replace(
        ROW, median_ms=12345.6, iqr_ms=123.4, time_ratio=12.34, time_ratio_iqr=1.23, tax=10.9, tax_iqr=1.2
    )
    rows = [replace(row, variant=LOWER_RESOLUTION), replace(row, batch=1), replace(row, dtype="bfloat16")]
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(terminal_table(rows, width=width))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    for cell in ("1090 % (120)", "12.34 (1.23)", "bfloat16", "resnet50_mod"):
        assert cell in text, cell
    assert ("12346 (123)" in text) == (width > 80)


def series() -> list[Measurement]:
    base = replace(ROW, model="resnet50", time_ratio=1.0, median_ms=40.0, tax=None, macs=4_089_184_256)
    return [
        base,
        replace(
            base, variant=LOWER_RESOLUTION, input_size=(3, 176, 176), median_ms=26.0, macs=2_600_000_000
        ),
        ROW,
        replace(ROW, variant=NO_BLOCKS, tax=None, median_ms=26.0, macs=2_500_000_000),
        Measurement(model="broken", error="no"),
    ]


def test_plot_names_networks_axes_and_settings(tmp_path: Path) -> None:
    path = plot_against_latency(series(), "macs", tmp_path / "figure.svg")
    told = re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())
    assert path == tmp_path / "figure.svg"
    for text in (
        "resnet50",
        "resnet50 at 176 px",
        "resnet50_mod",
        "latency, ms a batch",
        "multiply-accumulates an image, G",
        "cpu, eager, float32, channels_last, batch 16, 2 threads",
        "baseline",
        "converted",
        NO_BLOCKS,
        "Some CPU @ 2.0 GHz (2 cores, avx2 avx512f) · torch 2.15.0",
    ):
        assert told.count(text) == 1, text
    assert "broken" not in told
    assert "other" not in told


def test_plot_has_a_panel_for_each_setting(tmp_path: Path) -> None:
    rows = [replace(row, batch=b) for b in (1, 16) for row in series()[:2]]
    text = plot_against_latency(rows, "parameters", tmp_path / "figure.svg").read_text()
    assert "batch 1, 2 threads" in text
    assert "batch 16, 2 threads" in text
    assert text.count(">parameters, M<") == 2


def test_plot_is_the_same_each_time_and_as_png_too(tmp_path: Path) -> None:
    a = plot_against_latency(series(), "macs", tmp_path / "a.svg").read_text()
    b = plot_against_latency(series(), "macs", tmp_path / "b.svg").read_text()
    assert a == b
    png = plot_against_latency(series(), "macs", tmp_path / "a.png").read_bytes()
    assert png.startswith(b"\x89PNG")


def test_plot_of_accuracy_takes_rows_that_have_one(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no row has both a time and accuracy; there are 5 rows"):
        plot_against_latency(series(), "accuracy", tmp_path / "figure.svg")
    assert list(tmp_path.iterdir()) == []
    rows = [replace(series()[0], accuracy=0.761), *series()[1:]]
    text = plot_against_latency(rows, "accuracy", tmp_path / "figure.svg").read_text()
    assert ">top-1 accuracy, %<" in text
    assert "resnet50_mod" not in text


@pytest.mark.parametrize(
    ("y", "name", "message"),
    [("speed", "a.svg", "y is 'speed'"), ("macs", "a.gif", "a.gif: the suffix must be")],
)
def test_plot_refuses_what_it_cannot_draw(tmp_path: Path, y: str, name: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plot_against_latency(series(), y, tmp_path / name)  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=t", "-c", "user.email=t@t"]
    done = subprocess.run(["git", *who, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_commit_is_that_of_a_tracked_package_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert (provenance.SOURCE / "__init__.py").is_file()  # what it asks git for by default
    assert provenance.commit(package) == ""  # no repository
    git(tmp_path, "init", "-q")
    (tmp_path / "other.txt").write_text("")
    git(tmp_path, "add", "other.txt")
    git(tmp_path, "commit", "-qm", "someone else's")
    assert provenance.commit(package) == ""  # installed into a repository that does not track it
    git(tmp_path, "add", "package")
    git(tmp_path, "commit", "-qm", "ours")
    head = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "other.txt").write_text("results do not make the code another")
    assert provenance.commit(package) == head
    (package / "__init__.py").write_text("x = 1")
    assert provenance.commit(package) == f"{head}-dirty"
    monkeypatch.setenv("PLIANT_COMMIT", "abc123")  # of a copy over another history
    assert provenance.commit(package) == "abc123"


def test_commit_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert provenance.commit(provenance.SOURCE) == ""


def test_provenance_says_where_figures_come_from(clock: SimpleNamespace) -> None:
    (row,) = measure({"a": conv()}, input_size=SMALL, rounds=1)
    assert (row.torch, row.timm, row.pliant) == (torch.__version__, timm.__version__, pliant.__version__)
    assert row.cores >= 1
    assert row.cpu
    assert row.instructions
    assert row.load is None or row.load >= 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", row.date)
    assert row.gpu == ""
    assert not [value for value in vars(row).values() if isinstance(value, str) and value.startswith("/")]


@pytest.mark.parametrize(
    ("line", "sets"),
    [
        ("flags\t\t: fpu avx avx2 avx512f avx512_vnni rdpid", "avx2 avx512f avx512_vnni"),
        ("flags\t\t: fpu avx avx2 rdpid", "avx2"),
        ("Features\t: fp asimd asimddp i8mm", "asimd asimddp i8mm"),
        ("", torch.backends.cpu.get_cpu_capability().lower()),
    ],
)
def test_instruction_sets_tell_processors_of_one_name_apart(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, sets: str
) -> None:
    for name in provenance.LIMITS:
        monkeypatch.delenv(name, raising=False)
    info = tmp_path / "cpuinfo"
    info.write_text(f"model name\t: AMD EPYC\n{line}\n")
    assert provenance.instruction_sets(info) == sets
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert provenance.instruction_sets(info) == f"{sets} ONEDNN_MAX_CPU_ISA=AVX2"


def test_the_governor_is_read_where_the_system_tells_it(tmp_path: Path) -> None:
    assert provenance.governor(tmp_path) == ""
    for cpu, name in (("cpu0", "powersave"), ("cpu1", "performance"), ("cpu2", "powersave")):
        file = tmp_path / cpu / "cpufreq" / "scaling_governor"
        file.parent.mkdir(parents=True)
        file.write_text(f"{name}\n")
    assert provenance.governor(tmp_path) == "performance powersave"


def test_cpu_model_is_read_where_linux_tells_it(tmp_path: Path) -> None:
    info = tmp_path / "cpuinfo"
    info.write_text("processor\t: 0\nmodel name\t: Fine CPU 9\nflags : x\nmodel name\t: Fine CPU 9\n")
    assert provenance.cpu_model(info) == "Fine CPU 9"
    assert provenance.cpu_model(tmp_path / "absent") != "Fine CPU 9"
