"""The fused Mixture-of-Depths operator on the CPU: its arithmetic and its registrations."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator

import pytest
import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from _mod_block import FUSIONS, ORDERS, arguments, arguments_with, error, image
from pliant import MixtureOfDepths, convert
from pliant.deploy.folding import fold_norms
from pliant.methods.mixture_of_depths import MoDBlock
from pliant.methods.mixture_of_depths.ops import building
from pliant.methods.mixture_of_depths.ops.fused import FusedMoDBlock, fusable
from pliant.methods.mixture_of_depths.ops.mod_block import in_pytorch, mod_block_

BLOCKS = {"bottleneck": Bottleneck, "basic": BasicBlock}


@pytest.fixture(scope="module")
def native() -> None:
    """The native form, or a skip that says why there is none."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        if not building.ready():
            pytest.skip(f"no native form here: {building.why_not()}")


@pytest.fixture(params=[1, 2])
def threads(request) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def mod_block(kind="bottleneck", channels=64, k=16, dilation=1, **options) -> MoDBlock:
    """A block with folded norms, as `optimize` finds it, in evaluation."""
    make = BLOCKS[kind]
    stage = nn.Sequential(
        *(
            make(channels, channels // make.expansion, dilation=dilation, first_dilation=dilation)
            for _ in "ab"
        )
    )
    made = convert(stage, MixtureOfDepths(c=channels // k, **options)).eval()
    for norm in made.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.normal_(norm.running_mean)
            nn.init.uniform_(norm.running_var, 0.5, 2)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)
    return fold_norms(made, torch.randn(1, channels, 4, 4))[1].requires_grad_(False)


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_the_pytorch_form_is_the_block(kind, order, fusion):
    block = mod_block(kind, order=order, fusion=fusion, dilation=2).double()
    fused = FusedMoDBlock(block)
    x = torch.randn(3, 64, 5, 7, dtype=torch.float64)
    assert fused(x).shape == x.shape
    assert error(fused(x), block(x)) < 1e-12
    assert error(block(x), x) > 1e-3


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.usefixtures("native")
def test_the_native_form_is_the_block(kind, order, fusion, dilation, threads):
    block = mod_block(kind, order=order, fusion=fusion, dilation=dilation)
    fused = FusedMoDBlock(block)
    for batch in (0, 1, 2, 5):
        x = image(batch, 64, 12, 13)
        before = x.clone()
        with torch.no_grad():
            got, want = fused(x), block(x)
        assert torch.equal(x, before)
        assert got.shape == want.shape
        assert batch == 0 or error(got, want) < 4e-7


@pytest.mark.parametrize(
    ("channels", "k", "r", "size"),
    [
        (256, 4, 16, (28, 28)),
        (512, 8, 32, (28, 28)),
        (1024, 16, 64, (14, 14)),
        (2048, 32, 128, (7, 7)),
        (40, 20, 12, (9, 33)),  # more than one vector in each direction, and a rest
        (12, 12, 3, (1, 1)),
        (8, 4, 1, (40, 3)),
    ],
)
@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.usefixtures("native")
def test_shapes(channels, k, r, size, kind, threads):
    args = arguments(channels, k, r, kind, logits=torch.randperm(channels) / channels - 0.3)
    x = image(2, channels, *size)
    want = x.clone()
    in_pytorch(want, *args, 1, "score", "first")
    mod_block_(x, *args, 1, "score", "first")
    assert error(x, want) < 4e-7


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.usefixtures("native")
def test_channels_that_are_read_and_written(order, fusion, threads):
    """Those picked are just those that are written to, backwards."""
    for picked in (range(16)[::-1], range(48, 64), range(8, 24)):
        logits = torch.full((64,), -5.0)
        logits[list(picked)] = torch.linspace(3, 1, 16)
        args = arguments(logits=logits)
        x = image(1, 64, 20, 20)
        want = x.clone()
        in_pytorch(want, *args, 1, order, fusion)
        mod_block_(x, *args, 1, order, fusion)
        assert error(x, want) < 4e-7


@pytest.mark.usefixtures("native")
def test_memory_formats(threads):
    args = arguments()
    wide = torch.rand(2, 64, 24, 13)
    for x in (image(2, 64, 12, 13), torch.rand(2, 64, 12, 13), wide[:, :, ::2], wide.transpose(2, 3)):
        x, want, strides = x.clone() if x.is_contiguous() else x, x.clone(), x.stride()
        in_pytorch(want, *args, 1, "score", "first")
        mod_block_(x, *args, 1, "score", "first")
        assert error(x, want) < 4e-7
        assert x.stride() == strides


@pytest.mark.usefixtures("native")
def test_ties_go_to_the_lower_channel(threads):
    """A silent selector ranks all alike; saturated sigmoids tie, their logits do not."""
    args = arguments(kind="basic", logits=torch.zeros(64))
    x = image(1, 64, 12, 12)
    want = x.clone()
    in_pytorch(want, *arguments_with(args, logits=-torch.arange(64) * 1e-9), 1, "score", "first")
    mod_block_(x, *args, 1, "score", "first")
    assert error(x, want) < 4e-7
    high = 60 + torch.randperm(64).float()
    x = image(1, 64, 12, 12)
    want = x.clone()
    in_pytorch(want, *arguments_with(args, logits=high), 1, "score", "first")
    mod_block_(x, *arguments_with(args, logits=high), 1, "score", "first")
    assert error(x, want) < 4e-7


@pytest.mark.usefixtures("native")
def test_nan_stays_in_its_image(threads):
    args = arguments()
    x = image(3, 64, 12, 12)
    x[1, 40, 3, 3] = float("nan")
    before, want = x.clone(), x.clone()
    in_pytorch(want, *args, 1, "score", "first")
    mod_block_(x, *args, 1, "score", "first")
    assert error(x[::2], want[::2]) < 4e-7
    assert x[1, :16].isnan().all()
    assert torch.equal(x[1, 16:].nan_to_num(), before[1, 16:].nan_to_num())


@pytest.mark.usefixtures("native")
def test_nan_passes_the_relu():
    """A weight that is NaN reaches what is computed from it."""
    args = arguments()
    args[2] = args[2].clone()
    args[2][0, 0] = float("nan")
    x = image(1, 64, 12, 12)
    mod_block_(x, *args, 1, "score", "first")
    assert x[:, :16].isnan().all()
    assert x[:, 16:].isfinite().all()


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.usefixtures("native")
def test_bfloat16(kind, fusion, threads):
    """As exact as the plain form: against float64, of the same rounded weights."""
    logits = torch.randperm(64) / 16 - 1.0  # gaps that bfloat16 keeps
    args = arguments(kind=kind, logits=logits, dtype=torch.bfloat16)
    x = image(2, 64, 12, 13, torch.bfloat16)
    exact, plain = x.double(), x.clone()
    in_pytorch(exact, *(None if a is None else a.double() for a in args), 1, "score", fusion)
    in_pytorch(plain, *args, 1, "score", fusion)
    mod_block_(x, *args, 1, "score", fusion)
    assert x.dtype == torch.bfloat16
    assert error(x, exact) < max(4e-3, error(plain, exact))


@pytest.mark.parametrize("kind", BLOCKS)
@pytest.mark.usefixtures("native")
def test_registrations(kind):
    args = arguments(kind=kind, logits=torch.randperm(64) / 64)
    found = torch.library.opcheck(mod_block_, (image(2, 64, 6, 5), *args, 1, "score", "first"))
    assert set(found.values()) == {"SUCCESS"}


@pytest.mark.parametrize("kind", BLOCKS)
def test_operations_count_as_those_of_the_plain_form(kind):
    block = mod_block(kind)
    fused = FusedMoDBlock(block)
    x = image(3, 64, 6, 5)
    counts = []
    for module in (block, fused):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            module(x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_gradients_are_the_plain_forms():
    block = mod_block().double()
    fused = FusedMoDBlock(block, inplace=True)
    x = torch.randn(2, 64, 5, 5, dtype=torch.float64)
    grads = []
    for module in (block, fused):
        leaf = x.clone().requires_grad_()
        module(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert error(grads[1], grads[0]) < 1e-12
    fused.requires_grad_(True)
    fused(x).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fused.parameters())


@pytest.mark.usefixtures("native")
def test_the_operator_refuses_a_gradient():
    x = image(1, 64, 5, 5)
    with pytest.raises(RuntimeError, match=r"mod_block_ has no gradient: call it under torch.no_grad"):
        mod_block_(x.requires_grad_(), *arguments(), 1, "score", "first")
    before = x._version
    with torch.no_grad():
        mod_block_(x, *arguments(), 1, "score", "first")
    assert x._version == before + 1  # autograd sees that x changed


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (0, torch.zeros(63, 8), "down has the shape"),
        (1, torch.zeros(64, 8), "up has the shape"),
        (2, torch.zeros(4, 65, 1, 1), "k must be from 1 to 64 channels, not 65"),
        (4, torch.zeros(4, 4, 1, 1), "weight2 has the shape"),
        (5, torch.zeros(4, dtype=torch.float64), "bias2 must be a CPU tensor"),
        (7, None, "weight3 and bias3 go together"),
    ],
)
@pytest.mark.usefixtures("native")
def test_wrong_arguments(place, wrong, message):
    args = arguments()
    args[place] = wrong
    with pytest.raises(RuntimeError, match=message):
        mod_block_(image(1, 64, 5, 5), *args, 1, "score", "first")
    for order, fusion in (("rank", "first"), ("score", "middle")):
        with pytest.raises(RuntimeError, match=r"not (rank|middle)"):
            mod_block_(image(1, 64, 5, 5), *arguments(), 1, order, fusion)


@pytest.mark.usefixtures("native")
def test_in_place_or_not():
    block = mod_block()
    x = image(1, 64, 6, 6)
    before = x.clone()
    with torch.no_grad():
        out = FusedMoDBlock(block)(x)
        assert torch.equal(x, before)
        assert FusedMoDBlock(block, inplace=True)(x) is x
    assert torch.equal(x, out)
    assert copy.deepcopy(FusedMoDBlock(block, inplace=True)).inplace


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"selection": "random"}, "not chosen by a learned selector"),
        ({"selection": "fixed"}, "not chosen by a learned selector"),
        ({"selection": "first"}, "not chosen by a learned selector"),
        ({"inner_shortcut": True}, "inner_shortcut adds"),
        ({"last_act": True}, "ends with an activation"),
    ],
)
def test_what_has_no_fused_form(options, reason):
    block = mod_block(**options)
    assert reason in fusable(block)
    with pytest.raises(ValueError, match="cannot be fused"):
        FusedMoDBlock(block)


def test_cores_that_have_no_fused_form():
    block = mod_block()
    block.core.act1 = nn.SiLU()
    assert "not convolutions with ReLU between" in fusable(block)
    block = mod_block()
    block.core.conv2.padding = (0, 0)
    assert "another padding" in fusable(block)
    unfolded = convert(nn.Sequential(Bottleneck(64, 16), Bottleneck(64, 16)), MixtureOfDepths(c=4))
    assert "folded first" in fusable(unfolded[1])
