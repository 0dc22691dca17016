"""Engines: each computes what eager PyTorch does; what one that fails costs."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from pliant import cli
from pliant.deploy.engines import ENGINES, FileEngine, named
from pliant.deploy.engines.eager import Eager
from pliant.measuring import latency
from pliant.measuring.entrants import EngineError, fresh
from pliant.measuring.isolation import Isolated
from pliant.measuring.latency import NOT_FASTER, measure
from pliant.measuring.rows import (
    LOWER_RESOLUTION,
    NO_BLOCKS,
    Measurement,
    markdown_table,
    read_rows,
    write_rows,
)

SMALL = (1, 8, 8)
RUNTIMES = [name for name in ("onnxruntime", "openvino") if importlib.util.find_spec(name)]

# Engines for a child process; each does one thing that it must not.
FAKES = '''
import os, time
import torch
from pliant.deploy.engines import FileEngine


class Fake(FileEngine):
    name = "fake"

    def shared(self, precision, optimized=False, native=False):
        return "fake"

    def write(self, model, example, folder, **how):
        path = folder / "network"
        path.write_text(str(sum(p.numel() for p in model.parameters())))
        return path

    def load(self, path, example, **how):
        print("noise on standard output")
        return lambda images: images.sum()


class Fails(Fake):
    """What goes wrong depends on the network, which its number of parameters tells."""

    name = "fails"

    def load(self, path, example, **how):
        kind = path.read_text()
        if kind == "20":
            os._exit(139)
        if kind == "30":
            time.sleep(600)
        if kind == "40":
            raise RuntimeError("no luck in /home/someone/secret/file.py")
        left = 6 if kind == "50" else 10**9

        def run(images):  # of 50 parameters: dies in the first round, after warming up
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), 11)
            return images.sum()

        return run
'''


def conv(width: int = 1) -> nn.Sequential:
    """Of ten parameters a channel."""
    return nn.Sequential(nn.Conv2d(1, width, 3))


def engines_there(names: list[str]) -> list[Any]:
    slow = {"compile", "compiled", "aoti"}  # a compiler takes half a minute
    return [pytest.param(n, marks=pytest.mark.slow) if n in slow else n for n in names]


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The engines above, which a child process finds as this one does."""
    (tmp_path / "pliant_test_fakes.py").write_text(FAKES)
    monkeypatch.syspath_prepend(tmp_path)
    import pliant_test_fakes

    yield pliant_test_fakes
    del sys.modules["pliant_test_fakes"]


