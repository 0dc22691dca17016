"""The loader's rates: what is timed, its rows and its table."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from rich.console import Console
from typer.testing import CliRunner

from _images import make_folder
from pliant.records import read_records, write_records
from research.bench import loader
from research.bench.loader import (
    PHOTOGRAPHS,
    LoaderRate,
    measure_loader,
    rates_markdown,
    run_loader_bench,
)
from research.commands import app


@pytest.fixture(scope="module")
def rows():
    return measure_loader(workers=(0,), rounds=2, images=64, pixels=32)


def test_every_way_is_timed_in_turn(rows):
    ways = [(r.work, r.workers, r.source) for r in rows]
    assert ways == [(w, 0, s) for w in ("decode", "train") for s in ("folder", "shards")]
    assert all(r.images_per_s > 0 and r.iqr is not None for r in rows)
    assert [r.ratio for r in rows if r.source == "folder"] == [1.0, 1.0]
    assert all((r.index_us is None) == (r.source == "folder") for r in rows)
    assert all(r.index_us > 0 for r in rows if r.source == "shards")
    about = {(r.data, r.images, r.megapixels, r.pixels, r.rounds, r.torch) for r in rows}
    assert about == {(PHOTOGRAPHS, 64, 0.188, 32, 2, torch.__version__)}
    assert 20 < rows[0].kilobytes < 150  # photographs, not noise or one colour


def test_both_sources_hold_the_same_images(tmp_path):
    root = make_folder(tmp_path / "images", 30)
    seen = {}
    real = loader._rate

    def watched(images, recipe, work, workers):
        seen.setdefault(recipe.data, (len(images), images.image(7).tobytes(), images.labels.tolist()))
        return real(images, recipe, work, workers)

    loader._rate, before = watched, loader._rate
    try:
        found = measure_loader(root, workers=(0,), works=("train",), rounds=1, images=50, pixels=16)
    finally:
        loader._rate = before
    assert seen["folder"] == seen["shards"]
    assert {r.data for r in found} == {"images"}
    assert {r.images for r in found} == {50}
    assert set(seen["folder"][2]) == {0, 1, 2}  # evenly taken: of every class


def test_only_full_batches_after_the_first_are_counted(monkeypatch):
    clock = iter([10.0, 12.0])
    monkeypatch.setattr(loader.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(loader, "_decoded", lambda images, workers: iter([16] * 5))
    assert loader._rate(None, None, "decode", 2) == 3 * 16 / 2


def test_wrong_numbers_are_refused(tmp_path):
    for options, told in (
        ({"rounds": 0}, "rounds must be at least 1, not 0"),
        ({"works": ("read",)}, "no work 'read'; there are decode, train"),
        ({"workers": ()}, r"workers must be numbers from 0 on, not \[\]"),
        ({"images": 32, "workers": (2,)}, "32 images are too few for 2 workers: at least 80"),
    ):
        with pytest.raises(ValueError, match=told):
            measure_loader(**options)
    with pytest.raises(FileNotFoundError):
        measure_loader(tmp_path / "none")


def test_rows_are_written_read_and_shown(rows, tmp_path):
    write_records(tmp_path / "rows.csv", LoaderRate, rows)
    assert read_records(tmp_path / "rows.csv", LoaderRate) == rows
    table = rates_markdown([replace(rows[0], images_per_s=123.4, iqr=5.6, ratio=1.0, ratio_iqr=0.0)])
    assert "| decode | 0 | folder | 123 (6) | 1.00 (0.00) |" in table
    text = (tmp_path / "rows.csv").read_text()
    (tmp_path / "rows.csv").write_text(text.replace("decode,32,0", "decode,32,none"))
    with pytest.raises(ValueError, match=r"rows\.csv, line 2: workers is 'none', which is no int"):
        read_records(tmp_path / "rows.csv", LoaderRate)
    (tmp_path / "rows.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="the columns are not those of a LoaderRate"):
        read_records(tmp_path / "rows.csv", LoaderRate)


def test_the_bench_writes_rows_and_table(tmp_path):
    found = run_loader_bench(results=tmp_path, quick=True, console=Console(quiet=True))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loader-cpu-quick.csv", "loader-cpu-quick.md"]
    assert read_records(tmp_path / "loader-cpu-quick.csv", LoaderRate) == found
    assert (tmp_path / "loader-cpu-quick.md").read_text().startswith("# The loader\n")


@pytest.mark.parametrize(
    "options",
    [["--suite", "loader", "--resume"], ["--suite", "loader", "--device", "cuda"], ["--path", "x"]],
)
def test_options_of_other_suites_are_refused(options):
    assert CliRunner().invoke(app, ["bench", *options]).exit_code == 1
