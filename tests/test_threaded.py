"""Values of one forward: along feature maps, and into blocks."""

from __future__ import annotations

import gc
import threading
import weakref
from operator import attrgetter

import pytest
import timm
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from pliant import CondConv, convert
from pliant.threaded import Bound, between, pass_along, thread, threaded


class Give(nn.Module):
    """Threads the mean of its input."""

    def forward(self, x):
        return thread(x * 2, "mean", x.mean())


class Take(nn.Module):
    """Adds what came; fails without it."""

    def forward(self, x):
        value = threaded(x, "mean")
        if value is None:
            raise RuntimeError("nothing came")
        return thread(x + value, "mean", value)


# --- along feature maps ------------------------------------------------------------------------


def test_a_value_comes_along_under_its_name():
    x = torch.zeros(2)
    value = torch.ones(1)
    assert thread(x, "routing", value) is x
    assert threaded(x, "routing") is value
    assert threaded(x, "depth") is None
    assert threaded(x.clone(), "routing") is None
    assert threaded(x.view(2), "routing") is None


def test_values_die_with_the_feature_map():
    value = torch.ones(1)
    alive = weakref.ref(value)
    x = thread(torch.zeros(2), "routing", value)
    del value
    gc.collect()
    assert alive() is not None
    del x
    assert alive() is None, "at once, without the collector"


def test_nothing_is_left_on_a_network_after_a_forward():
    network = nn.Sequential(Give(), nn.ReLU(), Take())
    pass_along([network[1]], "mean")
    seen = []
    network[0].register_forward_hook(lambda module, args, out: seen.append(weakref.ref(out)))
    with torch.no_grad():
        out = network(torch.ones(2))
    before = {name: sorted(vars(m)) for name, m in network.named_modules()}
    with torch.no_grad():
        network(torch.ones(2))
    assert out.tolist() == [3.0, 3.0]
    assert [ref() for ref in seen] == [None, None]
    assert {name: sorted(vars(m)) for name, m in network.named_modules()} == before


def test_pass_along():
    x = thread(torch.ones(1, 2, 4, 4), "mean", torch.tensor(5.0))
    norm = nn.BatchNorm2d(2).eval()
    assert threaded(norm(x), "mean") is None
    pass_along([norm], "mean")
    assert threaded(norm(x), "mean") == 5
    assert threaded(norm(x.clone()), "mean") is None
    assert threaded(norm(x), "routing") is None


def test_pass_along_keeps_a_value_of_the_outputs_own():
    give = Give()
    pass_along([give], "mean")
    assert threaded(give(thread(torch.ones(2), "mean", torch.tensor(5.0))), "mean") == 1


def test_pass_along_leaves_other_outputs_alone():
    class Pair(nn.Module):
        def forward(self, *tensors):
            return tensors

    pair = Pair()
    pass_along([pair], "mean")
    x = thread(torch.ones(2), "mean", torch.tensor(5.0))
    assert [t.tolist() for t in pair(x, x)] == [[1, 1], [1, 1]]
    assert pair() == ()


def test_two_forwards_at_once_do_not_mix():
    """Both are inside the network together, one value of each not yet taken."""
    meet = threading.Barrier(2, timeout=30)

    class Meet(nn.Module):
        def forward(self, x):
            meet.wait()
            return x

    network = nn.Sequential(Give(), Meet(), Take(), Meet(), Take())
    results = {}

    def run(start: float) -> None:
        results[start] = network(torch.full((2,), start)).tolist()

    threads = [threading.Thread(target=run, args=(start,)) for start in (1.0, 10.0)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert results == {1.0: [4.0, 4.0], 10.0: [40.0, 40.0]}


# --- gradient checkpointing --------------------------------------------------------------------

FAMILIES = {
    "resnet20_cifar": {},
    "mobilenetv1_w025_cifar": {},
    "regnetx_002": {},
    "convnext_atto": {"dims": (8, 16, 24, 32), "depths": (1, 1, 2, 1)},
}


@pytest.mark.parametrize("routing", ["single", "shared", "hierarchical"])
@pytest.mark.parametrize("name", FAMILIES)
def test_timms_checkpointing_gives_the_same_gradients(name, routing):
    method = CondConv(experts=2, routing=routing, upcycle=False)
    network = convert(timm.create_model(name, num_classes=3, **FAMILIES[name]), method).train()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.0  # or the second pass of a checkpoint would count twice
    x = torch.randn(2, 3, 32, 32)
    gradients = []
    for enable in (False, True):
        network.set_grad_checkpointing(enable)
        network.zero_grad()
        network(x).square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in network.named_parameters()})
    for n in gradients[0]:
        torch.testing.assert_close(gradients[1][n], gradients[0][n], msg=n)
    router = [n for n in gradients[0] if "router" in n]
    assert router
    assert any(gradients[0][n].abs().max() > 0 for n in router)


def test_reentrant_checkpointing_is_a_clear_error():
    network = convert(timm.create_model("resnet20_cifar"), CondConv(experts=2, routing="single"))

    class Reentrant(nn.Module):
        def __init__(self, stage):
            super().__init__()
            self.stage = stage

        def forward(self, x):
            return checkpoint(self.stage, x, use_reentrant=True)

    network.layer3 = Reentrant(network.layer3)
    with pytest.raises(RuntimeError, match=r"no routing came .*reentrant gradient checkpointing"):
        network.train()(torch.randn(2, 3, 16, 16)).sum().backward()


