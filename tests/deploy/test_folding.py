"""Folding batch norms: which ones go, and that the function stays."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d, ScaledStdConv2d
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pliant import AdaptiveDepth, CondConv, MixtureOfDepths, convert, set_depth, subnet
from pliant.deploy.folding import fold_norms
from pliant.methods.condconv.layers import CondConv2d
from pliant.threaded import pass_along, thread, threaded

# Pixels, and how many norms follow something else than a convolution.
FAMILIES = {
    "resnet18": (32, 0),
    "resnet50_cifar": (16, 0),
    "resnet50_mod": (64, 0),
    "resnet20_cifar_mod": (16, 0),
    "mobilenetv2_035": (32, 0),
    "tf_efficientnet_b0": (64, 0),  # "same" padding
    "regnety_002": (32, 0),
    "ghostnet_050": (32, 0),
    "cspresnet50": (32, 0),
    "dla34": (32, 0),
    "repvgg_a0": (32, 17),  # a norm on the block's input
    "densenet121": (32, 62),  # norms on concatenations
}


def with_statistics(model: nn.Module, spread: float = 0.1) -> nn.Module:
    """The network with norms as training leaves them: no statistic at its start."""
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            nn.init.normal_(norm.running_mean, 0, spread)
            nn.init.uniform_(norm.running_var, 0.8, 1.25)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.8, 1.2)
                nn.init.normal_(norm.bias, 0, spread)
    return model.eval()


def norms(model: nn.Module) -> list[str]:
    return [path for path, m in model.named_modules() if isinstance(m, _BatchNorm)]


def assert_same(folded: nn.Module, model: nn.Module, x: torch.Tensor, rtol: float = 1e-5) -> None:
    with torch.no_grad():
        want, got = model(x), folded(x)
    assert want.isfinite().all()
    assert (got - want).norm() <= rtol * want.norm()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_norm_behind_a_convolution_goes(name):
    size, left = FAMILIES[name]
    model = with_statistics(timm.create_model(name, num_classes=5))
    x = torch.randn(2, 3, size, size)
    before = len(norms(model))
    folded = fold_norms(model, x)
    assert len(norms(folded)) == left < before
    assert len(norms(model)) == before
    assert_same(folded, model, x)


class Branches(nn.Module):
    """Convolutions and norms, wired by a function of itself and the input."""

    def __init__(self, wire, **layers) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.wire = wire

    def forward(self, x):
        return self.wire(self, x)


def conv(channels=4):
    return nn.Conv2d(3, channels, 3, padding=1)


def parametrized():
    return nn.utils.parametrizations.weight_norm(conv())


def hooked():
    layer = conv()
    layer.register_forward_hook(lambda _module, _args, y: 2 * y)
    return layer


LEFT_ALONE = {
    "another reader": (lambda m, x: m.norm(y := m.conv(x)) + y, {"conv": conv()}),
    "changed in place": (lambda m, x: m.norm(m.conv(x).relu_()), {"conv": conv()}),
    "activation between": (lambda m, x: m.norm(m.conv(x).relu()), {"conv": conv()}),
    "a view between": (lambda m, x: m.norm(m.conv(x).transpose(2, 3)), {"conv": conv()}),
    "convolution used twice": (lambda m, x: m.norm(m.conv(x)) + m.conv(x + 1), {"conv": conv()}),
    "norm used twice": (
        lambda m, x: m.norm(m.conv(x)) + m.norm(torch.cat((x, x), 1)[:, :4]),
        {"conv": conv()},
    ),
    "standardised weight": (lambda m, x: m.norm(m.conv(x)), {"conv": ScaledStdConv2d(3, 4, 3)}),
    "parametrised weight": (lambda m, x: m.norm(m.conv(x)), {"conv": parametrized()}),
    "a hook behind it": (lambda m, x: m.norm(m.conv(x)), {"conv": hooked()}),
    "no statistics": (
        lambda m, x: m.bare(m.conv(x)),
        {"conv": conv(), "bare": nn.BatchNorm2d(4, track_running_stats=False)},
    ),
    "a linear layer's tokens": (
        lambda m, x: m.tokens(m.fc(x.flatten(2))),
        {"fc": nn.Linear(64, 8), "tokens": nn.BatchNorm1d(3)},
    ),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_what_is_no_pair_stays(case):
    wire, layers = LEFT_ALONE[case]
    model = Branches(wire, norm=nn.BatchNorm2d(4), **layers)
    for norm in model.modules():
        if isinstance(norm, _BatchNorm) and norm.track_running_stats:
            nn.init.normal_(norm.running_mean)
    model.eval()
    x = torch.randn(2, 3, 8, 8)
    folded = fold_norms(model, x)
    assert norms(folded) == norms(model)
    assert torch.equal(folded(x), model(x))


def test_what_the_caller_gets_is_read():
    model = Branches(lambda m, x: (y := m.conv(x), m.norm(y)), conv=conv(), norm=nn.BatchNorm2d(4))
    with_statistics(model, 1.0)
    x = torch.randn(1, 3, 8, 8)
    folded = fold_norms(model, x)
    for got, want in zip(folded(x), model(x), strict=True):
        assert torch.equal(got, want)


def test_a_shared_weight_stays():
    first, second = conv(), conv()
    second.weight = first.weight
    model = Branches(
        lambda m, x: m.norm(m.first(x)) + m.second(x), first=first, second=second, norm=nn.BatchNorm2d(4)
    )
    with_statistics(model, 1.0)
    x = torch.randn(1, 3, 8, 8)
    assert norms(fold_norms(model, x)) == ["norm"]


def test_linear_layers_without_tokens_take_a_norm():
    model = with_statistics(
        nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8, affine=False)), 1.0
    )
    x = torch.randn(5, 6)
    folded = fold_norms(model, x)
    assert norms(folded) == []
    assert_same(folded, model, x)


def test_the_activation_of_a_norm_stays_and_hands_values_on():
    norm = BatchNormAct2d(4)
    model = with_statistics(nn.Sequential(conv(), norm), 1.0)
    pass_along(model, "routing")
    x = torch.randn(2, 3, 8, 8)
    folded = fold_norms(model, x)
    assert isinstance(folded[1], nn.ReLU)
    assert_same(folded, model, x)
    assert threaded(folded(thread(x.clone(), "routing", "value")), "routing") == "value"


@pytest.mark.parametrize(
    ("name", "method"),
    [("resnet50_cifar", None), ("mobilenetv2_035", None), ("mobilenetv2_035", CondConv(experts=2))],
)
def test_frozen_norms_go_as_others_do(name, method):
    """torchvision's, and timm's with an activation, as `timm.utils.freeze` makes them."""
    model = with_statistics(timm.create_model(name, num_classes=5))
    timm.utils.freeze(model)
    model = convert(model, method) if method else model
    x = torch.randn(2, 3, 32, 32)
    folded = fold_norms(model, x)
    frozen = [type(m).__name__ for m in model.modules() if "Frozen" in type(m).__name__]
    assert len(frozen) > 30
    assert not any("Frozen" in type(m).__name__ for m in folded.modules())
    assert_same(folded, model, x)


def test_nothing_of_the_callers_changes():
    model = timm.create_model("resnet20_cifar_mod", selection="random").train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    before = torch.random.get_rng_state()
    folded = fold_norms(model, torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(torch.random.get_rng_state(), before)
    assert model.training
    assert not any(m.training for m in folded.modules())
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key]), key
    assert not {id(p) for p in model.parameters()} & {id(p) for p in folded.parameters()}
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in folded.modules())


@pytest.mark.parametrize("skip", [(False,) * 4, (True, False, True, True)])
def test_adaptive_depth_keeps_its_switchable_norms(skip):
    base = timm.create_model("resnet18", channels=(8, 16, 24, 32), num_classes=5)
    model = with_statistics(convert(base, AdaptiveDepth()))
    x = torch.randn(2, 3, 32, 32)
    folded = fold_norms(model, x)
    left = norms(folded)
    assert len(left) < len(norms(model))
    assert all(path.endswith((".full", ".base")) for path in left)
    set_depth(folded, skip)
    set_depth(model, skip)
    assert_same(folded, model, x)
    cut = subnet(model, skip)
    assert norms(fold_norms(cut, x)) == []
    assert_same(fold_norms(cut, x), model, x)


@pytest.mark.parametrize(
    "options", [{}, {"routing": "shared"}, {"per_channel": True}, {"form": "experts"}, {"form": "fused"}]
)
def test_condconv_takes_norms_up(options):
    base = timm.create_model("mobilenetv2_035", num_classes=5)
    model = with_statistics(convert(base, CondConv(experts=2, **options)))
    x = torch.randn(3, 3, 32, 32)
    folded = fold_norms(model, x)
    assert norms(folded) == []
    assert_same(folded, model, x)


@pytest.mark.parametrize(("bias", "left"), [(None, 0), ("shared", 0), ("experts", 1)])
def test_each_experts_own_bias_keeps_the_norm(bias, left):
    layer = CondConv2d(3, 4, 3, bias=bias, experts=3, router=None)
    weights = torch.rand(2, 3)
    model = Branches(lambda m, x: m.norm(m.layer(x, weights)), layer=layer, norm=nn.BatchNorm2d(4))
    with_statistics(model, 1.0)
    x = torch.randn(2, 3, 8, 8)
    folded = fold_norms(model, x)
    assert len(norms(folded)) == left
    assert_same(folded, model, x)


def test_memory_format_and_dtype_stay():
    model = with_statistics(timm.create_model("resnet50_cifar_mod", channels=(16, 32, 48, 64)))
    model = model.to(memory_format=torch.channels_last, dtype=torch.bfloat16)
    x = torch.randn(1, 3, 16, 16, dtype=torch.bfloat16)
    folded = fold_norms(model, x)
    weight = folded.layer1[0].conv2.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert {p.dtype for p in folded.parameters()} == {torch.bfloat16}
    assert norms(folded) == []


def test_a_converted_network_folds_as_one_made_by_name():
    base = timm.create_model("resnet18", channels=(16, 32, 48, 64), num_classes=5)
    model = with_statistics(convert(base, MixtureOfDepths(c=4)))
    x = torch.randn(2, 3, 32, 32)
    again = fold_norms(fold_norms(model, x), x)
    assert norms(again) == []
    assert_same(again, copy.deepcopy(model), x)
