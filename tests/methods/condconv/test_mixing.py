"""Forms of a mixed convolution: one function, its gradients, its layouts, its graphs."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from pliant.methods.condconv import mixing
from pliant.methods.condconv.mixing import Geometry, conditional_conv2d, conditional_linear, mix

TOLERANCE = 1e-12
FORMS = ("fused", "experts")


def literally(
    x: Tensor, weight: Tensor, routing: Tensor, bias: Tensor | None, geometry: Geometry
) -> Tensor:
    """The definition, example by example and expert by expert."""
    rows = []
    for one, share in zip(x.split(1), routing, strict=True):
        y = 0
        for e, kernel in enumerate(weight):
            own = bias[e] if bias is not None and bias.dim() == 2 else None
            y = y + share[e].reshape(-1, 1, 1) * F.conv2d(one, kernel, own, *geometry)
        rows.append(y)
    y = torch.cat(rows)
    return y + bias[:, None, None] if bias is not None and bias.dim() == 1 else y


def with_gradients(run: Any, *inputs: Tensor | None) -> list[Tensor]:
    """The output and the gradients of all inputs, under a loss that weights each output."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in inputs]
    y = run(*leaves)
    torch.manual_seed(1)
    present = [leaf for leaf in leaves if leaf is not None]
    return [y.detach(), *torch.autograd.grad(y, present, torch.randn(y.shape, dtype=y.dtype))]


def assert_same(found: list[Tensor], wanted: list[Tensor]) -> None:
    assert len(found) == len(wanted)
    for a, b in zip(found, wanted, strict=True):
        assert a.shape == b.shape
        scale = max(1.0, b.abs().max().item()) if b.numel() else 1.0
        assert (a - b).abs().max() <= TOLERANCE * scale if b.numel() else True


@st.composite
def problems(draw: st.DrawFn) -> dict[str, Any]:
    groups = draw(st.sampled_from((1, 2, 6)))
    per_group = 1 if groups == 6 else draw(st.integers(1, 3))
    out = groups * draw(st.integers(1, 3))
    kernel = draw(st.sampled_from(((1, 1), (3, 3), (3, 1), (2, 3))))
    pair = st.tuples(st.integers(1, 2), st.integers(1, 2))
    batch, experts = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    geometry = Geometry(draw(pair), draw(st.tuples(*2 * [st.integers(0, 2)])), draw(pair), groups)
    torch.manual_seed(draw(st.integers(0, 99)))
    x = torch.randn(batch, groups * per_group, 7, 6, dtype=torch.double)
    if draw(st.booleans()):
        x = x.to(memory_format=torch.channels_last)
    biases = {None: None, "shared": (out,), "experts": (experts, out)}
    shape = biases[draw(st.sampled_from(tuple(biases)))]
    routing = (batch, experts, out) if draw(st.booleans()) else (batch, experts)
    return {
        "x": x,
        "weight": torch.randn(experts, out, per_group, *kernel, dtype=torch.double),
        "routing": torch.rand(routing, dtype=torch.double),
        "bias": None if shape is None else torch.randn(shape, dtype=torch.double),
        "geometry": geometry,
    }


@given(problem=problems())
@settings(max_examples=120, deadline=None)
def test_the_forms_are_one_function(problem: dict[str, Any]) -> None:
    inputs = [problem[name] for name in ("x", "weight", "routing", "bias")]
    geometry = problem["geometry"]
    wanted = with_gradients(lambda *a: literally(*a, geometry), *inputs)
    for form in (*FORMS, "auto"):
        assert_same(
            with_gradients(partial(conditional_conv2d, geometry=geometry, form=form), *inputs), wanted
        )


@given(problem=problems())
@settings(max_examples=60, deadline=None)
def test_so_are_the_ways_of_the_fused_form(problem: dict[str, Any]) -> None:
    x, weight, routing, _, geometry = problem.values()
    inputs = [problem[name] for name in ("x", "weight", "routing", "bias")]

    def run(*a: Any) -> Tensor:
        return conditional_conv2d(*a, geometry, "fused")

    wanted = with_gradients(run, *inputs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mixing, "LARGE", 1)  # each example by itself
        assert_same(with_gradients(run, *inputs), wanted)
    with pytest.MonkeyPatch.context() as patch, torch.inference_mode():
        patch.setattr(mixing, "AT_ONCE", 2 * weight[0].numel())  # kernels of two at a time
        assert_same([run(*inputs)], wanted[:1])

    def unfolded(x: Tensor, weight: Tensor, routing: Tensor) -> Tensor:
        return mixing._by_patches(x, mix(weight, routing), geometry)

    plain = with_gradients(lambda *a: run(*a, None), x, weight, routing)
    assert_same(with_gradients(unfolded, x, weight, routing), plain)


