"""CondConv networks that are saved and loaded, and input that is out of the ordinary."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from torch import nn

from _small import VARIANTS, images, small
from pliant import CondConv, convert, load, save
from pliant.methods.condconv.layers import CondConv2d, CondLinear, Router
from pliant.surgery import conversions

LATE = {"begin": 13}  # of MobileNetV1's 15 units: cheap


# --- checkpoints ------------------------------------------------------------------------------------


def make(name, **kwargs):
    model = timm.create_model(name, **kwargs)
    if not hasattr(model, "_model_args"):  # timm before 1.0.31, which records nothing
        vars(model)["_model_args"] = kwargs
    return model


def assert_comes_back(model, folder):
    with torch.no_grad():
        for p in model.parameters():
            p += 0.01 * torch.rand_like(p)
    again = load(save(model, folder))
    x = images(2)
    with torch.no_grad():
        ours, theirs = model.eval()(x), again(x)
    for one, other in zip(ours, theirs, strict=True):
        assert torch.equal(one, other)
    assert conversions(again) == conversions(model)
    assert list(again.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize(
    ("variant", "named"), [*((v, False) for v in VARIANTS), ("block", True), ("single", True)]
)
def test_every_variant_comes_back(tmp_path, variant, named):
    options = {"experts": 3, **LATE, **VARIANTS[variant]}
    if named:
        model = make("cc_mobilenetv1_025_cifar", num_classes=5, drop_rate=0.1, **options)
    else:
        model = convert(make("mobilenetv1_w025_cifar", num_classes=5, drop_rate=0.1), CondConv(**options))
    assert model.classifier.drop == 0.1
    assert_comes_back(model, tmp_path / "net")


@pytest.mark.parametrize("routing", ["block", "single"])
def test_networks_for_features_come_back(tmp_path, routing):
    options = {"experts": 2, "routing": routing, "features_only": True}
    model = make("cc_resnet20_cifar", out_indices=(1, 3), **options)
    assert [f.shape[1] for f in model(images(2))] == [16, 64]
    assert_comes_back(model, tmp_path / "a")
    plain = make("mobilenetv1_w025_cifar", features_only=True)
    new = convert(plain, CondConv(experts=2, routing=routing, begin=13))
    assert [site[-3:] for site in conversions(new)[0].sites] == ["4.0", "4.1"]
    assert_comes_back(new, tmp_path / "b")


def test_a_new_head_is_plain_and_saved_when_the_network_is_asked_for_so(tmp_path):
    named = make("cc_mobilenetv1_025_cifar", experts=2, drop_rate=0.1, **LATE)
    named.reset_classifier(3)
    assert type(named.classifier) is nn.Linear
    with pytest.raises(ValueError, match=r"(?s)classifier\.weight.*arguments={\.\.\.}"):
        save(named, tmp_path / "net")
    x = images(2)
    again = load(save(named, tmp_path / "net", arguments={"classifier": False}))
    with torch.no_grad():
        assert torch.equal(again(x), named.eval()(x))
    assert again.num_classes == 3
    # One that was converted by hand is converted so.
    model = convert(make("mobilenetv1_w025_cifar"), CondConv(experts=2, classifier=False, **LATE))
    model.reset_classifier(3)
    assert_comes_back(model, tmp_path / "other")


# --- other bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["fused", "experts", "auto"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_on_a_cpu(form, dtype):
    plain = small("mobilenetv1_w025_cifar")
    model = convert(plain, CondConv(experts=2, form=form))
    x = images(3)
    with torch.no_grad():
        expected = plain(x)
        usual = (copy.deepcopy(plain).to(dtype)(x.to(dtype)) - expected).abs().mean()
        out = copy.deepcopy(model).to(dtype)(x.to(dtype))
        with torch.autocast("cpu", dtype):
            automatic = model(x)
    for half in (out, automatic):
        assert half.dtype == dtype
        assert (half - expected).abs().mean() < 2 * usual, "as exact as the plain network is"


@pytest.mark.parametrize("form", ["fused", "experts", "auto"])
@pytest.mark.parametrize("name", ["mobilenetv1_w025_cifar", "resnet20_cifar", "convnext_tiny"])
def test_an_empty_batch(name, form):
    model = convert(small(name), CondConv(experts=2, form=form, routing="hierarchical"))
    with torch.no_grad():
        assert model(torch.zeros(0, 3, 32, 32)).shape == (0, 5)


def test_an_expert_that_is_never_chosen_keeps_its_weights():
    method = CondConv(experts=3, active=1, activation="softmax", begin=14)
    model = convert(small("mobilenetv1_w025_cifar"), method)
    with torch.no_grad():  # in each router the last expert never wins
        for module in model.modules():
            if isinstance(module, Router):
                module.fc2.bias[2] = -1e4
    loss = nn.functional.cross_entropy(model.train()(images(8, 16)), torch.arange(8) % 5)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    layers = [m for m in model.modules() if isinstance(m, (CondConv2d, CondLinear))]
    assert len(layers) == 3
    for layer in layers:
        assert layer.weight.grad[:2].any()
        assert not layer.weight.grad[2].any(), "a gradient of zero, not none: DDP wants one of all"
    before = layers[0].weight.detach().clone()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert torch.equal(layers[0].weight[2], before[2])
    assert not torch.equal(layers[0].weight[:2], before[:2])
