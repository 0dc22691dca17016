"""Writing files for engines: in children of their own, ahead, once, and never beside timing."""

from __future__ import annotations

import importlib.util
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from _measure import SMALL, kind, stand_in
from pliant.compiling import torch_threads
from pliant.deploy.engines import ENGINES, FileEngine
from pliant.measuring import worker
from pliant.measuring.candidates import Candidate
from pliant.measuring.isolation import Isolated
from pliant.measuring.latency import measure
from pliant.measuring.writing import FEW, Files, Writing

ANSWER = """
log = Path(os.environ["PLIANT_TEST_LOG"])

def note(*words):
    with log.open("a") as file:
        print(*words, file=file, flush=True)

def wait_for(words):
    for _ in range(1000):
        if words in log.read_text():
            return
        time.sleep(0.01)
    raise RuntimeError(f"no {words!r}")

def write(request, given, folder):
    kind = kind_of(given)
    note("write", kind, os.getpid(), len(list(folder.parent.glob("*.network"))))
    if kind == "crash":
        os._exit(3)
    if kind == "hang":
        other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
        note("compiler", other.pid)
        time.sleep(600)
    if kind == "raise":
        raise RuntimeError("no luck")
    if kind == "unread":
        return None
    if kind == "first":
        wait_for("write second")
    path = folder / "network"
    path.write_text(kind)
    note("written", kind)
    return str(path)

def answer(request):
    if request["do"] == "write":
        return {"path": write(request, Path(request["given"]), Path(request["folder"]))}
    if request["do"] == "load":
        kind = Path(request["path"]).read_text()
        note("load", kind, os.getpid())
        if kind == "first":
            wait_for("write third")
        return {"seconds": 0.05 if kind == "short" else 1.0}
    note("time", request["number"], request["calls"])
    return {"seconds": 0.01}
"""


class Fake(FileEngine):
    name = "fake"

    def write(self, model: nn.Module, example: Tensor, folder: Path, **how: Any) -> Path:
        path = folder / "network"
        path.write_text(f"by the parent, {how}")
        return path

    def load(self, path: Path, example: Tensor, **how: Any) -> Any:
        raise NotImplementedError("a child does that")


class Shared(Fake):
    name = "shared"

    def shared(self, precision: str = "float32", optimized: bool = False, native: bool = False) -> str:
        return "file"


class Other(Shared):
    name = "other"


def nets(*kinds: str) -> dict[str, nn.Module]:
    return {name: kind(name) for name in kinds}


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[list[str]]]:
    """The engines above with children as above; gives the lines that were noted, by first word."""
    log = tmp_path / "log"
    log.touch()
    monkeypatch.setenv("PLIANT_TEST_LOG", str(log))
    monkeypatch.setattr("pliant.measuring.isolation.COMMAND", stand_in(ANSWER))
    monkeypatch.setattr("pliant.measuring.writing.os.cpu_count", lambda: 2)
    monkeypatch.setattr("pliant.measuring.writing.FEW", 2)
    for engine in (Fake(), Shared(), Other()):
        monkeypatch.setitem(ENGINES, engine.name, engine)

    def lines(*words: str) -> list[list[str]]:
        found = [line.split() for line in log.read_text().splitlines()]
        return [line for line in found if not words or line[0] in words]

    lines.log = log  # type: ignore[attr-defined]
    return lines


def ended(pid: str) -> bool:
    """Whether a process is over; one that nobody waited for is."""
    stat = Path(f"/proc/{pid}/stat")
    for _ in range(500):
        if not stat.exists() or stat.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.01)
    return False