@pytest.mark.parametrize("shape", [(5,), (3, 2, 5), (0, 2, 5)])
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bias", [None, (4,), (3, 4)])
def test_linear_forms_are_one_function(
    shape: tuple[int, ...], per_channel: bool, bias: tuple[int, ...] | None
) -> None:
    inputs = [
        torch.randn(6, *shape, dtype=torch.double),
        torch.randn(3, 4, 5, dtype=torch.double),
        torch.rand((6, 3, 4) if per_channel else (6, 3), dtype=torch.double),
        None if bias is None else torch.randn(bias, dtype=torch.double),
    ]

    def literal(x: Tensor, weight: Tensor, routing: Tensor, bias: Tensor | None) -> Tensor:
        share = routing if per_channel else routing[:, :, None].expand(-1, -1, 4)
        y = torch.einsum("b...c,eoc,beo->b...o", x, weight, share)
        if bias is None:
            return y
        mixed = torch.einsum("eo,beo->bo", bias, share) if bias.dim() == 2 else bias.expand(6, -1)
        return y + mixed.reshape(6, *[1] * (x.dim() - 2), 4)

    wanted = with_gradients(literal, *inputs)
    for form in (*FORMS, "auto"):
        assert_same(with_gradients(partial(conditional_linear, form=form), *inputs), wanted)


