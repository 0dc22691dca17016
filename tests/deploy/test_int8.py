"""Files in 8-bit integers: what they hold, how near they are, and what is refused."""

from __future__ import annotations

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import _export
import pliant
from _cli import run
from _engines import RUNTIMES
from pliant.deploy import int8
from pliant.deploy.engines import ENGINES
from pliant.deploy.facts import read_report
from pliant.deploy.int8 import CALIBRATED_ON, FLOAT, random_images
from pliant.deploy.loading import open_export
from pliant.deploy.parity import ParityError
from pliant.measuring.candidates import fresh
from pliant.measuring.latency import measure

HAVE_NNCF = "openvino" in RUNTIMES and importlib.util.find_spec("nncf") is not None
needs_nncf = pytest.mark.skipif(not HAVE_NNCF, reason="NNCF, of the extra openvino, is not installed")
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


@pytest.mark.slow
@needs_onnx_runtime
@pytest.mark.parametrize("name", RUNTIMES)
def test_one_file_serves_all_batches_and_forms_are_rows(name: str) -> None:
    # OpenVINO 2026.4 cannot compile a shorter one: it moves a scale of 32 channels behind a slice of 16.
    short = {} if name == "openvino" else {"layers": (2, 1, 1)}
    rows = measure(
        {"mod": fresh("resnet20_cifar_mod", **short)},
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


# --- files to deploy -----------------------------------------------------------------------------


def exported(model: nn.Module, path: Path, **options) -> Path:
    """A file in int8. Of networks that were not trained any answers do: classes of theirs nearly tie."""
    how = {"calibrate": _export.images(24), "batches": (1, 3), "tolerance": math.inf, **options}
    return pliant.export(model, path, precision="int8", **how)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    """A network of two stages, and its file."""
    if "onnxruntime" not in RUNTIMES:
        pytest.skip("ONNX Runtime makes the file")
    torch.manual_seed(0)
    model = _export.NETWORKS["plain"]()
    return model, exported(model, tmp_path_factory.mktemp("plain") / "net.onnx")


def tiny(width: int = 8, classes: int = 5) -> nn.Module:
    torch.manual_seed(0)
    head = nn.Linear(width, classes)
    model = nn.Sequential(nn.Conv2d(3, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)
    model.pretrained_cfg = {"input_size": (3, 8, 8), "mean": (0.5,), "std": (0.25,)}
    return model


def sources(path: Path, names: set[str], stop: str) -> set[str]:
    """Types of the operators that tensors come from, back to those of type `stop`."""
    import onnx

    made = {name: node for node in onnx.load(str(path)).graph.node for name in node.output}
    found, left = set(), [name for name in names if name in made]
    while left:
        node = made[left.pop()]
        found.add(node.op_type)
        if node.op_type != stop:
            left += [name for name in node.input if name in made]
    return found


def quantised(path: Path) -> int:
    """Convolutions and products whose weights are in integers."""
    import onnx

    graph = onnx.load(str(path)).graph
    made = {name: node.op_type for node in graph.node for name in node.output}
    return sum(
        made.get(node.input[1]) == "DequantizeLinear"
        for node in graph.node
        if node.op_type in ("Conv", "Gemm", "MatMul")
    )


def test_a_file_answers_as_the_network_does_at_any_batch(plain):
    model, path = plain
    report = read_report(path)
    assert report.facts.precision == "int8"
    assert report.parity.images == 12  # every second one; the others set the ranges
    assert report.parity.batches == (1, 3)
    assert report.parity.top1_agreement >= 0.9
    assert report.parity.cosine > 0.99
    network, x = open_export(path), _export.images(7)
    with torch.no_grad():
        expected = model(x)
    error = (network(x) - expected).abs().max() / expected.abs().max()
    assert 1e-4 < error < 0.2  # near, and not float
    assert quantised(path) == 11  # all of its convolutions, and the classifier


def test_weights_use_7_bits_so_that_processors_without_vnni_add_without_overflow(plain):
    import onnx

    graph = onnx.load(str(plain[1])).graph
    kept = [onnx.numpy_helper.to_array(i) for i in graph.initializer]
    weights = [values for values in kept if values.dtype == "int8" and values.ndim > 1]
    assert len(weights) == 11
    assert max(abs(values.astype(int)).max() for values in weights) == 64


@needs_onnx_runtime
def test_selectors_stay_in_float(tmp_path):
    path = exported(_export.mod(), tmp_path / "mod.onnx")
    names = {f"layer{n}.1.selector.{what}" for n in (1, 2) for what in ("logits", "index")}
    assert sources(path, names, "GlobalAveragePool") == {"TopK", "Conv", "Relu", "GlobalAveragePool"}
    assert quantised(path) > 6


@needs_onnx_runtime
def test_routers_and_mixed_kernels_stay_in_float(tmp_path):
    import onnx

    path = exported(_export.condconv(begin=3), tmp_path / "cc.onnx")
    graph = onnx.load(str(path)).graph
    made = {name: node for node in graph.node for name in node.output}
    gates = [node for node in graph.node if node.op_type == "Sigmoid"]
    assert gates
    for gate in gates:  # from the router's product on nothing is rounded
        product = made[gate.input[0]]
        assert (product.op_type, gate.name[: len(FLOAT)], product.name[: len(FLOAT)]) == (
            "Gemm",
            FLOAT,
            FLOAT,
        )
    for node in graph.node:  # neither are the weights of routers, nor the experts
        if node.name.startswith(FLOAT) and node.op_type in ("Gemm", "MatMul"):
            assert node.input[1] not in made or made[node.input[1]].op_type != "DequantizeLinear"
    assert quantised(path) == 3  # the stem, and the plain block behind it


@needs_onnx_runtime
def test_the_preparation_of_images_stays_in_float(tmp_path):
    import onnx

    torch.manual_seed(0)
    x = torch.randint(0, 256, (16, 3, 20, 24), dtype=torch.uint8)
    path = exported(tiny(), tmp_path / "net.onnx", calibrate=x, takes="uint8", image_size=(20, 24))
    first = [node.op_type for node in onnx.load(str(path)).graph.node if node.name.startswith(FLOAT)]
    assert {"Cast", "Resize", "Mul", "Add"} <= set(first)
    assert open_export(path)(x[:3]).shape == (3, 5)


@needs_onnx_runtime
def test_a_file_in_int8_is_scored_and_timed_itself(tmp_path):
    model = tiny(classes=10)
    path = exported(model, tmp_path / "net.onnx", calibrate=_export.images(8, 8))
    file, network = pliant.evaluate(path), pliant.evaluate(model, pixels=8)
    assert file.images == network.images == 540
    assert abs(file.loss - network.loss) < 0.1
    assert file.loss != network.loss
    (row,) = measure(str(path), rounds=1, min_run_time=0, threads=1)
    assert (row.engine, row.dtype, row.error) == ("onnxruntime", "int8", "")


@needs_onnx_runtime
def test_a_fixed_batch_in_int8(tmp_path):
    how = {"calibrate": _export.images(10, 8), "dynamic_batch": False}
    path = exported(tiny(), tmp_path / "net.onnx", example=torch.zeros(3, 3, 8, 8), **how)
    parity = read_report(path).parity
    assert (parity.batches, parity.images) == ((3,), 6)  # of five, one is repeated
    with pytest.raises(ValueError, match=r"takes torch.float32 images of \[3, 3, 8, 8\]"):
        open_export(path)(torch.zeros(1, 3, 8, 8))


@needs_onnx_runtime
def test_a_file_that_answers_otherwise_is_refused_with_its_numbers(tmp_path, monkeypatch):
    model, how = tiny(), {"calibrate": _export.images(80, 8), "tolerance": None}
    right = int8.quantise
    exported(model, tmp_path / "right.onnx", **how)
    assert read_report(tmp_path / "right.onnx").parity.top1_agreement >= 0.9

    def of_dark_images(source, path, images, **options):  # their ranges hold nothing of the others
        return right(source, path, [1e-3 * x for x in images], **options)

    monkeypatch.setattr(int8, "quantise", of_dark_images)
    with pytest.raises(ParityError, match="does not answer as the network does: 40 images") as caught:
        exported(model, tmp_path / "net.onnx", **how)
    assert caught.value.parity.top1_agreement < 0.9
    assert not (tmp_path / "net.onnx").exists()


@needs_onnx_runtime
def test_weights_beside_the_graph_are_quantised_too(tmp_path, monkeypatch):
    from pliant.deploy import onnx_file

    monkeypatch.setattr(onnx_file, "LARGEST_FILE", 100)
    path = exported(tiny(64), tmp_path / "net.onnx", calibrate=_export.images(8, 8))
    assert {file.name for file in tmp_path.iterdir()} == {"net.onnx", "net.onnx.data", "net.onnx.json"}
    assert set(read_report(path).sha256) == {"net.onnx", "net.onnx.data"}
    assert open_export(path)(torch.zeros(2, 3, 8, 8)).shape == (2, 5)


@pytest.mark.slow  # NNCF alone takes seconds to import; in ONNX the same is fast
@needs_nncf
def test_an_openvino_file_is_quantised_by_nncf_and_its_selectors_are_not(tmp_path):
    from openvino import Core

    path = exported(_export.mod(), tmp_path / "net.xml", batches=(1,))
    report = read_report(path)
    assert report.facts.precision == "int8"
    assert "nncf" in report.facts.versions
    assert report.parity.cosine > 0.9
    found = {op.get_friendly_name(): op.get_type_name() for op in Core().read_model(str(path)).get_ops()}
    rounded = [name for name, kind in found.items() if kind == "FakeQuantize"]
    assert len(rounded) > 10
    assert [name for name in found if name.startswith(FLOAT)]
    assert [name for name in rounded if name.startswith(FLOAT)] == []
    assert open_export(path)(torch.zeros(4, 3, 16, 16)).shape == (4, 5)


@needs_onnx_runtime
def test_the_command_calibrates(tmp_path):
    pliant.save(fresh("resnet20_cifar", layers=(1, 1, 1)), tmp_path / "m")
    options = ("--precision", "int8", "--calibrate", "digits", "--calibrate-images", 6)
    printed = run("export", tmp_path / "m", tmp_path / "net.onnx", *options, "--tolerance", 2)
    assert "6 images in 8-bit integers: the same top-1 for" in printed
    assert read_report(tmp_path / "net.onnx").parity.images == 6


@needs_onnx_runtime
@pytest.mark.slow
@pytest.mark.parametrize("ending", [".onnx", pytest.param(".xml", marks=needs_nncf)])
def test_a_trained_network_keeps_its_accuracy(trained, cifar10, correct, tmp_path, ending):
    network = trained("resnet56_cifar", "resnet56-4bfd9763.th")
    images = cifar10[0][-256:]
    path = pliant.export(network, tmp_path / f"net{ending}", precision="int8", calibrate=images)
    assert read_report(path).parity.top1_agreement > 0.96
    own, ours = correct(network, cifar10, 2000), correct(open_export(path), cifar10, 2000)
    assert abs(own - ours) <= 20  # a percent
