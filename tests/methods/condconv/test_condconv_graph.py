"""CondConv networks compiled, exported, copied, in threads and in two processes."""

from __future__ import annotations

import copy
import textwrap
import threading

import pytest
import timm
import torch
from torch import nn

from _copies import copies_of
from _processes import run_two
from _small import VARIANTS, images, separable
from pliant import CondConv, convert

# Variants of a network whose experts and routers are random, so that routings matter.
FORMS = {"fused": {"form": "fused"}, "experts": {"form": "experts"}}
ALL = {**VARIANTS, **FORMS, "hard to one": {"active": 1}, "hard and hidden": {"active": 1, "hidden": 1}}

# Those whose graphs differ in kind; the others differ in a layer or an activation, and are slow tests.
KINDS = ("block", "hierarchical", "per_channel", "hard", "fused", "experts")
EACH = [pytest.param(v, marks=() if v in KINDS else pytest.mark.slow) for v in ALL]


def network(variant: str) -> nn.Module:
    return separable(**ALL[variant])


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# --- graphs --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "variant", [pytest.param(v, marks=() if v in KINDS[:2] else pytest.mark.slow) for v in ALL]
)
def test_compiles_without_a_break_and_only_once(variant):
    model = network(variant)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        first, second = images(3, 16), images(3, 16)
        torch.testing.assert_close(compiled(first), model(first), rtol=1e-5, atol=1e-6)
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(compiled(second), model(second), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("variant", ["hierarchical", "hard"])
def test_trains_when_compiled(variant):
    model = network(variant).train()
    eager = copy.deepcopy(model)
    x = images(4, 16)
    torch.compile(model, backend="aot_eager", fullgraph=True)(x).square().sum().backward()
    eager(x).square().sum().backward()
    for (name, p), q in zip(model.named_parameters(), eager.named_parameters(), strict=True):
        torch.testing.assert_close(p.grad, q[1].grad, rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("variant", "strict"),
    [
        pytest.param(v, strict, marks=() if v in KINDS[: 2 if strict else None] else pytest.mark.slow)
        for v in ALL
        for strict in (False, True)
    ],
)
def test_exports_with_a_dynamic_batch(variant, strict):
    model = network(variant)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        model, (images(2, 16),), dynamic_shapes={"x": {0: batch}}, strict=strict
    ).module()
    with torch.no_grad():
        for size in (1, 2, 5):
            x = images(size, 16)
            torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["resnet20_cifar", "regnetx_002", "convnext_atto", "tf_efficientnet_lite0"]
)
def test_other_families_compile_and_export(name):
    torch.manual_seed(0)
    small = {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)} if name == "convnext_atto" else {}
    method = CondConv(experts=2, upcycle=False, routing="shared")
    model = convert(timm.create_model(name, **small), method).eval()
    x = images(2)
    with torch.no_grad():
        expected = model(x)
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
        torch.testing.assert_close(compiled, expected, rtol=1e-3, atol=1e-4)
        batch = torch.export.Dim("batch", min=1, max=64)
        program = torch.export.export(model, (x,), dynamic_shapes={"x": {0: batch}}).module()
        for size in (1, 5):
            x = images(size)
            torch.testing.assert_close(program(x), model(x), rtol=1e-3, atol=1e-4)


# --- copies -----------------------------------------------------------------------------------------


def tensors_of(module: nn.Module):
    """Tensors that hang on a module beside its parameters and buffers."""
    for inner in module.modules():
        for name, value in vars(inner).items():
            if isinstance(value, torch.Tensor):
                yield name, value


