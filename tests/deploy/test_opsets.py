"""ONNX files in the opsets before those that PyTorch writes."""

from __future__ import annotations

import pytest
import timm
import torch

import _export
import pliant
from _export import images, need
from pliant.deploy.facts import read_report
from pliant.deploy.loading import open_export, read_facts

onnx = pytest.importorskip("onnx")
ir = pytest.importorskip("onnx_ir")

from pliant.deploy.opsets import lower  # noqa: E402 - onnx may be missing


@pytest.mark.parametrize("opset", [16, pytest.param(17, marks=pytest.mark.slow)])
def test_a_file_in_an_older_opset_is_the_network(tmp_path, opset):
    """It says its opset, passes the check with its selections, and older engines can read its format."""
    need(".onnx")
    network = _export.mod()
    path = pliant.export(network, tmp_path / "net.onnx", opset=opset, batches=(2,))
    model = onnx.load(str(path))
    assert [(o.domain, o.version) for o in model.opset_import] == [("", opset)]
    assert model.ir_version == 8
    onnx.checker.check_model(model, full_check=True)
    assert read_facts(path).opset == opset
    assert read_report(path).parity.selections == 8
    x = images(3)
    with torch.no_grad():
        torch.testing.assert_close(open_export(path)(x), network(x), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [16, 17])
@pytest.mark.parametrize(
    ("name", "fails"),
    [
        ("resnet20_cifar", ()),
        ("cc_mobilenetv1_025", ()),
        ("mobilenetv3_small_050", ()),
        ("regnetx_002", ()),
        ("vit_tiny_patch16_224", (16,)),
        ("convnext_atto", (16,)),
    ],
)
def test_families_in_an_older_opset(tmp_path, name, opset, fails):
    need(".onnx")
    model = timm.create_model(name).eval()
    path = tmp_path / "net.onnx"
    if opset in fails:
        with pytest.raises(
            ValueError, match=r"opset 16 has no LayerNormalization .* came with opset 17; ch"
        ):
            pliant.export(model, path, opset=opset, batches=(1,))
        return
    pliant.export(model, path, opset=opset, batches=(1,))
    assert [o.version for o in onnx.load(str(path)).opset_import] == [opset]


def lowered(body: str, opset: int = 16):
    """The operators, with their attributes and numbers of inputs, of a graph of opset 18 made older."""
    text = f"""<ir_version: 10, opset_import: ["" : 18]>
        net (float[2, 4, 6, 6] x) => (float[] y)
        <int64[2] axes = {{2, 3}}, int64[4] pads = {{0, 0, 1, 1}}, float[4] scales = {{1, 1, 2, 2}},
         int64[1, 1] at = {{0}}, float[1, 4, 6, 6] z = {{{", ".join("0" * 144)}}}>
        {{ {body} }}"""
    model = ir.from_onnx_text(text)
    lower(model, opset)
    assert model.opset_imports[""] == opset
    nodes = [n for n in model.graph if n.op_type != "Identity"]
    return [(n.op_type, {k: a.value for k, a in n.attributes.items()}, len(n.inputs)) for n in nodes]


@pytest.mark.parametrize(
    "kind", ["Mean", "Max", "Min", "L1", "L2", "Prod", "LogSum", "LogSumExp", "SumSquare"]
)
def test_axes_of_a_reduction_become_an_attribute(kind):
    assert lowered(f"y = Reduce{kind} <keepdims = 0> (x, axes)") == [
        (f"Reduce{kind}", {"keepdims": 0, "axes": (2, 3)}, 1)
    ]
    assert lowered(f"y = Reduce{kind} <keepdims = 0> (x)") == [(f"Reduce{kind}", {"keepdims": 0}, 1)]


def test_what_only_says_its_default_is_left_out():
    (found,) = lowered("a, b = Split <axis = 1, num_outputs = 2> (x)\n y = Identity (a)")
    assert found == ("Split", {"axis": 1}, 1)
    (found,) = lowered('y = Resize <antialias = 0, mode = "linear"> (x, , scales)')
    assert found[1] == {"mode": "linear"}
    for body in (
        "y = ScatterND (x, at, z)",
        'y = ScatterND <reduction = "add"> (x, at, z)',
        "y = Pad (x, pads)",
    ):
        assert len(lowered(body)) == 1


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (
            "y = Mish (x)",
            r"opset 16 has no Mish \(.*\), which came with opset 18; choose that or a newer one",
        ),
        (
            'y = ScatterND <reduction = "max"> (x, at, z)',
            "opset 16 has no ScatterND such as .* choose opset 18",
        ),
        ("y = Resize <antialias = 1> (x, , scales)", "no Resize such as"),
        ("y = ReduceMean <noop_with_empty_axes = 1> (x)", "no ReduceMean such as"),
        ("n = Shape <start = 2> (x)\n y = ReduceMax (x, n)", "no ReduceMax such as"),
        ("y = Pad (x, pads, , axes)", "no Pad such as"),
    ],
)
def test_what_an_older_opset_has_not_is_named(body, message):
    with pytest.raises(ValueError, match=message):
        lowered(body)
