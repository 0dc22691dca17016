"""Adaptive depth with the other methods, in every order: it works, or says why not."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from _adaptive import all_skips, images, scramble
from pliant import (
    AdaptiveDepth,
    CondConv,
    MixtureOfDepths,
    Subnet,
    at_depth,
    convert,
    depths,
    get_depth,
    load,
    save,
    set_depth,
    subnet,
)
from pliant.counting import count_macs, count_parameters
from pliant.methods.adaptive_depth import AdaptiveBlock, SwitchableNorm
from pliant.methods.condconv import CondConvBlock
from pliant.methods.mixture_of_depths import MoDBlock
from pliant.surgery import conversions

METHODS = {
    "M": MixtureOfDepths(c=4, reduction=2),
    "C": CondConv(experts=2),
    "A": AdaptiveDepth(),
}
WORKING = ["MA", "CA", "MCA", "CMA"]


def build(order: str) -> nn.Module:
    """A small ResNet-18 by the methods whose letters are given, first one first."""
    torch.manual_seed(0)
    model = timm.create_model("resnet18_cifar", channels=(8, 16, 24, 32), num_classes=5)
    return scramble(convert(model, *(METHODS[letter] for letter in order))).eval()


@pytest.mark.parametrize("order", WORKING)
def test_all_depths_are_the_cut_out_ones(order):
    model, x = build(order), images(size=16)
    seen = []
    with torch.no_grad():
        for skip in all_skips(4):
            with at_depth(model, skip):
                out = model(x)
            assert torch.equal(out, subnet(model, skip)(x))
            assert not any(torch.equal(out, other) for other in seen)
            seen.append(out)


@pytest.mark.parametrize("order", WORKING)
def test_at_full_depth_it_is_the_network_without_depths(order):
    torch.manual_seed(0)
    given = timm.create_model("resnet18_cifar", channels=(8, 16, 24, 32), num_classes=5)
    others = [METHODS[letter] for letter in order if letter != "A"]
    given = scramble(convert(given, *others)).eval()
    made = convert(given, METHODS["A"])
    x = images(size=16)
    with torch.no_grad():
        assert torch.equal(made(x), given(x))
    doubled = sum(count_parameters(m.base) for m in made.modules() if isinstance(m, SwitchableNorm))
    assert count_parameters(made) == count_parameters(given) + doubled
    assert count_macs(made, (3, 32, 32)) == count_macs(given, (3, 32, 32))


@pytest.mark.parametrize("order", WORKING)
def test_counts(order):
    model = build(order)
    found = depths(model)
    assert len({d.skip for d in found}) == 16
    assert found[0].macs == max(d.macs for d in found)
    assert found[-1].macs == min(d.macs for d in found)
    for d in (found[0], found[5], found[-1]):
        cut = subnet(model, d.skip)
        assert d.parameters == count_parameters(cut)
        kinds = [m for m in cut.modules() if isinstance(m, (AdaptiveBlock, SwitchableNorm))]
        assert kinds == []
    parts = {"M": MoDBlock, "C": CondConvBlock}
    for letter in set(order) - {"A"}:
        assert any(isinstance(m, parts[letter]) for m in model.modules())


@pytest.mark.parametrize("order", WORKING)
def test_a_training_step_of_both_depths_reaches_every_parameter(order):
    model = build(order).train()
    x, y = images(4, size=16), torch.arange(4)
    loss = 0
    for skip in ((False,) * 4, (True,) * 4):
        with at_depth(model, skip):
            loss = loss + nn.functional.cross_entropy(model(x), y)
    loss.backward()
    without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert without == []
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in before if ".base." in n and n.endswith("bias")} <= moved


@pytest.mark.parametrize("order", WORKING)
def test_saved_and_loaded_with_all_depths_and_cut_out(tmp_path, order):
    model, x = build(order), images(size=16)
    set_depth(model, (False, True, False, False))
    again = load(save(model, tmp_path / "whole"))
    assert [type(c.method).__name__[0] for c in conversions(again)] == list(order)
    assert get_depth(again) == (False, True, False, False)
    cut = subnet(model, (True, False, True, True))
    cut_again = load(save(cut, tmp_path / "cut"))
    with torch.no_grad():
        for skip in all_skips(4):
            with at_depth(model, skip), at_depth(again, skip):
                assert torch.equal(again(x), model(x))
        assert torch.equal(cut_again(x), cut(x))


@pytest.mark.parametrize(
    ("order", "inner"),
    [("AM", "MixtureOfDepths"), ("AC", "CondConv"), ("MAC", "CondConv"), ("CAM", "MixtureOfDepths")],
)
def test_the_other_order_says_which_comes_first(order, inner):
    with pytest.raises(
        ValueError,
        match=f"{inner} goes inside the blocks of AdaptiveDepth, which was applied before it; apply "
        f"{inner} first, then AdaptiveDepth",
    ):
        build(order)


def test_what_was_cut_out_can_be_converted_further(tmp_path):
    model = build("A")
    base = subnet(model, (False, True, True, True))
    made = scramble(convert(base, METHODS["M"])).eval()
    assert [n for n, m in made.named_modules() if isinstance(m, MoDBlock)] == ["layer1.1"]
    again = load(save(made, tmp_path / "net"))
    assert [c.method.name for c in conversions(again)] == ["AdaptiveDepth", "Subnet", "MixtureOfDepths"]
    with torch.no_grad():
        assert torch.equal(again(images()), made(images()))
    # Once more, other depths.
    deeper = convert(subnet(model, (False,) * 4), AdaptiveDepth(skippable=(1, 0, 0, 0)))
    assert get_depth(deeper) == (False,)


@pytest.mark.parametrize("routing", ["block", "layer", "shared", "single", "hierarchical"])
def test_every_routing_of_condconv(routing):
    torch.manual_seed(0)
    model = timm.create_model("resnet18_cifar", channels=(8, 16, 24, 32), num_classes=5)
    model = convert(model, CondConv(experts=2, routing=routing), AdaptiveDepth())
    model, x = scramble(model).eval(), images(size=16)
    with torch.no_grad():
        for skip in all_skips(4):
            with at_depth(model, skip):
                assert torch.equal(model(x), subnet(model, skip)(x))


@pytest.mark.parametrize(
    ("routing", "begin", "source", "user"),
    [
        ("shared", 3, "layer1.1", "layer2.0"),
        ("single", 3, "layer1.1", "layer2.0"),
        ("hierarchical", 3, "layer1.1", "layer2.0"),
        ("hierarchical", 5, "layer2.1", "layer3.0"),
    ],
)
def test_a_routing_that_others_use_cannot_be_skipped(routing, begin, source, user):
    model = timm.create_model("resnet18_cifar", channels=(8, 16, 24, 32))
    model = convert(model, CondConv(experts=2, routing=routing, begin=begin))
    message = (
        rf"{source} cannot be skipped: its routing is that of {user} too; name other blocks in skippable"
    )
    with pytest.raises(ValueError, match=message):
        convert(model, AdaptiveDepth())
    stage = int(source[5]) - 1
    others = tuple(0 if n == stage else 1 for n in range(4))
    if routing != "shared":
        made = convert(model, AdaptiveDepth(skippable=others))
        assert len(get_depth(made)) == 3


def test_mobilenetv2_with_conditional_layers_of_their_own():
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv2_035", num_classes=5)
    model = convert(model, CondConv(experts=2, routing="layer"), AdaptiveDepth())
    model, x = scramble(model).eval(), images()
    with torch.no_grad():
        for skip in ((False,) * 5, (True,) * 5, (False, True, False, True, True)):
            with at_depth(model, skip):
                assert torch.equal(model(x), subnet(model, skip)(x))


def test_subnet_holds_the_others():
    made = convert(
        timm.create_model("resnet18_cifar", channels=(8, 16, 24, 32)),
        METHODS["M"],
        AdaptiveDepth(skippable=(1, 0, 0, 0)),
        Subnet(skip=(False,)),
    )
    assert sum(isinstance(m, MoDBlock) for m in made.modules()) == 4
