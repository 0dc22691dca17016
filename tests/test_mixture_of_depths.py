"""Mixture-of-Depths blocks: their arithmetic, gradients, options and errors."""

from __future__ import annotations

import copy
from typing import get_args

import pytest
import timm
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from timm.layers import BlurPool2d, DropPath
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

from pliant import MixtureOfDepths, convert, plan
from pliant.anatomy import RemovedBlock
from pliant.methods.mixture_of_depths import (
    ChannelSelector,
    Fusion,
    MoDBlock,
    Order,
    RandomSelector,
    Selection,
    without_mod_blocks,
)

FUSIONS = get_args(Fusion)
ORDERS = get_args(Order)
DRAWN = tuple(s for s in get_args(Selection) if s not in ("none", "static"))  # static: test_variants


def mod_block(
    channels=16, k=4, block=BasicBlock, seed=0, double=True, drop_path=None, **options
) -> MoDBlock:
    """One block as surgery makes it, in evaluation, its norms with statistics of their own."""
    torch.manual_seed(seed)
    stage = nn.Sequential(*(block(channels, channels // block.expansion) for _ in range(2)))
    if drop_path is not None:
        stage[1].drop_path = DropPath(drop_path)
    if double:
        stage.double()
    made = convert(stage, MixtureOfDepths(c=channels // k, **options))[1].eval()
    assert isinstance(made, MoDBlock)
    assert made.k == k
    for norm in made.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return made


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


def test_selector_has_no_bias_and_the_reduction_asked_for():
    for reduction, hidden in ((16, 2), (8, 4), (64, 1)):
        selector = mod_block(32, 4, reduction=reduction).selector
        assert {name: tuple(p.shape) for name, p in selector.named_parameters()} == {
            "fc1.weight": (hidden, 32),
            "fc2.weight": (32, hidden),
        }


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
    ("selection", "order"),
    [("learned", "score"), ("learned", "index"), ("fixed", "score"), ("first", "score")],
)
@pytest.mark.parametrize("inner_shortcut", [False, True])
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


# --- the start as the network without the blocks --------------------------------------


@pytest.mark.parametrize("fusion", ["first", "last", "original"])
@pytest.mark.parametrize(
    "options",
    [*({"selection": s} for s in DRAWN), {"gate": "map"}, {"gate": "map", "selection": "first"}],
    ids=str,
)
def test_zero_init_last_starts_as_the_network_without_them(options, fusion):
    torch.manual_seed(0)
    plain = timm.create_model("resnet18_cifar", channels=(16, 32, 64, 128))
    method = MixtureOfDepths(c=4, reduction=2, fusion=fusion, zero_init_last=True, **options)
    assert "trained again" not in str(plan(plain, method))
    model = convert(plain, method)
    bare = convert(plain, MixtureOfDepths(selection="none"))
    x = torch.randn(4, 3, 16, 16)
    for train in (False, True):
        with torch.no_grad():
            out = model.train(train)(x)
            assert torch.equal(out, without_mod_blocks(model)(x))
            # Batch norm without momentum's memory: the same statistics, so the same output.
            assert torch.equal(out, bare.train(train)(x))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
        optimiser.step()
    for name, p in model.named_parameters():
        assert p.grad.abs().sum() > 0, f"{name} does not learn"


def test_without_zero_init_the_start_is_another():
    torch.manual_seed(0)
    model = timm.create_model("resnet18_cifar_mod", channels=(16, 32, 64, 128), c=4).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert not torch.equal(model(x), without_mod_blocks(model)(x))


def test_zero_for_ever_is_refused():
    with pytest.raises(ValueError, match="gradient of zero for ever"):
        MixtureOfDepths(last_act=True, zero_init_last=True)
    # With an inner shortcut before the activation, everything learns from the first or second step.
    made = mod_block(16, 4, reduction=4, last_act=True, zero_init_last=True, inner_shortcut=True)
    nn.init.zeros_(made.core.bn2.weight)  # mod_block draws the norms
    nn.init.zeros_(made.core.bn2.bias)
    optimiser = torch.optim.SGD(made.parameters(), lr=0.1)
    x = torch.randn(4, 16, 5, 5, dtype=torch.double)
    for _ in range(2):
        optimiser.zero_grad()
        made(x).square().mean().backward()
        optimiser.step()
    for name, p in made.named_parameters():
        assert p.grad.abs().sum() > 0, f"{name} does not learn"


@pytest.mark.parametrize(
    "options", [{"fusion": "replace"}, {"inner_shortcut": True}, {"inner_shortcut": True, "gate": "map"}]
)
def test_zero_init_last_that_starts_otherwise_says_so(options):
    model = timm.create_model("resnet18_cifar", channels=(16, 32, 64, 128)).eval()
    method = MixtureOfDepths(c=4, reduction=4, zero_init_last=True, **options)
    assert "a trained network has to be trained again" in str(plan(model, method))
    made = convert(model, method)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert not torch.equal(made(x), without_mod_blocks(made)(x))


def test_without_mod_blocks():
    model = timm.create_model("resnet20_cifar_mod")
    bare = without_mod_blocks(model)
    assert sum(isinstance(m, RemovedBlock) for m in bare.modules()) == 3
    assert not any(isinstance(m, MoDBlock) for m in bare.modules())
    assert sum(isinstance(m, MoDBlock) for m in model.modules()) == 3, "a copy is changed, not the model"
    assert bare.layer1[0].conv1.weight is not model.layer1[0].conv1.weight
    with pytest.raises(ValueError, match="ResNet has no Mixture-of-Depths block"):
        without_mod_blocks(bare)


# --- a sample alone, and random selection -----------------------------------------------


@pytest.mark.parametrize("selection", ["learned", "fixed", "first"])
@pytest.mark.parametrize("order", ORDERS)
def test_a_sample_alone_is_as_in_a_batch(selection, order):
    made = mod_block(32, 8, selection=selection, order=order)
    x = torch.randn(5, 32, 4, 4, dtype=torch.double)
    with torch.no_grad():
        together = made(x)
        for b in range(5):
            torch.testing.assert_close(made(x[b : b + 1])[0], together[b], rtol=1e-12, atol=1e-12)


def test_learned_selection_is_per_sample():
    made = mod_block(32, 8)
    torch.manual_seed(1)
    index = made.selector(torch.randn(6, 32, 4, 4, dtype=torch.double))[1]
    assert len({tuple(sorted(row)) for row in index.tolist()}) > 1


@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("order", ORDERS)
def test_random_selection_is_fresh_per_sample_and_reproducible(train, order):
    selector = mod_block(64, 16, selection="random", order=order).train(train).selector
    x = torch.randn(4, 64, 2, 2, dtype=torch.double)
    torch.manual_seed(3)
    (none, first), (_, second) = selector(x), selector(x)
    assert none is None
    assert first.shape == (4, 16)
    assert not torch.equal(first, second)
    assert len({tuple(sorted(row)) for row in first.tolist()}) == 4
    assert all(len(set(row)) == 16 for row in first.tolist())
    torch.manual_seed(3)
    assert torch.equal(selector(x)[1], first)
    ascending = bool((first.diff(dim=1) > 0).all())
    assert ascending == (order == "index")
    assert not list(selector.parameters())
    assert not selector.state_dict()


def test_random_selection_visits_all_channels_alike():
    selector = RandomSelector(8, 2, fixed=False)
    torch.manual_seed(0)
    counts = selector(torch.zeros(4000, 8, 1, 1))[1].flatten().bincount(minlength=8)
    assert counts.sum() == 8000
    assert ((counts - 1000).abs() < 150).all(), "five standard deviations"


@pytest.mark.parametrize("order", ORDERS)
def test_fixed_selection_stays_and_is_saved(order):
    made = mod_block(64, 16, selection="fixed", order=order)
    index = made.state_dict()["selector.index"]
    assert index.shape == (16,)
    assert len(set(index.tolist())) == 16
    assert bool((index.diff() > 0).all()) == (order == "index")
    x = torch.randn(2, 64, 3, 3, dtype=torch.double)
    with torch.no_grad():
        out = made(x)
        assert torch.equal(made(x), out)
        other = mod_block(64, 16, seed=9, selection="fixed", order=order)
        assert not torch.equal(other.selector.index, index)
        other.load_state_dict(made.state_dict())
        assert torch.equal(other(x), out)


# --- scores -----------------------------------------------------------------------------


def test_order_of_channels_and_their_scores():
    by_score = mod_block(64, 16).selector
    by_index = copy.deepcopy(by_score)
    by_index.order = "index"
    x = torch.randn(3, 64, 4, 4, dtype=torch.double)
    all_scores = by_score.logits(x).sigmoid()
    scores, index = by_score(x)
    assert (scores.diff(dim=1) <= 0).all()
    assert torch.equal(scores, all_scores.gather(1, index))
    assert (scores[:, -1:] >= all_scores.scatter(1, index, 0)).all(), "the best, and none better left out"
    sorted_scores, sorted_index = by_index(x)
    assert (sorted_index.diff(dim=1) > 0).all()
    assert torch.equal(sorted_index, index.sort(1).values)
    assert torch.equal(sorted_scores, all_scores.gather(1, sorted_index))


def test_saturated_scores_are_ranked_by_their_logits():
    selector = ChannelSelector(8, 3, 8)
    with torch.no_grad():
        selector.fc1.weight.copy_(torch.eye(8))
        selector.fc2.weight.copy_(torch.eye(8))
    x = torch.tensor([50.0, 90, 60, 1, 70, 40, 80, 30])[None, :, None, None]
    scores, index = selector(x)
    assert scores.tolist() == [[1.0, 1.0, 1.0]], "all saturate"
    assert index.tolist() == [[1, 6, 4]]


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [
        (torch.half, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.double, torch.double),
    ],
)
def test_scores_are_wide(dtype, wide):
    made = mod_block(32, 8, double=False).to(dtype)
    x = torch.randn(2, 32, 4, 4).to(dtype)
    with torch.no_grad():
        scores, index = made.selector(x)
        out = made(x)
    assert scores.dtype == wide
    assert out.dtype == dtype
    exact = copy.deepcopy(made.selector).double()(x.double())
    torch.testing.assert_close(scores.double(), exact[0], rtol=1e-5, atol=1e-6)
    assert torch.equal(index, exact[1])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.half])
def test_autocast_leaves_the_selector_alone(dtype):
    made = mod_block(32, 8, double=False)
    x = torch.randn(2, 32, 4, 4)
    with torch.no_grad():
        plain = made.selector(x)
        with torch.autocast("cpu", dtype):
            cast = made.selector(x)
            assert made.core(x[:, :8]).dtype == dtype, "autocast is on"
            out = made(x)
    assert cast[0].dtype == torch.float32
    assert torch.equal(cast[0], plain[0])
    assert torch.equal(cast[1], plain[1])
    assert out.dtype == torch.float32
    assert torch.equal(out[:, 8:], x[:, 8:])


@pytest.mark.parametrize("fusion", FUSIONS)
def test_block_under_autocast_is_close_to_full_precision(fusion):
    made = mod_block(32, 8, double=False, fusion=fusion)
    x = torch.randn(2, 32, 4, 4)
    with torch.no_grad():
        full = made(x)
        with torch.autocast("cpu", torch.bfloat16):
            torch.testing.assert_close(made(x), full, rtol=0.05, atol=0.1)


# --- what the block keeps of the one it replaces --------------------------------------------


def test_dilation_and_padding_are_kept():
    model = timm.create_model("resnet50_mod", output_stride=8)
    dilation = {path: m.core.conv2.dilation for path, m in model.named_modules() if isinstance(m, MoDBlock)}
    assert dilation == {
        "layer1.1": (1, 1),
        "layer2.1": (1, 1),
        "layer2.3": (1, 1),
        "layer3.1": (2, 2),
        "layer3.3": (2, 2),
        "layer3.5": (2, 2),
        "layer4.1": (4, 4),
    }
    assert model.layer4[1].core.conv2.padding == (4, 4)
    with torch.no_grad():
        assert model.eval().forward_features(torch.zeros(1, 3, 64, 64)).shape == (1, 2048, 8, 8)


def test_drop_path_is_kept():
    model = timm.create_model("resnet20_cifar_mod", drop_path_rate=0.5)
    plain = timm.create_model("resnet20_cifar", drop_path_rate=0.5)
    for path in ("layer1.1", "layer3.1"):
        kept, was = model.get_submodule(path).drop_path, plain.get_submodule(path).drop_path
        assert isinstance(kept, DropPath)
        assert kept.drop_prob == was.drop_prob > 0
    made = mod_block(16, 4, drop_path=0.5).train()
    x = torch.randn(64, 16, 2, 2, dtype=torch.double)
    dropped = (made(x) == x).flatten(1).all(1)
    assert 10 < int(dropped.sum()) < 54, "whole samples are passed on untouched"
    assert not (made.eval()(x) == x).flatten(1).all(1).any()
    assert isinstance(mod_block(16, 4).drop_path, nn.Identity)


def test_eps_momentum_and_activation_are_kept():
    torch.manual_seed(0)
    stage = nn.Sequential(*(BasicBlock(16, 16, act_layer=nn.SiLU) for _ in range(2)))
    for m in stage.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eps, m.momentum = 1e-3, 0.01
    core = convert(stage, MixtureOfDepths(c=2))[1].core
    assert isinstance(core.act1, nn.SiLU)
    assert (core.bn1.eps, core.bn1.momentum, core.bn2.eps) == (1e-3, 0.01, 1e-3)


def test_padding_mode_and_process_group_are_kept():
    stage = nn.Sequential(*(BasicBlock(16, 16) for _ in range(2)))
    stage[1].conv2 = nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular", bias=False)
    stage = nn.SyncBatchNorm.convert_sync_batchnorm(stage, process_group="some of them")
    core = convert(stage, MixtureOfDepths(c=2))[1].core
    assert (core.conv1.padding_mode, core.conv2.padding_mode) == ("zeros", "circular")
    assert isinstance(core.bn1, nn.SyncBatchNorm)
    assert core.bn1.process_group == core.bn2.process_group == "some of them"


# --- options and errors ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"c": 0}, "c must be a whole number of at least 1, not 0"),
        ({"c": -4}, "c must be a whole number of at least 1, not -4"),
        ({"c": 2.0}, r"c must be a whole number of at least 1, not 2\.0"),
        ({"c": True}, "c must be a whole number of at least 1, not True"),
        ({"c": "64"}, "c must be a whole number of at least 1, not '64'"),
        ({"reduction": 0}, "reduction must be a whole number of at least 1, not 0"),
        ({"reduction": None}, "reduction must be a whole number of at least 1, not None"),
        (
            {"selection": "best"},
            "selection must be one of learned, static, random, fixed, first, none; not 'best'",
        ),
        ({"order": "channel"}, "order must be one of score, index; not 'channel'"),
        ({"fusion": "middle"}, "fusion must be one of first, last, original, replace; not 'middle'"),
        ({"blocks": "even"}, "blocks must be 'odd', 'all' or a tuple of paths, not 'even'"),
        ({"blocks": "layer1.1"}, "blocks must be 'odd', 'all' or a tuple of paths, not 'layer1.1'"),
        ({"blocks": (1,)}, r"blocks must be 'odd', 'all' or a tuple of paths, not \(1,\)"),
        ({"blocks": None}, "blocks must be 'odd', 'all' or a tuple of paths, not None"),
        ({"stages": 1}, "stages must be a tuple of whole numbers or None, not 1"),
        ({"stages": ("0",)}, r"stages must be a tuple of whole numbers or None, not \('0',\)"),
        ({"stages": (True,)}, r"stages must be a tuple of whole numbers or None, not \(True,\)"),
        ({"blocks": ("layer1.1",), "stages": (3,)}, r"stages=\(3,\) goes with blocks='odd' or 'all' only"),
        ({"inner_shortcut": "no"}, "inner_shortcut must be True or False, not 'no'"),
        ({"last_act": 1}, "last_act must be True or False, not 1"),
        ({"zero_init_last": None}, "zero_init_last must be True or False, not None"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MixtureOfDepths(**options)


def test_options_are_keywords_frozen_and_comparable():
    with pytest.raises(TypeError):
        MixtureOfDepths(64)
    method = MixtureOfDepths(blocks=["layer1.1"])
    assert method == MixtureOfDepths(blocks=("layer1.1",))
    assert MixtureOfDepths(stages=[0, 1]) == MixtureOfDepths(stages=(0, 1))
    assert method.name == "MixtureOfDepths"
    with pytest.raises(AttributeError):
        method.c = 3


@pytest.mark.parametrize(
    ("network", "c", "message"),
    [
        ("resnet18", 65, r"layer1\.1: C = 64 channels with c = 65 leave k = 0"),
        ("resnet50", 65, r"layer1\.1: C = 256 channels with c = 65 leave k = 3 .* 0 inside its core"),
        ("resnet20_cifar", 17, r"layer1\.1: C = 16 channels with c = 17 leave k = 0"),
    ],
)
def test_a_c_too_large_names_block_and_values(network, c, message):
    model = timm.create_model(network)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        convert(model, MixtureOfDepths(c=c), inplace=True)
    assert not any(isinstance(m, MoDBlock) for m in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    convert(model, MixtureOfDepths(c=c - 1))


@pytest.mark.parametrize(
    ("network", "c"), [("resnet18", 64), ("resnet50", 64), ("resnet20_cifar", 16), ("resnet50_cifar", 64)]
)
def test_default_c_is_the_width_of_the_first_block(network, c):
    model = convert(timm.create_model(network), MixtureOfDepths())
    for block in model.modules():
        if isinstance(block, MoDBlock):
            assert block.k == block.channels // c


def mod_paths(model):
    return [path for path, m in model.named_modules() if isinstance(m, (MoDBlock, RemovedBlock))]


@pytest.mark.parametrize(
    ("options", "paths"),
    [
        ({}, ["layer1.1", "layer2.1", "layer2.3", "layer3.1", "layer3.3", "layer3.5", "layer4.1"]),
        ({"stages": (1,)}, ["layer2.1", "layer2.3"]),
        ({"stages": (3, 0)}, ["layer1.1", "layer4.1"]),
        ({"blocks": "all", "stages": (2,)}, [f"layer3.{i}" for i in range(1, 6)]),
        ({"blocks": "all", "stages": (0, 3)}, ["layer1.1", "layer1.2", "layer4.1", "layer4.2"]),
        ({"blocks": ("layer2.2", "layer4.1")}, ["layer2.2", "layer4.1"]),
        # VGG-like: the first block of a stage may be named where it keeps its shape.
        ({"blocks": ("layer1.0",), "selection": "none"}, ["layer1.0"]),
    ],
)
@pytest.mark.parametrize("selection", ["learned", "none"])
def test_where(options, paths, selection):
    model = convert(timm.create_model("resnet34"), MixtureOfDepths(**{"selection": selection, **options}))
    assert mod_paths(model) == paths


def test_one_block_stages_stay():
    model = timm.create_model("resnet18_cifar", channels=(16, 32, 64, 128), layers=(1, 2, 1, 3))
    assert mod_paths(convert(model, MixtureOfDepths(c=4))) == ["layer2.1", "layer4.1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": ("layer2.0",)}, r"layer2\.0 has stride 2 and goes from 64 to 128 channels"),
        ({"blocks": ("layer1.1", "layer3.0")}, r"layer3\.0 has stride 2 and goes from 128 to 256"),
        ({"blocks": ("layer9.1",)}, r"blocks names 'layer9\.1', which is no block; blocks: layer1\.0, "),
        ({"stages": (4,)}, "stages holds 4, but ResNet has 4 stages"),
        ({"stages": (-1,)}, "stages holds -1, but ResNet has 4 stages"),
        ({"blocks": ()}, "MixtureOfDepths matches nothing in ResNet"),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_where_not(options, message, inplace):
    model = timm.create_model("resnet18")
    names = {name: type(m) for name, m in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        convert(model, MixtureOfDepths(**options), inplace=inplace)
    assert {name: type(m) for name, m in model.named_modules()} == names


def test_widening_without_stride_is_refused():
    with pytest.raises(ValueError, match=r"layer1\.0 has stride 1 and goes from 64 to 256 channels"):
        convert(timm.create_model("resnet50"), MixtureOfDepths(blocks=("layer1.0",)))


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        ("resnext50_32x4d", "grouped convolutions: a core of k channels cannot keep the groups"),
        ("seresnet50", r"channel attention \(SEModule\) has no narrow form here"),
        ("resnet50_gn", "GroupNorm: a core needs batch norm"),
        ("convnext_atto", "no Mixture-of-Depths core for a convnext.ConvNeXtBlock"),
        ("vit_tiny_patch16_224", "no Mixture-of-Depths core for a vision_transformer.Block"),
        ("regnetx_002", "no Mixture-of-Depths core for a regnet.Bottleneck"),
    ],
)
def test_networks_without_a_core_are_passed_over_with_the_reason(network, reason):
    model = timm.create_model(network)  # older timm cannot build RegNet on meta
    with pytest.raises(ValueError, match=rf"(?s)matches nothing in \w+:.*: {reason}"):
        convert(model, MixtureOfDepths())


def test_anti_aliased_blocks_are_passed_over():
    # timm's networks have anti-aliasing in blocks that stride, so the others can be replaced.
    with torch.device("meta"):
        model = convert(timm.create_model("resnetblur50"), MixtureOfDepths())
    assert len(mod_paths(model)) == 7
    assert isinstance(model.layer2[0].aa, BlurPool2d)
    stage = nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 16, first_dilation=2, aa_layer=BlurPool2d))
    with pytest.raises(ValueError, match=r"1: anti-aliasing \(BlurPool2d\) has no narrow form here"):
        convert(stage, MixtureOfDepths(c=4))


