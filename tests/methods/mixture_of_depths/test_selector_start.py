"""How a channel selector starts, and how many hidden units it has."""

from __future__ import annotations

import pytest
import timm
import torch

from pliant import MixtureOfDepths, plan
from pliant.methods.mixture_of_depths.selectors import ChannelSelector


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