def test_a_file_that_cannot_be_written_costs_its_row(told: Any) -> None:
    class Local(nn.Conv2d):
        """Of a class that no pickle can name."""

    models = nets("a", "crash", "hang", "raise", "unread", "b")
    models["local"] = nn.Sequential(Local(1, 1, 3))
    limits: dict[str, Any] = {"rounds": 2, "min_run_time": 0, "write_timeout": 3}
    rows = measure(models, input_size=SMALL, engine="fake", threads=2, **limits)
    assert {r.model: (r.engine, r.error) for r in rows if r.error} == {
        "crash": ("fake", "fake (writing a file) died: exit status 3"),
        "hang": ("fake", "fake (writing a file) did not answer within 3 s"),
        "raise": ("fake", "RuntimeError: no luck"),
    }
    assert {r.model: r.rounds for r in rows if not r.error} == dict.fromkeys(
        ("a", "unread", "b", "local"), 2
    )
    # What no child can read is written here, with the same keywords.
    by_parent = ["load", "by", "the", "parent,", "{'precision':", "'float32',", "'threads':", "2}"]
    assert [line[:-1] for line in told("load") if line[1] == "by"] == [by_parent] * 2
    if sys.platform == "linux":  # nothing goes on, and not what a child had started
        assert all(ended(line[1]) for line in told("compiler"))
        assert all(ended(line[2]) for line in told("write"))


def test_files_are_written_ahead_two_at_once_and_not_beside_timing(told: Any) -> None:
    def note(done: int, total: int, what: str) -> None:
        with told.log.open("a") as file:
            print("progress", what, file=file, flush=True)

    # Writing the first waits for the second, and loading it for the third, or their rows say so.
    models = nets("first", "second", "third", "fourth", "fifth", "sixth")
    rows = measure(models, input_size=SMALL, engine="fake", rounds=2, min_run_time=0, progress=note)
    assert [r.error for r in rows] == [""] * 6
    lines = told()
    assert [line[1] for line in lines if line[0] == "load"] == list(models)
    start = lines.index(["progress", "round", "1", "of", "2"])
    assert {line[0] for line in lines[start:]} == {"progress", "time"}
    assert {line[0] for line in lines[:start]} == {"progress", "write", "written", "load"}
    at_once = 0
    for line in lines:
        at_once += (line[0] == "write") - (line[0] == "written")
        assert at_once <= 2
    writes = told("write")
    assert sorted(line[1] for line in writes) == sorted(models)
    assert len({line[2] for line in writes}) == 2
    assert not {line[2] for line in writes} & {line[2] for line in told("load")}
    assert max(int(line[3]) for line in writes) <= 3  # networks on their way


def test_a_few_are_written_by_the_child_that_runs_them(told: Any) -> None:
    rows = measure(nets("a", "b"), input_size=SMALL, engine="fake", rounds=1, min_run_time=0)
    assert [r.error for r in rows] == ["", ""]
    steps = told("write", "load")
    assert [line[:2] for line in steps] == [[do, kind] for kind in "ab" for do in ("write", "load")]
    assert len({line[2] for line in steps}) == 1
    # One that it dies of costs its row here, too; the other is loaded again in the next child.
    rows = measure(nets("c", "crash"), input_size=SMALL, engine="fake", rounds=1, min_run_time=0)
    assert [(r.rounds, r.error) for r in rows] == [
        (1, ""),
        (0, "fake (writing a file) died: exit status 3"),
    ]
    assert [line[1] for line in told("load")] == ["a", "b", "c", "c"]


