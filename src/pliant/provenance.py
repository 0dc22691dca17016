"""Where a figure comes from: machine, versions, commit, date.

A row of results without these cannot be compared with another. Host names, user names
and absolute paths are left out: rows are published.
"""

from __future__ import annotations

import os
import platform
import re
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import timm
import torch

from pliant._version import __version__

SOURCE = Path(__file__).resolve().parent
# Instruction sets that decide how fast a network runs, as Linux names them: of x86, then of Arm.
SETS = (
    *("avx2", "avx_vnni", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_int8", "amx_bf16"),
    *("asimd", "asimddp", "i8mm", "bf16", "sve", "sve2"),
)
LIMITS = ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA")  # of PyTorch, of oneDNN


def provenance(device: torch.device | str = "cpu") -> dict[str, Any]:
    """The fields of `pliant.records.Origin`, for figures taken on `device` now.

    Example:
        >>> provenance()["pliant"] == __version__
        True
    """
    device = torch.device(device)
    return {
        "cpu": cpu_model(),
        "cores": _cores(),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else "",
        "os": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "pliant": __version__,
        "commit": commit(SOURCE),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "instructions": instruction_sets(),
        "governor": governor(),
        "load": _load(),
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's model as the system names it, for example ``AMD EPYC 9654``."""
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:  # not Linux
        found = None
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def instruction_sets(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The processor's instruction sets among `SETS`, and variables that forbid some (`LIMITS`).

    Where the system does not list them, what PyTorch uses.
    """
    try:
        found = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE)
    except OSError:  # not Linux
        found = None
    known = found.group(1).split() if found else []
    sets = [name for name in SETS if name in known] or [torch.backends.cpu.get_cpu_capability().lower()]
    return " ".join([*sets, *(f"{name}={os.environ[name]}" for name in LIMITS if os.environ.get(name))])


def governor(cpus: Path = Path("/sys/devices/system/cpu")) -> str:
    """How the system chooses the frequency, such as ``performance``; empty if it does not say."""
    try:
        return " ".join(sorted({f.read_text().strip() for f in cpus.glob("cpu*/cpufreq/scaling_governor")}))
    except OSError:  # a processor that is off
        return ""


def _load() -> float | None:
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):  # Windows; a container that hides it
        return None


def commit(folder: Path) -> str:
    """Commit of the work tree that holds `folder`, ``-dirty`` if `folder` differs from it.

    What the variable ``PLIANT_COMMIT`` says goes before that, for copies without their history (in a
    container, on a lent machine). Empty where git does not track the folder: a package
    installed into somebody else's repository must not report that repository's commit.
    """
    if said := os.environ.get("PLIANT_COMMIT", ""):
        return said
    if not _git(folder, "ls-files", "--", "__init__.py"):
        return ""
    head = _git(folder, "rev-parse", "HEAD")
    # Only the code itself: results that a run has just written do not change it.
    changed = _git(folder, "status", "--porcelain", "--", ".")
    return f"{head}-dirty" if head and changed else head


def _git(folder: Path, *arguments: str) -> str:
    """What git prints; empty without git, a repository, or success."""
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=folder, capture_output=True, text=True, timeout=30, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)  # not on macOS and Windows
    return len(affinity(0)) if affinity else os.cpu_count() or 1
