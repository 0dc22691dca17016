"""Native forms of the operators, built by this machine's compiler on first use: `ready`.

The built library is kept in the user's cache (``$XDG_CACHE_HOME/pliant`` or
``~/.cache/pliant``) under a name that holds all it depends on: pliant's version, the
source, the processor and, for PyTorch's operator, PyTorch's version. So a machine builds it once,
and a library that is already there needs no compiler. A log line of level warning comes before
the build: it takes a minute or two, and Python shows warnings without any set-up, on stderr. A
build that fails is a warning, once, with its reason; the operator then runs in its PyTorch form,
whose results are the same.

No tensors here.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import torch

from pliant._files import atomic_path
from pliant._version import __version__

# Defines the operator that the library fills.
from pliant.methods.mixture_of_depths.ops.mod_block import mod_block_ as mod_block_

SOURCE = Path(__file__).with_name("mod_block.cpp")  # for PyTorch
ORT_SOURCE = Path(__file__).with_name("mod_block_ort.cpp")  # for any ONNX Runtime from 1.18 on
LIMIT = 600  # seconds; on a busy machine compiling takes one or two minutes
_DIGEST = hashlib.sha256().digest_size  # bytes, at the end of a library

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_outcome: str | None = None  # of this process: empty where the library is loaded, else why not


class BuildError(RuntimeError):
    """The native form cannot be built or loaded here; the message says why."""


def ready() -> bool:
    """Build and load the native form if need be, and say whether the operator runs in it.

    The first call in a process decides for all later ones. A failure is a warning, once.

    Example:
        >>> ready() == ready()
        True
    """
    global _outcome
    with _lock:
        if _outcome is None:
            try:
                _load(library())
                _outcome = ""
            except BuildError as error:
                _outcome = str(error)
                warnings.warn(
                    f"Mixture-of-Depths blocks run in their PyTorch form, which is slower: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )
    return not _outcome


def why_not() -> str:
    """Why `ready` returned False; empty if it returned True, or was not called yet."""
    return _outcome or ""


def onnx_library() -> Path:
    """Return the built library of the operator for ONNX Runtime; see `library`.

    Raises:
        ValueError: it cannot be built; the message says why.
    """
    try:
        return library(ORT_SOURCE)
    except BuildError as error:
        raise ValueError(f"the operator for ONNX Runtime cannot be built: {error}") from error


def library(source: Path | None = None) -> Path:
    """Return the path of the built library in the user's cache; build it if it is not there.

    A library runs as code of this process. So the cache is its owner's alone, what another user may
    have put or changed there is not loaded, and what is not whole (the library ends with its own
    SHA-256) is built again. Several processes may build at once: each writes under a name of its own,
    and only a complete file takes the final name.

    Args:
        source: C++ file that it is built from; by default `SOURCE`.

    Raises:
        BuildError: no compiler, one that fails (with the end of what it said), or a cache
            that cannot be written or is another user's.
    """
    if sys.platform != "linux":
        raise BuildError(f"it is built on Linux only, and this is {sys.platform}")
    source = source or SOURCE
    path = cache() / f"{source.stem}-{_key(source)}.so"
    try:
        _own(path.parent)
        if not _whole(path):
            with atomic_path(path) as temporary:
                _compile(temporary, source)
                with temporary.open("ab") as file:
                    file.write(_digest(temporary.read_bytes()))
            path.chmod(0o700)
    except OSError as error:
        raise BuildError(f"{path.parent} cannot be written ({error})") from error
    return path


def _own(folder: Path) -> None:
    """Make the cache, and see to it that only this user can change what is in it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    if folder.stat().st_uid != os.geteuid():
        raise BuildError(
            f"{folder} belongs to another user (number {folder.stat().st_uid}), who could run code as you; "
            f"set XDG_CACHE_HOME to a folder of your own"
        )
    if stat.S_IMODE(folder.stat().st_mode) & 0o077:
        folder.chmod(0o700)


def _whole(path: Path) -> bool:
    """Whether a library is there that this user built, to its end."""
    try:
        found = path.lstat()
        mine = stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid() and not found.st_mode & 0o022
        content = path.read_bytes() if mine else b""
    except FileNotFoundError:
        return False
    return content[-_DIGEST:] == _digest(content[:-_DIGEST])


def _digest(content: bytes) -> bytes:
    return hashlib.sha256(content).digest()


def cache() -> Path:
    """Return the folder of built libraries."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "pliant"


def _load(path: Path) -> None:
    operators: Any = torch.ops
    try:
        operators.load_library(path)
    except (OSError, RuntimeError) as error:
        raise BuildError(f"{path.name} was built and cannot be loaded ({error})") from error


def _key(source: Path | None = None) -> str:
    """What a built library depends on, in 20 letters."""
    source = source or SOURCE
    parts = [
        __version__,
        *((torch.__version__, str(torch.version.git_version)) if source != ORT_SOURCE else ()),
        *(part.read_text() for part in (source, *sorted(source.parent.glob("*.h")))),
        _processor(),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:20]


def _processor() -> str:
    """The kind of processor and its instruction sets: the library uses all that it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = ("flags", "Features", "model name", "CPU part", "cpu family", "model\t")
    return "\n".join([platform.machine(), *sorted({line for line in lines if line.startswith(names)})])


def compiler() -> list[str]:
    """Return the C++ compiler's command: ``$CXX``, or the first of c++, g++ and clang++ that is there.

    Raises:
        BuildError: there is none.
    """
    own = shlex.split(os.environ.get("CXX", ""))
    for command in [own] if own else [["c++"], ["g++"], ["clang++"]]:
        if shutil.which(command[0]):
            return command
    wanted = (
        f"$CXX names {own[0]!r}, which is not there" if own else "neither c++, g++ nor clang++ is there"
    )
    raise BuildError(f"no C++ compiler ({wanted}); install one, for example g++")


def _compile(target: Path, source: Path) -> None:
    native = ["-march=native"] if platform.machine() in ("x86_64", "aarch64") else []
    of_torch, linked = _torch_flags() if source != ORT_SOURCE else ([], [])
    found = compiler()
    _log.warning(
        "pliant builds %s for this machine with %s, once; it takes a minute or two and goes to %s",
        source.name,
        found[0],
        cache(),
    )
    command = [
        *found,
        *("-O3", *native, "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
        *("-std=c++20", "-fPIC", "-shared", *of_torch),
        *(str(source), "-o", str(target), *linked),
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=LIMIT, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired as error:
        raise BuildError(f"{command[0]} did not end within {LIMIT} s") from error
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-400:]
        raise BuildError(f"{command[0]} failed with status {done.returncode}: {said or 'it said nothing'}")
    if not target.stat().st_size:
        raise BuildError(f"{command[0]} ended well and wrote nothing")


def _torch_flags() -> tuple[list[str], list[str]]:
    """How to find PyTorch's headers, and its libraries."""
    # Not by torch.utils.cpp_extension: its import looks for CUDA and says so, and it wants ninja.
    installed = Path(torch.__file__).parent
    libraries, headers = installed / "lib", installed / "include"
    # PyTorch's own OpenMP: with a second one, two pools of threads would fight for the cores.
    own = sorted(p.name for p in libraries.glob("lib[gi]omp*.so*"))
    found = [
        *("-fopenmp", f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"),
        *("-isystem", str(headers), "-isystem", str(headers / "torch" / "csrc" / "api" / "include")),
    ]
    return found, [f"-L{libraries}", *(f"-l:{name}" for name in own[:1]), "-lc10", "-ltorch_cpu"]