def test_backward_hooks_on_layers_leave_a_routing_and_those_on_blocks_are_a_clear_error():
    base = timm.create_model("resnet20_cifar", layers=(1, 1, 2))
    network = convert(base, CondConv(experts=2, routing="single", begin=2)).train()
    x = torch.randn(2, 3, 16, 16)
    ran = []
    network.layer3[1].block.conv2.register_full_backward_hook(lambda *_: ran.append("conv2"))
    network(x).sum().backward()
    assert ran == ["conv2"]
    network.layer3[0].register_full_backward_hook(lambda *_: ran.append("block"))
    with pytest.raises(RuntimeError, match=r"no routing came .*full backward hooks on blocks do too"):
        network(x)


# --- into a block ----------------------------------------------------------------------------------


def bound(module, *leaves, call=None):
    """A view that notes its calls and doubles what a leaf gives."""
    calls = []

    def double(path, layer, x):
        calls.append(path)
        return 2 * layer(x)

    return Bound(module, frozenset(leaves), between(leaves), call or double), calls


class Add(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, x):
        return x + self.number


def test_bound_on_a_sequential():
    view, calls = bound(nn.Sequential(Add(1), Add(10), Add(100)), "0", "2")
    assert view(torch.tensor(0.0)) == (1 * 2 + 10 + 100) * 2
    assert calls == ["0", "2"]


def test_bound_on_nested_modules():
    module = nn.Sequential(nn.Sequential(Add(1), nn.Sequential(Add(2))), Add(3))
    view, calls = bound(module, "0.1.0")
    assert view(torch.tensor(0.0)) == (1 + 2) * 2 + 3
    assert calls == ["0.1.0"]
    assert module(torch.tensor(0.0)) == 6, "the module itself is as it was"


def test_bound_on_methods_that_call_self():
    class Outer(nn.Module):
        scale = 3

        def __init__(self):
            super().__init__()
            self.first, self.inner = Add(1), nn.ModuleList([Add(10)])

        def forward(self, x, again=False):
            return self._rest(self.first(x)) if not again else x

        def _rest(self, x):
            for layer in self.inner:
                x = layer(x) * self.scale
            return self.forward(x, again=True)

        @staticmethod
        def unused():
            return None

    view, calls = bound(Outer(), "first", "inner.0")
    assert view(torch.tensor(0.0)) == (1 * 2 + 10) * 2 * 3
    assert calls == ["first", "inner.0"]
    assert view.unused() is None
    assert view.scale == 3
    with pytest.raises(AttributeError, match="'Outer' object has no attribute 'missing'"):
        attrgetter("missing")(view)


def test_bound_on_a_forward_that_calls_that_of_its_base():
    class Scaled(Add):
        def __init__(self):
            super().__init__(1)
            self.inner = Add(10)

        def forward(self, x):
            return self._base(x) * 100

        def _base(self, x):
            return self.inner(super().forward(x))

    view, calls = bound(Scaled(), "inner")
    assert view(torch.tensor(0.0)) == 2 * (1 + 10) * 100
    assert calls == ["inner"]
    again, _ = bound(view, "inner")
    assert again(torch.tensor(0.0)) == 4 * (1 + 10) * 100


def test_hooks_run_as_they_do_without_the_view():
    module = nn.Sequential(nn.Sequential(Add(1), Add(2)), Add(3))
    ran = []
    for path, inner in module.named_modules():
        inner.register_forward_hook(lambda *_, path=path: ran.append(path))
    view, _ = bound(module, "0.0")
    view(torch.tensor(0.0))
    assert ran == ["0.0", "0.1", "0", "1", ""]
    ran.clear()
    module(torch.tensor(0.0))
    assert ran == ["0.0", "0.1", "0", "1", ""]


def test_backward_hooks_run_and_change_gradients_as_they_do_without_the_view():
    module = nn.Sequential(nn.Sequential(nn.Linear(1, 1), nn.Tanh()), nn.Linear(1, 1))
    ran = []
    for path, inner in module.named_modules():
        inner.register_full_backward_hook(
            lambda m, given, got, path=path: ran.append((path, m, given[0].item(), got[0].item()))
        )
    module[0].register_full_backward_hook(lambda _m, given, _got: (3 * given[0],))
    module[0].register_full_backward_pre_hook(lambda _m, got: (5 * got[0],))
    leaf = {"0.0": lambda _path, layer, x: layer(x)}
    view, _ = bound(module, *leaf, call=leaf["0.0"])
    x = torch.tensor([[0.5]], requires_grad=True)
    seen = []
    for call in (module, view):
        ran.clear()
        (grad,) = torch.autograd.grad(call(x).sum(), x)
        seen.append((grad.item(), list(ran)))
    assert seen[0] == seen[1]
    assert [path for path, *_ in ran] == ["1", "0.1", "0.0", "0", ""]
    assert ran[-2][1] is module[0], "hooks get the module, not the view"


def test_a_view_is_of_one_module_and_one_call():
    module = nn.Sequential(Add(1))
    view, _ = bound(module, "0")
    other = Bound(module, frozenset({"0"}), frozenset(), lambda path, layer, x: layer(x) - 5)
    assert view(torch.tensor(0.0)) == 2
    assert other(torch.tensor(0.0)) == -4
    assert view(torch.tensor(0.0)) == 2


@pytest.mark.parametrize(
    ("leaves", "expected"),
    [((), set()), (("a",), set()), (("a.b", "a.c.d"), {"a", "a.c"}), (("0.0.0", "1"), {"0", "0.0"})],
)
def test_between(leaves, expected):
    assert between(leaves) == expected


def test_keywords_go_through():
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.add = Add(1)

        def forward(self, x, *, factor=1):
            return self.add(x) * factor

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = Scaled()

        def forward(self, x):
            return self.inner(x, factor=3)

    view, calls = bound(Outer(), "inner.add")
    assert view(torch.tensor(1.0)) == 2 * 2 * 3
    assert calls == ["inner.add"]
