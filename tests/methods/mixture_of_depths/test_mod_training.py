"""A Mixture-of-Depths block in training: its faster forms give the plain form's values and gradients."""

from __future__ import annotations

import copy
import itertools
import warnings
from typing import get_args

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from pliant import MixtureOfDepths, convert
from pliant.methods.mixture_of_depths import ChannelSelector, Fusion, MoDBlock, Order, Selection
from pliant.methods.mixture_of_depths import training as routed
from pliant.methods.mixture_of_depths.ops import building, mod_training

FUSIONS, ORDERS = get_args(Fusion), get_args(Order)
DRAWN = tuple(s for s in get_args(Selection) if s != "none")
KNOWN = tuple(s for s in DRAWN if s != "static")
FORMATS = (torch.contiguous_format, torch.channels_last)

built = pytest.fixture(lambda: mod_training.ready() or pytest.skip(f"not built: {mod_training._outcome}"))


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


def plain(block: MoDBlock, x: torch.Tensor) -> torch.Tensor:
    """The block in PyTorch's own operators and their gradients."""
    k, scores = block.k, None
    index = torch.arange(k).expand(len(x), k)
    if block.selector is not None:
        scores, index = block.selector(x)
    where = index.expand(len(x), k)[:, :, None, None].expand(-1, -1, *x.shape[2:])
    y = block._process(x.gather(1, where))
    y = y if scores is None else y * scores[..., None, None]
    if block.fusion == "first":
        return torch.cat((x[:, :k] + y, x[:, k:]), 1)
    if block.fusion == "last":
        return torch.cat((x[:, :-k], x[:, -k:] + y), 1)
    return x.scatter_add(1, where, y) if block.fusion == "original" else x.scatter(1, where, y)


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
    """What `run` gives of the plain form; `block` is used up."""
    return run(lambda x: plain(block, x), block, x, g)[0]


def assert_same(found, expected, rtol=2e-5, rounded=None):
    """Equal but for rounding, to the largest value; or to five times what `rounded` is off by."""
    assert found.keys() == expected.keys()
    for name, value in found.items():
        other = expected[name]
        if value is None:
            assert other is None or not other.any(), name
            continue
        value, other = value.detach().double(), other.detach().double()
        # A gradient may be zero but for rounding (a scale before another norm): hence 1.
        allowed = rtol * max(float(other.abs().max()) if other.numel() else 0, 1)
        if rounded is not None:
            allowed += 5 * float((rounded[name].detach().double() - other).abs().max())
        torch.testing.assert_close(value, other, rtol=0, atol=allowed, msg=lambda m, n=name: f"{n}: {m}")


# --- PyTorch's operators, whose gradients take fewer passes --------------------------------------


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("selection", DRAWN)
@pytest.mark.parametrize("train", [False, True])
def test_routed_is_the_plain_form(form, fusion, selection, train):
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
def test_routed_has_second_derivatives(fusion, form):
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


# --- the native operators ------------------------------------------------------------------------


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("selection", KNOWN)
@pytest.mark.parametrize(("kind", "dilation"), [(BasicBlock, 1), (Bottleneck, 1), (Bottleneck, 2)])
def test_native_is_the_plain_form(built, kind, dilation, selection, fusion):
    sizes = [(16, 4, 3, 5, 6), (32, 8, 1, 1, 7), (16, 16, 2, 8, 8)]
    if kind is BasicBlock:
        sizes.append((16, 1, 4, 9, 2))
    for order, form, (channels, k, *size) in itertools.product(ORDERS, FORMATS, sizes):
        block = mod_block(channels, k, kind, dilation, selection=selection, order=order, fusion=fusion)
        x, g = images(channels, *size, form=form)
        exact = copy.deepcopy(block).double()
        expected = reference(exact, x.double(), g.double())
        rounded = reference(copy.deepcopy(block), x, g)
        given, was = g.clone(), x.clone()
        found, name = run(block, block, x, g)
        assert name == "TrainedBlockBackward"
        # One channel inside: the next norm undoes its scale, and that gradient is a sum of values
        # that cancel but for the norm's eps.
        one = kind is Bottleneck and k == 4
        assert_same(found, expected, 2e-4 if one else 2e-5, rounded)
        assert torch.equal(g, given)
        assert torch.equal(x, was)
        for key in ("out", "x'"):
            assert found[key].is_contiguous(memory_format=form)


