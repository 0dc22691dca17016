"""The cost of a training step: what is timed of each method, its rows and its table."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
import timm
import torch
from rich.console import Console
from typer.testing import CliRunner

from pliant.methods.condconv.layers import CondConv2d
from pliant.methods.mixture_of_depths import MoDBlock
from research.bench import steps
from research.bench.memory import peak_memory
from research.bench.step_rows import StepCost, steps_markdown
from research.bench.steps import measure_steps, run_step_bench
from research.commands import app

QUICK = {"batch": 2, "input_size": 8, "rounds": 1, "min_run_time": 0, "threads": 1}
STEPS = ["super alone", "base alone", "specialize", "joint"]


@pytest.fixture(scope="module")
def rows():
    return measure_steps("resnet20_cifar_adn", **QUICK)


def test_an_adaptive_network_is_held_against_both_plain_steps(rows):
    assert [r.step for r in rows] == STEPS
    whole, base, *both = rows
    assert whole.both_ratio + base.both_ratio == pytest.approx(1, abs=1e-5)
    plain = whole.median_ms + base.median_ms
    for row in both:
        assert row.both_ratio == pytest.approx(row.median_ms / plain, rel=1e-4)
    for row in rows:
        assert row.ratio == pytest.approx(row.median_ms / whole.median_ms, rel=1e-4)
        assert row.tax is None
    assert base.peak_mb < whole.peak_mb < both[0].peak_mb
    assert {(r.network, r.batch, r.input_size, r.device, r.threads, r.rounds) for r in rows} == {
        ("resnet20_cifar_adn", 2, "3x8x8", "cpu", 1, 1)
    }
    assert all(r.ratio_iqr is None and r.both_ratio_iqr is None for r in rows)
    assert all(r.torch == torch.__version__ for r in rows)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mixture_of_depths_is_held_against_plain_and_blocks_removed(dtype):
    options = {**QUICK, "channels_last": True, "dtype": dtype}
    found = measure_steps("resnet20_cifar_mod", against="resnet20_cifar", **options)
    assert [r.step for r in found] == [
        *("plain", "network", "blocks removed", "first k"),
        "network, as written",
    ]
    plain, network, removed, first, *_ = found
    for row in found:
        assert row.ratio == pytest.approx(row.median_ms / plain.median_ms, rel=1e-4)
        assert (row.dtype, row.channels_last, row.both_ratio) == (dtype, True, None)
    for row in (network, first):
        assert row.tax == pytest.approx(row.median_ms / removed.median_ms - 1, abs=1e-4)
    assert plain.tax is removed.tax is None
    assert removed.peak_mb < plain.peak_mb
    assert removed.peak_mb < network.peak_mb


def test_a_conditional_network_is_held_against_plain_in_both_forms():
    found = measure_steps("cc_resnet20_cifar", against="resnet20_cifar", **QUICK)
    assert [r.step for r in found] == ["plain", "fused", "experts"]
    assert all(r.tax is None for r in found)


def test_what_stands_beside_a_network_is_what_it_says():
    network = timm.create_model("resnet20_cifar_mod")
    made = steps._networks("n", network, "resnet20_cifar", (3, 8, 8))
    blocks = {key: [m for m in n.modules() if isinstance(m, MoDBlock)] for key, n in made.items()}
    assert {key: len(found) for key, found in blocks.items()} == {
        "plain": 0, "network": 3, "blocks removed": 0, "first k": 3,
        "network, as written": 3,
    }  # fmt: skip
    assert all(b.selector is None for b in blocks["first k"])
    assert made["network"] is network
    # Forms of one function: the same outputs and gradients, by other ways.
    x, found = torch.randn(4, 3, 8, 8), {}
    for key in ("network", "network, as written"):
        made[key].train()(x).square().sum().backward()
        found[key] = [p.grad for p in made[key].parameters()]
    torch.testing.assert_close(found["network, as written"], found["network"], rtol=1e-3, atol=1e-4)
    ways = {key: {type(m).forward for m in some} for key, some in blocks.items() if some}
    assert ways["network, as written"].isdisjoint(ways["network"])
    assert all(b.selector is not None for b in blocks["network"])
    network = timm.create_model("cc_resnet20_cifar", experts=2)
    made = steps._networks("n", network, "resnet20_cifar", (3, 8, 8))
    forms = {key: {m.form for m in n.modules() if isinstance(m, CondConv2d)} for key, n in made.items()}
    assert forms == {"plain": set(), "fused": {"fused"}, "experts": {"experts"}}
    assert {m.form for m in network.modules() if isinstance(m, CondConv2d)} == {"auto"}


def test_steps_compute_in_the_dtype_they_say():
    seen = {}
    for dtype in ("float32", "bfloat16"):
        network = timm.create_model("resnet20_cifar_mod")
        plain = timm.create_model("resnet20_cifar")
        plain.fc.register_forward_hook(
            lambda m, args, out, d=dtype: seen.setdefault(d, []).append(out.dtype)
        )
        measure_steps(network, against=plain, **{**QUICK, "dtype": dtype})
    assert {d: set(found) for d, found in seen.items()} == {
        "float32": {torch.float32}, "bfloat16": {torch.float32, torch.bfloat16},
    }  # fmt: skip


def test_peak_memory_is_what_is_alive_at_once_and_repeats():
    def step():
        a = torch.ones(1000)
        b = a.exp()
        del a
        return (b.sin() + 1).sum()

    step()
    assert 12000 <= peak_memory(step) < 12100  # and some scalars
    assert peak_memory(step) == peak_memory(step)
    assert peak_memory(lambda: None) == 0


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
    with pytest.raises(ValueError, match="resnet20_cifar_mod needs its plain network as the baseline"):
        measure_steps("resnet20_cifar_mod", **QUICK)
    with pytest.raises(ValueError, match="is adaptive and contains its plain networks"):
        measure_steps("resnet20_cifar_adn", against="resnet20_cifar", **QUICK)
    with pytest.raises(ValueError, match="no dtype 'float16' for training steps"):
        measure_steps("resnet20_cifar_adn", **{**QUICK, "dtype": "float16"})
    with pytest.raises(ValueError, match="convert it by AdaptiveDepth"):
        measure_steps("resnet20_cifar", **QUICK)
    with pytest.raises(ValueError, match="rounds must be at least 1, not 0"):
        measure_steps("resnet20_cifar_adn", **{**QUICK, "rounds": 0})
    with pytest.raises(ValueError, match="timm has no network 'resnet20_cifar_and'"):
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
    runs = [(case, dtype) for case in steps.SUITES["cpu"] for dtype in case.dtypes]
    assert [(c[0], c[1]["against"], c[1]["dtype"]) for c in calls] == [
        (case.network, case.against, dtype) for case, dtype in runs
    ]
    assert all(c[1]["channels_last"] and c[1]["max_run_time"] for c in calls)
    with (tmp_path / "steps-cpu.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(found) == 4 * len(calls)
    assert steps_markdown(found) in (tmp_path / "steps-cpu.md").read_text()
    calls.clear()
    command = ["bench", "--suite", "steps", "--quick", "--threads", "1", "--results", str(tmp_path)]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    assert [(c[0], c[1]["rounds"], c[1]["threads"]) for c in calls] == [("resnet20_cifar_mod", 3, 1)]
    assert (tmp_path / "steps-cpu-quick.csv").is_file()


def test_the_table_says_time_ratio_tax_and_spread():
    row = StepCost(
        network="net", step="specialize", batch=4, input_size="3x8x8", device="cpu", threads=1, rounds=3,
        median_ms=12.34, iqr_ms=0.5, ratio=1.61, ratio_iqr=0.02, both_ratio=1.0432, both_ratio_iqr=0.01,
        peak_mb=3.21, cpu="C", cores=2, commit="a" * 40 + "-dirty",
    )  # fmt: skip
    taxed = replace(row, step="network", dtype="bfloat16", both_ratio=None, tax=0.0712, tax_iqr=0.004)
    text = steps_markdown([row, taxed])
    assert "| net | specialize | 4 | float32 | 12.3 (0.5) | 1.61 (0.02) |  | 1.04 (0.01) | 3.2 |" in text
    assert "| net | network | 4 | bfloat16 | 12.3 (0.5) | 1.61 (0.02) | 7.1 % (0.4) |  | 3.2 |" in text
    assert f"C (2 cores) · threads 1 · torch  · commit {'a' * 12}-dirty" in text
    assert "| 7.1 % |" in steps_markdown([replace(taxed, tax_iqr=None)])
