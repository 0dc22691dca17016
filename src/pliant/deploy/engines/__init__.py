"""Engines that run networks, behind one interface.

Each says whether it is there (`Engine.missing` names what is not, with the line that installs
it) and makes a runner of a network: ``ENGINES["onnxruntime"].prepare(model, example)``.
`pliant.measure` times networks in them; nothing heavy is imported before it is used.
"""

from __future__ import annotations

from collections.abc import Sequence

from pliant.deploy.engines.aoti import AOTInductor
from pliant.deploy.engines.base import PRECISIONS, Engine, FileEngine, Runner
from pliant.deploy.engines.compile import Compile
from pliant.deploy.engines.eager import Eager
from pliant.deploy.engines.onnxruntime import ONNXRuntime
from pliant.deploy.engines.openvino import OpenVINO

__all__ = ["ALL", "ENGINES", "PRECISIONS", "Engine", "FileEngine", "Runner", "named"]

ALL = "all"

_DEPLOYED: tuple[Engine, ...] = (Eager(), Compile(), AOTInductor(), ONNXRuntime(), OpenVINO())
# `compiled` leaves weights variable, as `pliant.compile_depths` does, so it is no way to deploy.
ENGINES: dict[str, Engine] = {e.name: e for e in (*_DEPLOYED, Compile("compiled", freeze=False))}


def named(names: str | Sequence[str]) -> list[Engine]:
    """Engines by name; ``"all"`` are those in which networks are deployed.

    Raises:
        ValueError: no such engine, or none named.

    Example:
        >>> [engine.name for engine in named("all")]
        ['eager', 'compile', 'aoti', 'onnxruntime', 'openvino']
    """
    several = [names] if isinstance(names, str) else list(names)
    if ALL in several:
        return list(_DEPLOYED)
    for name in several:
        if name not in ENGINES:
            raise ValueError(f"no engine {name!r}; the engines are {', '.join(ENGINES)}")
    if not several:
        raise ValueError(f"no engine named; the engines are {', '.join(ENGINES)}")
    return [ENGINES[name] for name in dict.fromkeys(several)]
