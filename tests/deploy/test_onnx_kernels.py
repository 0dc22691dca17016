"""Mixed kernels in the blocked layout of ONNX Runtime: what compiled files of them compute and hold."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import _export
import pliant
from _export import images, need
from pliant.deploy import onnx_native
from pliant.deploy.facts import read_report
from pliant.deploy.loading import open_export, read_facts

BLOCKED = onnx_native.BLOCKED


@pytest.fixture
def blocked() -> None:
    """Skip a test where ONNX Runtime is missing, or has no blocked layout."""
    need(".onnx")
    try:
        onnx_native.block_size()
    except ValueError as error:
        pytest.skip(str(error))


def bodies(path) -> list:
    import onnx

    loops = [node for node in onnx.load(str(path)).graph.node if node.op_type == "Scan"]
    return [onnx.helper.get_node_attr_value(node, "body") for node in loops]


@pytest.mark.usefixtures("blocked")
@pytest.mark.parametrize(
    ("options", "loops"), [({}, 10), pytest.param({"routing": "layer"}, 9, marks=pytest.mark.slow)]
)
def test_a_compiled_file_mixes_kernels_in_blocks_of_channels(tmp_path, options, loops):
    """24 channels fill no whole number of blocks of 16; what fills them up is zero.

    Of one convolution alone, a 1x1 (the shortcut's) is a product over all images in place of a loop.
    """
    network = _export.condconv(**options)
    path = pliant.export(network, tmp_path / "net.onnx", compiled=True, batches=(1, 3))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.onnx", "net.onnx.json"]
    facts = read_facts(path)
    assert facts.compiled
    assert facts.library_sha256 == ""
    assert read_report(path).parity.max_rel_error < 1e-5
    x = images(3)
    with torch.no_grad():
        torch.testing.assert_close(open_export(path)(x), network(x), rtol=1e-4, atol=1e-4)
    convolutions = [(body, n) for body in bodies(path) for n in body.node if n.op_type == "Conv"]
    mixed = [n for body, n in convolutions if n.input[1] in {value.name for value in body.input}]
    assert len(mixed) == loops
    assert {n.domain for n in mixed} == {BLOCKED}
    assert onnx_native.check_here(path, facts) is None
    other = replace(facts, machine="some CPU, blocks of 4 channels")
    with pytest.raises(ValueError, match="blocks of 4 channels, and ONNX Runtime works in blocks of"):
        onnx_native.check_here(path, other)


def test_what_neither_mixes_nor_is_an_operator_is_refused(tmp_path):
    need(".onnx")
    with pytest.raises(ValueError, match="of this network's none can: it has no part of such a method"):
        pliant.export(_export.plain().eval(), tmp_path / "net.onnx", compiled=True)
    assert list(tmp_path.iterdir()) == []


def test_matrices_of_one_row_an_image_are_no_constants_to_pack(tmp_path, monkeypatch):
    need(".onnx")
    import onnx

    from pliant.deploy import onnx_file

    monkeypatch.setattr(onnx_file, "UNPACKED", 1000)
    network = _export.condconv()
    path = pliant.export(network, tmp_path / "net.onnx", batches=(1, 3))
    graph = onnx.load(str(path)).graph
    constants = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer}
    right = {n.input[1] for n in graph.node if n.op_type in ("MatMul", "Gemm")}
    assert not [name for name in right if name in constants and constants[name].size >= 1000]
    passed = [n for n in graph.node if n.op_type == "Reshape" and n.output[0] in right]
    assert all(n.input[0] in constants and n.input[1] not in constants for n in passed)
    assert np.sum([constants[n.input[0]].size >= 1000 for n in passed]) == 10
