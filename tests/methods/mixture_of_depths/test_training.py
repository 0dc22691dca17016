"""A Mixture-of-Depths block in training gives the values and gradients of its plain operators.

Those values are compared with a reading of the paper in `test_block`, and the gradients of training
against difference quotients; so each of the two forms is held by the other.
"""

from __future__ import annotations

import copy
import itertools
from typing import get_args

import pytest
import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from pliant import MixtureOfDepths, convert
from pliant.methods.mixture_of_depths import Fusion, MoDBlock, Order, Selection
from pliant.methods.mixture_of_depths.ops import building
from pliant.methods.mixture_of_depths.training import joined, taken

FUSIONS, ORDERS = get_args(Fusion), get_args(Order)
DRAWN = tuple(s for s in get_args(Selection) if s != "none")
FORMATS = (torch.contiguous_format, torch.channels_last)


def mod_block(channels=16, k=4, kind=BasicBlock, dilation=1, **options) -> MoDBlock:
    """A block in training whose norms have weights and shifts of their own."""
    torch.manual_seed(0)
    stage = nn.Sequential(
        *(kind(channels, channels // kind.expansion, dilation=dilation) for _ in range(2))
    )
    made = convert(stage, MixtureOfDepths(c=channels // k, reduction=2, **options))[1].train()
    for norm in made.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 2)
            nn.init.normal_(norm.bias)
    return made


def images(channels=16, batch=3, height=5, width=6, dtype=torch.float32, form=torch.contiguous_format):
    torch.manual_seed(3)
    x, g = (torch.randn(2, batch, channels, height, width) + 0.3).to(dtype)
    return (t.contiguous(memory_format=form) for t in (x, g))


def run(function, block, x, g):
    """Output, gradients of x and of all parameters, and the norms' buffers."""
    x = x.detach().requires_grad_()
    torch.manual_seed(5)  # of random selection
    out = function(x)
    found = {"out": out, **block.state_dict()}
    names, weights = zip(("x", x), *block.named_parameters(), strict=True)
    grads = torch.autograd.grad(out, weights, g, allow_unused=True)
    return found | {f"{n}'": grad for n, grad in zip(names, grads, strict=True)}, out.grad_fn.name()


def reference(block, x, g):
    """What `run` gives of the plain operators; `block` is used up."""
    return run(block.written, block, x, g)[0]


def assert_same(found, expected, rtol=2e-5):
    """Equal but for rounding, relative to the largest value."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        other = expected[name]
        if value is None:
            assert other is None or not other.any(), name
            continue
        value, other = value.detach().double(), other.detach().double()
        # A gradient may be zero but for rounding (a scale before another norm): hence 1.
        allowed = rtol * max(float(other.abs().max()) if other.numel() else 0, 1)
        torch.testing.assert_close(value, other, rtol=0, atol=allowed, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("selection", DRAWN)
@pytest.mark.parametrize("train", [False, True])
def test_values_and_gradients_are_the_plain_forms(form, fusion, selection, train):
    for order, inner_shortcut in itertools.product(ORDERS, (False, True)):
        block = mod_block(
            selection=selection, fusion=fusion, order=order, inner_shortcut=inner_shortcut
        ).double()
        block.train(train)
        x, g = images(dtype=torch.float64, form=form)
        expected = reference(copy.deepcopy(block), x, g)
        found, name = run(block, block, x, g)
        assert "Fuse" in name
        assert_same(found, expected, 1e-12)
        assert found["x'"].is_contiguous(memory_format=form), "gradients keep the memory format"


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("form", FORMATS)
def test_second_derivatives(fusion, form):
    block = mod_block(8, 4, Bottleneck, fusion=fusion).double().eval()
    block.core.act1, block.core.act2 = nn.Softplus(), nn.Softplus()
    block.selector.fc1.weight.data.abs_()  # no silent unit: its kink has no difference quotient
    x, _ = images(8, 2, 2, 3, torch.float64, form)
    x = x.abs()
    assert block.selector.logits(x).sort(1).values.diff(dim=1).min() > 1e-4
    assert torch.autograd.gradcheck(block, x.requires_grad_())
    assert torch.autograd.gradgradcheck(block, x)


def test_odd_strides_are_taken():
    block = mod_block().double()
    x, g = images(dtype=torch.float64)
    wide = torch.randn(3, 16, 5, 12, dtype=torch.float64)
    for strange in (wide[..., ::2], x.transpose(1, 3).contiguous().transpose(1, 3), x[:1].expand_as(x)):
        for of_out in (g, g[:1, :1, :1, :1].expand_as(g)):
            expected = reference(copy.deepcopy(block), strange, of_out)
            found, _ = run(other := copy.deepcopy(block), other, strange, of_out)
            assert_same(found, expected, 1e-12)


def test_torch_func_and_forward_gradients_take_the_plain_operators():
    block = mod_block().double().eval()
    x, t = images(dtype=torch.float64)
    one = torch.func.grad(lambda x: block(x[None]).sum())
    expected = torch.autograd.grad(block(x.requires_grad_()).sum(), x)[0]
    torch.testing.assert_close(torch.func.vmap(one)(x.detach()), expected)
    _, tangent = torch.func.jvp(block, (x.detach(),), (t,))
    _, reverse = torch.autograd.functional.jvp(block, x.detach(), t)
    torch.testing.assert_close(tangent, reverse)


def test_a_compiler_sees_the_plain_operators():
    block = mod_block()
    x, g = images()
    expected = reference(copy.deepcopy(block), x, g)
    compiled = torch.compile(block, backend="aot_eager", fullgraph=True)
    found, _ = run(compiled, block, x, g)
    assert_same(found, expected)


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traced_with_gradients_saved_and_loaded(train, tmp_path):
    """TorchScript cannot save functions of Python, so a trace holds the plain operators."""
    block = mod_block().train(train)
    copied, x = copy.deepcopy(block), torch.randn(3, 16, 4, 5)
    torch.jit.trace(block, x, check_trace=False).save(tmp_path / "block.pt")
    again = torch.jit.load(tmp_path / "block.pt")
    for batch in (x, torch.randn(1, 16, 7, 3)):
        torch.testing.assert_close(again(batch), copied(batch), rtol=1e-4, atol=1e-5)


def test_a_plain_forward_builds_nothing(monkeypatch):
    monkeypatch.setattr(building, "library", lambda *_: pytest.fail("built"))
    x, g = images()
    mod_block()(x).backward(g)
    with torch.no_grad():
        mod_block()(x)
    mod_block().eval()(x)


def test_gathering_and_adding_leave_their_inputs():
    x, y = torch.zeros(1, 3, 1, 1), torch.ones(1, 1, 1, 1)
    at = torch.tensor([[2]])
    assert joined(x, y, at).flatten().tolist() == [0, 0, 1]
    assert joined(x + 5, y, 1, replace=True).flatten().tolist() == [5, 1, 5]
    assert taken(x, 0, 2).shape == (1, 2, 1, 1)
    assert not x.any()
