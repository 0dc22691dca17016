"""Several processes on this machine that form one group, started as torchrun or SLURM would."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
OURS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "NODE_RANK", "GROUP_RANK")


def free_port():
    """A port that nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def clean():
    """This process's environment without what a launcher puts there; one thread."""
    kept = {
        k: v for k, v in os.environ.items() if k not in OURS and not k.startswith(("SLURM_", "TORCHEL"))
    }
    return {**kept, "OMP_NUM_THREADS": "1"}


def torchrun(rank, world, port):
    """What torchrun tells a process of one machine."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": "test",
    }


def start(command, environments):
    """A process for each environment, with the same command."""
    return [
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**clean(), **environment},
            cwd=HERE,
        )
        for environment in environments
    ]


def ended(running, timeout=300):
    """What each process printed, and its exit status, when all have ended."""
    try:
        said = [process.communicate(timeout=timeout)[0] for process in running]
    finally:
        for process in running:
            process.kill()
    return [(text, process.returncode) for text, process in zip(said, running, strict=True)]


def run_script(script, folder):
    """Run Python text that starts processes of its own, for ``folder / "run"``; what each printed.

    By rank: each prints a line that begins with its own. Fails, with what was printed to standard error,
    if the script does not end well.
    """
    path = folder / "script.py"
    path.write_text(script)
    done = subprocess.run(
        [sys.executable, str(path), str(folder / "run")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return dict(line.split(" ", 1) for line in done.stdout.splitlines() if line[:2] in ("0 ", "1 "))


def run_two(program, *arguments, environment=torchrun, timeout=300):
    """Run Python text in two processes of one group; what each printed.

    Fails, with what they printed, if one does not end well.
    """
    port = free_port()
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = ended(start(command, [environment(rank, 2, port) for rank in range(2)]), timeout)
    for text, status in done:
        assert status == 0, text
    return [text for text, _ in done]
