"""Exported files: what they compute, hold and say, in their own engines."""

from __future__ import annotations

import json
from collections import Counter

import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

import _export
import pliant
from _export import ENDINGS, images, need
from _small import settled
from pliant.deploy.export import PRECISIONS
from pliant.deploy.facts import read_report, report_path
from pliant.deploy.inputs import Preparation
from pliant.deploy.loading import open_export, read_facts
from pliant.deploy.parity import ParityError

# Writing ONNX takes seconds: what is left to the slow tests differs in the network only.
QUICK = {(".onnx", "mod"), (".onnx", "condconv"), (".xml", "mod, bottleneck")}
QUICK_HALVES = {(".pt2", "bfloat16", "plain"), (".pt2", "bfloat16", "mod")}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Exports a network of `_export` once, with any batch; gives the file and the network."""
    done = {}

    def make(name: str, ending: str):
        need(ending)
        if (name, ending) not in done:
            network = _export.NETWORKS[name]()
            folder = tmp_path_factory.mktemp("files")
            done[name, ending] = pliant.export(network, folder / f"net{ending}"), network
        return done[name, ending]

    return make


@pytest.mark.parametrize(
    ("ending", "name"),
    [
        pytest.param(e, n, marks=() if e == ".pt2" or (e, n) in QUICK else pytest.mark.slow)
        for e in ENDINGS
        for n in _export.NETWORKS
    ],
)
def test_a_file_computes_what_the_network_does_at_any_batch(made, ending, name):
    path, network = made(name, ending)
    parity = read_report(path).parity
    assert parity.batches == (1, 2, 5)
    assert parity.images == 16
    assert parity.max_rel_error < 1e-5
    assert parity.top1_differs == parity.wrong_selections == 0
    blocks = sum(type(m).__name__ == "ChannelSelector" for m in network.modules())
    assert parity.selections == 16 * blocks
    run = open_export(path)
    for batch in (1, 3, 8):
        x = images(batch)
        with torch.no_grad():
            torch.testing.assert_close(run(x), network(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("ending", "name"),
    [
        pytest.param(e, n, marks=() if e == ".pt2" and n == "mod" else pytest.mark.slow)
        for e in ENDINGS
        for n in ("mod", "mod, bottleneck", "condconv")
    ],
)
def test_a_fixed_batch(tmp_path, ending, name):
    need(ending)
    network = _export.NETWORKS[name]()
    path = pliant.export(network, tmp_path / f"n{ending}", images(1), dynamic_batch=False)
    assert read_report(path).parity.batches == (1,)
    run, x = open_export(path), images(1)
    with torch.no_grad():
        torch.testing.assert_close(run(x), network(x), rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match=r"takes torch.float32 images of \[1, 3, 16, 16\], not .* of \[2,"):
        run(images(2))


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".onnx", ".xml"])
@pytest.mark.parametrize(
    "options",
    [
        {"order": "index"},
        {"fusion": "last"},
        {"fusion": "original"},
        {"fusion": "replace"},
        {"selection": "fixed", "fusion": "original"},
        {"selection": "fixed", "fusion": "replace"},
        {"selection": "first"},
        {"selection": "none"},
        {"inner_shortcut": True, "last_act": True},
    ],
    ids=str,
)
def test_every_option_of_mixture_of_depths(tmp_path, ending, options):
    need(ending)
    network = _export.mod(**options)
    path = pliant.export(network, tmp_path / f"net{ending}", batches=(1, 3))
    assert read_report(path).parity.max_rel_error < 1e-5
    x = images(2)
    with torch.no_grad():
        torch.testing.assert_close(open_export(path)(x), network(x), rtol=1e-4, atol=1e-4)


def test_the_network_stays_as_it_is(tmp_path):
    network = _export.mod().train()
    before = {k: v.clone() for k, v in network.state_dict().items()}
    pliant.export(network, tmp_path / "net.pt2", batches=(2,))
    assert network.training
    assert all(p.requires_grad for p in network.parameters())
    assert all(torch.equal(v, before[k]) for k, v in network.state_dict().items())


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".onnx", ".xml"])
@pytest.mark.parametrize("name", ["cc_mobilenetv1_025_cifar", "resnet20_cifar_adn"])
def test_named_networks_at_any_batch(tmp_path, ending, name):
    """CondConv mixes other kernels for each image; of Adaptive Depth one depth goes into a file."""
    need(ending)
    network = timm.create_model(name, num_classes=5)
    if name.endswith("adn"):
        network = pliant.subnet(network, (True, False, True))
    network = settled(network)
    path = pliant.export(network, tmp_path / f"net{ending}", batches=(1, 3))
    assert read_report(path).parity.batches == (1, 3)
    run = open_export(path)
    for batch in (1, 3):
        x = images(batch, 32)
        with torch.no_grad():
            expected = network(x)
        assert batch == 1 or expected.std(0).min() > 1e-2  # the images are told apart
        torch.testing.assert_close(run(x), expected, rtol=1e-4, atol=1e-4)


# --- the ONNX graph ------------------------------------------------------------------------------


def test_the_onnx_graph_is_that_of_the_plan(made):
    """Of two blocks: pool, two 1x1 convolutions, top-k, sigmoid of k, one gather, no slice."""
    onnx = pytest.importorskip("onnx")
    path, _ = made("mod", ".onnx")
    graph = onnx.load(str(path)).graph
    counts = Counter(node.op_type for node in graph.node)
    # 1 stem, 2 + 3 of the even blocks, 2 selector + 2 core + 1 fusion in each of the odd ones.
    assert counts["Conv"] == 1 + 5 + 2 * 5
    assert counts["GlobalAveragePool"] == 3
    assert counts["TopK"] == counts["Sigmoid"] == counts["Gather"] == 2
    assert counts["Range"] == 1
    absent = ("Slice", "Concat", "ReduceMean", "GatherElements", "GatherND", "ScatterND", "Pad", "Expand")
    assert [op for op in absent if counts[op]] == []
    constants = {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer}
    assert [int(constants[n.input[1]].item()) for n in graph.node if n.op_type == "TopK"] == [4, 6]
    outputs = [name for node in graph.node for name in node.output]
    assert {"layer1.1.selector.index", "layer2.1.selector.logits"} <= set(outputs)


@pytest.mark.parametrize("active", [None, pytest.param(1, marks=pytest.mark.slow)])
def test_mixed_kernels_of_any_batch_are_one_loop_a_block(made, tmp_path, active):
    """A loop for the stem and each block, its constants inside; nothing unfolds images."""
    need(".onnx")
    import onnx

    if active is None:
        path, _ = made("condconv", ".onnx")
    else:
        path = pliant.export(_export.condconv(active=active), tmp_path / "net.onnx", batches=(1, 3))
    graph = onnx.load(str(path)).graph
    loops = [node for node in graph.node if node.op_type == "Scan"]
    bodies = [onnx.helper.get_node_attr_value(node, "body") for node in loops]
    counts = [Counter(node.op_type for node in body.node) for body in bodies]
    # Hard routing gathers one expert of each kernel, of the classifier's too.
    assert [c["Conv"] for c in counts] == [1, 2, 2, 3, 2] + [0] * (active is not None)
    assert [c["Gather"] for c in counts] == ([0] * 5 if active is None else [1, 2, 2, 3, 2, 1])
    assert not any(node.op_type in ("Conv", "Gather", "Im2Col") for node in graph.node)
    outside = {name for body in bodies for node in body.node for name in node.input}
    outside &= {tensor.name for tensor in graph.initializer if len(tensor.dims) > 1}
    assert outside == set()


def test_the_onnx_file_passes_the_checker_and_holds_no_path(made):
    onnx = pytest.importorskip("onnx")
    for name in ("mod", "condconv"):
        path, _ = made(name, ".onnx")
        onnx.checker.check_model(str(path), full_check=True)
        model = onnx.load(str(path))
        assert model.opset_import[0].version == 18
        assert model.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
        assert b"site-packages" not in path.read_bytes()
        assert b".py" not in path.read_bytes()


def test_another_opset(tmp_path):
    """The file holds that, says so, and runs in ONNX Runtime."""
    need(".onnx")
    import onnx

    network = _export.mod()
    path = pliant.export(network, tmp_path / "net.onnx", opset=20, batches=(2,))
    assert [o.version for o in onnx.load(str(path)).opset_import if not o.domain] == [20]
    assert read_facts(path).opset == read_report(path).facts.opset == 20
    assert read_report(path).parity.selections == 8
    x = images(3)
    with torch.no_grad():
        torch.testing.assert_close(open_export(path)(x), network(x), rtol=1e-4, atol=1e-4)


def test_tensorrt_documents_all_that_is_in_the_graph(made):
    ir = pytest.importorskip("onnx_ir")
    from pliant.deploy.tensorrt import objections

    for name in ("mod", "condconv"):
        assert objections(ir.load(str(made(name, ".onnx")[0]))) == []


def test_weights_too_large_for_one_message_lie_beside_the_graph(made, tmp_path, monkeypatch):
    ir = pytest.importorskip("onnx_ir")
    from pliant.deploy import onnx_file

    path, network = made("mod", ".onnx")
    monkeypatch.setattr(onnx_file, "LARGEST_FILE", 1000)
    files = onnx_file.write(ir.load(str(path)), tmp_path / "net.onnx", read_facts(path))
    assert [file.name for file in files] == ["net.onnx", "net.onnx.data"]
    assert files[0].stat().st_size < path.stat().st_size / 2
    result = onnx_file.runner(files[0], ["layer1.1.selector", "layer2.1.selector"])(x := images(2))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["net.onnx", "net.onnx.data"]
    assert {b: s.channels.shape for b, s in result.selections.items()} == {
        "layer1.1.selector": (2, 4),
        "layer2.1.selector": (2, 6),
    }
    with torch.no_grad():
        torch.testing.assert_close(result.outputs[0], network(x), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(open_export(files[0])(x), result.outputs[0])


def test_what_tensorrt_does_not_document_is_named():
    ir = pytest.importorskip("onnx_ir")
    from pliant.deploy.tensorrt import objections

    text = """<ir_version: 8, opset_import: ["" : 18]>
        net (float[N, 8] x, int64[1] k, uint8[4] u) => (float y, int64 i, float z, uint8 v) {
            y, i = TopK <sorted = 0> (x, k)
            z, a, b, c = Unique (x)
            v = Identity (u)
        }"""
    found = objections(ir.from_onnx_text(text))
    assert len(found) == 3
    assert "TopK" in found[0]
    assert "K is no constant" in found[0]
    assert "Unique" in found[1]
    assert "no supported operator" in found[1]
    assert "no UINT8 input" in found[2]


# --- what stands in the file -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "name"), [(".pt2", "mod"), (".onnx", "mod"), (".xml", "mod, bottleneck")]
)
def test_the_file_says_what_it_is(made, ending, name):
    path, _ = made(name, ending)
    facts = read_facts(path)
    assert facts == read_report(path).facts
    assert facts.takes == "normalised"
    assert facts.precision == "float32"
    assert (facts.opset == 18) == (ending != ".pt2")
    assert (facts.batch, facts.input_size, facts.network_size) == (None, (3, 16, 16), (3, 16, 16))
    assert (facts.mean, facts.std) == ((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    assert facts.methods[0].startswith("MixtureOfDepths(c=4")
    assert facts.versions["pliant"] == pliant.__version__


def test_names_of_classes_and_several_outputs(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3, bias=False)

        def forward(self, x):
            y = self.conv(x)
            return [y.mean((2, 3)), y]

    path = pliant.export(Two(), tmp_path / "n.pt2", torch.zeros(1, 3, 8, 8), classes=("a", "b", "c", "d"))
    facts = read_facts(path)
    assert (facts.classes, facts.outputs) == (("a", "b", "c", "d"), ("output0", "output1"))
    assert [y.shape for y in open_export(path)(torch.zeros(2, 3, 8, 8))] == [(2, 4), (2, 4, 6, 6)]


def test_a_report_is_of_its_file_alone(tmp_path):
    path = pliant.export(_export.plain().eval(), tmp_path / "net.pt2", batches=(1,))
    content = json.loads(report_path(path).read_text())
    assert content["parity"]["images"] == 2
    with path.open("ab") as file:
        file.write(b"x")
    with pytest.raises(ValueError, match="not the file that was checked"):
        read_report(path)
    report_path(path).unlink()
    with pytest.raises(ValueError, match="no report of an exported file"):
        read_report(path)


# --- preparation in the graph ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "takes"),
    [
        (".pt2", "uint8"),
        (".pt2", "float"),
        pytest.param(".onnx", "uint8", marks=pytest.mark.slow),
        pytest.param(".xml", "uint8", marks=pytest.mark.slow),
    ],
)
def test_baked_preparation_is_the_preparation_outside(tmp_path, ending, takes):
    need(ending)
    network = _export.plain().eval()
    path = pliant.export(network, tmp_path / f"net{ending}", takes=takes, image_size=(24, 20))
    pixels = torch.randint(0, 256, (3, 3, 24, 20), dtype=torch.uint8)
    given = pixels if takes == "uint8" else pixels / 255
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    outside = F.interpolate(pixels / 255, (16, 16), mode="bilinear", align_corners=False)
    outside = (outside - mean[:, None, None]) / std[:, None, None]
    with torch.no_grad():
        torch.testing.assert_close(open_export(path)(given), network(outside), rtol=1e-4, atol=1e-4)
    facts = read_facts(path)
    assert (facts.takes, facts.input_size, facts.network_size) == (takes, (3, 24, 20), (3, 16, 16))
    with pytest.raises(ValueError, match="takes torch"):
        open_export(path)(given.double())


def test_preparation_that_does_not_fit_is_refused():
    for arguments, message in [
        (("jpeg", (3, 8, 8), (3, 8, 8)), "takes must be one of"),
        (("uint8", (3, 8, 8), (3, 8, 8)), "pass mean and std"),
        (("uint8", (3, 8, 8), (3, 8, 8), (0.5,) * 2, (0.5,)), "mean has 2 values"),
        (("uint8", (3, 8, 8), (3, 8, 8), (0.5,), (0.0,)), "std must be above 0"),
        (("uint8", (3, 0, 8), (3, 8, 8), (0.5,), (0.5,)), "size must be"),
        (("float", (1, 8, 8), (3, 8, 8), (0.5,), (0.5,)), "1 channels do not fit"),
    ]:
        with pytest.raises(ValueError, match=message):
            Preparation(*arguments)


def test_real_images_are_digits_or_those_of_a_folder(tmp_path):
    preparation = Preparation("uint8", (3, 12, 10), (3, 12, 10), (0.5,), (0.5,))
    digits = preparation.real(3, None)
    assert digits.shape == (3, 3, 12, 10)
    assert digits.dtype == torch.uint8
    assert digits.float().std() > 20
    Image.new("RGB", (20, 24), (255, 0, 128)).save(tmp_path / "red.png")
    own = preparation.real(2, tmp_path)
    assert own[:, :, 0, 0].tolist() == [[255, 0, 128]] * 2
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no image"):
        preparation.real(1, tmp_path / "empty")
    with pytest.raises(ValueError, match="is no folder"):
        preparation.real(1, tmp_path / "missing")


# --- precision, machine code -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ending", "precision", "name"),
    [
        pytest.param(e, p, n, marks=() if (e, p, n) in QUICK_HALVES else pytest.mark.slow)
        for e, target in ENDINGS.items()
        for p in PRECISIONS[target]
        if p != "float32"
        for n in ("plain", "mod", "condconv", "depth")
    ],
)
def test_half_precision(tmp_path, ending, precision, name):
    need(ending)
    network = _export.NETWORKS[name]()
    path = pliant.export(network, tmp_path / f"net{ending}", precision=precision)
    parity = read_report(path).parity
    assert 1e-5 < parity.max_rel_error < parity.tolerance
    assert parity.images == 16
    assert parity.selections == (32 if name == "mod" else 0)
    assert parity.wrong_selections == 0
    assert read_facts(path).precision == precision
    assert open_export(path)(images(2)).dtype == torch.float32


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_machine_code(tmp_path, precision):
    """It does not tell its selections; each image's outputs are the network's, or are explained."""
    network = _export.mod()
    try:
        path = pliant.export(network, tmp_path / "net.pt2", compiled=True, precision=precision)
    except ParityError:
        raise
    except ValueError as error:
        pytest.skip(str(error))
    assert read_facts(path).compiled
    parity = read_report(path).parity
    assert (parity.images, parity.told, parity.unexplained) == (16, False, 0)
    assert parity.holds
    run = open_export(path, threads=1)
    for batch in (1, 4):
        x = images(batch)
        with torch.no_grad():
            found, expected = run(x), network(x)
        if precision == "float32":
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert found.shape == expected.shape
