"""The Mixture-of-Depths block in Triton: against PyTorch's operators, in Triton's interpreter.

Triton decides when a kernel is defined whether it is interpreted, so that runs in a process of
its own. Compiling and tracing the kernels for a GPU needs none; running them does (`make gpu`).
"""

from __future__ import annotations

import multiprocessing
import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from pliant.deploy.folding import fold_norms
from pliant.methods.mixture_of_depths.ops import triton_mod
from pliant.methods.mixture_of_depths.ops.fused import FusedMoDBlock
from pliant.methods.mixture_of_depths.ops.mod_block import in_pytorch
from pliant.methods.mixture_of_depths.ops.triton_mod import mod_block, unfit

pytestmark = pytest.mark.skipif(not triton_mod.INSTALLED, reason="Triton is not installed")

Weights = tuple[Tensor | None, ...]
Call = Callable[..., tuple[Tensor, Tensor]]
LAYOUTS = {True: torch.channels_last, False: torch.contiguous_format}


def in_child(x: Tensor, weights: Weights, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What the kernels make of `x`, and `x` afterwards; runs where Triton is interpreted."""
    reason = unfit(x, weights[2])
    assert not reason, reason
    with torch.no_grad():
        y = mod_block(x, *weights, **options)
    return y, x


@pytest.fixture(scope="module")
def interpreted() -> Iterator[Call]:
    """`in_child`, in a process whose Triton interprets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("OMP_NUM_THREADS", "1")
        child = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        child.submit(torch.get_num_threads).result()  # it is up, and has read its environment
    with child:
        yield lambda x, weights, **options: child.submit(in_child, x, weights, options).result()


def drawn(channels: int, k: int, inner: int | None, hidden: int = 4) -> Weights:
    """Weights of a block; `inner` None: a core of two 3x3. No hidden unit is silent."""
    down, up = torch.rand(channels, hidden) / channels, torch.randn(hidden, channels)
    shapes = [(k, k, 3), (k, k, 3)] if inner is None else [(inner, k, 1), (inner, inner, 3), (k, inner, 1)]
    core: list[Tensor | None] = []
    for out, into, size in shapes:
        core += [torch.randn(out, into, size, size) / (into * size**2) ** 0.5, torch.randn(out)]
    return down, up, *core, *[None] * (6 - len(core))


def feature_map(batch: int, channels: int, height: int, width: int, channels_last: bool = False) -> Tensor:
    """Maps whose channels differ in their means."""
    x = torch.randn(batch, channels, height, width) + torch.rand(batch, channels, 1, 1)
    return x.relu().contiguous(memory_format=LAYOUTS[channels_last])


def plain(x: Tensor, weights: Weights, dilation: int = 1, order: str = "score") -> Tensor:
    """The same in PyTorch's operators and float32."""
    y = x.float().clone()
    in_pytorch(y, *(None if w is None else w.float() for w in weights), dilation, order, "first")
    return y


# Batch, C, k, the core's width (None: two 3x3), height, width, dilation.
SIZES = {
    "small": (2, 64, 4, 1, 9, 7, 1),
    "no powers of two": (3, 60, 5, 3, 5, 11, 1),
    "selector in a launch of its own": (1, 520, 8, 2, 6, 5, 1),
    "widest core": (1, 64, 64, 16, 3, 5, 1),
    "dilated": (1, 32, 8, 2, 9, 8, 2),
    "one channel": (1, 16, 1, 1, 4, 3, 1),
    "one position": (2, 8, 2, 1, 1, 1, 1),
    "one row": (2, 8, 3, 1, 1, 6, 1),
    "one column": (2, 8, 3, 1, 6, 1, 1),
    "two 3x3": (2, 24, 3, None, 5, 7, 1),
    "two 3x3, dilated, all channels": (1, 6, 6, None, 6, 7, 2),
}


@pytest.mark.parametrize(
    ("name", "channels_last", "inplace", "order"),
    [(name, True, True, "score") for name in SIZES]
    + [(name, False, False, "index") for name in SIZES]
    + [("no powers of two", True, False, "index"), ("no powers of two", False, True, "score")],
)
def test_as_in_pytorch(name, channels_last, inplace, order, interpreted):
    batch, channels, k, inner, height, width, dilation = SIZES[name]
    hidden = 33 if channels > 512 else 4  # beyond 2 ** 14 weights, a kernel more
    weights = drawn(channels, k, inner, hidden)
    x = feature_map(batch, channels, height, width, channels_last)
    y, after = interpreted(x.clone(), weights, dilation=dilation, order=order, inplace=inplace)
    expected = plain(x, weights, dilation, order)
    assert (y - expected).norm() / expected.norm() < 1e-6
    assert torch.equal(y[:, k:], x[:, k:])
    assert y.stride() == x.stride()
    assert torch.equal(after, y if inplace else x)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("inner", [2, None])
def test_half_precision_is_rounded_once(dtype, inner, interpreted):
    weights = tuple(None if w is None else w.to(dtype) for w in drawn(32, 4, inner))
    x = feature_map(2, 32, 5, 6, channels_last=True).to(dtype)
    y, _ = interpreted(x, weights)
    expected = plain(x, weights)
    assert y.dtype == dtype
    torch.testing.assert_close(y, expected.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-4)


def test_channels_that_are_read_while_they_are_written(interpreted):
    """The first k are chosen, and stand in another order than they are written in."""
    weights = drawn(16, 4, 2)
    up = torch.full((4, 16), -1.0)
    up[:, :4] = torch.tensor([1.0, 3.0, 4.0, 2.0])  # 2, 1, 3, 0 are chosen, in this order
    weights = (weights[0], up, *weights[2:])
    x = feature_map(2, 16, 20, 20)  # several programs a sample
    for channels_last in (False, True):
        given = x.clone(memory_format=LAYOUTS[channels_last])  # its memory is the child's too
        y, _ = interpreted(given, weights, inplace=True)
        torch.testing.assert_close(y, plain(x, weights), rtol=1e-5, atol=1e-5)


def test_of_equal_logits_the_lower_channel_is_chosen(interpreted):
    """Silent hidden units make all logits zero, of either sign."""
    weights = drawn(12, 3, None)
    down, up = -torch.ones(12, 4), torch.randn(4, 12).sign()
    x = torch.rand(1, 12, 4, 4) + 0.1
    y, _ = interpreted(x, (down, up, *weights[2:]), order="index")
    first = torch.zeros(4, 12)
    first[:, :3] = 1e-6  # now the first three are best, and their scores are what they were
    expected = plain(x, (-down, first, *weights[2:]), order="index")
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)


