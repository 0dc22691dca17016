"""Engines: each computes what eager PyTorch does, and says what it does not."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from _engines import RUNTIMES, conv
from _measure import SMALL
from pliant.deploy.engines import ENGINES, FileEngine, Runner, named
from pliant.measuring.candidates import fresh
from pliant.measuring.latency import measure


def engines_there(names: list[str]) -> list[Any]:
    slow = {"compile", "compiled", "aoti"}  # a compiler takes half a minute
    return [pytest.param(n, marks=pytest.mark.slow) if n in slow else n for n in names]


def close_to_eager(name: str, precision: str, model: nn.Module) -> float:
    """Relative error of an engine's output, over that of the network in float32."""
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    return error(ENGINES[name].prepare(model, x, precision=precision, threads=1), model, x)


def error(run: Runner, model: nn.Module, x: Tensor) -> float:
    with torch.inference_mode():
        expected = model(x)
    found = run(x)
    assert found.shape == expected.shape
    return float((found.float() - expected).abs().max() / expected.abs().max())


def with_blocks() -> nn.Module:
    """Five blocks, two of them Mixture-of-Depths blocks."""
    return fresh("resnet20_cifar_mod", layers=(2, 1, 2)).eval()


def without_blocks() -> nn.Module:
    """Nothing that selects: in bfloat16 it may select others."""
    return fresh("resnet20_cifar", layers=(1, 1, 1)).eval()


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Tensor, Path]:
    """A network without blocks, an image, and the file of the network, which both runtimes run."""
    torch.manual_seed(0)
    model, x = without_blocks(), torch.randn(1, 3, 32, 32)
    return model, x, ENGINES["onnxruntime"].write(model, x, tmp_path_factory.mktemp("engines"))


@pytest.mark.parametrize("name", engines_there(["eager", "compile", "compiled", "aoti", *RUNTIMES]))
def test_an_engine_computes_what_eager_does(name: str) -> None:
    model = with_blocks()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert close_to_eager(name, "float32", model) < 1e-5
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", RUNTIMES)
def test_so_does_its_best_form(name: str, tmp_path: Path) -> None:
    model, x = with_blocks(), torch.randn(2, 3, 32, 32)
    engine = ENGINES[name]
    assert isinstance(engine, FileEngine)
    run = engine.load(engine.write(model, x, tmp_path, threads=1, optimized=True), x, threads=1)
    assert error(run, model, x) < 1e-5


@pytest.mark.parametrize("name", engines_there(["eager", "compile", "aoti"]))
def test_bfloat16_is_close_and_is_bfloat16(name: str) -> None:
    assert 1e-6 < close_to_eager(name, "bfloat16", without_blocks()) < 0.1


@pytest.mark.skipif("openvino" not in RUNTIMES, reason="OpenVINO is not installed")
def test_openvino_in_bfloat16(written: tuple[nn.Module, Tensor, Path]) -> None:
    model, x, path = written
    try:
        run = ENGINES["openvino"].load(path, x, precision="bfloat16", threads=1)
    except ValueError as refused:
        pytest.skip(str(refused))  # this CPU has none
    assert 1e-6 < error(run, model, x) < 0.1


@pytest.mark.skipif("openvino" not in RUNTIMES, reason="OpenVINO is not installed")
def test_openvino_says_what_it_would_not_do(
    monkeypatch: pytest.MonkeyPatch, written: tuple[nn.Module, Tensor, Path]
) -> None:
    import openvino

    engine, (_, x, path) = ENGINES["openvino"], written
    held = {"INFERENCE_NUM_THREADS": 2, "INFERENCE_PRECISION_HINT": "<Type: 'float32'>"}
    compiled = SimpleNamespace(get_property=held.__getitem__)
    monkeypatch.setattr(openvino.Core, "compile_model", lambda *args: compiled)
    with pytest.raises(ValueError, match="OpenVINO runs on 2 threads on this machine, not on 3"):
        engine.load(path, x, threads=3)
    with pytest.raises(ValueError, match=r"no bfloat16 on this machine: it would compute in .*float32"):
        engine.load(path, x, precision="bfloat16", threads=2)


def test_what_an_engine_cannot_do_is_said() -> None:
    x = torch.zeros(1, *SMALL)
    with pytest.raises(ValueError, match="bfloat16 is not supported by onnxruntime, only float32, int8"):
        ENGINES["onnxruntime"].prepare(conv(), x, precision="bfloat16")
    with pytest.raises(ValueError, match="no precision 'int4'; there are float32,"):
        ENGINES["eager"].prepare(conv(), x, precision="int4")
    with pytest.raises(ValueError, match="int8 is not supported by eager, only float32, bfloat16"):
        ENGINES["eager"].prepare(conv(), x, precision="int8")
    with pytest.raises(ValueError, match="threads must be at least 1, not 0"):
        ENGINES["eager"].prepare(conv(), x, threads=0)
    assert ENGINES["openvino"].unfit("cuda", "float32") == "openvino is not supported on cuda, only on cpu"
    with pytest.raises(ValueError, match="no engine 'tensorrt'; the engines are eager, compile,"):
        named(["eager", "tensorrt"])
    with pytest.raises(ValueError, match="no engine named"):
        named([])