@pytest.mark.parametrize("variant", ALL)
def test_copies_after_a_forward(variant):
    model = network(variant)
    attributes = {name: sorted(vars(m)) for name, m in model.named_modules()}
    model.train()(images(2, 16)).sum().backward()
    assert {name: sorted(vars(m)) for name, m in model.named_modules()} == attributes
    assert list(tensors_of(model)) == []
    assert all(t.is_leaf for t in (*model.parameters(), *model.buffers()))
    model.eval()
    x = images(2, 16)
    with torch.no_grad():
        expected = model(x)
        for how, again in copies_of(model).items():
            assert torch.equal(again(x), expected), how
            assert not {id(p) for p in again.parameters()} & {id(p) for p in model.parameters()}, how


# --- at once ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["block", "single", "shared", "hierarchical", "per_channel"])
def test_two_threads_get_what_they_get_alone(variant):
    model = network(variant)
    inputs = [images(3, 16) for _ in range(2)]
    with torch.no_grad():
        alone = [model(x) for x in inputs]
    meet = threading.Barrier(2, timeout=60)

    def wait(module, args, out):  # both are in the middle of the network together
        meet.wait()

    for path in ("blocks.0.0", "blocks.1.0"):
        model.get_submodule(path).register_forward_hook(wait)
    results = {}

    def run(n: int) -> None:
        with torch.no_grad():
            results[n] = [model(inputs[n]) for _ in range(5)]

    threads = [threading.Thread(target=run, args=(n,)) for n in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for n in range(2):
        assert all(torch.equal(out, alone[n]) for out in results[n])


PROCESS = """
    import torch
    from torch import distributed, nn
    from torch.nn.parallel import DistributedDataParallel
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.efficientnet import EfficientNet
    from pliant import CondConv, convert
    from pliant.methods.condconv.layers import CondConv2d, CondLinear, Router

    torch.set_num_threads(1)
    distributed.init_process_group("gloo")
    rank = distributed.get_rank()
    variants = [
        {"routing": "block"}, {"routing": "layer"}, {"routing": "single"}, {"routing": "shared"},
        {"routing": "hierarchical"}, {"per_channel": True}, {"hidden": 1}, {"form": "experts"},
        {"active": 1, "activation": "softmax"}, {"active": 1},
    ]
    for options in variants:
        torch.manual_seed(0)
        stages = decode_arch_def([["dsa_r1_k3_s2_c8"], ["dsa_r2_k3_s2_c16"]])
        plain = EfficientNet(stages, num_classes=5, num_features=0, stem_size=8)
        model = convert(plain, CondConv(experts=3, begin=2, upcycle=False, **options))
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval().requires_grad_(False)  # or two halves would not be one whole
        if "active" in options:
            with torch.no_grad():  # an expert that no example of either process chooses
                for module in model.modules():
                    if isinstance(module, Router):
                        module.fc2.bias[2] = -1e4
        unused = [m.weight for m in model.modules() if isinstance(m, (CondConv2d, CondLinear))]
        before = [weight[2].clone() for weight in unused]
        x, y = torch.randn(8, 3, 16, 16), torch.arange(8) % 5
        loss = nn.functional.cross_entropy
        loss(model(x), y).backward()
        alone = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        model.zero_grad()
        parallel = DistributedDataParallel(model)
        optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
        half = slice(4 * rank, 4 * rank + 4)
        for step in range(2):
            loss(parallel(x[half]), y[half]).backward()
            if step == 0:
                both = [p.grad for p in model.parameters() if p.requires_grad]
                for one, two in zip(alone, both, strict=True):
                    torch.testing.assert_close(two, one, rtol=1e-3, atol=1e-5)
            optimiser.step()
            optimiser.zero_grad()
        for weight, old in zip(unused, before, strict=True):
            assert torch.equal(weight[2], old) == ("active" in options)
        print("same gradients", options, flush=True)
    distributed.destroy_process_group()
"""


@pytest.mark.slow  # test_an_expert_that_is_never_chosen_keeps_its_weights: every parameter has a gradient
def test_two_processes_train_without_looking_for_unused_parameters():
    for text in run_two(textwrap.dedent(PROCESS)):
        assert text.count("same gradients") == 10
