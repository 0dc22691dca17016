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
from pliant.deploy.selections import Result, Run, Selection

SECTION = "pliant"  # of the file's run-time information


def write(onnx_path: Path, path: Path, facts: Facts) -> list[Path]:
    """Convert an ONNX file, and write it with its facts: ``.xml`` and ``.bin``."""
    openvino = require("openvino")
    model = openvino.convert_model(str(onnx_path))
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
    path: str | Path, threads: int | None = None, precision: str = "f32"
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A function that runs the file by OpenVINO on the CPU.

    Args:
        path: path of the ``.xml``.
        threads: threads of OpenVINO; None: as many as it takes. A ``ValueError`` if it would take others.
        precision: that it computes in, ``f32``, ``bf16`` or ``f16``. OpenVINO's own default on
            a CPU with bfloat16 is that, which changes which channels are selected.
    """
    run = Requests(compile_model(require("openvino").Core().read_model(str(path)), threads, precision))
    return lambda images: tuple(run(images))


def runner(path: Path, ranking: list[str]) -> Run:
    """Runs the file, its selections as further outputs; these change nothing else in it."""
    model = require("openvino").Core().read_model(str(path))
    outputs = len(model.outputs)
    for part in ranking:
        model.add_outputs(list(selection_names(part)))
    outputs_of = Requests(compile_model(model, 1, "f32"))

    def run(images: Tensor) -> Result:
        tensors = outputs_of(images)
        chosen = {}
        for n, part in enumerate(ranking):
            logits, index = tensors[outputs + 2 * n : outputs + 2 * n + 2]
            chosen[part] = Selection(logits.flatten(1), index.flatten(1).to(torch.int64))
        return Result(tuple(tensors[:outputs]), chosen)

    return run


class Requests:
    """Runs a compiled model from any number of threads: each call has an infer request to itself.

    A compiled model's own request is one for all threads, and gives a caller what another one asked.

    Args:
        compiled: what `compile_model` made.
    """

    def __init__(self, compiled: Any) -> None:
        self._compiled, self._ports = compiled, list(compiled.outputs)
        self._idle: deque[Any] = deque()  # its ends can be taken and put back from any thread

    def __call__(self, images: Tensor) -> list[Tensor]:
        """The outputs for contiguous `images` [B, C, H, W], each in memory of its own."""
        try:
            request = self._idle.pop()
        except IndexError:
            request = self._compiled.create_infer_request()
        found = request.infer([images.numpy()], share_inputs=True)
        outputs = [torch.from_numpy(found[port]) for port in self._ports]
        self._idle.append(request)  # not where it failed
        return outputs


def compile_model(model: Any, threads: int | None, precision: str) -> Any:
    """What OpenVINO makes of a model on the CPU, for latency.

    Args:
        model: read by OpenVINO.
        threads: threads of OpenVINO; None: as many as it takes.
        precision: ``f32``, ``bf16`` or ``f16``; OpenVINO's own default depends on the processor.

    Raises:
        ValueError: OpenVINO would run on other threads, or has no bfloat16 on this processor.
    """
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
    return compiled
