"""Layers with mixed weights and their routers: against timm's, precision, bad input."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from _conditional import FORMS, KINDS, layer_of
from pliant.methods.condconv.layers import (
    CondConv2d,
    CondLinear,
    Router,
    SharedRouting,
    check_experts,
)
from pliant.methods.condconv.mixing import ROUTING
from pliant.threaded import thread, threaded

# Beside timm


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_timm_computes_the_same_and_its_weights_load(kind: str, form: str, bias: bool) -> None:
    ours = layer_of(kind, "experts" if bias else None, form=form)
    options = {"padding": 0, **KINDS[kind]}
    theirs = timm.layers.CondConv2d(8, ours.out_channels, **options, bias=bias, num_experts=4).double()
    router = {f"router.{name}": value for name, value in ours.router.state_dict().items()}
    ours.load_state_dict({**theirs.state_dict(), **router})
    x, routing = torch.randn(3, 8, 9, 10).double(), torch.rand(3, 4).double()
    torch.testing.assert_close(ours(x, routing), theirs(x, routing), rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [(9, 10), (8, 7)])
def test_same_padding_is_that_of_tensorflow(form: str, size: tuple[int, int]) -> None:
    ours = layer_of("same", "shared", form=form)
    plain = timm.layers.Conv2dSame(8, 16, 3, stride=2, bias=True).double()
    with torch.no_grad():
        ours.weight.copy_(plain.weight.flatten(1).expand(4, -1, -1))
        ours.bias.copy_(plain.bias)
    x = torch.randn(2, 8, *size).double()
    routing = torch.rand(2, 4).double()
    routing = routing / routing.sum(1, keepdim=True)
    torch.testing.assert_close(ours(x, routing), plain(x), rtol=0, atol=1e-12)


def test_one_expert_of_weight_one_is_the_plain_layer() -> None:
    plain, ours = nn.Conv2d(8, 16, 3, padding=1), CondConv2d(8, 16, 3, padding=1, bias="shared", experts=1)
    with torch.no_grad():
        ours.weight.copy_(plain.weight.flatten(1)[None])
        ours.bias.copy_(plain.bias)
    x = torch.randn(3, 8, 6, 6)
    torch.testing.assert_close(ours(x, torch.ones(3, 1)), plain(x))


def test_a_linear_layer_is_a_convolution_of_one_position() -> None:
    linear = CondLinear(8, 16, "experts", experts=4, router=Router(8, 4)).double()
    conv = CondConv2d(8, 16, 1, bias="experts", experts=4, router=Router(8, 4)).double()
    conv.load_state_dict(linear.state_dict())
    x = torch.randn(3, 8, 5, 6).double()
    torch.testing.assert_close(linear(x[:, :, 0, 0]), conv(x[:, :, :1, :1])[:, :, 0, 0])
    routing = torch.rand(3, 4).double()
    last = linear(x.permute(0, 2, 3, 1), routing).permute(0, 3, 1, 2)
    torch.testing.assert_close(last, conv(x, routing))


def test_dropout_is_on_the_input_and_the_router_sees_none_of_it() -> None:
    layer = CondLinear(64, 16, experts=4, router=Router(64, 4), drop=0.5)
    seen: list[Tensor] = []
    layer.router.register_forward_hook(lambda module, args, y: seen.append(args[0]))
    x = torch.ones(2, 64)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    assert all(torch.equal(s, x) for s in seen)
    assert len(seen) == 4


@pytest.mark.parametrize("kind", ["1x1 strided", "3x3", "depthwise", "linear"])
def test_the_forms_of_a_layer_train_alike(kind: str) -> None:
    """Outputs and the gradients of input, experts, biases and router."""
    found = []
    for form in (*FORMS, "auto"):
        torch.manual_seed(0)
        if kind == "linear":
            layer: nn.Module = CondLinear(8, 16, "experts", router=Router(8, 8), form=form).double()
        else:
            layer = layer_of(kind, form=form)
        x = torch.randn(3, 8, *(() if kind == "linear" else (9, 9)), dtype=torch.double, requires_grad=True)
        y = layer(x)
        y.square().sum().backward()
        found.append({"y": y, "x": x.grad, **{n: p.grad for n, p in layer.named_parameters()}})
        assert all(value is not None and value.any() for value in found[-1].values())
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-10, atol=1e-12)


# Routing


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("outputs", [None, 5])
def test_a_router_is_what_the_paper_writes(activation: str, outputs: int | None) -> None:
    router = Router(8, 4, hidden=3, activation=activation, outputs=outputs).double()
    x = torch.randn(2, 8, 3, 5).double()
    hidden = F.relu(router.fc1(x.mean((2, 3))))
    logits = router.fc2(hidden)
    if outputs:
        logits = logits.reshape(2, 4, 5)
    wanted = logits.sigmoid() if activation == "sigmoid" else logits.softmax(1)
    torch.testing.assert_close(router(x), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
@pytest.mark.parametrize("outputs", [None, 5])
@pytest.mark.parametrize("active", [1, 2, 4])
def test_hard_routing_chooses_so_many(activation: str, outputs: int | None, active: int) -> None:
    x = torch.randn(6, 8, 3, 3)
    hard = Router(8, 4, activation=activation, outputs=outputs, active=active)
    soft = Router(8, 4, activation=activation, outputs=outputs)
    soft.load_state_dict(hard.state_dict())
    chosen, all_of_them = hard(x), soft(x)
    assert ((chosen > 0).sum(1) == active).all()
    # The highest are chosen.
    lowest_chosen = all_of_them.masked_fill(chosen == 0, 2).amin(1)
    assert (all_of_them.masked_fill(chosen > 0, -1).amax(1) <= lowest_chosen).all()
    if activation == "softmax":
        torch.testing.assert_close(chosen.sum(1), torch.ones_like(chosen[:, 0]))
    else:
        assert torch.equal(chosen, all_of_them * (chosen > 0))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_an_expert_that_is_never_chosen_gets_a_gradient_of_zero(form: str, activation: str) -> None:
    router = Router(8, 4, activation=activation, active=2)
    with torch.no_grad():
        router.fc2.weight.mul_(1e-3)
        router.fc2.bias.copy_(torch.tensor([3.0, -3.0, 2.0, -4.0]))  # the first and third win
    layer = CondConv2d(8, 16, 3, padding=1, bias="experts", experts=4, router=router, form=form)
    layer(torch.randn(5, 8, 6, 6)).square().sum().backward()
    for p in (layer.weight, layer.bias, router.fc2.weight, router.fc2.bias):
        assert p.grad is not None
        assert not p.grad[[1, 3]].any()
        assert p.grad[[0, 2]].flatten(1).any(1).all() if p.dim() > 1 else p.grad[[0, 2]].all()


def test_a_constant_start_gives_every_expert_the_same() -> None:
    for activation, weight in (("sigmoid", 0.5), ("softmax", 0.25)):
        router = Router(8, 4, activation=activation)
        assert router.start_constant() == 4 * weight
        assert torch.equal(router(torch.randn(2, 8, 3, 3)), torch.full((2, 4), weight))


def test_the_routing_before_is_an_input_of_the_next() -> None:
    router = Router(8, 4, previous=True)
    assert router.fc2.in_features == 12
    x, before = torch.randn(2, 8, 3, 3), torch.rand(2, 4)
    wanted = router.fc2(torch.cat((x.mean((2, 3)), before), 1)).sigmoid()
    torch.testing.assert_close(router(thread(x, ROUTING, before)), wanted)
    assert SharedRouting()(x) is before


@pytest.mark.parametrize("router", [Router(8, 4, previous=True), SharedRouting()])
def test_a_routing_that_does_not_arrive_is_a_clear_error(router: nn.Module) -> None:
    with pytest.raises(RuntimeError, match="no routing came with the feature map"):
        router(torch.randn(2, 8, 3, 3))


@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_routing_is_passed_on_where_told(kind: str) -> None:
    x = torch.randn(2, 8, 5, 5) if kind == "conv" else torch.randn(2, 8)
    router = Router(8, 4)
    layer = (
        CondConv2d(8, 8, 3, router=router, experts=4)
        if kind == "conv"
        else CondLinear(8, 8, router=router, experts=4)
    )
    assert threaded(layer(x), ROUTING) is None
    layer.passes_on = True
    torch.testing.assert_close(threaded(layer(x), ROUTING), router(x))


# Precision


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["1x1", "3x3", "grouped", "depthwise"])
def test_half_precision_on_a_cpu(dtype: torch.dtype, form: str, kind: str) -> None:
    wanted_of = layer_of(kind, double=False, form=form)
    layer = copy.deepcopy(wanted_of).to(dtype)
    wanted_of.load_state_dict({k: v.float() for k, v in layer.state_dict().items()})
    for batch in (1, 3):
        x = torch.randn(batch, 8, 9, 9, dtype=dtype)
        y = layer(x)
        assert y.dtype == dtype
        assert layer.router(x).dtype == torch.float32
        error = (y.float() - wanted_of(x.float())).abs().max()
        assert error < 16 * torch.finfo(dtype).eps
        y.sum().backward()
        assert layer.weight.grad.dtype == dtype
        assert layer.weight.grad.isfinite().all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("layer", ["conv", "linear"])
@pytest.mark.parametrize("grad", [True, False])
def test_autocast_leaves_the_router_in_full_precision(form: str, layer: str, grad: bool) -> None:
    router = Router(8, 4)
    made: nn.Module = CondLinear(8, 16, "experts", experts=4, router=router, form=form)
    x = torch.randn(3, 8)
    if layer == "conv":
        made = CondConv2d(8, 16, 3, bias="experts", experts=4, router=router, form=form)
        x = torch.randn(3, 8, 7, 7)
    wanted, routing = made(x), router(x)
    seen: list[Tensor] = []
    router.register_forward_hook(lambda module, args, y: seen.append(y))
    with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
        y = made(x)
    assert y.dtype == torch.bfloat16
    assert torch.equal(seen[0], routing)
    assert (y.float() - wanted).abs().max() < 0.05
    if grad:
        y.float().sum().backward()
        assert made.weight.grad.dtype == torch.float32


# Bad input


def test_numbers_of_experts_that_make_no_sense() -> None:
    for experts in (0, -1, 65, 2.0, True, None, "8"):
        with pytest.raises(ValueError, match=r"experts must be a whole number from 1 to 64, not"):
            check_experts(experts)
        with pytest.raises(ValueError, match=r"experts must be a whole number from 1 to 64, not"):
            CondConv2d(4, 4, 1, experts=experts)
    for active in (0, 5, True):
        with pytest.raises(ValueError, match=r"active must be a whole number from 1 to 4, not"):
            Router(8, 4, active=active)
    check_experts(64, 64)
    check_experts(1, None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"form": "quick"}, "form must be one of auto, fused, experts; not 'quick'"),
        ({"bias": True}, "bias must be None, 'shared' or 'experts', not True"),
        ({"router": Router(8, 3)}, "weights for 3 experts; the layer has 4 experts of 16 channels"),
        ({"router": Router(8, 4, outputs=5)}, "4 experts of 5 channels; the layer has 4 experts of 16"),
    ],
)
def test_arguments_that_do_not_fit(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CondConv2d(8, 16, 3, experts=4, **options)
    with pytest.raises(ValueError, match=message):
        CondLinear(8, 16, experts=4, **options)


def test_a_router_of_other_channels_is_refused_when_the_layer_is_built() -> None:
    for options in ({}, {"hidden": 3}, {"previous": True}, {"outputs": 16}):
        with pytest.raises(ValueError, match="router takes 8 channels, but the layer's in_channels is 16"):
            CondConv2d(16, 16, 3, experts=4, router=Router(8, 4, **options))
        with pytest.raises(ValueError, match="router takes 8 channels, but the layer's in_features is 16"):
            CondLinear(16, 16, experts=4, router=Router(8, 4, **options))
        CondConv2d(16, 16, 1, groups=4, experts=4, router=Router(16, 4, **options))
        CondLinear(16, 16, experts=4, router=Router(16, 4, **options))
    for router in (SharedRouting(), nn.Identity()):  # they say nothing of channels
        CondLinear(16, 16, experts=4, router=router)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"in_channels": 0}, "in_channels must be a whole number of at least 1, not 0"),
        ({"out_channels": -8}, "out_channels must be a whole number of at least 1, not -8"),
        ({"groups": 0}, "groups must be a whole number of at least 1, not 0"),
        ({"groups": 2.0}, r"groups must be a whole number of at least 1, not 2\.0"),
        ({"kernel_size": 0}, "kernel_size must be one or two whole numbers of at least 1, not 0"),
        ({"kernel_size": (3, 0)}, r"kernel_size must be .* of at least 1, not \(3, 0\)"),
        ({"kernel_size": (3, 3, 3)}, r"kernel_size must be one or two .*, not \(3, 3, 3\)"),
        ({"stride": 0}, "stride must be one or two whole numbers of at least 1, not 0"),
        ({"stride": 1.5}, r"stride must be one or two whole numbers of at least 1, not 1\.5"),
        ({"dilation": 0}, "dilation must be one or two whole numbers of at least 1, not 0"),
        ({"padding": -1}, "padding must be one or two whole numbers of at least 0, not -1"),
        ({"padding": (0, -1)}, r"padding must be .* of at least 0, not \(0, -1\)"),
    ],
)
def test_convolutions_that_there_are_not(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CondConv2d(**{"in_channels": 8, "out_channels": 8, "kernel_size": 3, **options})


def test_linear_layers_and_routers_that_there_are_not() -> None:
    for drop in (1.5, -0.1, float("nan"), None, True):
        with pytest.raises(ValueError, match=f"drop must be a number from 0 to 1, not {drop}"):
            CondLinear(8, 8, drop=drop)
    for wrong in (0, -3, 2.0, True):
        said = f"must be a whole number of at least 1, not {wrong}"
        for name in ("channels", "hidden", "outputs"):
            with pytest.raises(ValueError, match=f"{name} {said}"):
                Router(**{"channels": 8, "experts": 4, name: wrong})
        for name in ("in_features", "out_features"):
            with pytest.raises(ValueError, match=f"{name} {said}"):
                CondLinear(**{"in_features": 8, "out_features": 8, name: wrong})
    assert CondLinear(8, 8, drop=1).drop == 1
    assert Router(8, 4, hidden=1).fc1.out_features == 1


def test_channels_that_groups_do_not_divide() -> None:
    with pytest.raises(ValueError, match="in_channels must be a multiple of groups = 3, not 8"):
        CondConv2d(8, 9, 3, groups=3)
    with pytest.raises(ValueError, match="out_channels must be a multiple of groups = 3, not 8"):
        CondConv2d(9, 8, 3, groups=3)


def test_padding_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="padding must be numbers or 'same', not 'valid'"):
        CondConv2d(8, 8, 3, padding="valid")


def test_an_activation_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="activation must be one of sigmoid, softmax; not 'relu'"):
        Router(8, 4, activation="relu")


def test_inputs_that_do_not_fit() -> None:
    conv = CondConv2d(8, 16, 3, experts=4)
    linear = CondLinear(8, 16, experts=4)
    x = torch.randn(2, 8, 5, 5)
    with pytest.raises(ValueError, match=r"wanted images of \[B, 8, H, W\], not \(2, 7, 5, 5\)"):
        conv(x[:, :7], torch.rand(2, 4))
    with pytest.raises(ValueError, match=r"wanted images of \[B, 8, H, W\], not \(2, 8, 5\)"):
        conv(x[..., 0], torch.rand(2, 4))
    with pytest.raises(ValueError, match=r"wanted inputs of \[B, ..., 8\], not \(2, 7\)"):
        linear(torch.randn(2, 7), torch.rand(2, 4))
    for layer, good in ((conv, x), (linear, x[:, :, 0, 0])):
        with pytest.raises(ValueError, match="has no router: call it with a routing of"):
            layer(good)
        for shape in ((2, 3), (1, 4), (2, 4, 8), (4,)):
            with pytest.raises(
                ValueError, match=r"2 examples and 4 experts want \(2, 4\), or \(2, 4, 16\)"
            ):
                layer(good, torch.rand(shape))


@pytest.mark.parametrize("form", [*FORMS, "auto"])
@pytest.mark.parametrize("kind", [*KINDS, "linear"])
def test_an_empty_batch(kind: str, form: str) -> None:
    layer: nn.Module
    if kind == "linear":
        layer, x = CondLinear(8, 16, "experts", router=Router(8, 8), form=form), torch.randn(0, 8)
    else:
        layer, x = layer_of(kind, double=False, form=form), torch.randn(0, 8, 9, 9)
    y = layer(x)
    assert y.shape == (0, *layer(torch.randn(2, *x.shape[1:])).shape[1:])
    y.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())


# As a module


def test_the_names_of_the_state_do_not_change() -> None:
    layer = CondConv2d(8, 16, 3, bias="experts", experts=4, router=Router(8, 4, hidden=3))
    assert {name: tuple(value.shape) for name, value in layer.state_dict().items()} == {
        "weight": (4, 16, 72),
        "bias": (4, 16),
        "router.fc1.weight": (3, 8),
        "router.fc1.bias": (3,),
        "router.fc2.weight": (4, 3),
        "router.fc2.bias": (4,),
    }
    linear = CondLinear(8, 16, "shared", experts=4, router=Router(8, 4))
    assert {name: tuple(value.shape) for name, value in linear.state_dict().items()} == {
        "weight": (4, 16, 8),
        "bias": (16,),
        "router.fc2.weight": (4, 8),
        "router.fc2.bias": (4,),
    }


def test_copies_are_apart() -> None:
    layer = layer_of("3x3")
    x = torch.randn(2, 8, 9, 9).double()
    wanted = layer(x)
    other = copy.deepcopy(layer)
    assert torch.equal(other(x), wanted)
    with torch.no_grad():
        other.weight.zero_()
        other.router.fc2.bias.fill_(9)
    assert torch.equal(layer(x), wanted)


def test_a_fresh_expert_is_drawn_as_a_plain_layer() -> None:
    layer = CondConv2d(32, 64, 3, bias="experts", experts=4)
    bound = (32 * 9) ** -0.5
    for values in (layer.weight, layer.bias):
        assert values.abs().max() <= bound
        assert values.detach().std() == pytest.approx(bound / 3**0.5, rel=0.15)


def test_print_tells_what_it_is() -> None:
    text = str(CondConv2d(8, 8, 3, padding="same", groups=8, experts=4, router=Router(8, 4, active=2)))
    assert "kernel_size=(3, 3)" in text
    assert "padding=same" in text
    assert "experts=4, activation='sigmoid', active=2" in text
