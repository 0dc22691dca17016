"""Timings of the two forms, and the rule that is held to those that are committed."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pliant.methods.condconv import mixing
from pliant.methods.condconv.layers import CondConv2d, Router
from pliant.methods.condconv.mixing import Geometry, choose_form, faster_form
from research.bench import mixing_forms as forms
from research.bench.mixing_forms import (
    Case,
    FormTimes,
    cases,
    measure_forms,
    read_forms,
    run_forms,
    write_forms,
)

COMMITTED = Path(__file__).resolve().parents[2] / "results" / "condconv-forms-cpu.csv"
SMALL = [Case("1x1", 7, 8, 2, 1, False), Case("3x3", 4, 8, 4, 3, True), Case("1x1", 1, 8, 2, 2, True)]


@pytest.fixture(scope="module")
def committed() -> list[FormTimes]:
    return read_forms(COMMITTED)


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


def test_the_measurements_cover_what_the_rule_is_for(committed: list[FormTimes]) -> None:
    assert {r.batch for r in committed} == {1, 2, 4, 8, 16, 32, 64}
    assert {r.size for r in committed} >= {1, 4, 7, 14, 28, 56}
    assert {r.experts for r in committed} == {2, 4, 8, 16, 32}
    assert {r.kind for r in committed} == {"1x1", "3x3", "depthwise"}
    assert len({r.channels for r in committed}) >= 5
    for training in (False, True):
        for kind in ("1x1", "3x3"):
            assert sum(r.kind == kind and r.training == training for r in committed) >= 50
    assert all(r.device == "cpu" and r.cpu and r.torch and r.commit and r.date for r in committed)
    assert all(r.rounds >= 3 and r.fused_ms > 0 and r.experts_ms > 0 for r in committed)


@pytest.mark.parametrize(
    ("kind", "training", "bound"),
    [
        ("1x1", False, 1.045),
        ("1x1", True, 1.015),
        ("3x3", False, 1.045),
        ("3x3", True, 1.015),
        ("depthwise", False, 1.01),
        ("depthwise", True, 1.02),
    ],
)
def test_the_rule_is_nearly_as_fast_as_the_faster_form(
    committed: list[FormTimes], kind: str, training: bool, bound: float
) -> None:
    rows = [r for r in committed if r.kind == kind and r.training == training]
    assert geometric_mean([r.slowdown for r in rows]) < bound
    # A rule of one form alone does worse, or no worse where one form always wins.
    for form in ("fused", "experts"):
        alone = [max(1.0, r.ratio if form == "experts" else 1 / r.ratio) for r in rows]
        assert geometric_mean(alone) >= geometric_mean([r.slowdown for r in rows])


@pytest.mark.parametrize("training", [False, True])
def test_the_batch_enters_where_it_helps(
    committed: list[FormTimes], monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    rows = [r for r in committed if r.kind == "3x3" and r.training == training]
    with_it = geometric_mean([r.slowdown for r in rows])
    monkeypatch.setitem(mixing.BATCH_POWER, "larger", 0.0)
    assert geometric_mean([r.slowdown for r in rows]) > with_it + 0.02


def test_it_is_seldom_far_off(committed: list[FormTimes]) -> None:
    # On a shared machine a round can be off by any factor: only rows whose ratio repeats.
    steady = [r for r in committed if r.ratio_iqr < 0.2 * r.ratio]
    assert len(steady) > len(committed) / 3
    assert sum(r.slowdown > 1.5 for r in steady) < 0.015 * len(steady)


def test_the_rule_is_for_a_gpu_what_it_is_for_a_cpu() -> None:
    """Nobody has measured one yet; when somebody has, this test should say so."""
    assert not COMMITTED.with_name("condconv-forms-cuda.csv").exists()


def test_depthwise_convolutions_are_fused_and_single_vectors_are_not() -> None:
    assert faster_form(1, (8, 64, 1, 3, 3)) == "fused"
    assert faster_form(1, (8, 1000, 512, 1, 1)) == "experts"
    assert faster_form(14 * 14, (8, 256, 256, 1, 1)) == "fused"
    for batch in (1, 64):
        assert faster_form(4 * 4, (2, 64, 64, 3, 3), batch) == "experts"
        assert faster_form(14 * 14, (2, 64, 64, 3, 3), batch) == "fused"
    assert faster_form(7 * 7, (2, 64, 64, 3, 3), 1) == "fused"
    assert faster_form(7 * 7, (2, 64, 64, 3, 3), 16) == "experts"
    assert faster_form(7 * 7, (2, 64, 64, 1, 1), 16) == "fused"  # 1x1: at any batch
    assert faster_form(10**6, (1, 64, 64, 3, 3)) == "experts"  # one expert: its own convolution


@pytest.mark.parametrize("experts", [2, 18, 64])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", ["linear", "1x1", "3x3"])
def test_one_position_never_has_matrices_for_each_example(
    kind: str, training: bool, experts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """256 examples of 1024 channels and 1000 classes: 1 GB of kernels, at any number of experts."""

    def mixed(*args: object) -> None:
        raise AssertionError("kernels were mixed")

    monkeypatch.setattr(mixing, "mix", mixed)
    routing, device = torch.empty(256, experts, device="meta"), "meta"
    with torch.set_grad_enabled(training):
        x = torch.empty(256, 1024, device=device, requires_grad=training)
        if kind == "linear":
            y = mixing.conditional_linear(x, torch.empty(experts, 1000, 1024, device=device), routing)
        else:
            side = int(kind[0])
            weight = torch.empty(experts, 1000, 1024, side, side, device=device)
            same = Geometry(padding=(side // 2, side // 2))
            y = mixing.conditional_conv2d(x[:, :, None, None], weight, routing, None, same)
    assert y.numel() == 256 * 1000


def test_an_open_batch_leaves_no_guard() -> None:
    """What enters the rule is a number; a graph for any batch is of any batch."""
    layer = CondConv2d(4, 4, 3, padding=1, experts=2, router=Router(4, 2))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(3, 4, 7, 7)
    torch._dynamo.mark_dynamic(x, 0)  # an error where the batch is guarded
    torch.testing.assert_close(compiled(x), layer(x))
    with torch.compiler.set_stance("fail_on_recompile"):
        for batch in (2, 64):  # of forms that differ
            x = torch.randn(batch, 4, 7, 7)
            torch.testing.assert_close(compiled(x), layer(x))
    torch._dynamo.reset()


def test_the_form_is_chosen_by_the_output() -> None:
    weight = torch.empty(2, 8, 8, 3, 3)
    x = torch.empty(4, 8, 8, 8)
    assert choose_form(x, weight, Geometry(padding=(1, 1))) == "fused"
    assert choose_form(x, weight, Geometry((2, 2), (1, 1))) == "experts"
    assert choose_form(x.to("meta"), weight.to("meta"), Geometry((2, 2), (1, 1))) == "experts"


def test_cases_are_within_the_limits_and_in_one_order() -> None:
    for device in ("cpu", "cuda"):
        found = cases(device)
        assert found == cases(device)
        assert len(set(found)) == len(found)
        assert all(c.values <= forms.MOST_VALUES[device] for c in found)
    assert len(cases("cuda")) > len(cases("cpu"))


def test_rows_of_all_kinds_come_back_from_the_file(tmp_path: Path) -> None:
    told: list[str] = []
    rows = measure_forms(
        SMALL, rounds=2, min_run_time=0, progress=lambda done, total, what: told.append(what)
    )
    assert [r.case for r in rows] == SMALL
    assert told == ["1x1, 8 channels", "3x3, 8 channels", "1x1, 8 channels"]
    write_forms(tmp_path / "a.csv", rows)
    back = read_forms(tmp_path / "a.csv")
    assert {r.case for r in back} == set(SMALL)
    assert {r.commit for r in back} == {r.commit for r in rows}
    write_forms(tmp_path / "b.csv", back)
    assert read_forms(tmp_path / "b.csv") == back
    (tmp_path / "b.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="the columns are not those of times of both forms"):
        read_forms(tmp_path / "b.csv")


def test_a_slowdown_is_against_the_faster_form() -> None:
    (row,) = measure_forms(SMALL[:1], rounds=1, min_run_time=0)
    assert faster_form(49, row.case.weight) == "fused"
    assert replace(row, ratio=2.0).slowdown == 1.0
    assert replace(row, ratio=0.5).slowdown == 2.0
    (row,) = measure_forms(SMALL[2:], rounds=1, min_run_time=0)
    assert replace(row, ratio=2.0).slowdown == 2.0


def test_no_case_begins_after_the_time_is_up() -> None:
    assert measure_forms(SMALL, rounds=1, min_run_time=0, max_run_time=0) == []


def test_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "cases", lambda device: SMALL)
    threads = torch.get_num_threads()
    rows = run_forms("cpu", tmp_path, quick=True)
    assert [r.threads for r in rows] == [1, 1, 1, 2]
    path = tmp_path / "condconv-forms-cpu-quick.csv"
    assert len(read_forms(path)) == 4
    # A row is replaced when its case is timed again, and stays when it is not.
    other = Case("1x1", 4, 8, 2, 1, False)
    monkeypatch.setattr(forms, "cases", lambda device: [SMALL[0], other])
    run_forms("cpu", tmp_path, quick=True)
    assert [r.case for r in read_forms(path) if r.threads == 1].count(SMALL[0]) == 1
    assert {r.case for r in read_forms(path)} == {*SMALL, other}
    assert torch.get_num_threads() == threads
    with pytest.raises(ValueError, match="no benchmark for device 'tpu'; there is one for cpu, cuda"):
        run_forms("tpu", tmp_path)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="PyTorch sees no GPU"):
            run_forms("cuda", tmp_path)


@pytest.mark.gpu
def test_forms_on_a_gpu() -> None:
    rows = measure_forms(SMALL, device="cuda", rounds=2, min_run_time=0)
    assert [r.case for r in rows] == SMALL
    assert all(r.gpu and r.ratio > 0 for r in rows)