@pytest.mark.parametrize("form", FORMATS)
def test_native_under_autocast_is_at_least_as_exact(built, form):
    block = mod_block()
    x, g = images(batch=8, dtype=torch.bfloat16, form=form)
    exact = copy.deepcopy(block).double()
    expected = reference(exact, x.double(), g.double())
    with torch.autocast("cpu", torch.bfloat16):
        found, name = run(block, block, x, g)
    assert name == "TrainedBlockBackward"
    assert found["out"].dtype == found["x'"].dtype == torch.bfloat16
    rounded = {"out", "x'"}
    assert_same({n: found[n] for n in rounded}, {n: expected[n] for n in rounded}, 2**-8)
    exactly = found.keys() - rounded
    assert_same({n: found[n] for n in exactly}, {n: expected[n] for n in exactly})


def test_native_repeats_to_the_bit_on_any_number_of_threads(built):
    block, before = mod_block(), torch.get_num_threads()
    x, g = images(batch=7)
    results = []
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(run(other := copy.deepcopy(block), other, x, g)[0])
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(value, other[name]) for name, value in results[0].items())


def test_native_ranks_as_topk_does(built):
    block = mod_block(8, 4)
    x = torch.zeros(3, 8, 2, 2)  # all logits are equal: the lower channels
    x[1, 5] = float("nan")  # NaN everywhere
    layers = mod_training.layers_of(block.core)
    index = mod_training.mod_training(
        x, None, block.selector.fc1.weight, block.selector.fc2.weight,
        [c.weight.contiguous() for c in layers.convs], [n.weight for n in layers.norms],
        [n.bias for n in layers.norms], [], [], [1e-5] * 2, [0.1] * 2, 1, False, "score", "first",
    )[1]  # fmt: skip
    assert index.tolist() == [[0, 1, 2, 3]] * 3


def test_what_is_frozen_gets_no_gradient(built):
    block = mod_block()
    x, g = images()
    for p in block.selector.parameters():
        p.requires_grad_(False)
    block(x).backward(g)  # x wants none
    assert x.grad is None
    assert all(p.grad is None for p in block.selector.parameters())
    expected = mod_block()
    plain(expected, x).backward(g)
    for (name, p), q in zip(block.core.named_parameters(), expected.core.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-4, msg=name)


def test_the_map_may_be_read_elsewhere(built):
    """As in a network, whose next block adds its shortcut to the same gradient."""
    block = mod_block()
    x, g = images()
    found, _ = run(lambda x: block(x) * 2 + x, block, x, g)
    other = mod_block()
    expected, _ = run(lambda x: plain(other, x) * 2 + x, other, x, g)
    assert_same(found, expected)


def test_checkpointing_gives_the_same_gradients(built):
    block = mod_block()
    x, g = images()
    expected, _ = run(copied := copy.deepcopy(block), copied, x, g)
    found, _ = run(lambda x: checkpoint(block, x, use_reentrant=False), block, x, g)
    for name in found:
        if name.endswith("'"):
            assert torch.equal(found[name], expected[name])


def test_native_has_no_second_derivative_and_says_so(built):
    block = mod_block()
    x, _ = images()
    with pytest.raises(RuntimeError, match="has no second derivative; in float64"):
        torch.autograd.grad(block(x.requires_grad_()).sum(), x, create_graph=True)


