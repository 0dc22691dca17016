"""Mixture-of-Depths blocks: their arithmetic and gradients."""

from __future__ import annotations

import copy

import pytest
import timm
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from _mod_block import DRAWN, FUSIONS, ORDERS, mod_block
from pliant.methods.mixture_of_depths import ChannelSelector, MoDBlock, RandomSelector


def naive(block: MoDBlock, x, index):
    """The ten-line reading of section 3, one sample and one channel at a time."""
    out = x.clone()
    for b in range(len(x)):
        picked = [int(i) for i in index[b]]
        xb = torch.stack([x[b, i] for i in picked])
        y = block.last_act(block.core(xb[None])[0] + (xb if block.inner_shortcut else 0))
        if isinstance(block.selector, ChannelSelector):
            hidden = (block.selector.fc1.weight @ x[b].mean((1, 2))).clamp(min=0)
            y = (
                y
                * torch.stack([(block.selector.fc2.weight @ hidden)[i].sigmoid() for i in picked])[
                    :, None, None
                ]
            )
        for j, i in enumerate(picked):
            to = {"first": j, "last": x.shape[1] - block.k + j}.get(block.fusion, i)
            out[b, to] = y[j] + (0 if block.fusion == "replace" else x[b, to])
    return out


def naive_index(block: MoDBlock, x, order, seed):
    """Which channels, by sorting Python numbers, one sample at a time."""
    selector, k = block.selector, block.k
    if selector is None:
        return [list(range(k))] * len(x)
    if isinstance(selector, RandomSelector) and selector.index is not None:
        return [selector.index.tolist()] * len(x)
    if isinstance(selector, RandomSelector):
        torch.manual_seed(seed)
        keys = torch.rand(x.shape[:2]).tolist()
    else:
        keys = []
        for b in range(len(x)):
            hidden = (selector.fc1.weight @ x[b].mean((1, 2))).clamp(min=0)
            keys.append((selector.fc2.weight @ hidden).tolist())
    best = [sorted(range(len(row)), key=lambda i, row=row: -row[i])[:k] for row in keys]
    return [sorted(row) for row in best] if order == "index" else best


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("selection", DRAWN)
@settings(max_examples=8, deadline=None)
@given(
    batch=st.integers(1, 3),
    height=st.integers(1, 5),
    width=st.integers(1, 5),
    shape=st.sampled_from([(8, 1), (8, 4), (16, 2), (16, 16), (32, 8)]),
    block=st.sampled_from([BasicBlock, Bottleneck]),
    inner_shortcut=st.booleans(),
    last_act=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_block_is_the_naive_one(
    selection, order, fusion, batch, height, width, shape, block, inner_shortcut, last_act, seed
):
    channels, k = shape
    if block is Bottleneck and k < 4:
        k = 4
    made = mod_block(
        channels,
        k,
        block,
        seed,
        selection=selection,
        order=order,
        fusion=fusion,
        inner_shortcut=inner_shortcut,
        last_act=last_act,
        reduction=4,
    )
    x = torch.randn(batch, channels, height, width, dtype=torch.double)
    if isinstance(made.selector, ChannelSelector):  # tied channels may come in any order
        assume(made.selector.logits(x).sort(1).values.diff(dim=1).min() > 1e-9)
    index = naive_index(made, x, order, seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        torch.testing.assert_close(made(x), naive(made, x, index), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_cores(block):
    """The layers of the spec's table."""
    k = 8
    width = {BasicBlock: k, Bottleneck: k // 4}[block]
    shapes = {
        BasicBlock: [(k, k, 3), (k, k, 3)],
        Bottleneck: [(k, width, 1), (width, width, 3), (width, k, 1)],
    }[block]
    core = mod_block(32, k, block).core
    convs = [m for m in core if isinstance(m, nn.Conv2d)]
    assert [(m.in_channels, m.out_channels, m.kernel_size[0]) for m in convs] == shapes
    assert all(m.stride == (1, 1) and m.bias is None for m in convs)
    assert [type(m).__name__ for m in core] == (["Conv2d", "BatchNorm2d", "ReLU"] * len(convs))[:-1]


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
def test_last_act_is_that_of_the_block_only_when_asked_for(block):
    assert isinstance(mod_block(32, 8, block).last_act, nn.Identity)
    assert isinstance(mod_block(32, 8, block, last_act=True).last_act, nn.ReLU)
    # fusion="replace" and no scores: what comes out of the block is seen as it is.
    bare = {"selection": "first", "fusion": "replace", "last_act": True}
    x = torch.randn(4, 32, 3, 3, dtype=torch.double)
    for inner_shortcut in (False, True):
        made = mod_block(32, 8, block, inner_shortcut=inner_shortcut, **bare)
        with torch.no_grad():
            assert (made(x)[:, :8] >= 0).all(), "the activation is behind the inner shortcut"


# --- which channels change ---------------------------------------------------------


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("selection", DRAWN)
def test_exactly_the_promised_channels_change(selection, fusion):
    made = mod_block(16, 4, selection=selection, fusion=fusion, reduction=4)
    x = torch.randn(3, 16, 4, 4, dtype=torch.double)
    index = torch.tensor(naive_index(made, x, "score", 5))
    torch.manual_seed(5)
    with torch.no_grad():
        changed = (made(x) != x).flatten(2)
    promised = torch.zeros(3, 16, dtype=torch.bool)
    if fusion == "first":
        promised[:, :4] = True
    elif fusion == "last":
        promised[:, -4:] = True
    else:
        promised.scatter_(1, index, True)
    assert torch.equal(changed.any(2), promised)
    assert changed.all(2).equal(promised), "every pixel of a promised channel changes"


# --- gradients ---------------------------------------------------------------------


def separated(made: MoDBlock, batch=2, size=3):
    """Inputs whose logits are so far apart that no small step changes the ranking."""
    for seed in range(100):
        torch.manual_seed(seed)
        x = torch.randn(batch, made.channels, size, size, dtype=torch.double)
        if not isinstance(made.selector, ChannelSelector):
            return x
        gaps = made.selector.logits(x).sort(1).values.diff(dim=1)
        if gaps.min() > 1e-3:
            return x
    raise AssertionError("no well separated input found")


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize(
    ("selection", "order", "inner_shortcut"),
    [
        ("learned", "score", False),
        ("learned", "index", True),
        ("fixed", "score", False),
        ("first", "score", True),
    ],
)
def test_gradients(selection, order, fusion, inner_shortcut):
    made = mod_block(
        8,
        4,
        Bottleneck,
        selection=selection,
        order=order,
        fusion=fusion,
        inner_shortcut=inner_shortcut,
        reduction=1,
    )
    # A smooth core: a difference quotient across the kink of a ReLU is no gradient.
    made.core.act1, made.core.act2 = nn.Softplus(), nn.Softplus()
    x = separated(made).requires_grad_()
    names, weights = zip(*made.named_parameters(), strict=True)

    def function(x, *weights):
        return torch.func.functional_call(made, dict(zip(names, weights, strict=True)), (x,))

    inputs = (x, *(w.detach().clone().requires_grad_() for w in weights))
    assert torch.autograd.gradcheck(function, inputs, atol=1e-6)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("order", ORDERS)
def test_selector_learns(order, fusion):
    torch.manual_seed(0)
    model = timm.create_model(
        "resnet18_cifar_mod", channels=(16, 32, 64, 128), c=4, reduction=2, order=order, fusion=fusion
    )
    before = copy.deepcopy(model.state_dict())
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    loss = nn.functional.cross_entropy(model(torch.randn(8, 3, 16, 16)), torch.arange(8))
    loss.backward()
    for path, block in model.named_modules():
        if isinstance(block, MoDBlock):
            for name, p in block.named_parameters(path):
                assert p.grad.isfinite().all(), name
                assert p.grad.abs().sum() > 0, name
    optimiser.step()
    for name, value in model.state_dict().items():
        if "selector" in name:
            assert not torch.equal(value, before[name]), name


# --- a sample alone, and autocast -----------------------------------------------------------


@pytest.mark.parametrize("selection", ["learned", "fixed", "first"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_sample_alone_is_as_in_a_batch(selection, order):
    made = mod_block(32, 8, selection=selection, order=order)
    x = torch.randn(5, 32, 4, 4, dtype=torch.double)
    with torch.no_grad():
        together = made(x)
        for b in range(5):
            torch.testing.assert_close(made(x[b : b + 1])[0], together[b], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_block_under_autocast_is_close_to_full_precision(fusion):
    made = mod_block(32, 8, double=False, fusion=fusion)
    x = torch.randn(2, 32, 4, 4)
    with torch.no_grad():
        full = made(x)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(made(x), full, rtol=0.05, atol=0.1)
