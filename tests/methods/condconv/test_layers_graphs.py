"""Layers with mixed weights in graphs: compiled, exported, traced, on the meta device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from _conditional import FORMS, KINDS, layer_of
from pliant.methods.condconv.layers import CondLinear, Router


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["1x1 strided", "depthwise", "linear"])
def test_it_compiles_whole(kind: str, form: str) -> None:
    torch._dynamo.reset()
    if kind == "linear":
        layer: nn.Module = CondLinear(8, 16, "shared", router=Router(8, 8), form=form)
        x = torch.randn(3, 8)
    else:
        layer = layer_of(kind, double=False, form=form)
        x = torch.randn(3, 8, 9, 9).to(memory_format=torch.channels_last)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=False)
    wanted, found = layer(x), compiled(x)
    torch.testing.assert_close(found, wanted)
    ours = torch.autograd.grad(found.square().sum(), layer.weight)
    torch.testing.assert_close(ours, torch.autograd.grad(wanted.square().sum(), layer.weight))
    with torch.no_grad():
        for some in (x, x[:1]):
            torch.testing.assert_close(compiled(some), layer(some))


@pytest.mark.parametrize("form", [*FORMS, "auto"])
@pytest.mark.parametrize("kind", ["1x1", "grouped"])
def test_compiled_for_any_batch_it_compiles_once(kind: str, form: str) -> None:
    torch._dynamo.reset()
    layer = layer_of(kind, double=False, form=form)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        # From 16 on, PyTorch compiles its own convolutions anew as well.
        for n, batch in enumerate((4, 2, 7, 15)):
            x = torch.randn(batch, 8, 9, 9)
            with torch.compiler.set_stance("default" if n == 0 else "fail_on_recompile"):
                torch.testing.assert_close(compiled(x), layer(x))


def exported(layer: nn.Module, x: Tensor, strict: bool = False) -> torch.export.ExportedProgram:
    batch = torch.export.Dim("batch", min=1, max=64)
    return torch.export.export(layer, (x,), dynamic_shapes={"x": {0: batch}}, strict=strict)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", [*KINDS, "linear"])
def test_exported_at_batch_two_it_runs_at_any(kind: str, form: str) -> None:
    if kind == "linear":
        layer: nn.Module = CondLinear(8, 16, "shared", router=Router(8, 8), form=form)
        shape: tuple[int, ...] = (8,)
    else:
        layer = layer_of(kind, double=False, form=form)
        shape = (8, 9, 9)
    program = exported(layer.eval(), torch.randn(2, *shape))
    for node in program.graph.nodes:
        if "conv" in str(node.target):
            groups = node.args[6] if len(node.args) > 6 else 1
            assert groups == KINDS[kind].get("groups", 1), "a group count holds the batch"
    assert not any("conv" in str(n.target) for n in program.graph.nodes if form == "fused")
    for batch in (1, 2, 5):
        x = torch.randn(batch, *shape)
        torch.testing.assert_close(program.module()(x), layer(x))


def test_strict_export_too() -> None:
    layer = layer_of("3x3", double=False).eval()
    program = exported(layer, torch.randn(2, 8, 9, 9), strict=True)
    x = torch.randn(5, 8, 9, 9)
    torch.testing.assert_close(program.module()(x), layer(x))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["1x1 strided", "strided", "depthwise"])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
def test_traced_at_batch_two_it_runs_at_any(kind: str, form: str) -> None:
    layer = layer_of(kind, double=False, form=form).eval()
    traced = torch.jit.trace(layer, torch.randn(2, 8, 9, 9))
    for batch in (1, 2, 5):
        x = torch.randn(batch, 8, 9, 9)
        torch.testing.assert_close(traced(x), layer(x))


@pytest.mark.parametrize("form", FORMS)
def test_it_runs_on_the_meta_device(form: str) -> None:
    layer = layer_of("3x3", form=form).to("meta")
    assert layer(torch.empty(2, 8, 9, 9, device="meta", dtype=torch.double)).shape == (2, 16, 9, 9)
