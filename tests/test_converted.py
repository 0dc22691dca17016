"""What a converted network can do: copies, moves, layouts, compiling, exporting."""

from __future__ import annotations

import copy

import pytest
import timm
import torch

from _copies import copies_of
from _surgery import SELECTIONS, ShareTheMean, converted, small
from pliant import MixtureOfDepths, convert
from pliant.surgery import conversions


def test_state_dict_keys_of_a_converted_network():
    keys = [key for key in converted().state_dict() if key.startswith("layer1.1.")]
    core = [f"layer1.1.core.{name}" for name in ("conv1.weight", "conv2.weight")]
    norms = [
        f"layer1.1.core.bn{n}.{what}"
        for n in (1, 2)
        for what in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ]
    selector = ["layer1.1.selector.fc1.weight", "layer1.1.selector.fc2.weight"]
    assert sorted(keys) == sorted(core + norms + selector)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_forward_stores_nothing(selection):
    model = converted(selection).train()
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert {key for m in model.modules() for key in vars(m)} == {
        key for m in converted(selection).modules() for key in vars(m)
    }
    copy.deepcopy(model)  # a stored tensor of the graph could not be copied


@pytest.mark.parametrize("selection", SELECTIONS)
def test_copies_and_pickles(selection):
    model = converted(selection)
    x = torch.randn(2, 3, 16, 16)

    def run(network):
        torch.manual_seed(1)
        with torch.no_grad():
            return network(x)

    for how, network in copies_of(model).items():
        assert torch.equal(run(network), run(model)), how
        assert conversions(network) == conversions(model), how


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.double])
def test_moves(selection, dtype):
    model = converted(selection).to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        assert model(torch.randn(2, 3, 16, 16, dtype=dtype)).dtype == dtype
        meta = model.to("meta")(torch.empty(5, 3, 32, 32, dtype=dtype, device="meta"))
    assert meta.shape == (5, 10)
    assert meta.is_meta


def test_converting_on_meta_and_in_half():
    with torch.device("meta"):
        model = timm.create_model("resnet50")
    assert all(p.is_meta for p in convert(model, MixtureOfDepths()).parameters())
    half = convert(small().bfloat16(), MixtureOfDepths(c=4))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_channels_last(selection):
    model = converted(selection)
    x = torch.randn(2, 3, 16, 16)
    torch.manual_seed(1)
    with torch.no_grad():
        plain = model(x)
        torch.manual_seed(1)
        last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-5)
        features = model.layer1[1](torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last))
    if selection != "none":
        assert features.is_contiguous(memory_format=torch.channels_last), "the layout is kept"


def test_memory_format_is_kept():
    for wanted in (torch.channels_last, torch.contiguous_format):
        new = convert(small().to(memory_format=wanted), MixtureOfDepths(c=4))
        assert all(p.is_contiguous(memory_format=wanted) for p in new.parameters() if p.dim() == 4)
        assert new.layer1[1].core.conv1.weight.shape[2:] == (3, 3), "where the two differ"


def test_new_parts_learn_in_a_frozen_network():
    new = convert(small().requires_grad_(False), MixtureOfDepths(c=4))
    assert {p.requires_grad for p in new.layer1[1].parameters()} == {True}
    assert {p.requires_grad for p in new.layer1[0].parameters()} == {False}


@pytest.mark.parametrize(
    ("selection", "fusion"),
    [
        pytest.param(
            s, f, marks=() if (s, f) in (("learned", "original"), ("random", "first")) else pytest.mark.slow
        )
        for s in SELECTIONS
        for f in ("first", "original")
    ],
)
def test_compiles_without_a_break_and_only_once(selection, fusion):
    torch._dynamo.reset()
    model = converted(selection, fusion=fusion)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for n in range(2):
            x = torch.randn(2, 3, 16, 16)
            torch.manual_seed(n)
            plain = model(x)
            torch.manual_seed(n)
            if n == 0:
                assert torch.equal(compiled(x), plain)
            else:
                with torch.compiler.set_stance("fail_on_recompile"):
                    assert torch.equal(compiled(x), plain)
    torch._dynamo.reset()


def test_a_threaded_network_compiles_and_trains():
    torch._dynamo.reset()
    model = convert(small(), MixtureOfDepths(c=4, reduction=4), ShareTheMean()).train()
    x = torch.randn(4, 3, 16, 16)
    eager = copy.deepcopy(model)
    torch.compile(model, backend="eager", fullgraph=True)(x).sum().backward()
    eager(x).sum().backward()
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    torch._dynamo.reset()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_exports_with_a_dynamic_batch(selection):
    model = converted(selection)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        model, (torch.randn(2, 3, 16, 16),), dynamic_shapes={"x": {0: batch}}
    ).module()
    x = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        torch.manual_seed(0)
        plain = model(x)
        torch.manual_seed(0)
        torch.testing.assert_close(program(x), plain, rtol=1e-5, atol=1e-6)
