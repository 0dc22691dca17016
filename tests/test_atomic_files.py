"""Files under their final names: whole, and as readable as the umask says."""

from __future__ import annotations

import csv
import os
import signal
import stat

import pytest
import timm

import _export
import pliant
from pliant._files import atomic_path, leftovers
from pliant.deploy.placing import workshop
from pliant.measuring.rows import Measurement, write_rows


@pytest.fixture(params=[0o022, 0o077, 0o002], ids=oct)
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def modes(folder):
    """Mode of each file below a folder, by name."""
    return {f.name: stat.S_IMODE(f.stat().st_mode) for f in folder.rglob("*") if f.is_file()}


def test_a_file_is_as_readable_as_the_umask_says(tmp_path, umask):
    """Also where a library puts a private file of its own in the place."""

    def by_a_library(path):
        other = path.with_suffix(".part")
        other.write_text("whole")
        other.chmod(0o600)
        other.replace(path)

    for n, write in enumerate((lambda path: path.write_text("whole"), by_a_library)):
        with atomic_path(tmp_path / f"{n}.txt") as temporary:
            write(temporary)
    assert modes(tmp_path) == dict.fromkeys(("0.txt", "1.txt"), 0o666 & ~umask)
    assert os.umask(umask) == umask


def test_what_pliant_writes_is_as_readable_as_the_umask_says(tmp_path, umask):
    pliant.save(timm.create_model("resnet20_cifar_mod"), tmp_path / "net")
    write_rows(tmp_path / "rows.csv", [Measurement(model="net")])
    pliant.export(_export.plain().eval(), tmp_path / "net.pt2", batches=(1,))
    found = modes(tmp_path)
    assert set(found) >= {"model.safetensors", "config.json", "rows.csv", "net.pt2", "net.pt2.json"}
    assert found == dict.fromkeys(found, 0o666 & ~umask)


@pytest.mark.parametrize("ending", [".onnx", ".xml"])
def test_what_engines_libraries_write_is_too(tmp_path, ending):
    _export.need(ending)
    before = os.umask(0o027)
    try:
        pliant.export(_export.plain().eval(), tmp_path / f"net{ending}", batches=(1,))
    finally:
        os.umask(before)
    found = modes(tmp_path)
    assert found == dict.fromkeys(found, 0o640)


def test_what_fails_leaves_what_stood_there(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("old")

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise csv.Error

    with pytest.raises(csv.Error):
        fail()
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.csv", "old")]


def killed_write(path):
    """Write in a process that is killed when it has written a half."""
    child = os.fork()
    if not child:
        try:
            with atomic_path(path) as temporary:
                temporary.write_text("half")
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_what_killed_writers_left_goes_with_the_next_and_what_others_write_stays(tmp_path):
    path = tmp_path / "a.csv"
    killed_write(path)
    killed_write(tmp_path / "a.csv.json")
    assert [p.read_text() for p in tmp_path.rglob("a.csv*")] == ["half"] * 2
    with atomic_path(path) as living:
        living.write_text("older")
        with atomic_path(path) as temporary:
            temporary.write_text("whole")
        assert path.read_text() == "whole"
        assert leftovers(path) == [living.parent]
    assert path.read_text() == "older"
    assert leftovers(path) == []
    assert len(leftovers(tmp_path / "a.csv.json")) == 1  # until that is written


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_so_it_is_with_exports(tmp_path):
    path = tmp_path / "net.pt2"
    killed_write(path)
    with workshop(path) as living:
        (living / "net.pt2").write_text("half")
        with workshop(path):
            assert len(leftovers(path)) == 3
        assert leftovers(path) == [living]
    assert list(tmp_path.iterdir()) == []
