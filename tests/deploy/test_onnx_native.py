"""ONNX files compiled for this machine: what they compute, what stands beside them, what goes wrong."""

from __future__ import annotations

import json

import pytest
import timm
import torch
from torch import nn

import _export
import pliant
from pliant.deploy import onnx_native
from pliant.deploy.engines import ENGINES
from pliant.deploy.facts import digest_of, read_report, report_path
from pliant.deploy.loading import open_export, read_facts
from pliant.deploy.onnx_file import library_path, open_session
from pliant.measuring.latency import measure
from pliant.measuring.rows import NATIVE, PLAIN_FORM
from pliant.methods.mixture_of_depths.method import NO_BLOCKS
from pliant.methods.mixture_of_depths.ops import building

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxscript", reason="the extra onnx is not installed")
ort = pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")


@pytest.fixture(scope="module")
def layout():
    """Channels in a block of ONNX Runtime's layout, or a skip that says why there is none."""
    try:
        building.library(building.ORT_SOURCE)
        return onnx_native.block_size()
    except (building.BuildError, ValueError) as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize(
    ("make", "dynamic"),
    [
        (lambda: _export.mod("bottleneck"), True),
        (lambda: _export.mod("bottleneck", order="index", fusion="last"), False),
        (lambda: _export.mod(fusion="replace"), True),  # 24 channels are no whole blocks of 16
        pytest.param(lambda: timm.create_model("resnet20_cifar_mod").eval(), True, marks=pytest.mark.slow),
        pytest.param(_export.mod_of_depth, True, marks=pytest.mark.slow),
    ],
    ids=["bottleneck", "by index, batch of 3", "basic", "cifar", "mod and depth"],
)
def test_a_compiled_file_is_the_network(layout, tmp_path, make, dynamic):
    network = make()
    size = pliant.anatomy.input_size(network) or (3, 16, 16)
    path = tmp_path / "net.onnx"
    pliant.export(network, path, torch.zeros(3, *size), compiled=True, dynamic_batch=dynamic)
    assert {p.name for p in tmp_path.iterdir()} == {"net.onnx", "net.onnx.so", "net.onnx.json"}
    report = read_report(path)
    assert set(report.sha256) == {"net.onnx", "net.onnx.so"}
    blocks = sum(type(m).__name__ == "ChannelSelector" for m in network.modules())
    assert report.parity.selections == 2 * blocks * (8 if dynamic else 3)
    assert report.parity.max_rel_error < 1e-5
    facts = read_facts(path)
    assert (facts.compiled, facts.batch) == (True, None if dynamic else 3)
    assert facts.machine.endswith(f"blocks of {layout} channels")
    nodes = [n for n in onnx.load(path).graph.node if n.op_type == "MoDBlock"]
    assert len(nodes) == blocks
    assert all(len(n.output) == 1 for n in nodes)
    assert not [n for n in onnx.load(path).graph.node if n.op_type in ("TopK", "Gather")]
    for threads in (1, 2):
        run = open_export(path, threads=threads)
        for batch in (1, 2, 7) if dynamic else (3,):
            x = torch.randn(batch, *size)
            with torch.no_grad():
                torch.testing.assert_close(run(x), network(x), rtol=1e-4, atol=1e-5)


def test_blocks_in_whole_blocks_of_channels_keep_the_layout(layout, tmp_path):
    """Nothing is reordered around them."""
    path = pliant.export(_export.mod("bottleneck"), tmp_path / "net.onnx", compiled=True, batches=(1,))
    graph = onnx.load(path).graph
    sizes = [a.i for n in graph.node if n.op_type == "MoDBlock" for a in n.attribute if a.name == "block"]
    assert sizes == [layout, layout]
    before = {n.input[0] for n in graph.node if n.op_type == "MoDBlock"}
    assert not [n for n in graph.node if n.op_type == "ReorderInput" and n.output[0] in before]


def test_a_block_that_the_operator_does_not_know_stays_in_the_graph(layout, tmp_path):
    network = _export.mod("bottleneck")
    network.layer1[1].last_act = nn.ReLU()
    path = pliant.export(network, tmp_path / "net.onnx", compiled=True)
    assert [n.name for n in onnx.load(path).graph.node if n.op_type == "MoDBlock"] == ["layer2.1"]
    assert [n.op_type for n in onnx.load(path).graph.node].count("TopK") == 1
    parity = read_report(path).parity
    assert parity.holds
    assert parity.selections in (0, 32)  # ONNX Runtime keeps the tensors' names, or it does not
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(open_export(path)(x), network(x), rtol=1e-4, atol=1e-5)


