"""OpenVINO files: an ``.xml`` with its ``.bin``, made from an ONNX graph and run by OpenVINO.

By way of ONNX, because then one graph is shaped and its tensors keep their names.

Shapes: as in the network; the batch is open where it is in the graph.
"""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pliant.deploy.extras import require
from pliant.deploy.facts import Facts
from pliant.deploy.onnx_file import selection_names
from pliant.deploy.selections import Result, Run, told_beside

SECTION = "pliant"  # of the file's run-time information


def write(
    onnx_path: Path, path: Path, facts: Facts, change: Callable[[Any], Any] | None = None
) -> list[Path]:
    """Convert an ONNX file, and write it with its facts: ``.xml`` and ``.bin``.

    Args:
        onnx_path: the ONNX file.
        path: the ``.xml``.
        facts: what the file says of itself.
        change: makes another model of OpenVINO's of the converted one.
    """
    openvino = require("openvino")
    model = openvino.convert_model(str(onnx_path))
    if change is not None:
        model = change(model)
    for key, value in facts.to_metadata().items():
        model.set_rt_info(value, [SECTION, key.removeprefix("pliant.")])
    openvino.save_model(model, str(path), compress_to_fp16=False)
    return [path, path.with_suffix(".bin")]


def facts_of(path: str | Path) -> Facts:
    """What an OpenVINO file says of itself; OpenVINO is not needed for it.

    Raises:
        ValueError: it is no OpenVINO file of pliant's.
    """
    try:
        section = ElementTree.parse(path).getroot().find(f"rt_info/{SECTION}")
    except (ElementTree.ParseError, OSError) as error:
        raise ValueError(f"{path} is no OpenVINO file: {error}") from error
    entries = [] if section is None else list(section)
    return Facts.from_metadata({f"pliant.{e.tag}": e.get("value", "") for e in entries})


def load(
    path: str | Path,
    threads: int | None = None,
    precision: str = "f32",
    shape: tuple[int, ...] | None = None,
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A function that runs the file by OpenVINO on the CPU.

    Args:
        path: path of the ``.xml``, or of an ``.onnx``.
        threads: threads of OpenVINO; None: as many as it takes.
        precision: that it computes in, ``f32``, ``bf16`` or ``f16``. OpenVINO's own default on
            a CPU with bfloat16 is that, which changes which channels are selected.
        shape: the one shape [B, C, H, W] of images; None: that of the file.

    Raises:
        ValueError: OpenVINO would run on other threads, or has no bfloat16 on this processor.
    """
    model = _read(path)
    if shape is not None:
        model.reshape(list(shape))
    return _compiled(model, threads, precision)


def runner(path: Path, ranking: list[str]) -> Run:
    """Runs the file, its selections as further outputs; these change nothing else in it."""
    model = _read(path)
    outputs = len(model.outputs)
    for part in ranking:
        model.add_outputs(list(selection_names(part)))
    call = _compiled(model, 1, "f32")

    def run(images: Tensor) -> Result:
        return told_beside(call(images), outputs, ranking)

    return run


def _read(path: str | Path) -> Any:
    return require("openvino").Core().read_model(str(path))


def _compiled(model: Any, threads: int | None, precision: str) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A function that runs what OpenVINO makes of a model on the CPU, for latency, from any thread."""
    settings: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
    if threads is not None:
        settings["INFERENCE_NUM_THREADS"] = threads
        settings["ENABLE_HYPER_THREADING"] = True  # or half of the threads are left out
    compiled = require("openvino").Core().compile_model(model, "CPU", settings)
    if threads is not None and (given := compiled.get_property("INFERENCE_NUM_THREADS")) != threads:
        raise ValueError(f"OpenVINO runs on {given} threads on this machine, not on {threads}")
    given = compiled.get_property("INFERENCE_PRECISION_HINT")
    if precision == "bf16" and "bfloat16" not in str(given):
        raise ValueError(f"OpenVINO has no bfloat16 on this machine: it would compute in {given}")
    ports = list(compiled.outputs)
    # Each call has a request to itself: the model's own is one for all threads, and gives a caller
    # what another one asked. Threads may take from a deque and put back at once.
    idle: deque[Any] = deque()

    def run(images: Tensor) -> tuple[Tensor, ...]:
        try:
            request = idle.pop()
        except IndexError:
            request = compiled.create_infer_request()
        found = request.infer([images.numpy()], share_inputs=True)
        outputs = tuple(torch.from_numpy(found[port]) for port in ports)
        idle.append(request)  # not one that failed
        return outputs

    return run