KINDS = {
    "1x1": ((4, 6, 5, 1, 1), Geometry()),
    "1x1 strided": ((4, 6, 5, 1, 1), Geometry(stride=(2, 2))),
    "3x3": ((4, 6, 5, 3, 3), Geometry(padding=(1, 1))),
    "depthwise": ((4, 5, 1, 3, 3), Geometry((2, 2), (1, 1), (1, 1), 5)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("batch", [1, 3])
def test_the_output_has_the_memory_format_of_the_input(kind: str, form: str, batch: int) -> None:
    shape, geometry = KINDS[kind]
    x, weight, routing = torch.randn(batch, 5, 8, 8), torch.randn(shape), torch.rand(batch, 4)
    y = conditional_conv2d(x, weight, routing, None, geometry, form)
    assert y.is_contiguous()
    last = conditional_conv2d(
        x.to(memory_format=torch.channels_last), weight, routing, None, geometry, form
    )
    assert last.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(last, y)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("per_channel", [False, True])
def test_an_empty_batch_gives_an_empty_output(kind: str, form: str, per_channel: bool) -> None:
    shape, geometry = KINDS[kind]
    weight = torch.randn(shape, requires_grad=True)
    x = torch.randn(0, 5, 8, 8, requires_grad=True)
    routing = torch.rand((0, 4, shape[1]) if per_channel else (0, 4), requires_grad=True)
    y = conditional_conv2d(x, weight, routing, torch.randn(4, shape[1]), geometry, form)
    size = geometry.output_size(8, 8, shape[3:])
    assert y.shape == (0, shape[1], *size)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert weight.grad is not None
    assert not weight.grad.any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_product_is_counted(kind: str, form: str, per_channel: bool) -> None:
    (experts, out, inputs, height, width), geometry = KINDS[kind]
    values = out * inputs * height * width
    positions = math.prod(geometry.output_size(8, 8, (height, width)))
    x, weight = torch.randn(1, 5, 8, 8), torch.randn(experts, out, inputs, height, width)
    routing = torch.rand((1, experts, out) if per_channel else (1, experts))
    with FlopCounterMode(display=False) as counter:
        conditional_conv2d(x, weight, routing, None, geometry, form)
    mixed = {
        "fused": experts * values + values * positions,
        "experts": experts * values * positions + experts * out * positions,
    }
    assert counter.get_total_flops() == 2 * mixed[form]


@pytest.mark.parametrize("form", FORMS)
def test_every_product_of_a_linear_layer_is_counted(form: str) -> None:
    x, weight, routing = torch.randn(1, 7, 5), torch.randn(4, 6, 5), torch.rand(1, 4)
    with FlopCounterMode(display=False) as counter:
        conditional_linear(x, weight, routing, None, form)
    wanted = {"fused": 4 * 30 + 30 * 7, "experts": 4 * 30 * 7 + 4 * 6 * 7}
    assert counter.get_total_flops() == 2 * wanted[form]


def test_small_kernels_go_side_by_side_and_large_ones_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = F.conv2d

    def counted(x: Tensor, *args: Any) -> Tensor:
        calls.append(args[-1])
        return real(x, *args)

    monkeypatch.setattr(F, "conv2d", counted)
    x, routing = torch.randn(3, 8, 4, 4), torch.rand(3, 2)
    conditional_conv2d(x, torch.randn(2, 8, 8, 3, 3), routing, form="fused")
    assert calls == [3]
    calls.clear()
    monkeypatch.setattr(mixing, "LARGE", 8 * 8 * 9)
    conditional_conv2d(x, torch.randn(2, 8, 8, 3, 3), routing, form="fused")
    assert calls == [1, 1, 1]


def test_kernels_of_few_examples_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    batches: list[int] = []
    real = mixing._each

    def noted(x: Tensor, kernels: Tensor, bias: Tensor | None, geometry: Geometry) -> Tensor:
        batches.append(len(kernels))
        return real(x, kernels, bias, geometry)

    monkeypatch.setattr(mixing, "_each", noted)
    monkeypatch.setattr(mixing, "AT_ONCE", 2 * 8 * 8 + 1)
    x, weight, routing = torch.randn(5, 8, 4, 4), torch.randn(2, 8, 8, 1, 1), torch.rand(5, 2)
    with torch.no_grad():
        conditional_conv2d(x, weight, routing, form="fused")
    assert batches == [2, 2, 1]
    batches.clear()
    conditional_conv2d(x, weight.requires_grad_(), routing, form="fused")
    assert batches == [5]  # their gradients need them all


# Hard routing: experts of no weight are not read


def hard(batch: int, experts: int, active: int, out: int | None) -> Tensor:
    """A routing whose weights are zero but for `active` experts of each example (and channel)."""
    shape = (batch, experts) if out is None else (batch, experts, out)
    routing = torch.rand(shape) + 0.1
    return routing * torch.zeros(shape).scatter(1, routing.topk(active, dim=1).indices, 1.0)


@pytest.mark.parametrize("out", [None, 6])
@pytest.mark.parametrize("active", [1, 2])
@pytest.mark.parametrize("kind", ["1x1", "3x3", "depthwise", "linear"])
def test_of_few_examples_only_the_chosen_experts_are_read(
    kind: str, active: int, out: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = 1 if kind == "depthwise" else 6
    sides = () if kind == "linear" else 2 * (1 if kind == "1x1" else 3,)
    weight, bias = torch.randn(5, 6, inputs, *sides), torch.randn(5, 6)
    same = Geometry(padding=(1, 1) if 3 in sides else (0, 0), groups=6 if kind == "depthwise" else 1)

    def run(x: Tensor, weight: Tensor, routing: Tensor, active: int | None) -> Tensor:
        if kind == "linear":
            return conditional_linear(x, weight, routing, bias, active=active)
        return conditional_conv2d(x, weight, routing, bias, same, active=active)

    for batch in (1, 2, 7):
        x = torch.randn(batch, 6, *() if kind == "linear" else (5, 4))
        routing = hard(batch, 5, active, out)
        wanted = run(x, weight, routing, None)
        with torch.no_grad():
            torch.testing.assert_close(run(x, weight, routing, active), wanted)
            monkeypatch.setattr(mixing, "AT_ONCE", 1)  # one example's kernel at a time
            torch.testing.assert_close(run(x, weight, routing, active), wanted)
            monkeypatch.undo()
    # What nobody chose is not a number, and nobody sees it.
    x, routing = torch.randn(1, 6, *() if kind == "linear" else (5, 4)), hard(1, 5, active, out)
    chosen = routing[0] > 0 if out is None else (routing[0] > 0).any(1)
    spoilt = weight.clone()
    spoilt[~chosen] = float("nan")
    with torch.no_grad():
        found = run(x, spoilt, routing, active)
    torch.testing.assert_close(found, run(x, weight, routing, None))


def test_gradients_reach_all_experts_of_a_hard_routing() -> None:
    weight = torch.randn(4, 6, 6, 1, 1, requires_grad=True)
    routing = hard(1, 4, 2, None)
    conditional_conv2d(torch.randn(1, 6, 5, 5), weight, routing, active=2).square().sum().backward()
    assert weight.grad is not None
    assert torch.equal(weight.grad.flatten(1).any(1), routing[0] > 0)