@pytest.mark.parametrize(
    ("count", "device", "cores", "ahead"),
    [(FEW, "cpu", 8, 0), (FEW + 1, "cpu", 8, 2), (FEW + 1, "cpu", 1, 1), (FEW + 1, "cuda", 8, 0)],
)
def test_how_many_children_write(
    count: int, device: str, cores: int, ahead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pliant.measuring.writing.os.cpu_count", lambda: cores)
    candidates = [Candidate(str(i), "network") for i in range(count)]
    candidates += [Candidate("refused", "network", error="no"), Candidate("there", "network")]
    files = Files(tmp_path, written={("there", "network", "as built", "file"): tmp_path})
    how = {"precision": "float32", "threads": 1}
    engine = Shared()
    with Writing(files, engine, Isolated(engine, 1), candidates, how, device, 1) as writing:
        assert writing.ahead == ahead


def test_shared_files_are_written_once_or_fail_once(told: Any) -> None:
    models = nets("a", "crash", "raise")
    options: dict[str, Any] = {"rounds": 1, "min_run_time": 0, "batch": (1, 3)}
    rows = measure(models, input_size=SMALL, engines=["shared", "other"], forms=["as built"], **options)
    failures = ["", "shared (writing a file) died: exit status 3", "RuntimeError: no luck"]
    assert [r.error for r in rows] == failures * 4
    assert sorted(line[1] for line in told("write")) == ["a", "crash", "raise"]
    assert [line[1] for line in told("load")] == ["a"] * 4
    # Two engines and two batches had one file; what serves one alone is written for each batch.
    measure({"b": kind("b")}, input_size=SMALL, engine="fake", **options)
    assert [line[1] for line in told("write")][3:] == ["b", "b"]


def test_calls_a_round_are_counted_when_nothing_is_written(told: Any) -> None:
    # Beside files being written a call took 0.05 s, or 1 s; alone it takes 0.01 s.
    measure(nets("short", "a", "b"), input_size=SMALL, engine="fake", rounds=1, min_run_time=0.1)
    assert told("time") == [["time", "0", "1"], ["time", "0", "10"], ["time", "1", "1"], ["time", "2", "1"]]


def test_no_network_is_begun_ahead_after_the_time_is_up(told: Any) -> None:
    options: dict[str, Any] = {"rounds": 1, "min_run_time": 0, "max_prepare_time": 0}
    rows = measure(nets("a", "b", "c"), input_size=SMALL, engine="fake", **options)
    assert [r.error for r in rows] == ["", *["left out: preparing took over 0 s"] * 2]
    assert [line[1] for line in told("write")] == ["a"]


def test_an_interrupted_run_ends_what_is_being_written(told: Any) -> None:
    def interrupt(done: int, total: int, what: str) -> None:
        while done == 1 and not told("compiler"):
            time.sleep(0.01)
        if done == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # at once, not after ten minutes
        measure(nets("a", "hang", "c", "d"), input_size=SMALL, engine="fake", progress=interrupt)
    if sys.platform == "linux":
        assert all(ended(line[1]) for line in told("compiler"))
        assert all(ended(line[2]) for line in told("write", "load"))


def request_for(given: Path, folder: Path) -> dict[str, Any]:
    engine = f"{Echo.__module__}:{Echo.__qualname__}"
    where = {"given": str(given), "folder": str(folder)}
    return {"do": "write", "engine": engine, "threads": 3, "seed": 7, **where, "how": {"optimized": True}}


class Echo(Fake):
    """Writes what it is given."""

    def write(self, model: nn.Module, example: Tensor, folder: Path, **how: Any) -> Path:
        inner = {"seed": torch.initial_seed(), "threads": torch.get_num_threads()}
        torch.save((model.state_dict(), example, how, inner), folder / "echo")
        return folder / "echo"


def test_a_worker_writes_what_it_is_given(tmp_path: Path) -> None:
    network, images = kind("a"), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    torch.save((network, images), tmp_path / "given")
    with torch_threads(torch.get_num_threads()):  # a worker changes its own
        found = worker._done(request_for(tmp_path / "given", tmp_path), {})
    assert found == {"path": str(tmp_path / "echo")}
    state, example, how, inner = torch.load(tmp_path / "echo", weights_only=True)
    assert all(torch.equal(state[k], v) for k, v in network.state_dict().items())
    assert torch.equal(example, images)
    assert example.stride() == images.stride()
    assert how == {"optimized": True}
    assert inner == {"seed": 7, "threads": 3}


def test_a_worker_that_cannot_read_a_network_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = ModuleType("pliant_test_main")  # as ``__main__``, which is another in a child
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, module.__name__, module)
        own = type("Own", (nn.Conv2d,), {"__module__": module.__name__})
        module.Own = own  # type: ignore[attr-defined]
        torch.save((own(1, 1, 3), torch.zeros(1, *SMALL)), tmp_path / "given")
    with torch_threads(torch.get_num_threads()):
        assert worker._done(request_for(tmp_path / "given", tmp_path), {}) == {"path": None}


