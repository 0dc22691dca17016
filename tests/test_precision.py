"""Layers of selectors and routers are called, in full precision, whatever stands in their place."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune

import _export
import pliant
from pliant.deploy.folding import fold_norms
from pliant.deploy.optimize import optimize, unfused
from pliant.parts import hooked, replace_parts
from pliant.precision import linear


class Adapted(nn.Module):
    """A low-rank adapter around a layer, as LoRA puts one: the layer's weight can be read through it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, 1, bias=False)
        self.up = nn.Linear(1, base.out_features, bias=False)

    @property
    def weight(self):
        return self.base.weight

    @property
    def bias(self):
        return self.base.bias

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Packed(nn.Module):
    """A quantised layer, whose weight is no tensor: `torch.ao` has a method of that name."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.packed = [base.weight.detach().clone(), base.bias]

    def weight(self):
        return self.packed[0]

    def forward(self, x):
        return x @ self.packed[0].t() + (0 if self.packed[1] is None else self.packed[1])


class Doubled(nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 2 * weight


def with_hook(layer):
    layer.register_forward_hook(lambda _module, _args, y: y + 1)
    return layer


def with_own_forward(layer):
    layer.forward = lambda x: 3 * nn.Linear.forward(layer, x)
    return layer


def parametrized(layer):
    parametrize.register_parametrization(layer, "weight", Doubled())
    return layer


# What people do to a layer: each makes of it something that is called with the same effect.
CHANGES = {
    "adapter": Adapted,
    "packed": Packed,
    "hook": with_hook,
    "own forward": with_own_forward,
    "parametrization": parametrized,
    "weight norm": lambda layer: parametrizations.weight_norm(layer),
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "bias": lambda layer: nn.Linear(layer.in_features, layer.out_features),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("change", CHANGES)
def test_a_layer_is_called_in_the_precision_of_its_input(change, dtype, bias):
    torch.manual_seed(0)
    with torch.no_grad():  # a pruned weight with gradients cannot be copied
        layer = CHANGES[change](nn.Linear(8, 4, bias=bias))
    x = torch.randn(3, 8)
    rounded = copy.deepcopy(layer).to(dtype).float() if change != "own forward" else layer
    if change == "own forward":
        dtype = torch.float32  # a method that is bound to the layer does not follow a copy
    expected = rounded(x)
    found = linear(x, layer.to(dtype))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_gradients_reach_an_adapter_in_half_precision():
    layer = Adapted(nn.Linear(4, 4)).to(torch.bfloat16)
    linear(torch.randn(2, 4), layer).sum().backward()
    assert layer.up.weight.grad.abs().sum() > 0
    assert layer.up.weight.grad.dtype == torch.bfloat16


def changed(change, **options):
    """A Mixture-of-Depths network, and one whose selectors' second layers are changed so."""
    network = _export.mod(**options)
    other = copy.deepcopy(network)
    for module in other.modules():
        if hasattr(module, "fc2"):
            torch.manual_seed(0)
            module.fc2 = CHANGES[change](module.fc2)
    return network, other.eval()


@pytest.mark.parametrize("change", [c for c in CHANGES if c != "pruned"])
def test_every_form_of_a_block_calls_the_layers_of_its_selector(change):
    """Eager, fast and exported forms agree, and are another network than the one before."""
    network, other = changed(change)
    x = _export.images(4)
    with torch.no_grad():
        expected = other(x)
        fast = optimize(other, x)
        same = change in ("packed", "weight norm")
        assert torch.allclose(network(x), expected, rtol=1e-3) == same
        torch.testing.assert_close(fast(x), expected, rtol=1e-4, atol=1e-4)
        reasons = unfused(fast).values()
        assert reasons
        assert all(reasons)
        for target in ("program", "onnx"):
            formed = replace_parts(
                copy.deepcopy(other), lambda _, p, t=target: p if hooked(p) else p.export_form(t, None)
            )
            torch.testing.assert_close(formed(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["adapter", "hook"])
def test_a_changed_layer_is_exported(tmp_path, change):
    _, other = changed(change)
    path = pliant.export(other, tmp_path / "net.pt2", batches=(2,))
    x = _export.images(2)
    with torch.no_grad():
        torch.testing.assert_close(pliant.open_export(path)(x), other(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("change", ["adapter", "packed", "hook", "parametrization"])
def test_a_router_calls_its_layers(change):
    network = _export.condconv()
    x = _export.images(2)
    with torch.no_grad():
        before = network(x)
        for module in network.modules():
            if hasattr(module, "fc2"):
                module.fc2 = CHANGES[change](module.fc2)
        after = network(x)
    assert torch.equal(before, after) == (change == "packed")


def test_dynamic_quantisation_of_selectors_and_routers():
    quantize = pytest.importorskip("torch.ao.quantization").quantize_dynamic
    for network in (_export.mod(), _export.condconv()):
        x = _export.images(2)
        with torch.no_grad():
            try:
                quantised = quantize(copy.deepcopy(network), {nn.Linear}, dtype=torch.qint8)
            except (RuntimeError, AttributeError) as error:
                pytest.skip(f"no quantised linear layers here: {error}")
            torch.testing.assert_close(quantised(x), network(x), rtol=0.3, atol=0.3)


@pytest.mark.parametrize("change", ["hook", "own forward", "parametrization"])
def test_folding_leaves_a_layer_that_is_more_than_its_weights(change):
    network = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)).eval()
    nn.init.constant_(network[1].weight, 3.0)
    network[0] = CHANGES[change](network[0])
    x = torch.randn(4, 8)
    with torch.no_grad():
        folded = fold_norms(network, x)
        assert isinstance(folded[1], nn.BatchNorm1d)
        if change != "own forward":
            torch.testing.assert_close(folded(x), network(x))
