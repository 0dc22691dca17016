"""Networks made ready for inference: the same function, and nothing changed behind anybody's back."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from pliant import AdaptiveDepth, CondConv, MixtureOfDepths, convert, set_depth, subnet
from pliant.counting import count_macs
from pliant.deploy.optimize import optimize, unfused
from pliant.measuring.candidates import fresh
from pliant.methods.mixture_of_depths import MoDBlock
from pliant.methods.mixture_of_depths.ops.fused import FusedMoDBlock

pytestmark = pytest.mark.filterwarnings("ignore:Mixture-of-Depths blocks run in their PyTorch form")
NARROW = {"channels": (16, 32, 48, 64), "num_classes": 5}


def error(got, want) -> float:
    assert want.isfinite().all()
    return float((got.double() - want.double()).norm() / want.double().norm())


def fused_blocks(model: nn.Module) -> list[FusedMoDBlock]:
    return [m for m in model.modules() if isinstance(m, FusedMoDBlock)]


@pytest.mark.parametrize(
    ("name", "options", "size"),
    [
        ("resnet50_mod", {}, 64),
        ("resnet18_mod", {}, 64),
        pytest.param(
            *("resnet50_mod", {"c": 16, "order": "index", "output_stride": 8}, 64), marks=pytest.mark.slow
        ),
        ("resnet50_cifar_mod", {**NARROW, "c": 4, "blocks": "all"}, 16),
        ("resnet20_cifar_mod", {"fusion": "last"}, 16),
        ("resnet20_cifar_mod", {"fusion": "original", "order": "index"}, 16),
        ("resnet20_cifar_mod", {"fusion": "replace"}, 16),
    ],
)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_function_stays(name, options, size, batch):
    model = fresh(name, **options).eval()
    x = torch.randn(batch, 3, size, size)
    ready = optimize(model, x)
    assert unfused(ready) == {}
    assert len(fused_blocks(ready)) == sum(isinstance(m, MoDBlock) for m in model.modules())
    assert all(block.inplace for block in fused_blocks(ready))
    assert not any(isinstance(m, _BatchNorm) for m in ready.modules())
    with torch.inference_mode():
        want = model(x)
        for given in (x, x.to(memory_format=torch.channels_last)):
            before = given.clone()
            assert error(ready(given), want) < 1e-5
            assert torch.equal(given, before)
    assert count_macs(ready, (3, size, size)) == count_macs(model, (3, size, size))


def test_the_network_itself_stays():
    model = timm.create_model("resnet20_cifar_mod").train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    ready = optimize(model, torch.randn(1, 3, 16, 16))
    assert model.training
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.requires_grad for p in model.parameters())
    assert not any(p.requires_grad for p in ready.parameters())
    assert not any(m.training for m in ready.modules())
    own = {p.data_ptr() for p in model.parameters()}
    assert not own & {p.data_ptr() for p in ready.parameters()}


def test_what_can_be_left_off():
    model = timm.create_model("resnet50_cifar_mod", **NARROW, c=4).eval()
    x = torch.randn(2, 3, 16, 16)
    plain = optimize(model, x, fused=False)
    assert not fused_blocks(plain)
    assert set(unfused(plain).values()) == {""}
    weight = {form: optimize(model, x, channels_last=form).layer1[0].conv2.weight for form in (True, False)}
    assert weight[True].is_contiguous(memory_format=torch.channels_last)
    assert weight[False].is_contiguous()
    with torch.no_grad():
        assert error(plain(x), model(x)) < 1e-5
        assert error(optimize(model, x, channels_last=False)(x), model(x)) < 1e-5


@pytest.mark.parametrize(
    "options",
    [{"selection": "fixed"}, {"selection": "first"}, {"inner_shortcut": True}, {"last_act": True}],
)
def test_other_options_keep_the_plain_form(options):
    model = timm.create_model("resnet20_cifar_mod", **options).eval()
    x = torch.randn(2, 3, 16, 16)
    ready = optimize(model, x)
    assert not fused_blocks(ready)
    assert len(unfused(ready)) == 3
    assert all(unfused(ready).values())
    with torch.no_grad():
        assert error(ready(x), model(x)) < 1e-5


def test_hooks_keep_the_plain_form():
    model = timm.create_model("resnet20_cifar_mod").eval()
    blocks = [m for m in model.modules() if isinstance(m, MoDBlock)]
    seen = []
    blocks[0].selector.register_forward_hook(lambda *_: seen.append("selector"))
    ready = optimize(model, torch.randn(1, 3, 16, 16))
    assert list(unfused(ready).values()) == ["it has hooks, which another form would not run"]
    assert len(fused_blocks(ready)) == 2
    assert seen


class Around(nn.Module):
    """A Mixture-of-Depths block in a network that does something else with its input."""

    def __init__(self, forward) -> None:
        super().__init__()
        stage = nn.Sequential(*(timm.models.resnet.BasicBlock(8, 8) for _ in range(3)))
        self.stem = nn.Conv2d(3, 8, 3)
        _, self.block, self.other = convert(stage, MixtureOfDepths(c=2, reduction=1, blocks="all"))
        self.run = forward

    def forward(self, x):
        return self.run(self, x)


READERS = {
    "nobody": (lambda m, x: m.other(m.block(m.stem(x))), True),
    "before": (lambda m, x: m.other(m.block((y := m.stem(x)).add_(y.mean()))), True),
    "after": (lambda m, x: m.other(m.block(y := m.stem(x)) + y), False),
    "a view after": (lambda m, x: m.other(m.block(y := m.stem(x)) + y[:, :1]), False),
    "an older view after": (
        lambda m, x: ((v := (y := m.stem(x))[:, :1]), m.other(m.block(y) + v))[1],
        False,
    ),
    "the caller": (lambda m, x: (m.other(m.block(y := m.stem(x))), y), False),
    "another block": (lambda m, x: m.block(y := m.stem(x)) + m.other(y), False),
}


@pytest.mark.parametrize("case", READERS)
def test_in_place_only_where_nobody_reads_on(case):
    forward, inplace = READERS[case]
    model = Around(forward).eval()
    x = torch.randn(2, 3, 9, 9)
    ready = optimize(model, x)
    assert ready.block.inplace is inplace
    assert unfused(ready) == {}
    with torch.no_grad():
        want, got = model(x), ready(x)
    for a, b in zip(got, want, strict=True) if isinstance(want, tuple) else [(got, want)]:
        assert error(a, b) < 1e-5


def test_the_callers_image_stays():
    """The block is the network's first layer, or the whole network."""
    model = Around(None).block.eval()
    for network in (nn.Sequential(model, nn.ReLU()), model):
        x = torch.randn(2, 8, 9, 9).to(memory_format=torch.channels_last)
        ready = optimize(network, x)
        (block,) = fused_blocks(ready)
        assert not block.inplace
        before = x.clone()
        with torch.no_grad():
            assert error(ready(x), network(x)) < 1e-5
        assert torch.equal(x, before)


