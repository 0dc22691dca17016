"""Files in 8-bit integers, by static quantisation after training: weights in int8, activations in uint8.

ONNX Runtime's quantiser does it to ONNX files, and NNCF to OpenVINO's. Both put what they round between
pairs of operators that the engine turns into integer kernels. Each output channel of a weight has a scale
of its own; an activation's range is from its least to its greatest value over some images (NNCF's own
choice, means over images, was further from the network). Activations are unsigned because ONNX Runtime's
kernels for x86 want that: signed ones took more than twice as long.

Weights use 7 of the 8 bits. A processor without VNNI adds two products in 16 bits, which full weights
overflow, so a file that was checked on one machine would be wrong on another. On ResNet-56 the
eighth bit made no difference in accuracy.

What rounding would change too much stays in float32: parts that say so (`Part.in_float`), and what prepares
the images. Their nodes are marked by their names.

Shapes: images [B, C, H, W].
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pliant.deploy.extras import onnx_runtime, require
from pliant.deploy.onnx_file import INPUT, check, quiet, scopes

if TYPE_CHECKING:
    import onnx_ir as ir

FLOAT = "float."  # names of nodes that are not quantised begin so
CALIBRATED_ON = 4  # random images, where a file is only timed


def mark(model: ir.Model, in_float: Collection[str]) -> None:
    """Name the nodes of a graph that stay in float: of these parts, and of what is outside the network.

    Args:
        model: the graph, with the exporter's notes (`scopes`).
        in_float: paths of the parts in the network; the empty path is the network itself.
    """
    kept = {f"network.{path}" if path else "network" for path in in_float}
    for node in model.graph:
        around = scopes(node)
        if around and ("network" not in around or kept.intersection(around)):
            node.name = f"{FLOAT}{node.name}"


def quantise(source: Path, path: Path, images: Iterable[Tensor], *, external: bool = False) -> list[Path]:
    """Write an ONNX file again, in 8-bit integers.

    Args:
        source: the file in float32; calls its input `INPUT`, and marks what stays in float (`mark`).
        path: the file to write.
        images: batches; their activations set the ranges.
        external: the weights lie beside `source`, and will beside `path`, in ``FILE.data``.

    Returns:
        The files that were written, `path` first.

    Raises:
        MissingExtraError: onnx or onnxruntime is not installed.
        ValueError: ONNX's checker refuses the graph.
    """
    onnx = require("onnx")
    onnx_runtime()
    tools: Any = importlib.import_module("onnxruntime.quantization")  # on use: it loads much

    class Reader(tools.CalibrationDataReader):  # type: ignore[misc]
        left = ({INPUT: x.contiguous().numpy()} for x in images)

        def get_next(self) -> dict[str, Any] | None:
            return next(self.left, None)

    nodes = onnx.load(str(source), load_external_data=False).graph.node
    with quiet():  # it recommends steps that the file has behind it
        tools.quantize_static(
            source,
            path,
            Reader(),
            quant_format=tools.QuantFormat.QDQ,
            per_channel=True,
            reduce_range=True,
            activation_type=tools.QuantType.QUInt8,
            weight_type=tools.QuantType.QInt8,
            nodes_to_exclude=[node.name for node in nodes if node.name.startswith(FLOAT)],
            use_external_data_format=external,
        )
    check(path)
    data = path.with_name(f"{path.name}.data")
    return [path, data] if data.is_file() else [path]


def quantise_openvino(model: Any, images: list[Tensor]) -> Any:
    """A model of OpenVINO in 8-bit integers, from one in float32.

    Args:
        model: as OpenVINO read it from an ONNX file, where `mark` named what stays in float.
        images: batches; their activations set the ranges.

    Raises:
        MissingExtraError: nncf is not installed.
    """
    tools: Any = require("nncf")
    estimators: Any = importlib.import_module("nncf.quantization.range_estimator")
    with quiet():  # it draws progress bars
        return tools.quantize(
            model,
            tools.Dataset([x.contiguous().numpy() for x in images]),
            preset=tools.QuantizationPreset.MIXED,  # activations by their own two ends, as in ONNX
            target_device=tools.TargetDevice.CPU,
            subset_size=len(images),
            ignored_scope=tools.IgnoredScope(patterns=[f"{re.escape(FLOAT)}.*"], validate=False),
            advanced_parameters=tools.AdvancedQuantizationParameters(
                overflow_fix=tools.OverflowFix.ENABLE,  # 7 bits
                activations_range_estimator_params=estimators.RangeEstimatorParametersSet.MINMAX,
            ),
        )


def random_images(example: Tensor) -> list[Tensor]:
    """Single images of the example's size, the same ones in each call; for a file that is only timed.

    Example:
        >>> [tuple(x.shape) for x in random_images(torch.zeros(16, 3, 8, 8))]
        [(1, 3, 8, 8), (1, 3, 8, 8), (1, 3, 8, 8), (1, 3, 8, 8)]
    """
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, *example.shape[1:], generator=generator) for _ in range(CALIBRATED_ON)]