def use(engine: FileEngine, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setitem(ENGINES, engine.name, engine)
    return engine.name


def close_to_eager(name: str, precision: str, model: nn.Module, **options: Any) -> float:
    """Relative error of an engine's output, over that of the network in float32."""
    x = torch.randn(2, 3, 32, 32).to(memory_format=torch.channels_last)
    with torch.inference_mode():
        expected = model(x)
    found = ENGINES[name].prepare(model, x, precision=precision, threads=1, **options)(x)
    assert found.shape == expected.shape
    return float((found.float() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("name", engines_there(["eager", "compile", "compiled", "aoti", *RUNTIMES]))
def test_an_engine_computes_what_eager_does(name: str) -> None:
    model = fresh("resnet20_cifar_mod").eval()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    assert close_to_eager(name, "float32", model) < 1e-5
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", RUNTIMES)
def test_so_does_its_best_form(name: str) -> None:
    model = fresh("resnet20_cifar_mod").eval()
    assert close_to_eager(name, "float32", model, optimized=True) < 1e-5


@pytest.mark.parametrize("name", engines_there(["eager", "compile", "aoti"]))
def test_bfloat16_is_close_and_is_bfloat16(name: str) -> None:
    # Without blocks that select: in bfloat16 they may select others.
    error = close_to_eager(name, "bfloat16", fresh("resnet20_cifar").eval())
    assert 1e-6 < error < 0.1


@pytest.mark.skipif("openvino" not in RUNTIMES, reason="OpenVINO is not installed")
def test_openvino_in_bfloat16() -> None:
    try:
        error = close_to_eager("openvino", "bfloat16", fresh("resnet20_cifar").eval())
    except ValueError as refused:
        pytest.skip(str(refused))  # this CPU has none
    assert 1e-6 < error < 0.1


@pytest.mark.skipif("openvino" not in RUNTIMES, reason="OpenVINO is not installed")
def test_openvino_says_what_it_would_not_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import openvino

    model, x = fresh("resnet20_cifar").eval(), torch.randn(1, 3, 32, 32)
    engine = ENGINES["openvino"]
    path = engine.write(model, x, tmp_path)
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
        ("onnxruntime", "onnxruntime", 'onnxruntime not installed: pip install "pliant[onnx]"'),
        ("openvino", "openvino", 'openvino not installed: pip install "pliant[openvino]"'),
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
def test_runtimes_get_their_threads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime by its session's options, OpenVINO by its properties; one batch, then another."""
    model, x = fresh("resnet20_cifar").eval(), torch.randn(1, 3, 32, 32)
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
    run = ENGINES[name].prepare(model, x, threads=2)
    assert given[-1:] == wanted  # the file was checked in a session before
    with torch.inference_mode():
        assert torch.allclose(run(x), model(x), atol=1e-5)


def test_an_engine_that_fails_costs_its_row(fakes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = use(fakes.Fails(), monkeypatch)
    monkeypatch.setattr("pliant.measuring.writing.FEW", 6)  # one child is enough here
    # Between those that are well: dies as it loads, hangs, raises, dies in a round.
    models = {letter: conv(width) for width, letter in enumerate("abcdef", 1)}
    limits = {"rounds": 2, "min_run_time": 0, "timeout": 4}
    rows = measure(models, against="a", input_size=SMALL, engines=[name], threads=1, **limits)
    assert [r.error.partition(" (")[0] for r in rows] == [
        "",
        "fails died: SIGSEGV",
        "fails did not answer within 4 s",
        "RuntimeError: no luck in file.py",
        "fails died: SIGSEGV",
        "",
    ]
    assert [r.rounds for r in rows] == [2, 0, 0, 0, 0, 2]
    assert [r.time_ratio is not None for r in rows] == [not r.error for r in rows]
    assert all(r.macs == (i + 1) * rows[0].macs for i, r in enumerate(rows))


def test_an_engine_that_cannot_be_imported_in_its_process(
    fakes: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = use(fakes.Fake(), monkeypatch)
    (tmp_path / "pliant_test_fakes.py").write_text("raise ImportError('libfake.so.1 is not there')")
    rows = measure({"a": conv(), "b": conv()}, input_size=SMALL, engines=[name], rounds=1)
    assert [r.error for r in rows] == ["ImportError: libfake.so.1 is not there"] * 2


def test_a_process_that_does_not_even_start(fakes: Any) -> None:
    broken = "import sys; sys.exit('no torch in /home/someone/x')"
    with Isolated(fakes.Fake(), 5, command=[sys.executable, "-c", broken]) as child:
        for _ in range(2):
            with pytest.raises(EngineError, match=r"fake died: exit status 1 \(no torch in"):
                child.load(Path("x"), torch.zeros(1, *SMALL), "float32", 1)


def test_one_child_runs_all_and_ends(fakes: Any, tmp_path: Path) -> None:
    (tmp_path / "network").write_text("1")
    with Isolated(fakes.Fake(), 60) as child:
        loaded = [child.load(tmp_path / "network", torch.zeros(1, *SMALL), "float32", 1)[0] for _ in "ab"]
        process = child._child
        assert loaded == [0, 1]
        assert all(child.time(n, 2) > 0 for n in loaded)
        assert child._child is process
    assert process is not None
    assert process.returncode is not None


@pytest.mark.slow
def test_a_worker_by_hand(tmp_path: Path, fakes: Any) -> None:
    (tmp_path / "network").write_text("1")
    load = {
        "do": "load",
        "number": 0,
        "engine": "pliant_test_fakes:Fake",
        "path": str(tmp_path / "network"),
    }
    load |= {"shape": [1, 1, 2, 2], "strides": [4, 4, 2, 1], "dtype": "float32", "device": "cpu"}
    lines = [{**load, "precision": "float32", "threads": 1}, {"do": "time", "number": 7, "calls": 1}]
    done = subprocess.run(
        [sys.executable, "-m", "pliant.measuring.worker"],
        input="".join(json.dumps(line) + "\n" for line in lines),
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        capture_output=True,
        text=True,
        check=True,
    )
    ready, loaded, failed = map(json.loads, done.stdout.splitlines())
    assert ready == {}
    assert loaded["seconds"] > 0
    assert failed == {"error": "KeyError: 7"}
    assert "noise on standard output" in done.stderr


def test_forms_stand_beside_each_other(clock: SimpleNamespace) -> None:
    # Baseline, at 16 px, plain, optimized, without blocks.
    clock.times = lambda entrant, turn: (2.0, 1.5, 2.2, 1.1, 1.0)[entrant]
    rows = measure(
        "resnet20_cifar_mod",
        against="resnet20_cifar",
        engines=["eager"],
        lower_resolution=16,
        rounds=2,
    )
    assert [(r.label, r.form) for r in rows] == [
        ("resnet20_cifar", "plain"),
        ("resnet20_cifar at 16 px", "plain"),
        ("resnet20_cifar_mod", "plain"),
        ("resnet20_cifar_mod, optimized", "optimized"),
        (f"resnet20_cifar_mod {NO_BLOCKS}", "plain"),
    ]
    assert rows[1].variant == LOWER_RESOLUTION
    assert [r.error for r in rows] == [""] * 5
    assert [r.tax for r in rows] == [None, None, pytest.approx(1.2), pytest.approx(0.1), None]
    assert [r.time_ratio for r in rows] == [1.0, 0.75, 1.1, 0.55, 0.5]
    assert [r.note for r in rows] == ["", "", NOT_FASTER, "", ""]
    assert [r.channels_last for r in rows] == [True] * 5
    assert [c[:2] for c in clock.calls if c[1] >= 0] == [(n, t) for t in (0, 1) for n in range(5)]
    # Counts are those of the network, not of what folding leaves of it.
    as_built = measure("resnet20_cifar_mod", rounds=1, tax=False)[0]
    assert as_built.form == "as built"
    assert [r.parameters for r in rows[2:4]] == [as_built.parameters] * 2
    assert [r.macs for r in rows[2:4]] == [as_built.macs] * 2


def test_every_network_is_equally_optimised(monkeypatch: pytest.MonkeyPatch) -> None:
    class Spy(Eager):
        """Notes what it is handed: norms, layout of weights and images, size."""

        def __init__(self, name: str, by_pytorch: bool) -> None:
            self.name, self.by_pytorch, self.seen = name, by_pytorch, []

        def prepare(self, model: nn.Module, example: Tensor, **how: Any) -> Any:
            norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
            tensors = [example, *(m.weight for m in model.modules() if isinstance(m, nn.Conv2d))]
            last = {t.is_contiguous(memory_format=torch.channels_last) for t in tensors}
            self.seen.append((len(norms), last, example.shape[-1]))
            return super().prepare(model, example, **how)

    spies = Spy("spy", True), Spy("stranger", False)
    for spy in spies:
        monkeypatch.setitem(ENGINES, spy.name, spy)
    options: dict[str, Any] = {"against": "resnet20_cifar", "lower_resolution": 16, "rounds": 1}
    options |= {"min_run_time": 0}
    rows = measure("resnet20_cifar_mod", engines=["spy", "stranger"], **options)
    assert [(r.model, r.variant, r.form) for r in rows[:5]] == [
        ("resnet20_cifar", "network", "plain"),
        ("resnet20_cifar", LOWER_RESOLUTION, "plain"),
        ("resnet20_cifar_mod", "network", "plain"),
        ("resnet20_cifar_mod", "network", "optimized"),
        ("resnet20_cifar_mod", NO_BLOCKS, "plain"),
    ]
    assert [r.error for r in rows] == [""] * 10
    assert spies[0].seen == [(0, {True}, size) for size in (32, 16, 32, 32, 32)]
    # What is not PyTorch's gets folded norms, too, and its own layout.
    assert [(norms, size) for norms, _, size in spies[1].seen] == [(0, s) for s in (32, 16, 32, 32, 32)]
    assert all(False in last for _, last, _ in spies[1].seen)
    # As built, nothing is done to any of them.
    measure("resnet20_cifar_mod", engine="spy", **options)
    assert len(spies[0].seen) == 9
    assert all(norms > 0 and False in last for norms, last, _ in spies[0].seen[5:])


def test_blocks_without_a_fused_form_are_noted(
    clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = fresh("resnet20_cifar_mod", selection="first")
    rows = measure({"a": model}, engines=["eager"], rounds=1, tax=False)
    said = "blocks run in PyTorch's operators: its channels are not chosen by a learned selector"
    assert [r.note for r in rows] == ["", said]
    monkeypatch.setattr("pliant.ops.building._outcome", "no compiler")
    rows = measure("resnet20_cifar_mod", engines=["eager"], rounds=1, tax=False)
    assert [r.note for r in rows] == ["", "blocks run in PyTorch's operators: no compiler"]


def test_a_form_is_held_against_the_same_form(clock: SimpleNamespace) -> None:
    # As built and plain: baseline, network, network without blocks.
    clock.times = lambda entrant, turn: (2.0, 1.0, 3.0, 1.5, 2.0, 1.0)[entrant]
    forms = ("as built", "plain")
    rows = measure("resnet20_cifar_mod", against="resnet20_cifar", forms=forms, rounds=1)
    assert [(r.variant, r.form) for r in rows] == [
        (v, f) for v in ("network", "network", NO_BLOCKS) for f in forms
    ]
    assert [r.time_ratio for r in rows] == [1.0, 1.0, 1.5, 1.5, 1.0, 1.0]
    assert [r.tax for r in rows] == [None, None, 0.5, 0.5, None, None]
    with pytest.raises(
        ValueError, match="no form 'best'; the forms are as built, plain, optimized, native"
    ):
        measure("resnet20_cifar_mod", forms=["best"])


@pytest.mark.slow
def test_a_row_for_each_engine_batch_and_precision(
    clock: SimpleNamespace, fakes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = fakes.Fake()
    monkeypatch.setattr(type(fake), "precisions", ("float32",))
    name = use(fake, monkeypatch)
    written: list[str] = []
    write = Isolated.write
    monkeypatch.setattr(Isolated, "write", lambda s, *a: written.append(s.engine.name) or write(s, *a))
    told: list[tuple[int, int, str]] = []
    rows = measure(
        {"a": conv(), "b": conv()},
        against="a",
        input_size=SMALL,
        engines=["eager", name],
        batch=(1, 3),
        dtype=("float32", "bfloat16"),
        rounds=1,
        min_run_time=0,
        progress=lambda *t: told.append(t),
    )
    assert [(r.engine, r.dtype, r.batch, r.model) for r in rows] == [
        (e, d, b, m) for e in ("eager", name) for d in ("float32", "bfloat16") for b in (1, 3) for m in "ab"
    ]
    refused = f"bfloat16 is not supported by {name}, only {', '.join(ENGINES[name].precisions)}"
    assert [r.error for r in rows] == [""] * 12 + [refused] * 4
    assert [r.rounds for r in rows] == [1] * 12 + [0] * 4
    assert all(r.time_ratio is not None for r in rows[:12])
    assert len(written) == 2  # one file serves both batches
    assert told[-1] == (32, 32, "done")
    assert [t[0] for t in told] == sorted(t[0] for t in told)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["aoti", "compile", *RUNTIMES])
def test_all_forms_are_measured(name: str) -> None:
    rows = measure(
        "resnet20_cifar_mod",
        against="resnet20_cifar",
        engines=["eager", name],
        forms=["plain", "optimized"],
        batch=2,
        rounds=2,
        min_run_time=0,
        threads=1,
    )
    if any("compiler" in row.error for row in rows):
        pytest.skip("no C++ compiler on this machine")
    assert [r.error for r in rows] == [""] * 8
    assert all(r.median_ms is not None and r.median_ms > 0 for r in rows)
    assert [r.tax is not None for r in rows] == [False, True, True, False] * 2
    assert {r.runtime.partition(" ")[0] for r in rows} == {"", name if name in RUNTIMES else ""}
    assert [r.channels_last for r in rows] == [True] * 4 + [name not in RUNTIMES] * 4


ROW = Measurement(model="net", median_ms=1.0, form="optimized", runtime="onnxruntime 1.31.0")


def test_forms_and_runtimes_are_kept_and_shown(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    write_rows(path, [ROW])
    assert read_rows(path) == [ROW]
    text = markdown_table([ROW, Measurement(model="net", median_ms=2.0, form="plain")])
    assert "norms folded" in text
    assert "by onnxruntime 1.31.0" in text
    assert "| net, optimized |" in text
    assert "norms" not in markdown_table([Measurement(model="net", median_ms=2.0)])


def test_files_without_the_newer_columns_are_read_and_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    old = Measurement(model="net", median_ms=1.0, date="2026-01-02T03:04:05+00:00")
    write_rows(path, [old])
    text = path.read_text().replace(",form,runtime\n", "\n").replace(",as built,\n", "\n")
    path.write_text(text)
    assert text.splitlines()[0].endswith(",date")
    assert read_rows(path) == [old]
    write_rows(path, [ROW], append=True)
    assert read_rows(path) == [old, ROW]
    results = Path(__file__).resolve().parents[1] / "results"
    assert read_rows(results / "condconv-latency-cpu.csv")[0].form == "as built"


def test_the_command_takes_engines_batches_and_forms(
    tmp_path: Path, clock: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock.times = lambda entrant, turn: 1.0 + entrant % 3
    command = ["measure", "resnet20_cifar_mod", "--against", "resnet20_cifar", "--rounds", "2", "--no-tax"]
    command += ["--engines", "eager", "--batch", "1", "--batch", "2", "--rows", str(tmp_path / "rows.csv")]
    command += ["--html", str(tmp_path / "page.html"), "--markdown"]
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 0, done.output
    rows = read_rows(tmp_path / "rows.csv")
    assert [(r.batch, r.form) for r in rows] == [
        (b, f) for b in (1, 2) for f in ("plain", "plain", "optimized")
    ]
    assert done.output.count("| resnet20_cifar_mod, optimized |") == 2
    page = (tmp_path / "page.html").read_text()
    assert page.count("<td>resnet20_cifar_mod, optimized</td>") == 2
    assert "<h2>eager, batch 2, float32</h2>" in page
    assert f"{NOT_FASTER[0].upper()}{NOT_FASTER[1:]}: resnet20_cifar_mod (eager, batch 1, float32)" in page
    assert page.count("<svg") == 1
    assert ">Mixture-of-Depths, optimized<" in page  # the figure's legend

    # Rows of a run that is over are kept when the next takes the process down.
    runs = iter(range(1, 9))
    run = latency.run
    monkeypatch.setattr(latency, "run", lambda *a: sys.exit(9) if next(runs) == 2 else run(*a))
    done = CliRunner().invoke(cli.app, command)
    assert done.exit_code == 9
    assert [r.batch for r in read_rows(tmp_path / "rows.csv")] == [1, 1, 1, 2, 2, 2, 1, 1, 1]

    refused = CliRunner().invoke(cli.app, ["measure", "resnet20_cifar", "--engines", "eager,tvm"])
    assert str(refused.exception).startswith("no engine 'tvm'; the engines are eager, compile, aoti,")
    refused = CliRunner().invoke(cli.app, ["measure", "resnet20_cifar", "--forms", "best"])
    assert str(refused.exception) == "no form 'best'; the forms are as built, plain, optimized, native"


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
