"""The block as an operator of ONNX Runtime: its values in each layout, and what it refuses."""

from __future__ import annotations

import ctypes

import pytest
import torch

from _mod_block import FUSIONS, ORDERS, arguments, arguments_with, error, image
from pliant.deploy.onnx_file import open_session
from pliant.methods.mixture_of_depths.ops import building
from pliant.methods.mixture_of_depths.ops.mod_block import in_pytorch

onnx = pytest.importorskip("onnx", reason="the extra onnx is not installed")
pytest.importorskip("onnxruntime", reason="the extra onnx is not installed")

LAYOUTS = (1, 8, 16)


@pytest.fixture(scope="module")
def library():
    """The operator's library, or a skip that says why there is none."""
    try:
        return building.library(building.ORT_SOURCE)
    except building.BuildError as reason:
        pytest.skip(f"no operator for ONNX Runtime here: {reason}")


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
