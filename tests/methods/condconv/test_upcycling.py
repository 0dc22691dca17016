"""CondConv on a network that is trained: same function at the start, then experts part."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from _small import FAMILIES, VARIANTS, images, separable_plain, settled, small
from pliant import CondConv, convert
from pliant.methods.condconv.layers import CondConv2d, CondLinear, Router
from pliant.outside import classifier


def conditional(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, (CondConv2d, CondLinear))}


def from_first(name: str) -> dict[str, int]:
    """Begin so early that most of the network is converted."""
    return {"begin": 2 if "cifar" in name or "convnext" in name else 5}


def assert_same_function(plain, method):
    x = images()
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.float64, 1e-12)):
        model = copy.deepcopy(plain).to(dtype)
        for p in model.parameters():  # in double precision, values that single precision has not
            p.data *= 1 + torch.rand_like(p) * 1e-9
        new = convert(model, method)
        assert conditional(new)
        with torch.no_grad():
            expected, out = model(x.to(dtype)), new(x.to(dtype))
        assert expected.std() > 1e-2, "it must say something"
        torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance * float(expected.std()))


# --- the same function ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "activation"), [*((name, "sigmoid") for name in FAMILIES), ("convnext_tiny", "softmax")]
)
def test_every_family_keeps_its_function(name, activation):
    assert_same_function(small(name), CondConv(experts=2, activation=activation, **from_first(name)))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("name", "activation"), [("separable", "sigmoid"), ("resnet20_cifar", "softmax")])
def test_every_variant_keeps_the_function(name, activation, variant):
    options = {"activation": activation, **VARIANTS[variant]}
    if name == "resnet20_cifar" and variant in ("depthwise", "pointwise"):
        with pytest.raises(ValueError, match="CondConv matches nothing"):
            convert(small(name), CondConv(**options))
        return
    plain = settled(separable_plain()) if name == "separable" else small(name)
    begin = 2 if name == "separable" else 8  # the last three blocks and the classifier
    assert_same_function(plain, CondConv(experts=3, begin=begin, **options))


@pytest.mark.parametrize(("form", "activation"), [("fused", "softmax"), ("experts", "sigmoid")])
def test_one_expert_and_both_forms_keep_the_function(activation, form):
    for experts in (1, 2):
        method = CondConv(experts=experts, activation=activation, form=form, begin=2)
        assert_same_function(small("resnet20_cifar"), method)


def test_starting_afresh_is_another_function():
    plain, x = small("resnet20_cifar"), images()
    with torch.no_grad():
        out = convert(plain, CondConv(experts=2, upcycle=False))(x)
        assert (out - plain(x)).abs().max() > 0.1


def test_fresh_experts_are_as_large_as_the_layers_that_they_replace():
    plain = small("resnet20_cifar")
    nn.init.normal_(plain.fc.bias)
    new = convert(plain, CondConv(experts=16, upcycle=False))
    assert torch.equal(new.fc.bias, plain.fc.bias), "biases are the network's"
    for path, layer in conditional(new).items():
        old = plain.get_submodule(path.replace(".block.", ".")).weight
        scale = 2 / 16**0.5 if path == "fc" else 1.0
        ratio = float(layer.weight.detach().std() / old.detach().std())
        assert ratio == pytest.approx(scale, rel=0.06), path
        assert (layer.weight.std(0) > 0).all(), "no two are alike"


def test_noise_is_of_the_size_asked_for_and_sums_to_zero():
    plain = small("resnet20_cifar")
    for noise in (0.1, 0.5):
        layer = convert(plain, CondConv(experts=8, noise=noise)).layer3[1].block.conv1
        kernel = plain.layer3[1].conv1.weight.flatten(1)
        torch.testing.assert_close(layer.weight.sum(0) * 0.5, kernel)
        spread = (layer.weight - layer.weight.mean(0)).std() / (layer.weight.mean(0).std())
        assert float(spread) == pytest.approx(noise * (7 / 8) ** 0.5, rel=0.05)
    copies = convert(plain, CondConv(experts=3, activation="softmax")).layer3[1].block.conv1
    assert all(torch.equal(expert, kernel) for expert in copies.weight)


@pytest.mark.parametrize("active", [None, 2])
@pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
def test_fresh_logits_are_as_large_as_the_plain_networks(activation, active):
    torch.manual_seed(0)
    plain = nn.Sequential(nn.ReLU(), nn.Linear(64, 500, bias=False))
    options = {"experts": 16, "activation": activation, "active": active}
    new = convert(plain, CondConv(features=False, upcycle=False, **options))
    x = 0.2 * torch.randn(64, 64)  # so small that the router says a half, or a share, of each
    with torch.no_grad():
        ratio = float(new(x).std() / plain(x).std())
    assert ratio == pytest.approx(1, rel=0.2)


@pytest.mark.parametrize("value", [0.0, 0.1])
def test_a_layer_of_equal_weights_starts_apart_too(value):
    """A classifier that starts at zero has a standard deviation of zero."""
    plain = small("resnet20_cifar").double()
    layers = {"fc": 64, "layer3.1.conv1": 64 * 9}
    for path in layers:
        nn.init.constant_(plain.get_submodule(path).weight, value)
    nn.init.normal_(plain.fc.bias)
    x = images().double()
    same, fresh = (convert(plain, CondConv(experts=8, upcycle=upcycle)) for upcycle in (True, False))
    with torch.no_grad():
        torch.testing.assert_close(same(x), plain(x), rtol=1e-12, atol=1e-12)
    for path, fan_in in layers.items():
        start = (3 * fan_in) ** -0.5
        old = plain.get_submodule(path).weight.flatten(1)
        experts = conditional(same)[path.replace("conv", "block.conv")].weight
        torch.testing.assert_close(experts.sum(0) * 0.5, old, rtol=1e-12, atol=1e-12)
        noise = float((experts - experts.mean(0)).std())
        assert noise == pytest.approx(0.1 * start / 4 * (7 / 8) ** 0.5, rel=0.06), path
        experts = conditional(fresh)[path.replace("conv", "block.conv")].weight
        scale = 2 / 8**0.5 if path == "fc" else 1.0
        assert float(experts.std()) == pytest.approx(scale * start, rel=0.06), path


# --- experts part, or not ------------------------------------------------------------------------


def train(model, steps=20):
    torch.manual_seed(1)
    x, y = images(16, 16), torch.arange(16) % 5
    optimiser = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    model.train()
    for _ in range(steps):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimiser.step()
    assert loss.isfinite()
    return x


def spread(layer) -> float:
    """How far experts are from one another, in the size of a kernel."""
    weight = layer.weight.detach()
    return float((weight - weight.mean(0)).norm() / weight.norm())


@pytest.mark.parametrize("name", ["mobilenetv1_w025_cifar", "resnet20_cifar"])
def test_experts_part_under_softmax(name):
    model = convert(small(name), CondConv(experts=3, activation="softmax"))
    assert all(
        torch.equal(w, layer.weight[0]) for layer in conditional(model).values() for w in layer.weight
    )
    train(model)
    for path, layer in conditional(model).items():
        assert spread(layer) > 1e-3, path


@pytest.mark.parametrize("name", ["mobilenetv1_w025_cifar", "resnet20_cifar"])
def test_experts_part_and_routers_leave_their_constant_under_sigmoid(name):
    model = convert(small(name), CondConv(experts=3))
    before = {path: layer.weight.detach().clone() for path, layer in conditional(model).items()}
    routers = {path: m for path, m in model.named_modules() if isinstance(m, Router)}
    assert not any(p.any() for r in routers.values() for p in r.fc2.parameters())
    routings = {}
    for path, router in routers.items():
        router.register_forward_hook(lambda *a, path=path: routings.__setitem__(path, a[2].detach()))
    x = train(model)
    with torch.no_grad():
        model(x)
    for path, layer in conditional(model).items():
        moved = layer.weight.detach() - before[path]
        assert (moved - moved.mean(0)).norm() > 5e-4 * moved.norm(), f"{path}: each its own way"
        assert spread(layer) > 0.05, path
    for path, routing in routings.items():
        assert routing.std(0).max() > 1e-4, f"{path}: differs between examples"
        assert routing.std(1).max() > 1e-4, f"{path}: differs between experts"


def test_equal_copies_with_equal_routing_never_part():
    """The control: why there is noise."""
    method = CondConv(experts=3)
    object.__setattr__(method, "noise", 0.0)  # it is refused otherwise
    model = convert(small("resnet20_cifar").double(), method)
    before = {path: layer.weight.detach().clone() for path, layer in conditional(model).items()}
    torch.set_default_dtype(torch.float64)
    try:
        train(model)
    finally:
        torch.set_default_dtype(torch.float32)
    for path, layer in conditional(model).items():
        assert not torch.equal(layer.weight, before[path]), "it learns"
        assert spread(layer) < 1e-12, path
    for router in (m for m in model.modules() if isinstance(m, Router)):
        assert router.fc2.weight.any()
        assert (router.fc2.weight - router.fc2.weight[0]).abs().max() < 1e-12


def test_experts_of_a_frozen_network_learn():
    plain = small("resnet20_cifar").requires_grad_(False)
    model = convert(plain, CondConv(experts=2, activation="softmax"))
    new = {id(p) for layer in conditional(model).values() for p in layer.parameters()}
    new |= {id(p) for m in model.modules() if isinstance(m, Router) for p in m.parameters()}
    for name, p in model.named_parameters():
        assert p.requires_grad == (id(p) in new), name
    train(model)
    for path, layer in conditional(model).items():
        assert spread(layer) > 1e-3, path
    assert torch.equal(model.layer1[0].conv1.weight, plain.layer1[0].conv1.weight)


# --- dropout ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet20_cifar", {}),  # dropped by a function
        ("mobilenetv1_w025_cifar", {}),
        ("convnext_atto", FAMILIES["convnext_atto"]),  # by a module
        ("regnetx_002", {}),
    ],
)
def test_dropout_is_taken_over_and_the_router_sees_features_whole(name, kwargs):
    plain = timm.create_model(name, drop_rate=0.5, **kwargs).eval()
    model = convert(plain, CondConv(experts=2, activation="softmax"))
    head = model.get_submodule(classifier(plain))
    assert head.drop == 0.5
    assert getattr(model, "drop_rate", 0) == 0 or name in ("convnext_atto", "regnetx_002")
    assert not any(m.p for m in model.modules() if isinstance(m, nn.Dropout))
    assert plain.drop_rate == 0.5, "a copy is changed, not the network"
    seen, routed, outs = [], [], []
    head.register_forward_hook(lambda module, args, out: (seen.append(args[0]), outs.append(out)))
    head.router.register_forward_hook(lambda module, args, out: routed.append(out))
    head.train()
    x = images(2)
    with torch.no_grad():
        model(x), model(x)
        assert torch.equal(*seen)
        assert torch.equal(*routed)
        assert not torch.equal(*outs), "the layer drops"
        head.eval()
        model(x)
        torch.testing.assert_close(outs[-1], plain(x), rtol=1e-4, atol=1e-5)


def test_dropout_stays_where_the_classifier_stays():
    model = convert(timm.create_model("resnet20_cifar", drop_rate=0.5), CondConv(classifier=False))
    assert model.drop_rate == 0.5


# --- trained networks ---------------------------------------------------------------------------

WAYS = {
    "softmax": CondConv(experts=4, activation="softmax"),
    "sigmoid": CondConv(experts=4),
    "one expert": CondConv(experts=1, begin=1),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_trained_network_gives_the_same_answers(trained, cifar10, correct, way):
    plain = trained("resnet20_cifar", "resnet20-12fca82f.th")
    assert correct(plain, cifar10, 500) == 455
    assert correct(convert(plain, WAYS[way]), cifar10, 500) == 455


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "file", "right"),
    [("resnet20_cifar", "resnet20-12fca82f.th", 9173), ("resnet56_cifar", "resnet56-4bfd9763.th", 9339)],
)
def test_accuracy_is_unchanged_to_the_image(trained, cifar10, correct, name, file, right, way):
    assert correct(convert(trained(name, file), WAYS[way]), cifar10, 10_000) == right
