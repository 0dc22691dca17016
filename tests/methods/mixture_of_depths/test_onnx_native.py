"""ONNX files compiled for this machine: the operator in each layout, the files, what goes wrong."""

from __future__ import annotations

import ctypes
import json

import pytest
import timm
import torch
from torch import nn

import _export
import pliant
from _mod_block import FUSIONS, ORDERS, arguments, arguments_with, error, image
from pliant.deploy import onnx_native
from pliant.deploy.engines import ENGINES
from pliant.deploy.facts import digest_of, read_report, report_path
from pliant.deploy.loading import open_export, read_facts
from pliant.deploy.onnx_file import library_path, open_session
from pliant.measuring.latency import measure
from pliant.measuring.rows import NATIVE, PLAIN
from pliant.methods.mixture_of_depths.method import NO_BLOCKS
from pliant.methods.mixture_of_depths.ops import building
from pliant.methods.mixture_of_depths.ops.mod_block import in_pytorch

onnx = pytest.importorskip("onnx", reason="the extra pliant[onnx] is not installed")
pytest.importorskip("onnxscript", reason="the extra pliant[onnx] is not installed")
ort = pytest.importorskip("onnxruntime", reason="the extra pliant[onnx] is not installed")

LAYOUTS = (1, 8, 16)


@pytest.fixture(scope="module")
def library():
    """The operator's library, or a skip that says why there is none."""
    try:
        return building.library(building.ORT_SOURCE)
    except building.BuildError as reason:
        pytest.skip(f"no operator for ONNX Runtime here: {reason}")


@pytest.fixture(scope="module")
def layout(library):
    """Channels in a block of ONNX Runtime's layout, or a skip that says why there is none."""
    try:
        return onnx_native.block_size()
    except ValueError as reason:
        pytest.skip(str(reason))


@pytest.fixture(params=[1, 2])
def threads(request):
    return request.param


def in_blocks(x, size, back=False):
    """`x` [B, C, H, W] laid out in blocks of `size` channels, in the same shape; or back."""
    batch, channels, height, width = x.shape
    if back:
        parts = x.reshape(batch, channels // size, height, width, size).permute(0, 1, 4, 2, 3)
    else:
        parts = x.reshape(batch, channels // size, size, height, width).permute(0, 1, 3, 4, 2)
    return parts.reshape(x.shape)


def operator(library, tmp_path, args, *, block=16, threads=1, inplace=True, **attributes):
    """A function that runs the operator alone: image, logits and channels for `x` [B, C, H, W].

    In place it works on what another node computed; on an input of the graph it must not.
    """
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    weights = {f"w{i}": a for i, a in enumerate(args) if a is not None}
    given = {
        "dilation": 1,
        "order": "score",
        "fusion": "first",
        "block": block,
        **attributes,
    }
    told = ["logits", "channels"]
    if inplace:  # between two others: outputs of a graph have memory of their own
        nodes = [
            helper.make_node("Abs", ["images"], ["x"]),
            helper.make_node("MoDBlock", ["x", *weights], ["done", *told], domain="pliant", **given),
            helper.make_node("Neg", ["done"], ["y"]),
        ]
    else:
        nodes = [helper.make_node("MoDBlock", ["images", *weights], ["y", *told], domain="pliant", **given)]
    kinds = {"y": (1, 4), "logits": (1, 2), "channels": (7, 2)}
    outputs = [helper.make_tensor_value_info(n, t, [None] * d) for n, (t, d) in kinds.items()]
    images = helper.make_tensor_value_info("images", 1, ["batch", len(args[0]), "height", "width"])
    constants = [numpy_helper.from_array(a.numpy(), name) for name, a in weights.items()]
    graph = helper.make_graph(nodes, "one", [images], outputs, constants)
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("pliant", 1)]
    path = tmp_path / "one.onnx"
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), str(path))
    session = open_session(path, threads, library)

    def run(x):
        found = session.run(None, {"images": in_blocks(x, block).numpy()})
        y, logits, channels = map(torch.from_numpy, found)
        return in_blocks(-y if inplace else y, block, back=True), logits, channels

    return run


def expected(x, args, dilation=1, order="score", fusion="first"):
    want = x.contiguous().clone()
    in_pytorch(want, *args, dilation, order, fusion)
    return want


@pytest.mark.parametrize("kind", ["bottleneck", "basic"])
@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("block", LAYOUTS)
def test_the_operator_is_the_block_in_each_layout(library, tmp_path, kind, fusion, block, threads):
    args = arguments(64, 16, 8, kind, logits=torch.randperm(64) / 64 - 0.3)
    for order in ORDERS:
        for dilation in (1, 2):
            how = {"dilation": dilation, "order": order, "fusion": fusion}
            inplace = order == "score"
            run = operator(library, tmp_path, args, block=block, threads=threads, inplace=inplace, **how)
            for batch in (0, 1, 2, 5):
                x = image(batch, 64, 12, 13).contiguous()
                before = x.clone()
                y, logits, channels = run(x)
                assert torch.equal(x, before)
                assert y.shape == x.shape
                assert (logits.shape, channels.shape) == ((batch, 64), (batch, 16))
                if batch:
                    assert error(y, expected(x, args, **how)) < 4e-7
                    assert error(y, x) > 1e-3