def test_large_logits_are_ranked(interpreted):
    """Their sigmoids are all one."""
    weights = drawn(16, 2, 1)
    up = torch.full((4, 16), 100.0)
    up[:, 9], up[:, 5] = 400.0, 300.0
    x = feature_map(1, 16, 4, 4) + 1
    y, _ = interpreted(x, (torch.ones(16, 4), up, *weights[2:]))
    torch.testing.assert_close(y, plain(x, (torch.ones(16, 4), up, *weights[2:])), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_sample_with_nan_spoils_itself_alone(value, interpreted):
    weights = drawn(16, 3, 1)
    x = feature_map(2, 16, 4, 5)
    x[0, 7, 2, 2] = value
    y, _ = interpreted(x, weights)
    if value != value:
        assert y[0, :3].isnan().all()
    torch.testing.assert_close(y[0, 3:], x[0, 3:], equal_nan=True)
    torch.testing.assert_close(y[1], plain(x, weights)[1], rtol=1e-5, atol=1e-5)


def test_nan_within_the_core_stays_where_convolutions_take_it(interpreted):
    weights = drawn(16, 16, None)  # every channel is chosen, whatever the logits
    x = feature_map(1, 16, 9, 9)
    spoiled = [w.clone() if w is not None else None for w in weights]
    spoiled[3][:] = float("nan")  # the first convolution's bias: ReLU must not drop it
    y, _ = interpreted(x, tuple(spoiled))
    assert y.isnan().all()


def test_weights_in_channels_last(interpreted):
    """As `model.to(memory_format=torch.channels_last)` leaves them; no copy is made of the selector's."""
    for inner in (2, None):
        weights = drawn(32, 8, inner)
        x = feature_map(1, 32, 5, 5)
        expected = plain(x, weights)
        last = [
            w.contiguous(memory_format=torch.channels_last) if w is not None and w.dim() == 4 else w
            for w in weights
        ]
        last[:2] = [w.t().contiguous().t() for w in weights[:2] if w is not None]
        y, _ = interpreted(x, tuple(last))
        torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


def test_a_sample_alone_gives_what_it_gives_in_a_batch(interpreted):
    weights = drawn(64, 4, 1)
    x = feature_map(5, 64, 8, 8, channels_last=True)
    together, _ = interpreted(x, weights)
    alone, _ = interpreted(x[3:4].clone(), weights)
    torch.testing.assert_close(together[3:4], alone, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet50_mod", "resnet18_mod"])
def test_a_block_of_a_network(name, interpreted):
    model = timm.create_model(name, channels=(8, 16, 24, 32), c=8).eval()
    for norm in (m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        torch.nn.init.uniform_(norm.weight, 0.5, 1.5)
    block = model.layer2[1]
    fused = FusedMoDBlock(fold_norms(model, torch.randn(1, 3, 32, 32)).layer2[1])
    weights = tuple(fused._parameters.values())
    x = feature_map(2, block.channels, 6, 6)
    y, _ = interpreted(x, weights, dilation=fused.dilation, order=fused.order)
    with torch.no_grad():
        torch.testing.assert_close(y, block(x), rtol=1e-5, atol=1e-5)


def test_where_pytorch_runs_instead():
    x, weights = feature_map(2, 16, 4, 4), drawn(16, 2, 1)
    y = mod_block(x, *weights)
    torch.testing.assert_close(y, plain(x, weights))
    changed = x.clone()
    assert mod_block(changed, *weights, inplace=True) is changed
    assert torch.equal(changed, y)
    empty = mod_block(x[:0], *weights)
    assert empty.shape == (0, 16, 4, 4)
    last = mod_block(x, *weights, fusion="last")
    assert torch.equal(last[:, :14], x[:, :14])
    wanted = x.clone().requires_grad_()
    mod_block(wanted, *weights).sum().backward()
    assert wanted.grad is not None
    assert wanted.grad.abs().sum() > 0


def test_what_does_not_fit_is_named():
    meta, weight = torch.empty(2, 16, 4, 4, device="meta"), torch.empty(2, 2, 3, 3)
    assert unfit(meta, weight) == "the input is on meta, the kernels are for cuda"
    assert unfit(meta, weight, "original") == "fusion is 'original', the kernels know 'first'"
    assert unfit(torch.empty(2, 16, 4, 4), weight) == "the input is on cpu, the kernels are for cuda"
    with FakeTensorMode():
        cuda = torch.empty(2, 16, 4, 4, device="cuda")
        assert unfit(cuda.double(), weight) == "float64: the kernels compute in float32"
        assert unfit(cuda[:0], weight) == "the input is empty"
        for strided in (cuda[..., :3], cuda[:1].expand(2, -1, -1, -1)):
            assert "repeat values or skip some between rows" in unfit(strided, weight)
        assert "k = 64 by 64 inside the core" in unfit(cuda, torch.empty(64, 64, 3, 3))
        assert "C = 5000" in unfit(torch.empty(1, 5000, 1, 1, device="cuda"), weight)


@pytest.fixture
def h200(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Triton believes in a GPU, so that its compiler can be asked about kernels."""
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", 90, 32)

    class Driver:
        get_current_target = staticmethod(lambda: target)
        get_current_device = staticmethod(lambda: 0)

    monkeypatch.setattr(triton.runtime.driver, "_active", Driver())
    return target


def on_a_gpu_that_is_not_there(
    sizes: tuple[int, ...], dtype: torch.dtype = torch.float32, hidden: int = 4
) -> tuple[Tensor, Weights]:
    """An input in channels_last and weights; within `FakeTensorMode`."""
    batch, channels, k, inner, height, width, _ = sizes
    x = torch.empty(batch, channels, height, width, device="cuda", dtype=dtype)
    weights = drawn(channels, k, inner, hidden)
    empty = [None if w is None else torch.empty(w.shape, device="cuda", dtype=dtype) for w in weights]
    return x.contiguous(memory_format=torch.channels_last), tuple(empty)


def test_fake_tensors_and_flops() -> None:
    with FakeTensorMode(), torch.no_grad(), FlopCounterMode(display=False) as counter:
        for inner in (1, None):
            x, weights = on_a_gpu_that_is_not_there((2, 64, 4, inner, 9, 7, 1))
            assert unfit(x, weights[2]) == ""
            y = mod_block(x, *weights)
            assert (y.shape, y.stride(), y.dtype, y.device) == (x.shape, x.stride(), x.dtype, x.device)
            assert mod_block(x, *weights, inplace=True) is x
    selector, bottleneck, basic = 2 * 64 * 4, 63 * (4 + 9 + 4), 63 * 2 * 9 * 16
    # Twice each, for a batch of two, a multiplication and an addition.
    assert counter.get_total_flops() == 2 * 2 * 2 * (2 * selector + bottleneck + basic)


def compile_traced(function: Callable[..., Tensor]) -> tuple[Callable[..., Tensor], list[list[str]]]:
    """`function`, compiled as far as its graph, and the arguments that each kernel in it changes."""
    from torch._functorch.aot_autograd import aot_module_simplified

    written: list[list[str]] = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        def compiler(traced: torch.fx.GraphModule, _: Any) -> Any:
            nodes = (n for n in traced.graph.nodes if "tensors_to_clone" in n.kwargs)
            written.extend(n.kwargs["tensors_to_clone"] for n in nodes)
            return traced.forward

        return aot_module_simplified(graph, inputs, fw_compiler=compiler, inference_compiler=compiler)

    return torch.compile(function, backend=backend, fullgraph=True), written


def test_compiling_sees_what_each_kernel_writes(h200) -> None:
    """So that `torch.compile` copies nothing: not the map that is changed in place, no weight."""

    def both(x: Tensor, *weights: Tensor) -> Tensor:
        return mod_block(mod_block(x.relu(), *weights, inplace=True), *weights)

    compiled, written = compile_traced(both)
    with FakeTensorMode(), torch.no_grad():
        x, weights = on_a_gpu_that_is_not_there((2, 64, 4, 1, 9, 7, 1))
        compiled(x, *weights)
    assert written == [["kept", "partial"], ["x"], ["kept", "partial"], ["other"]]


def test_the_fused_block_runs_them_on_a_gpu(h200) -> None:
    model = timm.create_model("resnet20_cifar_mod").eval()
    block = FusedMoDBlock(fold_norms(model, torch.randn(1, 3, 32, 32)).layer2[1], inplace=True)
    compiled, written = compile_traced(lambda x: block(x.relu()))
    with FakeTensorMode(), torch.no_grad():
        for name, weight in block.named_parameters():
            moved = torch.nn.Parameter(torch.empty(weight.shape, device="cuda"), False)
            block.register_parameter(name, moved)
        x = torch.empty(2, block.channels, 16, 16, device="cuda")
        assert compiled(x).device.type == "cuda"
    assert written == [["kept", "partial"], ["x"]]


# As in resnet50_mod at 224 px, its four stages, and the last of resnet18_mod.
STAGES = {
    "stage 1": ((1, 256, 4, 1, 56, 56, 1), 16),
    "stage 2": ((16, 512, 8, 2, 28, 28, 1), 32),
    "stage 3": ((1, 1024, 16, 4, 14, 14, 1), 64),
    "stage 4": ((1, 2048, 32, 8, 7, 7, 1), 128),
    "two 3x3": ((1, 512, 8, None, 7, 7, 1), 32),
    "widest core": ((1, 1024, 64, 16, 14, 14, 1), 64),
    "widest two 3x3": ((1, 512, 32, None, 7, 7, 1), 32),
}
WAYS: list[dict[str, Any]] = [{"inplace": True}, {"order": "index"}]


@pytest.mark.parametrize(
    ("name", "dtype", "ways"),
    [
        ("stage 1", torch.bfloat16, WAYS[:1]),
        *(
            pytest.param(name, dtype, WAYS, marks=pytest.mark.slow)
            for name in STAGES
            for dtype in (torch.float32, torch.bfloat16)
        ),
    ],
)
def test_the_kernels_compile_for_a_gpu_and_fit_its_registers(
    name, dtype, ways, h200, monkeypatch, tmp_path
):
    from pliant.methods.mixture_of_depths.ops import _triton_launch

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launched: list[tuple[Any, dict[str, Any]]] = []

    class Recorded:
        def __init__(self, kernel: Any) -> None:
            self.kernel = kernel

        def __getitem__(self, grid: Any) -> Any:
            return self

        def __call__(self, *args: Any, **options: Any) -> None:
            named = zip(self.kernel.arg_names, args, strict=False)
            launched.append((self.kernel, dict(named) | options))

    monkeypatch.setattr(_triton_launch, "wrap_triton", Recorded)
    sizes, hidden = STAGES[name]
    with FakeTensorMode(), torch.no_grad():
        x, weights = on_a_gpu_that_is_not_there(sizes, dtype, hidden)
        for way in ways:
            mod_block(x, *weights, **way)
    once = ["pool", *["rank"] * (sizes[1] * hidden > 2**14), "basic" if sizes[3] is None else "bottleneck"]
    assert [kernel.__name__ for kernel, _ in launched] == once * len(ways)
    for kernel, arguments in launched:
        assert "LOCAL:0" in resources(kernel, arguments, h200, tmp_path)


def resources(kernel: Any, arguments: dict[str, Any], target: Any, folder: Path) -> str:
    """What a kernel, specialised as Triton does for these arguments, takes of a GPU."""
    import triton
    from triton.compiler import ASTSource

    signature, constants, attributes = {}, {}, {}
    for i, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = arguments[name]
        if isinstance(value, Tensor):
            signature[name] = {torch.float32: "*fp32", torch.bfloat16: "*bf16"}[value.dtype]
        elif parameter.is_constexpr or value == 1:
            signature[name], constants[name] = "constexpr", value
        else:
            signature[name] = "i32"
        if isinstance(value, Tensor) or (name not in constants and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target, {"num_warps": arguments.get("num_warps", 4)})
    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True).stdout


def on_gpu(x: Tensor, weights: Weights, dtype: torch.dtype) -> tuple[Tensor, Weights]:
    moved = tuple(None if w is None else w.to("cuda", dtype) for w in weights)
    return x.to("cuda", dtype), moved


TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}


@pytest.fixture
def exact() -> Iterator[None]:
    """No TF32 in what the kernels are compared with."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*SIZES, *STAGES])
@pytest.mark.parametrize("dtype", TOLERANCE)
# Not each batch in each layout: kernels compile anew for each, and a GPU may be lent for minutes.
@pytest.mark.parametrize(("batch", "channels_last"), [(1, False), (16, True)])
def test_on_a_gpu(name, dtype, batch, channels_last, exact) -> None:
    sizes, hidden = STAGES[name] if name in STAGES else (SIZES[name], 33 if "launch" in name else 4)
    _, channels, k, inner, height, width, dilation = sizes
    x, weights = on_gpu(
        feature_map(batch, channels, height, width, channels_last), drawn(channels, k, inner, hidden), dtype
    )
    with torch.inference_mode():
        assert unfit(x, weights[2]) == ""
        for order in ("score", "index"):
            expected = plain(x, weights, dilation, order)
            for inplace in (False, True):
                y = mod_block(x.clone(), *weights, dilation=dilation, order=order, inplace=inplace)
                assert (y.float() - expected).norm() / expected.norm() < TOLERANCE[dtype]
                assert torch.equal(y[:, k:], x[:, k:])


@pytest.mark.gpu
@pytest.mark.parametrize("inplace", [False, True])
def test_in_a_cuda_graph(inplace, exact) -> None:
    """Captured once, replayed on other images: other channels are chosen."""
    x, weights = on_gpu(feature_map(4, 1024, 14, 14, True), drawn(1024, 16, 4, 64), torch.float32)
    given = torch.empty_like(x)
    with torch.inference_mode():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles the kernels
            mod_block(given.copy_(x).clone(), *weights, inplace=inplace)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = mod_block(given.clone(), *weights, inplace=inplace)
        for seed in (1, 2, 3):
            torch.manual_seed(seed)
            other = feature_map(4, 1024, 14, 14, True).cuda()
            given.copy_(other)
            graph.replay()
            expected = plain(other, weights)
            assert (y - expected).norm() / expected.norm() < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled(mode, exact) -> None:
    x, weights = on_gpu(feature_map(2, 256, 28, 28, True), drawn(256, 4, 1, 16), torch.float32)

    def layers(x: Tensor, *weights: Tensor) -> Tensor:
        return mod_block((x * 2).relu(), *weights, inplace=True) + 1

    compiled = torch.compile(layers, mode=mode, fullgraph=True, dynamic=False)
    with torch.inference_mode():
        for _ in range(4):  # warm-up, capture, replays
            x = x.roll(1, 1)
            expected = plain((x * 2).relu(), weights) + 1
            y = compiled(x, *weights).clone()
            assert (y - expected).norm() / expected.norm() < 1e-5