def test_a_mixed_network_is_covered_where_it_can_be():
    stage = nn.Sequential(*(BasicBlock(16, 16) for _ in range(4)))
    stage[1] = BasicBlock(16, 16, attn_layer="se")
    covered = plan(stage, MixtureOfDepths(c=4))
    assert [r.path for r in covered.replacements] == ["3"]
    assert {p.path: p.reason for _, p in covered.passed_over} == {
        "0": "a stage's first block stays",
        "1": "channel attention (SEModule) has no narrow form here",
        "2": "an even block stays",
    }


def test_a_block_that_is_named_is_replaced_or_refused():
    stage = nn.Sequential(*(BasicBlock(16, 16) for _ in range(4)))
    stage[1] = BasicBlock(16, 16, attn_layer="se")
    with pytest.raises(ValueError, match=r"blocks names 1, which cannot be replaced: channel attention"):
        convert(stage, MixtureOfDepths(c=4, blocks=("1", "3")))


def test_plain_module_is_refused_with_what_is_known():
    with pytest.raises(ValueError, match=r"no block of a known family \(known: .*resnet\.BasicBlock"):
        convert(nn.Sequential(nn.Conv2d(3, 8, 3)), MixtureOfDepths())


def test_no_block_means_no_parameters_and_the_input_itself():
    model = timm.create_model("resnet20_cifar_mod", selection="none")
    x = torch.randn(1, 16, 2, 2)
    assert model.layer1[1](x) is x
    assert not list(model.layer1[1].parameters())
    # c means nothing where the blocks are gone.
    convert(timm.create_model("resnet18"), MixtureOfDepths(selection="none", c=1000))


def test_a_sample_count_of_zero_passes_through():
    made = mod_block(16, 4)
    assert made(torch.zeros(0, 16, 4, 4, dtype=torch.double)).shape == (0, 16, 4, 4)