def test_native_counts_its_operations(built):
    totals = []
    for function in (mod_block(), None):
        block = mod_block()
        x, g = images()
        with FlopCounterMode(display=False) as counter:
            (block if function else lambda x, b=block: plain(b, x))(x.requires_grad_()).backward(g)
        totals.append(counter.get_total_flops())
    assert totals[0] == pytest.approx(totals[1], rel=0.01)


@pytest.mark.parametrize("where", ["selector", "core.bn1"])
def test_hooks_see_what_they_wait_for(where):
    block = mod_block()
    seen = []
    block.get_submodule(where).register_forward_hook(lambda *args: seen.append(args[2]))
    x, g = images()
    expected = reference(mod_block(), x, g)
    found, name = run(block, block, x, g)
    assert "Fuse" in name
    assert len(seen) == 1
    assert_same(found, expected)


def frozen(block):
    block.core.bn1.eval()


def forgetful(block):
    block.core.bn2.momentum = None


def circular(block):
    block.core.conv1.padding_mode = "circular"


def other_act(block):
    block.core.act1 = nn.SiLU()


def half(block):
    block.to(torch.bfloat16)


def sync(block):
    block.core = nn.SyncBatchNorm.convert_sync_batchnorm(block.core)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (frozen, "do not use, or do not keep"),
        (forgetful, "do not use, or do not keep"),
        (circular, "a convolution of another kind"),
        (other_act, "Conv2d, BatchNorm2d, SiLU"),
        (half, "its weights are torch.bfloat16"),
        (sync, "not convolutions with batch norm"),
    ],
)
def test_what_native_does_not_know_is_named(change, reason):
    block = mod_block()
    assert isinstance(mod_training.layers_of(block.core), mod_training.Layers)
    change(block)
    assert reason in mod_training.layers_of(block.core)


def test_a_wide_core_is_left_to_pytorch():
    assert "wider than 16" in mod_training.layers_of(mod_block(64, 32).core)
    x, g = images(64)
    assert "Fuse" in run(block := mod_block(64, 32), block, x, g)[1]


def test_without_a_compiler_training_goes_on(monkeypatch):
    def missing(source):
        raise building.BuildError("no C++ compiler")

    monkeypatch.setattr(building, "library", missing)
    monkeypatch.setattr(mod_training, "_outcome", None)
    block = mod_block()
    x, g = images()
    expected = reference(mod_block(), x, g)
    with pytest.warns(RuntimeWarning, match="train in PyTorch's operators, which is slower: no C"):
        found, name = run(block, block, x, g)
    assert "Fuse" in name
    assert_same(found, expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block(x)  # told once


def test_nothing_is_built_where_no_gradient_is_wanted(monkeypatch):
    monkeypatch.setattr(mod_training, "_outcome", None)
    monkeypatch.setattr(building, "library", lambda source: pytest.fail("built"))
    x, _ = images()
    with torch.no_grad():
        mod_block()(x)
    mod_block().eval()(x)
    assert isinstance(mod_block().selector, ChannelSelector)


def test_a_network_trains_alike_in_all_forms(built, monkeypatch):
    """Some steps of a network in CIFAR form: the same losses, to rounding."""
    losses = []
    for native in (True, False):
        monkeypatch.setattr(mod_training, "_outcome", "" if native else "not here")
        torch.manual_seed(0)
        model = timm.create_model("resnet20_cifar_mod", reduction=2).train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        x, y = torch.randn(8, 3, 16, 16), torch.arange(8)
        losses.append([])
        for _ in range(4):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0]


def test_gathering_and_adding_leave_their_inputs():
    x, y = torch.zeros(1, 3, 1, 1), torch.ones(1, 1, 1, 1)
    at = torch.tensor([[2]])
    assert routed.added(x, y, at).flatten().tolist() == [0, 0, 1]
    assert routed.replaced(x + 5, y, 1).flatten().tolist() == [5, 1, 5]
    assert routed.taken(x, 0, 2).shape == (1, 2, 1, 1)
    assert not x.any()