def test_features_of_inner_blocks_stay():
    model = timm.create_model("resnet50_cifar_mod", **NARROW, c=4, blocks="all", features_only=True).eval()
    x = torch.randn(1, 3, 16, 16)
    ready = optimize(model, x)
    with torch.no_grad():
        for got, want in zip(ready(x), model(x), strict=True):
            assert error(got, want) < 1e-5


@pytest.mark.parametrize("skip", [(False,) * 4, (True, False, True, False)])
def test_with_adaptive_depth(skip):
    base = timm.create_model("resnet18", channels=(16, 32, 48, 64), num_classes=5)
    model = convert(base, MixtureOfDepths(c=4), AdaptiveDepth()).eval()
    x = torch.randn(2, 3, 32, 32)
    ready = optimize(model, x)
    set_depth(model, skip)
    set_depth(ready, skip)
    assert not any(block.inplace for block in fused_blocks(ready))
    cut = optimize(subnet(model, skip), x)
    assert all(block.inplace for block in fused_blocks(cut))
    with torch.no_grad():
        assert error(ready(x), model(x)) < 1e-5
        assert error(cut(x), model(x)) < 1e-5


def test_with_condconv():
    base = timm.create_model("resnet18", channels=(16, 32, 48, 64), num_classes=5)
    model = convert(base, MixtureOfDepths(c=4, stages=(0, 1)), CondConv(experts=2, begin=6)).eval()
    x = torch.randn(2, 3, 32, 32)
    ready = optimize(model, x)
    assert len(fused_blocks(ready)) == 2
    with torch.no_grad():
        assert error(ready(x), model(x)) < 1e-5


def test_bfloat16():
    model = fresh("resnet20_cifar_mod").eval()
    x = torch.randn(2, 3, 16, 16)
    half = optimize(model.to(torch.bfloat16), x.bfloat16())
    with torch.no_grad():
        exact, got = model.float()(x), half(x.bfloat16())
        plain = optimize(model.bfloat16(), x.bfloat16(), fused=False)(x.bfloat16())
    assert got.dtype == torch.bfloat16
    assert error(got, exact) < max(0.05, 2 * error(plain, exact))


def test_gradients_of_the_image_flow():
    model = fresh("resnet20_cifar_mod").eval().requires_grad_(False)
    x = torch.randn(1, 3, 16, 16)
    grads = []
    for network in (model, optimize(model, x)):
        leaf = x.clone().requires_grad_()
        network(leaf).square().sum().backward()
        grads.append(leaf.grad)
    assert error(grads[1], grads[0]) < 1e-4


def test_graphs_hold_the_operator_whole():
    """One graph without breaks, exported with any batch, and no recompilation for weights."""
    model = fresh("resnet50_cifar_mod", **NARROW, c=4).eval()
    x = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    ready = optimize(model, x)
    with torch.no_grad():
        want = model(x)
        compiled = torch.compile(ready, backend="aot_eager", fullgraph=True)
        assert error(compiled(x), want) < 1e-5
        batch = {0: torch.export.Dim("batch", min=1, max=8)}
        program = torch.export.export(ready, (x,), dynamic_shapes={"x": batch})
        calls = [n for n in program.graph.nodes if n.target is torch.ops.pliant.mod_block_.default]
        assert len(calls) == len(fused_blocks(ready)) == 7
        for size in (1, 2, 5):
            images = torch.randn(size, 3, 16, 16).to(memory_format=torch.channels_last)
            assert error(program.module()(images), model(images)) < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("freezing", [False, True])
def test_inductor_with_and_without_freezing(freezing):
    model = fresh("resnet20_cifar_mod").eval()
    x = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    ready = optimize(model, x)
    torch.compiler.reset()
    with torch.no_grad(), torch._inductor.config.patch(freezing=freezing):
        compiled = torch.compile(ready, fullgraph=True)
        assert error(compiled(x), model(x)) < 1e-5
        assert error(compiled(x), model(x)) < 1e-5  # the image of the first call stayed


@pytest.mark.slow
def test_aotinductor(tmp_path):
    model = fresh("resnet20_cifar_mod").eval()
    x = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    with torch.no_grad():
        program = torch.export.export(optimize(model, x), (x,))
        path = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "m.pt2"))
        runner = torch._inductor.aoti_load_package(path)
        assert error(runner(x), model(x)) < 1e-5
        assert error(runner(x), model(x)) < 1e-5