@pytest.mark.parametrize(
    ("name", "absent", "line"),
    [
        (
            "onnxruntime",
            "onnxruntime",
            'onnxruntime not installed: pip install ".[onnx]" in a checkout of pliant',
        ),
        (
            "openvino",
            "openvino",
            'openvino not installed: pip install ".[openvino]" in a checkout of pliant',
        ),
    ],
)
def test_a_missing_engine_is_named_with_its_install_line(
    name: str, absent: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec

    def find_spec(module: str, *args: Any) -> Any:
        there = module in (*ENGINES[name].packages, "onnx", "onnxscript") and module != absent
        return None if module == absent else object() if there else find(module, *args)

    monkeypatch.setattr("importlib.util.find_spec", find_spec)
    assert ENGINES[name].missing == line
    assert ENGINES[name].version == ""
    with pytest.raises(ValueError, match=r"not installed: pip install"):
        ENGINES[name].prepare(conv(), torch.zeros(1, *SMALL))
    rows = measure({"a": conv()}, input_size=SMALL, engines=["eager", name], rounds=1, min_run_time=0)
    assert [(r.engine, r.error) for r in rows] == [("eager", ""), (name, line)]
    with pytest.raises(ValueError, match=r"not installed: pip install"):  # nothing else to measure
        measure({"a": conv()}, input_size=SMALL, engine=name)


@pytest.mark.parametrize("name", engines_there(["eager", "compile", "compiled", "aoti", *RUNTIMES]))
def test_images_that_a_runner_was_not_made_for_are_refused(name: str) -> None:
    """Code for one shape may read past the end of others; both are named."""
    model, x = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten()).eval(), torch.randn(2, *SMALL)
    run = ENGINES[name].prepare(model, x, threads=1)
    for wrong in ((2, 1, 8, 7), (2, 2, 8, 8), (0, *SMALL), SMALL):
        with pytest.raises(ValueError, match=rf"made for images \[.*, 1, 8, 8\] of .*not \[{wrong[0]}, "):
            run(torch.zeros(*wrong))
    with pytest.raises(ValueError, match=r"\[.*, 1, 8, 8\] of torch.float32, not .* of torch.uint8"):
        run(torch.zeros(2, *SMALL, dtype=torch.uint8))
    assert run(x).shape == (2, 72)
    if name in ("eager", "onnxruntime"):
        assert run(torch.zeros(3, *SMALL)).shape == (3, 72)
    else:
        for batch in (1, 3):
            with pytest.raises(ValueError, match=rf"images \[2, 1, 8, 8\] of .*not \[{batch}, 1, 8, 8\]"):
                run(torch.zeros(batch, *SMALL))


def test_threads_are_those_that_are_told() -> None:
    seen = []

    class Spy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            seen.append((torch.get_num_threads(), torch.is_inference_mode_enabled(), x.dtype))
            return x

    before = torch.get_num_threads()
    run = ENGINES["eager"].prepare(Spy(), torch.zeros(1, *SMALL), precision="bfloat16", threads=2)
    try:
        run(torch.zeros(1, *SMALL))
    finally:
        torch.set_num_threads(before)
    assert seen == [(2, True, torch.bfloat16)]


@pytest.mark.parametrize("name", RUNTIMES)
def test_runtimes_get_their_threads(
    name: str, monkeypatch: pytest.MonkeyPatch, written: tuple[nn.Module, Tensor, Path]
) -> None:
    """ONNX Runtime by its session's options, OpenVINO by its properties."""
    model, x, path = written
    given: list[Any] = []
    if name == "onnxruntime":
        import onnxruntime

        session = onnxruntime.InferenceSession

        def watched(path: str, options: Any, providers: list[str]) -> Any:
            given.append((options.intra_op_num_threads, options.inter_op_num_threads))
            return session(path, options, providers=providers)

        monkeypatch.setattr(onnxruntime, "InferenceSession", watched)
        wanted = [(2, 1)]
    else:
        import openvino

        compile_model = openvino.Core.compile_model

        def watched_model(self: Any, net: Any, device: str, options: dict[str, Any]) -> Any:
            given.append({**options, "shape": str(net.inputs[0].partial_shape)})
            return compile_model(self, net, device, {**options, "INFERENCE_NUM_THREADS": 2})

        monkeypatch.setattr(openvino.Core, "compile_model", watched_model)
        wanted = [
            {
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": 2,
                "ENABLE_HYPER_THREADING": True,
                "INFERENCE_PRECISION_HINT": "f32",
                "shape": "[1,3,32,32]",
            }
        ]
    if os.cpu_count() == 1:
        pytest.skip("one core")
    run = ENGINES[name].load(path, x, threads=2)
    assert given == wanted
    with torch.inference_mode():
        assert torch.allclose(run(x), model(x), atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["eager", "compile", "aoti"])
def test_engines_on_a_gpu(name: str) -> None:
    rows = measure(
        "resnet20_cifar_mod",
        against="resnet20_cifar",
        device="cuda",
        engines=[name],
        batch=4,
        dtype=("float32", "bfloat16"),
        rounds=3,
    )
    assert [r.error for r in rows] == [""] * 8
    assert all(r.median_ms is not None and r.median_ms > 0 for r in rows)
    assert [r.tax is not None for r in rows] == [False, True, True, False] * 2
    assert {r.gpu for r in rows} == {torch.cuda.get_device_name()}
