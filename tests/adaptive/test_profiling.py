"""Latency of all depths, the front, and what a budget buys."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import timm
import torch

from _adaptive import adaptive, all_skips, images, plain
from _cli import fails, run
from pliant import DepthProfile, get_depth, measure, profile_depths, save, set_depth, skip_of, subnet
from pliant.adaptive.profiling import FRONT
from pliant.counting import count_macs, count_parameters
from pliant.measuring.rows import Measurement, read_rows, write_rows

QUICK = {"rounds": 2, "min_run_time": 0}


def row(letters, ms, macs, accuracy=None, **more) -> Measurement:
    return Measurement(
        model="net", variant=f"depth {letters}", median_ms=ms, macs=macs, accuracy=accuracy, **more
    )


# FT is slower than TF and not better; TT is slower than FT though smaller.
ROWS = (
    row("FF", 4.0, 100, 0.80),
    row("FT", 3.0, 70, 0.74),
    row("TF", 2.0, 80, 0.75),
    row("TT", 2.5, 50, 0.76),
)
UNSCORED = tuple(replace(r, accuracy=None) for r in ROWS)


@pytest.fixture(scope="module")
def profiled():
    model = adaptive()
    return model, profile_depths(model, images(3, size=16), **QUICK)


def test_every_depth_is_measured_with_where_it_comes_from(profiled):
    model, profile = profiled
    assert [skip_of(r) for r in profile.rows] == all_skips(3)
    for r in profile.rows:
        cut = subnet(model, skip_of(r))
        assert (r.parameters, r.macs) == (count_parameters(cut), count_macs(cut, (3, 16, 16)))
        assert (r.batch, r.input_size, r.rounds, r.error) == (3, (3, 16, 16), 2, "")
        assert (r.model, r.device, r.engine, r.dtype) == ("resnet20_cifar", "cpu", "eager", "float32")
        assert r.median_ms > 0
        assert r.torch == torch.__version__
        assert r.accuracy is None
    assert {r.variant for r in profile.rows if r.note == FRONT} == {r.variant for r in profile.front}


def test_the_network_stays_as_it_is():
    model = adaptive().train()
    set_depth(model, (True, False, True))
    before = {n: t.clone() for n, t in model.state_dict().items() if isinstance(t, torch.Tensor)}
    pointers = [p.data_ptr() for p in model.parameters()]
    profile_depths(model, images(1, size=16), rounds=1, min_run_time=0, skips=[(True, True, True)])
    assert model.training
    assert get_depth(model) == (True, False, True)
    assert [p.data_ptr() for p in model.parameters()] == pointers
    after = model.state_dict()
    assert all(torch.equal(t, after[n]) for n, t in before.items())


def test_dtype_and_memory_format_are_the_networks():
    model = adaptive().to(torch.bfloat16).to(memory_format=torch.channels_last)
    profile = profile_depths(
        model, images(1, size=8), rounds=1, min_run_time=0, skips=[(True, True, False)]
    )
    (only,) = profile.rows
    assert (only.dtype, only.channels_last, only.variant) == ("bfloat16", True, "depth TTF")


def test_accuracy_from_a_mapping_or_a_function():
    model = adaptive()
    skips = [(False, False, False), (True, True, True)]
    given = {"FFF": 0.9, skips[1]: 0, (True, False, False): 1.0}
    options = {"skips": skips, "rounds": 1, "min_run_time": 0}
    profile = profile_depths(model, images(1, size=8), accuracy=given, **options)
    assert [r.accuracy for r in profile.rows] == [0.9, 0.0]
    seen = []

    def score(network):
        assert network is model
        assert not torch.is_grad_enabled()
        seen.append(get_depth(network))
        return 0.1 * len(seen)

    profile = profile_depths(model, images(1, size=8), accuracy=score, **options)
    assert seen == skips
    assert [r.accuracy for r in profile.rows] == [0.1, 0.2]


def test_the_front_is_what_nothing_beats():
    assert [r.variant for r in DepthProfile(ROWS).front] == ["depth TF", "depth TT", "depth FF"]
    assert [r.variant for r in DepthProfile(UNSCORED).front] == ["depth TF", "depth FF"]
    tie = (row("F", 2.0, 10), row("T", 2.0, 5))
    assert [r.variant for r in DepthProfile(tie).front] == ["depth F"]
    # One accuracy of several is none: ranked by operations.
    assert not DepthProfile((ROWS[0], UNSCORED[1])).has_accuracy


@pytest.mark.parametrize(
    ("rows", "budget", "skip"),
    [
        (ROWS, {"budget_ms": 100}, "FF"),
        (ROWS, {"budget_ms": 4.0}, "FF"),
        (ROWS, {"budget_ms": 3.9}, "TT"),
        (ROWS, {"budget_ms": 2.4}, "TF"),
        (UNSCORED, {"budget_ms": 3.9}, "TF"),
        (ROWS, {"macs": 99}, "TT"),
        (ROWS, {"macs": 50}, "TT"),
        (UNSCORED, {"macs": 99}, "TF"),
        (UNSCORED, {"macs": 79}, "FT"),
    ],
)
def test_a_budget_buys_the_best_depth_within_it(rows, budget, skip):
    assert DepthProfile(rows).choose(**budget) == tuple(letter == "T" for letter in skip)


def test_depths_that_failed_are_not_chosen():
    failed = replace(ROWS[0], median_ms=None, error="out of memory")
    profile = DepthProfile((failed, *ROWS[1:]))
    assert profile.choose(budget_ms=100) == (True, True)
    assert "depth FF" not in [r.variant for r in profile.front]
    with pytest.raises(ValueError, match="no depth has a time: out of memory"):
        DepthProfile((failed,))


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        (
            {"budget_ms": 1.9},
            "no depth is within budget_ms=1.9; the fastest, TF, takes 2 ms",
        ),
        (
            {"macs": 49},
            "no depth is within macs=49; the smallest, TT, takes 50 multiply-accumulates",
        ),
        ({}, "budget_ms is None and macs is None; give one of the two"),
        ({"budget_ms": 3, "macs": 3}, "budget_ms is 3 and macs is 3; give one of the two"),
        ({"budget_ms": 0}, "budget_ms is 0; give a number above 0"),
        ({"budget_ms": float("nan")}, "budget_ms is nan; give"),
        ({"budget_ms": float("inf")}, "budget_ms is inf; give"),
        ({"macs": -1}, "macs is -1; give"),
        ({"macs": True}, "macs is True; give"),
        ({"budget_ms": "5"}, "budget_ms is '5'; give"),
    ],
)
def test_budgets_that_nothing_keeps_or_that_make_no_sense(budget, message):
    with pytest.raises(ValueError, match=message):
        DepthProfile(ROWS).choose(**budget)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"engine": "quantum"}, "no engine 'quantum'"),
        ({"skips": [(True, True)]}, "skip has 2 flags"),
        ({"skips": []}, "skips is empty; name at least one depth"),
        ({"accuracy": {}}, "accuracy has no value for depth FFF; it has none"),
        ({"accuracy": lambda _: 90.8}, "the accuracy of depth FFF is 90.8; give a share, 0 to 1"),
        ({"accuracy": lambda _: None}, "the accuracy of depth FFF is None; give a share"),
        ({"rounds": 0}, "rounds must be at least 1, not 0"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        profile_depths(adaptive(), images(1, size=8), **{**QUICK, **options})


def test_a_depth_that_is_asked_for_twice_is_measured_once():
    skip = (True, False, True)
    profile = profile_depths(adaptive(), images(1, size=8), skips=[skip, list(skip)], **QUICK)
    assert [skip_of(r) for r in profile.rows] == [skip]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            (*ROWS, ROWS[0]),
            "the rows are net depth FF, .*, net depth FF; give the depths of one network",
        ),
        ((*ROWS, row("FFF", 1.0, 10, 0.5)), "the rows are net .*, net depth FFF; give the depths of one"),
        ((*ROWS[:3], row("TT", 2.5, 50, math.nan)), "the accuracy of .*TT.* is nan; give a share"),
    ],
)
def test_rows_that_are_no_profile_are_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        DepthProfile(rows)


def test_unknown_counts_keep_no_budget():
    rows = tuple(replace(r, macs=None) for r in ROWS)
    with pytest.raises(ValueError, match="macs of a depth are not known; give budget_ms"):
        DepthProfile(rows).choose(macs=60)
    assert DepthProfile(rows).choose(budget_ms=3.9) == (True, True)


def test_networks_and_examples_that_do_not_fit():
    with pytest.raises(ValueError, match="has no adaptive depth"):
        profile_depths(plain("option A"), images(1))
    with pytest.raises(ValueError, match=r"example has the shape \(3, 8, 8\); give images \[B, C, H, W\]"):
        profile_depths(adaptive(), images(1, size=8)[0])
    with pytest.raises(ValueError, match="no depth has a time: RuntimeError"):
        profile_depths(adaptive(), images(1, size=8)[:, :1], **QUICK)


def test_saved_and_loaded_it_is_the_same(tmp_path, profiled):
    _, profile = profiled
    assert DepthProfile.load(profile.save(tmp_path / "deep" / "profile.csv")) == profile
    scored = DepthProfile(ROWS)
    assert DepthProfile.load(scored.save(tmp_path / "scored.csv")).choose(budget_ms=3.9) == (True, True)
    write_rows(tmp_path / "other.csv", [Measurement(model="resnet18")])
    with pytest.raises(ValueError, match="resnet18 is not a row of a depth; its variant must be like"):
        DepthProfile.load(tmp_path / "other.csv")
    write_rows(tmp_path / "none.csv", [])
    with pytest.raises(ValueError, match="no depth has a time: there is no row"):
        DepthProfile.load(tmp_path / "none.csv")


def test_figure(tmp_path):
    text = DepthProfile(ROWS).plot(tmp_path / "front.svg").read_text()
    assert "top-1 accuracy, %" in text
    assert all(f">{label}<" in text for label in ("FF", "TT", "TF"))
    assert ">FT<" not in text, "it is beaten"
    text = DepthProfile(UNSCORED).plot(tmp_path / "macs.svg").read_text()
    assert "multiply-accumulates, M" in text
    with pytest.raises(ValueError, match="the suffix must be one of"):
        DepthProfile(ROWS).plot(tmp_path / "front.jpeg")


@pytest.mark.slow  # a C++ compiler takes its time; test_depth_compiled.py compiles depths without one
def test_compiled_depths_are_profiled():
    torch._dynamo.reset()
    model = timm.create_model("resnet20_cifar_adn", layers=(1, 1, 2)).eval()
    try:
        profile = profile_depths(model, images(1, size=8), "compiled", rounds=1, min_run_time=0)
    except ValueError as error:
        pytest.skip(f"this machine compiles nothing: {error}")
    assert [r.engine for r in profile.rows] == ["compiled"] * 2
    torch._dynamo.reset()


def test_a_mod_network_with_depths_is_measured_without_its_tax():
    model = timm.create_model("resnet20_cifar_adn", layers=(1, 1, 2))
    assert [r.variant for r in measure(model, rounds=1, min_run_time=0)] == ["network"]


# --- the command ----------------------------------------------------------------------------------


def test_command_lists_depths():
    lines = [" ".join(line.split()) for line in run("depths", "resnet20_cifar_adn").splitlines()]
    assert "resnet20_cifar_adn depth FFF 0.270 0.0406" in lines
    assert "resnet20_cifar_adn depth TTT 0.173 0.0264" in lines
    assert sum("resnet20_cifar_adn depth" in line for line in lines) == 8


def test_command_profiles_a_saved_network(tmp_path):
    save(timm.create_model("resnet20_cifar_adn", layers=(1, 1, 2)), tmp_path / "net")
    rows, plot = tmp_path / "rows.csv", tmp_path / "front.png"
    options = ("--rounds", 1, "--threads", 1, "--rows", rows, "--plot", plot)
    printed = run("depths", tmp_path / "net", "--profile", *options)
    assert printed.count("resnet20_cifar_adn depth") >= 2
    assert "time," in printed
    assert [r.variant for r in read_rows(rows)] == ["depth F", "depth T"]
    assert plot.stat().st_size > 1000


def test_command_errors(monkeypatch, capsys, tmp_path):
    assert "has no adaptive depth" in fails(monkeypatch, capsys, "depths", "resnet20_cifar")
    assert "timm has no network 'resnet20_x'" in fails(monkeypatch, capsys, "depths", "resnet20_x")
    assert "PyTorch sees no GPU" in fails(
        monkeypatch, capsys, "depths", "resnet20_cifar_adn", "--profile", "--device", "cuda"
    )
    words = ("depths", "resnet20_cifar_adn", "--rows", tmp_path / "r.csv")
    assert "add --profile" in fails(monkeypatch, capsys, *words)
    words = ("depths", "resnet20_cifar_adn", "--profile", "--plot", tmp_path / "p.gif")
    assert "the suffix must be one of" in fails(monkeypatch, capsys, *words)
    assert not list(tmp_path.iterdir())