@pytest.mark.skipif(sys.platform == "win32", reason="no groups of processes")
def test_a_worker_ends_with_its_parent(monkeypatch: pytest.MonkeyPatch) -> None:
    parents: Iterator[int] = iter(())
    ended_by: list[tuple[int, ...]] = []

    def over(*how: int) -> None:
        ended_by.append(how)
        raise SystemExit

    monkeypatch.setattr("pliant.measuring.worker.LOOK", 0)
    monkeypatch.setattr("os.getppid", lambda: next(parents))
    monkeypatch.setattr("os.getpid", lambda: 7)
    monkeypatch.setattr("os.killpg", over)
    monkeypatch.setattr("os._exit", over)
    for group in (7, 6):  # its own, and one that it must not end
        parents = iter([5, 5, 1])
        monkeypatch.setattr("os.getpgrp", lambda group=group: group)
        with pytest.raises(SystemExit):
            worker._end_with(5)
        assert next(parents, None) is None
    assert ended_by == [(7, signal.SIGKILL), (1,)]


@pytest.mark.slow  # two exporters; test_a_worker_writes_what_it_is_given says it in this process
@pytest.mark.skipif(not importlib.util.find_spec("onnxruntime"), reason="ONNX Runtime is not installed")
def test_a_child_writes_the_same_file(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)).eval()
    images = torch.randn(2, *SMALL)
    engine, how = ENGINES["onnxruntime"], {"precision": "float32", "threads": 1}
    assert isinstance(engine, FileEngine)
    for name in ("child", "parent"):
        (tmp_path / name).mkdir()
    torch.save((network, images), tmp_path / "given")
    with Isolated(engine, 60) as child:
        by_child = child.write(tmp_path / "given", tmp_path / "child", how, 120)
    assert by_child == tmp_path / "child" / "network.onnx"
    by_parent = engine.write(network, images, tmp_path / "parent", **how)
    with torch.inference_mode():
        expected = network(images)
    found = [engine.load(path, images, **how)(images) for path in (by_child, by_parent)]
    assert torch.equal(*found)
    assert torch.allclose(found[0], expected, atol=1e-6)


FAILS = '''
import os, time
from pliant.deploy.engines import FileEngine


class Fails(FileEngine):
    """What goes wrong depends on the number of parameters."""

    name = "fails"

    def write(self, model, example, folder, **how):
        kind = sum(p.numel() for p in model.parameters())
        if kind == 20:
            os._exit(139)
        if kind == 30:
            time.sleep(600)
        if kind == 40:
            raise RuntimeError("no luck in /home/someone/secret/file.py")
        path = folder / "network"
        path.write_text(str(os.getpid()))
        return path

    def load(self, path, example, **how):
        if path.read_text() == str(os.getpid()):
            raise RuntimeError("one child writes and runs")
        return lambda images: images.sum()
'''


@pytest.mark.slow
def test_so_it_is_with_real_children(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pliant_test_fails.py").write_text(FAILS)
    monkeypatch.syspath_prepend(tmp_path)
    import pliant_test_fails

    monkeypatch.setitem(ENGINES, "fails", pliant_test_fails.Fails())
    models = {letter: nn.Sequential(nn.Conv2d(1, n, 3)) for n, letter in enumerate("abcde", 1)}
    limits: dict[str, Any] = {"rounds": 2, "min_run_time": 0, "write_timeout": 4}
    rows = measure(models, against="a", input_size=SMALL, engines=["fails"], threads=1, **limits)
    assert [r.error for r in rows] == [
        "",
        "fails (writing a file) died: SIGSEGV",
        "fails (writing a file) did not answer within 4 s",
        "RuntimeError: no luck in file.py",
        "",
    ]
    assert [r.rounds for r in rows] == [2, 0, 0, 0, 2]
