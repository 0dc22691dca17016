"""The lock of a folder: it ends with its process, and says where there are no locks."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys

import pytest

from pliant._lock import held, in_use, locks_in


def test_a_lock_ends_with_its_process_though_a_child_lives_on(tmp_path):
    script = """
import os, signal, sys, time
from pliant._lock import held
with held(sys.argv[1]):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)
    time.sleep(0.5)
    os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "run.lock"
    done = subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    child = int(done.stdout.readline())
    done.wait(60)
    try:
        os.kill(child, 0)  # it lives
        with held(path):
            assert path.read_text().startswith(f"process {os.getpid()} ")
    finally:
        os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP])
def test_a_file_system_without_locks_is_told_and_leaves_nothing_behind(
    number, tmp_path, monkeypatch, caplog
):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with held(tmp_path / "run.lock"), held(tmp_path / "run.lock"):
        assert "run.lock cannot be locked" in caplog.text
        assert not in_use(tmp_path / "run.lock")
    assert not locks_in(tmp_path)
    monkeypatch.undo()
    with held(tmp_path / "run.lock"):  # no other kind of lock was left there instead
        assert in_use(tmp_path / "run.lock")


def test_a_second_process_can_wait_for_the_lock(tmp_path):
    script = """
import sys
from pliant._lock import held
with held(sys.argv[1], wait=True):
    print(open(sys.argv[1]).read())
"""
    path = tmp_path / "rows.lock"
    with held(path):
        other = subprocess.Popen(
            [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
        )
        with pytest.raises(subprocess.TimeoutExpired):
            other.wait(1)
    said, _ = other.communicate(timeout=60)
    assert said.startswith(f"process {other.pid} on ")
