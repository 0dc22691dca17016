"""The cost of a training step at both depths: what is timed, its rows and its table."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
import timm
import torch
from rich.console import Console
from typer.testing import CliRunner

from pliant.cli import app
from pliant.measuring import steps
from pliant.measuring.steps import StepCost, measure_steps, run_step_bench, steps_markdown, write_steps

QUICK = {"batch": 2, "input_size": 8, "rounds": 1, "min_run_time": 0, "threads": 1}
STEPS = ["super alone", "base alone", "specialize", "joint"]


@pytest.fixture(scope="module")
def rows():
    return measure_steps("resnet20_cifar_adn", **QUICK)


def test_ratios_are_to_both_plain_steps_together(rows):
    assert [r.step for r in rows] == STEPS
    whole, base, *both = rows
    assert whole.ratio + base.ratio == pytest.approx(1, abs=1e-5)
    plain = whole.median_ms + base.median_ms
    for row in both:
        assert row.ratio == pytest.approx(row.median_ms / plain, rel=1e-4)
    assert {(r.network, r.batch, r.input_size, r.device, r.threads, r.rounds) for r in rows} == {
        ("resnet20_cifar_adn", 2, "3x8x8", "cpu", 1, 1)
    }
    assert all(r.ratio_iqr is None and r.torch == torch.__version__ for r in rows)


def test_each_kind_of_step_trains_what_it_says(monkeypatch):
    """Plain steps train plain networks of either depth; the others all of the adaptive one."""
    trained = []

    class Recorder(torch.optim.SGD):
        def __init__(self, params, **options):
            self.tensors = list(params)
            trained.append(self.tensors)
            super().__init__(self.tensors, **options)

    monkeypatch.setattr(torch.optim, "SGD", Recorder)
    model = timm.create_model("resnet20_cifar_adn", in_chans=1)
    before = {k: v.clone() for k, v in model.state_dict().items() if isinstance(v, torch.Tensor)}
    measure_steps(model, **QUICK)
    sizes = [sum(p.numel() for p in tensors) for tensors in trained]
    whole = sum(p.numel() for p in timm.create_model("resnet20_cifar", in_chans=1).parameters())
    adaptive = sum(p.numel() for p in model.parameters())
    base = sum(
        p.numel() for p in timm.create_model("resnet20_cifar", in_chans=1, layers=(2, 2, 2)).parameters()
    )
    assert sizes == [whole, base, adaptive, adaptive]
    assert all(p.grad is not None for tensors in trained for p in tensors)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())  # a copy is timed


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="convert it by AdaptiveDepth"):
        measure_steps("resnet20_cifar", **QUICK)
    with pytest.raises(ValueError, match="rounds must be at least 1, not 0"):
        measure_steps("resnet20_cifar_adn", **{**QUICK, "rounds": 0})
    with pytest.raises(ValueError, match="timm knows no model 'resnet20_cifar_and'"):
        measure_steps("resnet20_cifar_and", **QUICK)
    with pytest.raises(ValueError, match="batch must be at least 1"):
        measure_steps("resnet20_cifar_adn", **{**QUICK, "batch": 0})
    with pytest.raises(ValueError, match="no benchmark for device 'tpu'; there is one for cpu, cuda"):
        run_step_bench("tpu")


def test_the_bench_writes_rows_and_a_table(rows, tmp_path, monkeypatch):
    calls = []

    def measured(network, **options):
        calls.append((network, options))
        return [replace(r, network=network) for r in rows]

    monkeypatch.setattr(steps, "measure_steps", measured)
    found = run_step_bench("cpu", tmp_path, threads=1, console=Console(quiet=True))
    assert [c[0] for c in calls] == [name for name, _ in steps.SUITES["cpu"]]
    with (tmp_path / "steps-cpu.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(found) == 4 * len(calls)
    assert steps_markdown(found) in (tmp_path / "steps-cpu.md").read_text()
    calls.clear()
    command = ["bench", "--suite", "steps", "--quick", "--threads", "1", "--results", str(tmp_path)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert [(c[0], c[1]["rounds"], c[1]["threads"]) for c in calls] == [("resnet20_cifar_adn", 3, 1)]
    assert (tmp_path / "steps-cpu-quick.csv").is_file()


def test_the_table_says_time_ratio_and_spread(tmp_path):
    row = StepCost(
        network="net", step="specialize", batch=4, input_size="3x8x8", device="cpu", threads=1, rounds=3,
        median_ms=12.34, iqr_ms=0.5, ratio=1.0432, ratio_iqr=0.01, cpu="C", cores=2,
        commit="a" * 40 + "-dirty",
    )  # fmt: skip
    text = steps_markdown([row])
    assert "| net | specialize | 4 | 12.3 (0.5) | 1.04 (0.01) |" in text
    assert f"C (2 cores) · threads 1 · torch  · commit {'a' * 12}-dirty" in text
    write_steps(tmp_path / "a.csv", [row])
    write_steps(tmp_path / "a.csv", [replace(row, step="joint")], append=True)
    assert len((tmp_path / "a.csv").read_text().splitlines()) == 3
