"""How native operators are built; a compiler of ours stands in for the real one, which takes a minute."""

from __future__ import annotations

import multiprocessing
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from pliant.methods.mixture_of_depths.ops import building


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(building, "_outcome", None)
    if sys.platform != "linux":
        pytest.skip("native forms are built on Linux only")
    return tmp_path / "cache" / "pliant"


def stand_in(tmp_path: Path, monkeypatch, body: str) -> Path:
    """A compiler that notes its calls and then does `body`, where $out is what to write."""
    log, script = tmp_path / "calls", tmp_path / "compiler"
    script.write_text(
        f'#!/bin/sh\necho "$*" >> "{log}"\n'
        f'while [ $# -gt 0 ]; do [ "$1" = -o ] && out="$2"; shift; done\n{body}\n'
    )
    script.chmod(0o755)
    monkeypatch.setenv("CXX", str(script))
    return log


def test_the_cache_needs_no_compiler(cache, tmp_path, monkeypatch, caplog):
    log = stand_in(tmp_path, monkeypatch, "echo built > $out")
    path = building.library()
    (said,) = caplog.records  # before the build, and once
    assert said.levelname == "WARNING"
    assert re.fullmatch(
        rf"pliant builds mod_block\.cpp for this machine with .*, once; .* goes to {cache}", said.message
    )
    assert path.parent == cache
    assert path.read_bytes().startswith(b"built\n")
    assert "-march=native" in log.read_text() or os.uname().machine not in ("x86_64", "aarch64")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert building.library() == path
    assert len(log.read_text().splitlines()) == 1
    assert [p.name for p in cache.iterdir()] == [path.name]
    assert len(caplog.records) == 1


@pytest.mark.parametrize(
    "change",
    [
        ("__version__", "9.9"),
        ("_processor", lambda: "another"),
        ("SOURCE", Path(building.__file__)),
    ],
    ids=lambda change: change[0],
)
def test_another_version_or_processor_is_another_file(change, cache, monkeypatch):
    before = building._key()
    monkeypatch.setattr(building, *change)
    assert building._key() != before


def test_without_a_compiler_it_says_so_once(cache, monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler --flag")
    with pytest.warns(RuntimeWarning, match="PyTorch form.*no-such-compiler.*install one"):
        assert not building.ready()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not building.ready()
    assert "install one" in building.why_not()
    assert not list(cache.glob("*"))


def test_without_a_compiler_on_the_path(cache, tmp_path, monkeypatch):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(building.BuildError, match="neither c"):
        building.library()


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("echo 'line 1: no such thing' >&2; exit 3", "status 3.*no such thing"),
        ("echo half > $out; exit 1", "status 1.*said nothing"),
        ("exit 0", "wrote nothing"),
    ],
)
def test_a_broken_compiler(body, reason, cache, tmp_path, monkeypatch):
    log = stand_in(tmp_path, monkeypatch, body)
    with pytest.warns(RuntimeWarning, match=reason):
        assert not building.ready()
    assert not building.ready()
    assert len(log.read_text().splitlines()) == 1  # it is not tried again
    assert not list(cache.glob("*"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[: len(b) // 2],
        lambda b: b"",
        lambda b: b"x" + b[1:],
        lambda b: b + b"\0",
        lambda b: b[:-32],
    ],
    ids=["half", "empty", "changed", "longer", "of an earlier version"],
)
def test_a_library_that_is_not_whole_is_built_again(damage, cache, tmp_path, monkeypatch):
    """Loaded, half a library ends the process: SIGBUS."""
    log = stand_in(tmp_path, monkeypatch, "echo built > $out")
    path = building.library()
    whole = path.read_bytes()
    path.write_bytes(damage(whole))
    assert building.library().read_bytes() == whole
    assert len(log.read_text().splitlines()) == 2


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_the_cache_is_its_owners_alone(umask, cache, tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, "echo built > $out")
    cache.mkdir(parents=True)
    cache.chmod(0o777)  # as an earlier version left it, under such a umask
    before = os.umask(umask)
    try:
        path = building.library()
    finally:
        os.umask(before)
    assert cache.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("planted", ["writable", "another user's", "link"])
def test_a_library_that_others_may_have_put_there_is_not_loaded(planted, cache, tmp_path, monkeypatch):
    log = stand_in(tmp_path, monkeypatch, "echo built > $out")
    path = building.library()
    if planted == "writable":
        path.chmod(0o766)
    elif planted == "link":
        path.rename(tmp_path / "elsewhere")
        path.symlink_to(tmp_path / "elsewhere")
    else:
        lstat = Path.lstat
        monkeypatch.setattr(Path, "lstat", lambda p: _of_another(lstat(p)))
    again = building.library()
    assert len(log.read_text().splitlines()) == 2
    assert not again.is_symlink()
    assert again.stat().st_mode & 0o777 == 0o700


def _of_another(found):
    return os.stat_result((*found[:4], found.st_uid + 1, *found[5:10]))


def test_a_cache_of_another_user_is_refused(cache, tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, "echo built > $out")
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    with pytest.raises(building.BuildError, match=r"belongs to another user .*; set XDG_CACHE_HOME to a"):
        building.library()


def test_a_library_that_cannot_be_loaded(cache, tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, "echo no library > $out")
    with pytest.warns(RuntimeWarning, match="cannot be loaded"):
        assert not building.ready()


def test_a_compiler_that_hangs(cache, tmp_path, monkeypatch):
    stand_in(tmp_path, monkeypatch, "exec sleep 60")
    monkeypatch.setattr(building, "LIMIT", 0.2)
    with pytest.raises(building.BuildError, match=r"did not end within 0.2 s"):
        building.library()


def test_a_cache_that_cannot_be_written(tmp_path, cache, monkeypatch):
    stand_in(tmp_path, monkeypatch, "echo built > $out")
    (tmp_path / "cache").write_text("a file where the folder should be")
    with pytest.raises(building.BuildError, match="cannot be written"):
        building.library()


def test_two_processes_build_at_once(cache, tmp_path, monkeypatch):
    log = stand_in(tmp_path, monkeypatch, "sleep 1; printf '%01000d' 7 > $out")
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=building.library) for _ in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert len(log.read_text().splitlines()) == 2
    (path,) = cache.iterdir()
    assert path.stat().st_size == 1000 + 32  # and what tells that it is whole


WITHOUT = """
import warnings, timm, torch
from pliant.deploy.optimize import optimize, unfused
from pliant.methods.mixture_of_depths.ops import building
model = timm.create_model("resnet20_cifar_mod").eval()
x = torch.randn(2, 3, 16, 16)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    first, second = optimize(model, x), optimize(model, x)
    said = [w for w in caught if "PyTorch form" in str(w.message)]
with torch.no_grad():
    want, got = model(x), second(x)
    compiled = torch.compile(second, backend="aot_eager", fullgraph=True)(x)
assert unfused(second) == {} and not building.ready()
print(len(said), float((got - want).norm() / want.norm()) < 1e-5, torch.allclose(compiled, got))
"""


@pytest.mark.slow
def test_without_a_compiler_networks_are_right(cache):
    environment = {**os.environ, "CXX": "no-such-compiler", "XDG_CACHE_HOME": str(cache)}
    done = subprocess.run([sys.executable, "-c", WITHOUT], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["1", "True", "True"]
