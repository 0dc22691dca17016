"""OpenVINO, on the CPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from pliant.deploy import openvino_file
from pliant.deploy.engines.files import ONNXEngine

HINTS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}


class OpenVINO(ONNXEngine):
    """A model that OpenVINO compiled from an ONNX file, for latency and for one shape of input.

    In bfloat16 the file and the images stay float32 and the engine computes in bfloat16, by
    its hint. That hint is always given: the default on a CPU that has bfloat16 is
    bfloat16, whatever the file holds.

    It runs the files that ONNX Runtime does, which that has to be installed for. In int8
    (`pliant.deploy.int8`) what is not quantised there is float32. It refuses (``ValueError``) to
    run on other threads, or in another precision, than it is told to: this CPU has not so many,
    or no bfloat16.

    Example:
        >>> OpenVINO().unfit("cuda", "float32")
        'openvino is not supported on cuda, only on cpu'
    """

    name = "openvino"
    precisions = tuple(HINTS)
    packages = ("onnx", "onnxscript", "onnxruntime", "openvino")

    def _open(
        self, path: Path, example: Tensor, precision: str, threads: int
    ) -> Callable[[Tensor], tuple[Tensor, ...]]:
        return openvino_file.load(path, threads, HINTS[precision], tuple(example.shape))
