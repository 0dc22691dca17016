"""What timm's own tests/test_models.py asks of every network, asked of all of pliant's by name.

By shapes, on the meta device. What the methods exclude by design:

- a norm of an adaptive network's base network has no gradient from a forward at full depth, and a
  skipped block none at the smallest: every parameter has one from the two together;
- a vision transformer has no spatial output (timm excludes it from these checks, too).

torch.jit.script and torch.fx, which timm tests as well, are no promise of pliant.
"""

from __future__ import annotations

import copy
import math

import pytest
import timm
import torch
from timm.models import FeatureInfo

from _small import meta
from pliant.methods.adaptive_depth.depth import at_depth, get_depth
from pliant.models import list_networks

NETWORKS = list_networks()
SMALL = {
    *("resnet20_cifar", "resnet20_cifar_mod", "cc_resnet20_cifar", "resnet20_cifar_adn", "resnet18_cifar"),
    *("resnet18_mod", "mobilenetv1_w025", "mobilenetv1_w025_cifar", "cc_mobilenetv2_050"),
    "vit_tiny_patch16_adn",
}
ALL = [pytest.param(name, marks=() if name in SMALL else pytest.mark.slow) for name in NETWORKS]
REAL = ["resnet20_cifar", "resnet20_cifar_mod", "cc_resnet20_cifar", "resnet20_cifar_adn"]


def is_vit(name):
    return name.startswith("vit_")


def images(model, batch=1):
    return torch.empty(batch, *model.pretrained_cfg["input_size"], device="meta")


@pytest.mark.parametrize("name", NETWORKS)
def test_the_configuration_names_what_is_there(name):
    cfg = timm.get_pretrained_cfg(name)
    model = meta(name)
    state = model.state_dict()
    assert f"{cfg.classifier}.weight" in state
    assert f"{cfg.first_conv}.weight" in state
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    assert cfg.fixed_input_size is is_vit(name)
    assert (cfg.pool_size is None) is is_vit(name)
    if cfg.pool_size:
        stride = model.feature_info[-1]["reduction"]
        assert cfg.pool_size == tuple(side // stride for side in cfg.input_size[1:])


@pytest.mark.parametrize("name", ALL)
def test_default_configuration(name):
    model = meta(name).eval()
    x, pool = images(model), model.default_cfg["pool_size"]
    assert model.num_features > 0
    features = model.forward_features(x)
    logits = model.forward_head(features, pre_logits=True)
    assert logits.shape == (1, model.head_hidden_size)
    if is_vit(name):
        assert features.shape[-1] == model.num_features
    else:
        assert features.shape == (1, model.num_features, *pool)
    with torch.device("meta"):
        model.reset_classifier(0)
        assert model.num_classes == 0
        assert model(x).shape == logits.shape
        if not is_vit(name):
            model.reset_classifier(0, "")
            assert model(x).shape[2:] == pool
            headless = timm.create_model(name, num_classes=0, global_pool="").eval()
            assert headless(x).shape[2:] == pool


@pytest.mark.parametrize("name", ALL)
def test_backward_reaches_every_parameter(name):
    model = meta(name, num_classes=42).train()
    x = images(model, 2)
    output = model(x)
    assert output.shape == (2, 42)
    output.mean().backward()
    if name.endswith("_adn"):
        assert [n for n, p in model.named_parameters() if p.grad is None] == [
            n for n, _ in model.named_parameters() if ".base." in n
        ]
        with at_depth(model, (True,) * len(get_depth(model))):
            model(x).mean().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []


def check_features(found, channels, reductions, size):
    assert len(found) == len(channels) == len(reductions) >= 3
    for feature, count, stride in zip(found, channels, reductions, strict=True):
        assert feature.shape[:2] == (1, count)
        assert all(a <= math.ceil(b / stride) + 1 for a, b in zip(feature.shape[2:], size, strict=True))


@pytest.mark.parametrize("name", ALL)
def test_intermediates(name):
    model = meta(name).eval()
    info, x = FeatureInfo(model.feature_info, len(model.feature_info)), images(model)
    last, found = model.forward_intermediates(x, output_fmt="NCHW")
    check_features(found, info.channels(), info.reduction(), x.shape[2:])
    assert last.shape == model.forward_features(x).shape
    assert len(model.forward_intermediates(x, indices=2, intermediates_only=True)) == 2
    stopped = model.forward_intermediates(x, indices=[0, 1], stop_early=True, intermediates_only=True)
    assert [f.shape for f in stopped] == [f.shape for f in found[:2]]


@pytest.mark.parametrize("name", ALL)
def test_intermediates_as_features_of_a_pruned_network(name):
    model = meta(name, features_only=True, feature_cls="getter").eval()
    info, x = model.feature_info, images(model)
    check_features(model(x), info.channels(), info.reduction(), x.shape[2:])
    whole = meta(name).eval()
    pruned = copy.deepcopy(whole)
    with torch.device("meta"):
        assert pruned.prune_intermediate_layers([0, 1]) == [0, 1]
    found = pruned.forward_intermediates(x, indices=[0, 1], intermediates_only=True)
    assert [f.shape for f in found] == [f.shape for f in whole.forward_intermediates(x, [0, 1])[1]]
    assert len(pruned.state_dict()) < len(whole.state_dict())


@pytest.mark.parametrize("name", REAL)
def test_gradient_checkpointing_changes_nothing(name):
    model = timm.create_model(name).eval()
    x = torch.randn(2, 3, 32, 32)
    expected, found = model(x), model.forward_intermediates(x)
    assert torch.equal(found[0], model.forward_features(x))
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(model.forward_intermediates(x)[0], found[0], rtol=1e-4, atol=1e-5)
    assert expected.isfinite().all()
