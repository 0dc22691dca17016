"""What ImageNet's recipes take: the formulas by hand, and the page."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pliant.cli import app
from pliant.measuring.costs import (
    BEGIN,
    END,
    ENTRIES,
    changes,
    core_rate,
    cost,
    costs_markdown,
    write_costs,
)
from pliant.measuring.loader import LoaderRate, write_rates
from pliant.measuring.step_rows import StepCost, write_steps
from pliant.recipes import get_recipe
from pliant.train.recipe import override

ROW = StepCost(
    network="resnet50_mod", step="network", batch=64, input_size="3x224x224", device="cuda", gpu="H100",
    median_ms=100.0, peak_mb=5000.0,
)  # fmt: skip
RATE = LoaderRate(
    data="images", images=200, kilobytes=100.0, megapixels=0.2, source="shards", work="train", pixels=224,
    workers=1, rounds=5, images_per_s=100.0, cpu="Some CPU", index_us=50.0,
)  # fmt: skip
PAGE = Path(__file__).parents[1] / "docs" / "imagenet.md"


def test_the_formulas_by_hand():
    found = cost(get_recipe("imagenet.resnet50_mod.paper"), ROW, parameters=18_000_000, core_rate=100.0)
    assert (found.batch, found.step_ms) == (32, 50.0)  # half of the 64 that took 100 ms
    steps = 1_281_167 // 256
    assert steps == 5004
    epoch = steps * 0.05 + 100_000 / 256 * 0.05 / 3
    assert found.hours == pytest.approx(100 * epoch / 3600)
    assert found.hours == pytest.approx(7.13, abs=0.01)
    assert found.gpu_hours == pytest.approx(8 * found.hours)
    # 0.072 GB of gradients: 4.928 of activations at 64 images, half of them, and four times 0.072.
    assert found.memory_gb == pytest.approx(4.928 / 2 + 4 * 0.072)
    assert found.images_per_s == pytest.approx(256 / 0.05)
    assert found.cores == pytest.approx(51.2)
    four = cost(get_recipe("imagenet.resnet50_mod.paper"), ROW, 18_000_000, None, gpus=4)
    assert (four.batch, four.step_ms, four.cores) == (64, 100.0, None)
    assert four.gpu_hours == pytest.approx(found.gpu_hours, rel=1e-3)


def test_what_cannot_be_computed_is_refused():
    recipe = get_recipe("imagenet.resnet50_mod.paper")
    with pytest.raises(ValueError, match=r"7 GPUs cannot share .*'s batch of 256 evenly"):
        cost(recipe, ROW, 1, None, gpus=7)
    with pytest.raises(ValueError, match=r"7 GPUs cannot share .*'s batch of 256 evenly"):
        changes(recipe, 7)
    with pytest.raises(ValueError, match="7 GPUs cannot share"):
        costs_markdown([], [], gpus=7)
    with pytest.raises(ValueError, match="the row of resnet50_mod, network, has no time"):
        cost(recipe, replace(ROW, median_ms=None), 1, None)


def test_without_rows_nothing_is_claimed():
    text = costs_markdown([], [])
    lines = [line for line in text.splitlines() if line.startswith("| imagenet.")]
    assert len(lines) == 2 * len(ENTRIES)
    assert all("| not measured |" in line for line in lines)
    assert "The loader: not measured." in text
    assert "not measured: there is no `results/steps-cuda.csv` yet" in text


def test_rows_fill_the_table_by_the_nearest_batch_and_the_quickest_form():
    condconv = replace(ROW, network="cc_mobilenetv1_050", step="fused", median_ms=80.0)
    rows = [
        replace(ROW, batch=256, median_ms=1.0),
        ROW,
        condconv,
        replace(condconv, step="experts", median_ms=60.0),
        replace(ROW, dtype="bfloat16", median_ms=40.0),
    ]
    text = costs_markdown(rows, [RATE], price=2.5)
    (mod,) = [t for t in text.splitlines() if t.startswith("| imagenet.resnet50_mod.paper | 100 | float32")]
    assert mod.startswith(
        "| imagenet.resnet50_mod.paper | 100 | float32 | 32 of 64 | 50.0 | 7.1 | 57 | 143 | "
    )
    assert mod.endswith(" | 5120 | 51 |")
    assert "| imagenet.resnet50_mod.paper | 100 | bfloat16 | 32 of 64 | 20.0 |" in text
    assert "| imagenet.cc_mobilenetv1_050.paper | 120 | float32 | 32 of 64 | 30.0 |" in text
    assert "| imagenet.resnet50.paper | 100 | float32 | 32 | not measured |" in text
    assert "price at 2.5 an hour" in text
    assert "Some CPU loads 100 images a second" in text
    assert "| 40 | 6400 | 64 |" in text
    assert "finds ImageNet's images in their shards at its start, in 64 seconds." in text
    assert '\nImages "of" more: steps of so many were measured.' in text
    fitting = [replace(row, batch=32) for row in rows]
    assert "were measured" not in costs_markdown(fitting, [RATE])
    assert "| imagenet.resnet50_mod.paper | 100 | float32 | 32 | 1.0 |" in costs_markdown(fitting, [RATE])
    header, rule = (t for t in text.splitlines() if t.startswith(("| recipe", "|---|---:|---|")))
    assert header.count("|") == rule.count("|") == mod.count("|")


def test_one_worker_of_shards_is_one_core():
    others = [replace(RATE, workers=2), replace(RATE, source="folder"), replace(RATE, work="decode")]
    assert core_rate([*others, RATE]) is RATE
    assert core_rate(others) is None


def test_every_command_is_one_that_trains_the_papers_batch():
    for entry in ENTRIES:
        recipe = get_recipe(entry.recipe)
        changed = override(recipe, ["data=shards", "path=x", *shlex.split(changes(recipe))])
        assert changed.devices * changed.batch == recipe.batch
        assert changed.workers == 8
    text = costs_markdown([], [])
    assert (
        "torchrun --nproc-per-node 8 -m pliant train imagenet.resnet50_adn.paper data=shards path=SHARDS "
        "devices=8 batch=32" in text
    )


def test_the_command_fills_a_page_from_rows(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert "not measured" in write_costs(page, tmp_path)
    write_steps(tmp_path / "steps-cuda.csv", [ROW])
    write_rates(tmp_path / "loader-cpu.csv", [RATE])
    done = CliRunner().invoke(app, ["costs", "--results", str(tmp_path), "--page", str(page)])
    assert done.exit_code == 0, done.output
    text = page.read_text()
    assert text.startswith("before")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "| imagenet.resnet50_mod.paper | 100 | float32 | 32 of 64 | 50.0 | 7.1 | 57 |" in text


def test_the_page_is_what_the_rows_of_the_repository_say(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(PAGE.read_text())
    write_costs(page, PAGE.parents[1] / "results")
    assert page.read_text() == PAGE.read_text()