@pytest.mark.parametrize(
    ("channels", "k", "r", "size"),
    [
        (256, 4, 16, (28, 28)),
        (2048, 32, 128, (7, 7)),
        (48, 20, 12, (9, 33)),  # more than one vector in each direction, a rest, and parts of blocks
        (16, 16, 3, (1, 1)),
        (16, 1, 1, (40, 3)),
    ],
)
@pytest.mark.parametrize("block", LAYOUTS)
def test_shapes(library, tmp_path, channels, k, r, size, block, threads):
    kind = "basic" if k in (1, 16) else "bottleneck"
    args = arguments(channels, k, r, kind, logits=torch.randperm(channels) / channels - 0.3)
    x = image(2, channels, *size).contiguous()
    for fusion in ("first", "last"):
        run = operator(library, tmp_path, args, block=block, threads=threads, fusion=fusion)
        assert error(run(x)[0], expected(x, args, fusion=fusion)) < 4e-7


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fusion", FUSIONS)
def test_channels_that_are_read_and_written_and_told(library, tmp_path, order, fusion, threads):
    for picked in (range(16)[::-1], range(48, 64), range(8, 24)):
        logits = torch.full((64,), -5.0)
        logits[list(picked)] = torch.linspace(3, 1, 16)
        args = arguments(logits=logits)
        x = image(1, 64, 20, 20).contiguous()
        how = {"order": order, "fusion": fusion}
        y, seen, chosen = operator(library, tmp_path, args, threads=threads, **how)(x)
        assert error(y, expected(x, args, **how)) < 4e-7
        assert chosen[0].tolist() == (list(picked) if order == "score" else sorted(picked))
        assert int(seen[0].argmax()) == picked[0]


def test_ties_go_to_the_lower_channel_and_nan_comes_first(library, tmp_path, threads):
    silent = arguments(kind="basic", logits=torch.zeros(64))
    x = image(1, 64, 12, 12).contiguous()
    y, _, chosen = operator(library, tmp_path, silent, threads=threads)(x)
    assert chosen[0].tolist() == list(range(16))
    assert error(y, expected(x, arguments_with(silent, -torch.arange(64) * 1e-9))) < 4e-7
    high = arguments_with(silent, 60 + torch.randperm(64).float())  # whose sigmoids are all 1
    assert error(operator(library, tmp_path, high, threads=threads)(x)[0], expected(x, high)) < 4e-7

    args = arguments()
    x = image(3, 64, 12, 12).contiguous()
    x[1, 40, 3, 3] = float("nan")
    y, _, chosen = operator(library, tmp_path, args, threads=threads)(x)
    assert error(y[::2], expected(x, args)[::2]) < 4e-7
    assert y[1, :16].isnan().all()
    assert torch.equal(y[1, 16:].nan_to_num(), x[1, 16:].nan_to_num())


@pytest.mark.parametrize(
    ("place", "wrong", "message"),
    [
        (1, torch.zeros(64, 8), "weight 1 does not fit"),
        (4, torch.zeros(4, 4, 1, 1), "weight 4 does not fit"),
        (7, None, "takes 7 or 9 inputs"),
    ],
)
def test_wrong_weights_are_refused_when_the_file_is_opened(library, tmp_path, place, wrong, message):
    args = arguments()
    args[place] = wrong
    with pytest.raises(Exception, match=message):
        operator(library, tmp_path, args)
    for attribute in ({"fusion": "middle"}, {"dilation": 0}, {"block": 48}):
        with pytest.raises(Exception, match=r"not middle|makes no sense|whole blocks"):
            operator(library, tmp_path, arguments(), **attribute)


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
    with pytest.raises(
        ValueError, match=r"net\.onnx\.so is not the library that net\.onnx was compiled with"
    ):
        open_export(path)
    with pytest.raises(ValueError, match=r"net\.onnx\.so cannot be used here: .*"):
        open_session(path, 1, library_path(path))
    monkeypatch.setattr(ort, "__version__", "9.9.9")
    with pytest.raises(ValueError, match=r"compiled by and for onnxruntime .*, and this is 9\.9\.9"):
        open_export(file)


def test_an_old_runtime_is_told_what_is_needed(library):
    """Of the interface's table only the first function is called, which makes an error."""
    said = []
    make = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p)
    get = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_uint32)

    @make
    def create_status(code, message):
        said.append((code, message.decode()))
        return 42

    table = (ctypes.c_void_p * 1)(ctypes.cast(create_status, ctypes.c_void_p))
    get_api = get(lambda version: ctypes.addressof(table) if version == 1 else None)
    base = (ctypes.c_void_p * 2)(ctypes.cast(get_api, ctypes.c_void_p), None)
    register = ctypes.CDLL(str(library)).RegisterCustomOps
    register.restype = ctypes.c_void_p
    assert register(None, ctypes.byref(base)) == 42
    assert said == [(1, "pliant's operator cannot run here: it needs ONNX Runtime 1.18 or newer")]


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
        "resnet20_cifar_mod", engine="eager", forms=[PLAIN, NATIVE], rounds=1, min_run_time=0, input_size=8
    )
    assert [(r.form, r.variant) for r in rows] == [(PLAIN, "network"), (PLAIN, NO_BLOCKS)]


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
