"""OpenVINO, on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor

from pliant.deploy.engines.base import Expected, Runner, outputs
from pliant.deploy.engines.files import ONNXEngine
from pliant.deploy.extras import require
from pliant.deploy.openvino_file import Requests, compile_model

HINTS = {"float32": "f32", "bfloat16": "bf16", "int8": "f32"}


class OpenVINO(ONNXEngine):
    """A model that OpenVINO compiled from an ONNX file, for latency and for one shape of input.

    In bfloat16 the file and the images stay float32 and the engine computes in bfloat16, by
    its hint. That hint is always given: the default on a CPU that has bfloat16 is
    bfloat16, whatever the file holds.

    It runs the files that ONNX Runtime does, which that has to be installed for. In int8
    (`pliant.deploy.int8`) what is not quantised there is float32.

    Example:
        >>> OpenVINO().unfit("cuda", "float32")
        'openvino is not supported on cuda, only on cpu'
    """

    name = "openvino"
    devices = ("cpu",)
    precisions = tuple(HINTS)
    packages = ("onnx", "onnxscript", "onnxruntime", "openvino")

    def load(
        self, path: Path, example: Tensor, *, precision: str = "float32", threads: int | None = None
    ) -> Runner:
        """A compiled model; see `FileEngine.load`.

        Raises:
            ValueError: OpenVINO would run on other threads, or in another precision, than
                it is told to: this CPU has not so many, or no bfloat16.
        """
        threads = self._check(example, precision, threads)
        model = require("openvino").Core().read_model(str(path))
        model.reshape(list(example.shape))
        outputs_of = Requests(compile_model(model, threads, HINTS[precision]))
        expected = Expected(example, precision)

        def run(images: Tensor) -> Any:
            expected.check(images)
            return outputs(outputs_of(self.images(images, precision)))

        return run
