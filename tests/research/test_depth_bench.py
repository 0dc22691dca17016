"""The README's picture: accuracy against latency of an adaptive network's depths."""

from __future__ import annotations

import csv
import re
import shutil
from pathlib import Path

import pytest

from pliant.adaptive.profiling import DepthProfile
from pliant.records import percent
from research.bench.depths import BASELINE, SCORES, plot_depth_bench, run_depth_bench

RESULTS = Path(__file__).resolve().parents[2] / "results"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    for name in (SCORES, BASELINE):
        shutil.copy(RESULTS / name, tmp_path)
    return tmp_path


def test_each_depth_is_timed_beside_the_accuracy_of_its_row(results: Path) -> None:
    figure = run_depth_bench(results, quick=True)
    with (RESULTS / SCORES).open(newline="") as file:
        accuracy = {f"depth {row['depth']}": float(row["top1"]) for row in csv.DictReader(file)}
    profile = DepthProfile.load(results / "depths-cpu-quick.csv")
    assert {row.variant: percent(row.accuracy) for row in profile.rows} == accuracy
    assert len(accuracy) == 8
    assert all(row.threads == 1 and row.median_ms for row in profile.rows)
    assert all(f">{depth.removeprefix('depth ')}</text>" in figure.read_text() for depth in accuracy)


def test_the_picture_of_the_readme_is_that_of_the_rows(tmp_path: Path) -> None:
    profile = DepthProfile.load(RESULTS / "depths-cpu.csv")
    with (RESULTS / BASELINE).open(newline="") as file:
        plain = next(float(r["test_accuracy"]) / 100 for r in csv.DictReader(file) if r["label"] == "plain")
    drawn = plot_depth_bench(profile, plain, tmp_path / "drawn.svg")
    assert texts(drawn) == texts(RESULTS / "depths-cpu.svg")


def texts(path: Path) -> list[str]:
    """What a figure says; coordinates may differ between versions of matplotlib."""
    return re.findall(r">([^<]+)</text>", path.read_text())
