"""ONNX files in 8-bit integers, by ONNX Runtime's own static quantisation; for timing.

What people do to a file for a CPU: activations in uint8 and weights in int8, a scale for each
output channel, every operator that can be, as pairs of QuantizeLinear and DequantizeLinear around it
(QDQ), which ONNX Runtime and OpenVINO turn into integer kernels. Activations are unsigned because
ONNX Runtime's kernels for x86 want that: signed ones took more than twice as long.

The ranges are those of a few images. With random ones the file is good for timing alone: it says
nothing of accuracy, and neither do random weights.

Shapes: images [B, C, H, W].
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pliant.deploy.extras import onnx_runtime, require
from pliant.deploy.onnx_file import INPUT, quiet

CALIBRATED_ON = 4  # random images, where none are given


def quantise(source: Path, path: Path, images: Iterable[Tensor]) -> Path:
    """Write an ONNX file again, in 8-bit integers.

    `source` is in float32 and calls its input `INPUT`. The activations of `images`, each [B, C, H, W],
    set the ranges. Returns `path`.

    Raises:
        MissingExtraError: onnx or onnxruntime is not installed.
    """
    require("onnx")
    onnx_runtime()
    tools: Any = importlib.import_module("onnxruntime.quantization")  # on use: it loads much

    class Reader(tools.CalibrationDataReader):  # type: ignore[misc]
        left = ({INPUT: x.float().contiguous().numpy()} for x in images)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.left, None)

    with quiet():  # it recommends steps that the file has behind it
        tools.quantize_static(
            source,
            path,
            Reader(),
            quant_format=tools.QuantFormat.QDQ,
            per_channel=True,
            activation_type=tools.QuantType.QUInt8,
            weight_type=tools.QuantType.QInt8,
        )
    return path


def random_images(example: Tensor) -> list[Tensor]:
    """Single images of the example's size, the same ones in each call.

    Example:
        >>> [tuple(x.shape) for x in random_images(torch.zeros(16, 3, 8, 8))]
        [(1, 3, 8, 8), (1, 3, 8, 8), (1, 3, 8, 8), (1, 3, 8, 8)]
    """
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, *example.shape[1:], generator=generator) for _ in range(CALIBRATED_ON)]
