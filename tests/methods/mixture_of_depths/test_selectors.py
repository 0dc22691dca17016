"""Selectors: how they start, which channels they choose, and their scores."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

from _mod_block import ORDERS, mod_block
from pliant import MixtureOfDepths, plan
from pliant.methods.mixture_of_depths.selectors import ChannelSelector, RandomSelector


@pytest.mark.parametrize("hidden", [1, 4])
def test_hidden_units_start_on_their_active_side(hidden):
    """Pooled activations are not negative; a unit that starts negative for all never learns."""
    for seed in range(40):
        torch.manual_seed(seed)
        selector = ChannelSelector(16, 1, hidden)
        assert (selector.fc1.weight.sum(1) >= 0).all()
        assert selector.fc2.weight.min() < 0 < selector.fc2.weight.max()
        assert (selector.logits(torch.ones(1, 16, 2, 2)) != 0).any(), seed  # alike channels: active


def test_the_plan_says_when_a_selection_is_constant():
    network = timm.create_model("resnet20_cifar")
    (note,) = [n for n in plan(network, MixtureOfDepths()).notes if "hidden unit" in n]
    assert "layer1.1 is constant" in note
    for options in ({"reduction": 4}, {"selection": "random"}):
        assert not any("hidden unit" in n for n in plan(network, MixtureOfDepths(**options)).notes)
    x = torch.randn(32, 16, 4, 4).relu()
    one, many = ChannelSelector(16, 1, 1), ChannelSelector(16, 1, 16)
    active = one.logits(x).abs().sum(1) > 0  # where the unit is silent, all channels tie
    assert active.sum() > 8
    constant, free = one(x[active])[1], many(x)[1]
    assert len(constant.unique()) == 1 < len(free.unique())


@pytest.mark.parametrize("name", ["resnet20_cifar_mod", "resnet56_cifar_mod"])
def test_narrow_networks_have_more_than_one_hidden_unit(name):
    model = timm.create_model(name)
    found = [m.fc1.out_features for m in model.modules() if isinstance(m, ChannelSelector)]
    assert min(found) == 4
    assert timm.create_model(name, reduction=16).layer1[1].selector.fc1.out_features == 1


def test_selector_has_no_bias_and_the_reduction_asked_for():
    for reduction, hidden in ((16, 2), (8, 4), (64, 1)):
        selector = mod_block(32, 4, reduction=reduction).selector
        assert {name: tuple(p.shape) for name, p in selector.named_parameters()} == {
            "fc1.weight": (hidden, 32),
            "fc2.weight": (32, hidden),
        }


def test_learned_selection_is_per_sample():
    made = mod_block(32, 8)
    torch.manual_seed(1)
    index = made.selector(torch.randn(6, 32, 4, 4, dtype=torch.double))[1]
    assert len({tuple(sorted(row)) for row in index.tolist()}) > 1


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_random_selection_is_fresh_per_sample_and_reproducible(train, order):
    selector = mod_block(64, 16, selection="random", order=order).train(train).selector
    x = torch.randn(4, 64, 2, 2, dtype=torch.double)
    torch.manual_seed(3)
    (none, first), (_, second) = selector(x), selector(x)
    assert none is None
    assert first.shape == (4, 16)
    assert not torch.equal(first, second)
    assert len({tuple(sorted(row)) for row in first.tolist()}) == 4
    assert all(len(set(row)) == 16 for row in first.tolist())
    torch.manual_seed(3)
    assert torch.equal(selector(x)[1], first)
    ascending = bool((first.diff(dim=1) > 0).all())
    assert ascending == (order == "index")
    assert not list(selector.parameters())
    assert not selector.state_dict()


def test_random_selection_visits_all_channels_alike():
    selector = RandomSelector(8, 2, fixed=False)
    torch.manual_seed(0)
    counts = selector(torch.zeros(4000, 8, 1, 1))[1].flatten().bincount(minlength=8)
    assert counts.sum() == 8000
    assert ((counts - 1000).abs() < 150).all(), "five standard deviations"


@pytest.mark.parametrize("order", ORDERS)
def test_fixed_selection_stays_and_is_saved(order):
    made = mod_block(64, 16, selection="fixed", order=order)
    index = made.state_dict()["selector.index"]
    assert index.shape == (16,)
    assert len(set(index.tolist())) == 16
    assert bool((index.diff() > 0).all()) == (order == "index")
    x = torch.randn(2, 64, 3, 3, dtype=torch.double)
    with torch.no_grad():
        out = made(x)
        assert torch.equal(made(x), out)
        other = mod_block(64, 16, seed=9, selection="fixed", order=order)
        assert not torch.equal(other.selector.index, index)
        other.load_state_dict(made.state_dict())
        assert torch.equal(other(x), out)


def test_order_of_channels_and_their_scores():
    by_score = mod_block(64, 16).selector
    by_index = copy.deepcopy(by_score)
    by_index.order = "index"
    x = torch.randn(3, 64, 4, 4, dtype=torch.double)
    all_scores = by_score.logits(x).sigmoid()
    scores, index = by_score(x)
    assert (scores.diff(dim=1) <= 0).all()
    assert torch.equal(scores, all_scores.gather(1, index))
    assert (scores[:, -1:] >= all_scores.scatter(1, index, 0)).all(), "the best, and none better left out"
    sorted_scores, sorted_index = by_index(x)
    assert (sorted_index.diff(dim=1) > 0).all()
    assert torch.equal(sorted_index, index.sort(1).values)
    assert torch.equal(sorted_scores, all_scores.gather(1, sorted_index))


def test_saturated_scores_are_ranked_by_their_logits():
    selector = ChannelSelector(8, 3, 8)
    with torch.no_grad():
        selector.fc1.weight.copy_(torch.eye(8))
        selector.fc2.weight.copy_(torch.eye(8))
    x = torch.tensor([50.0, 90, 60, 1, 70, 40, 80, 30])[None, :, None, None]
    scores, index = selector(x)
    assert scores.tolist() == [[1.0, 1.0, 1.0]], "all saturate"
    assert index.tolist() == [[1, 6, 4]]


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.half, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.double, torch.double),
    ],
)
def test_scores_are_wide(dtype, wide):
    made = mod_block(32, 8, double=False).to(dtype)
    x = torch.randn(2, 32, 4, 4).to(dtype)
    with torch.no_grad():
        scores, index = made.selector(x)
        out = made(x)
    assert scores.dtype == wide
    assert out.dtype == dtype
    exact = copy.deepcopy(made.selector).double()(x.double())
    torch.testing.assert_close(scores.double(), exact[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(index, exact[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half])
def test_autocast_leaves_the_selector_alone(dtype):
    made = mod_block(32, 8, double=False)
    x = torch.randn(2, 32, 4, 4)
    with torch.no_grad():
        plain = made.selector(x)
        with torch.autocast("cpu", dtype):
            cast = made.selector(x)
            assert made.core(x[:, :8]).dtype == dtype, "autocast is on"
            out = made(x)
    assert cast[0].dtype == torch.float32
    assert torch.equal(cast[0], plain[0])
    assert torch.equal(cast[1], plain[1])
    assert out.dtype == torch.float32
    assert torch.equal(out[:, 8:], x[:, 8:])
