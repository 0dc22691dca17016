"""Files in 8-bit integers: what they hold, how near they are, and what is said where nothing can."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from _engines import RUNTIMES
from pliant.deploy.engines import ENGINES
from pliant.deploy.int8 import CALIBRATED_ON, random_images
from pliant.measuring.candidates import fresh
from pliant.measuring.latency import measure

needs_onnx_runtime = pytest.mark.skipif("onnxruntime" not in RUNTIMES, reason="it makes the files")


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Tensor, Path]:
    """A network of seven convolutions, images of it, and its file in int8, which both runtimes run."""
    torch.manual_seed(0)
    model, x = fresh("resnet20_cifar", layers=(1, 1, 1)).eval(), torch.randn(3, 3, 16, 16)
    folder = tmp_path_factory.mktemp("int8")
    return model, x, ENGINES["onnxruntime"].write(model, x, folder, precision="int8")


def test_images_are_the_same_in_each_call_and_differ_from_each_other() -> None:
    first, second = (random_images(torch.zeros(16, 3, 8, 8)) for _ in range(2))
    assert [x.shape for x in first] == [(1, 3, 8, 8)] * CALIBRATED_ON
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert not torch.equal(first[0], first[1])


@needs_onnx_runtime
def test_a_file_computes_in_integers_with_a_scale_for_each_output_channel(
    written: tuple[nn.Module, Tensor, Path],
) -> None:
    import onnx

    graph = onnx.load(str(written[2])).graph
    kept = {i.name: onnx.numpy_helper.to_array(i) for i in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert len(convolutions) == 7  # all layers but the last
    for node in convolutions:
        weight, image = (made[name] for name in (node.input[1], node.input[0]))
        assert {weight.op_type, image.op_type} == {"DequantizeLinear"}
        values, scales, _ = (kept[name] for name in weight.input)
        assert values.dtype == "int8"
        assert scales.shape == values.shape[:1]
        assert kept[image.input[2]].dtype == "uint8"


@needs_onnx_runtime
@pytest.mark.parametrize("name", RUNTIMES)
def test_an_engine_is_near_in_int8_and_is_not_float(
    name: str, written: tuple[nn.Module, Tensor, Path]
) -> None:
    model, x, path = written
    with torch.inference_mode():
        expected = model(x)
    found = ENGINES[name].load(path, x, precision="int8", threads=1)(x)
    assert 1e-4 < (found - expected).abs().max() / expected.abs().max() < 0.2


@needs_onnx_runtime
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n == "onnxruntime" else pytest.mark.slow) for n in RUNTIMES]
)
def test_one_file_serves_all_batches_and_forms_are_rows(name: str) -> None:
    rows = measure(
        {"mod": fresh("resnet20_cifar_mod", layers=(2, 1, 1))},
        input_size=16,
        engines=[name, "eager"],
        dtype="int8",
        batch=(1, 3),
        rounds=1,
        min_run_time=0,
        threads=1,
    )
    labels = ["mod", "mod, optimized", "mod without MoD blocks"]
    assert [(r.engine, r.batch, r.label) for r in rows] == [
        (e, b, label) for e in (name, "eager") for b in (1, 3) for label in labels
    ]
    assert all((r.dtype, r.error, r.rounds) == ("int8", "", 1) for r in rows[:6])
    assert {r.error for r in rows[6:]} == {
        "int8 is not supported by eager, only float32, bfloat16, float16"
    }