def test_a_wrong_operator_is_found_out(layout, tmp_path, monkeypatch):
    """In blocks of another size than ONNX Runtime's the file does not compute the network."""
    monkeypatch.setattr(onnx_native, "block_size", lambda: 24 - layout)
    with pytest.raises(pliant.deploy.parity.ParityError, match="is not the network"):
        pliant.export(_export.mod("bottleneck"), tmp_path / "net.onnx", compiled=True, batches=(2,))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def file(layout, tmp_path_factory):
    path = tmp_path_factory.mktemp("file") / "net.onnx"
    return pliant.export(_export.mod("bottleneck"), path, compiled=True, batches=(1,))


def test_two_lines_run_it_without_pliant(file):
    options = ort.SessionOptions()
    options.register_custom_ops_library(f"{file}.so")
    session = ort.InferenceSession(str(file), options)
    x = torch.randn(2, 3, 16, 16)
    (found,) = session.run(None, {"images": x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), open_export(file)(x))


def test_a_library_that_is_missing_changed_or_of_another_runtime(file, tmp_path, monkeypatch):
    """A library that somebody put there is not loaded, even with a report that names it."""
    path = tmp_path / file.name
    path.write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match=r"its report net\.onnx\.json is not beside it"):
        open_export(path)
    report_path(path).write_bytes(report_path(file).read_bytes())
    with pytest.raises(ValueError, match=r"net\.onnx\.so is not the file that was checked"):
        open_export(path)
    library_path(path).write_bytes(b"no library")
    said = json.loads(report_path(path).read_text())
    said["sha256"]["net.onnx.so"] = digest_of(library_path(path))
    report_path(path).write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"net\.onnx\.so is not the library that net\.onnx was compiled"):
        open_export(path)
    with pytest.raises(ValueError, match=r"net\.onnx\.so cannot be used here: .*"):
        open_session(path, 1, library_path(path))
    monkeypatch.setattr(ort, "__version__", "9.9.9")
    with pytest.raises(ValueError, match=r"compiled by and for onnxruntime .*, and this is 9\.9\.9"):
        open_export(file)


def test_what_cannot_be_compiled_is_refused_by_name(layout, tmp_path, monkeypatch):
    def refused(network, message, **options):
        with pytest.raises(ValueError, match=message):
            pliant.export(network, tmp_path / "net.onnx", compiled=True, **options)
        assert not list(tmp_path.glob("net*"))

    refused(_export.mod(), "for float32, not for float16", precision="float16")
    refused(_export.plain().eval(), "none can: it has no part of such a method")
    refused(_export.mod(selection="first"), "none can: its channels are not chosen by a learned selector")
    with monkeypatch.context() as patched:
        patched.setattr(onnx_native, "BLOCKED", "com.example.none")
        refused(_export.mod(), "ONNX Runtime has no blocked layout on this processor")
    monkeypatch.setenv("CXX", "no-such-compiler")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    refused(_export.mod(), "operator for ONNX Runtime cannot be built: no C\\+\\+ compiler .*install one")
    row = measure("resnet20_cifar_mod", engine="onnxruntime", forms=[NATIVE], rounds=1, tax=False)[-1]
    assert row.form == NATIVE
    assert "operator for ONNX Runtime cannot be built: no C++ compiler" in row.error


def test_only_onnx_runtime_has_a_native_form():
    assert [name for name, engine in ENGINES.items() if engine.native_precisions] == ["onnxruntime"]
    with pytest.raises(ValueError, match="none of these engines has the form 'native'; onnxruntime has"):
        measure("resnet20_cifar_mod", forms=[NATIVE])
    rows = measure(
        "resnet20_cifar_mod",
        engine="eager",
        forms=[PLAIN_FORM, NATIVE],
        rounds=1,
        min_run_time=0,
        input_size=8,
    )
    assert [(r.form, r.variant) for r in rows] == [(PLAIN_FORM, "network"), (PLAIN_FORM, NO_BLOCKS)]


@pytest.mark.slow
def test_native_networks_are_timed_beside_the_others(layout):
    rows = measure(
        "resnet20_cifar_mod",
        against="resnet20_cifar",
        engines=["onnxruntime"],
        batch=(1, 2),
        rounds=2,
        min_run_time=0,
        threads=1,
    )
    assert [r.error for r in rows] == [""] * 10
    native = [r for r in rows if r.form == NATIVE]
    assert [r.label for r in native] == ["resnet20_cifar_mod, native"] * 2
    assert all(r.tax is not None and r.time_ratio is not None for r in native)
