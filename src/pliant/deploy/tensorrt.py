"""Would TensorRT read this ONNX file? Held against what its parser documents.

There is no TensorRT here: what is checked is the graph, against the table of operators in the
documentation of its ONNX parser (``docs/operators.md`` of onnx/onnx-tensorrt, TensorRT 10.15),
as far as the table's restrictions can be read from a graph. The table is
``data/tensorrt_operators.csv``.
"""

from __future__ import annotations

import csv
from functools import cache
from importlib.resources import files
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import onnx_ir as ir

LARGEST_K = 3840  # of TopK, "must be less than"
OPSETS = range(9, 25)
_AXES_FIXED = ("ReduceMean", "ReduceSum", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceProd")
# ONNX's names of types, as the table has them.
_TYPES = {
    "FLOAT": "FP32",
    "FLOAT16": "FP16",
    "BFLOAT16": "BF16",
    "INT32": "INT32",
    "INT64": "INT64",
    "BOOL": "BOOL",
    "UINT8": "UINT8",
}


@cache
def operators() -> dict[str, frozenset[str]]:
    """The operators that TensorRT's parser supports, with the types that it takes.

    Example:
        >>> "TopK" in operators(), "NonZero" in operators(), "Unique" in operators()
        (True, True, False)
    """
    text = files("pliant.deploy").joinpath("tensorrt_operators.csv").read_text(encoding="utf-8")
    return {row["operator"]: frozenset(row["types"].split()) for row in csv.DictReader(text.splitlines())}


def objections(model: ir.Model) -> list[str]:
    """What TensorRT's parser does not document of a graph; empty where it documents all.

    Args:
        model: with the shapes and types of its values.
    """
    opset = model.opset_imports.get("", 0)
    found = [] if opset in OPSETS else [f"opset {opset} is not among {OPSETS[0]} to {OPSETS[-1]}"]
    for node in model.graph.all_nodes():
        supported = operators().get(node.op_type) if node.domain == "" else None
        where = f"{node.op_type} {node.name}"
        if supported is None:
            found.append(f"{where}: no supported operator")
            continue
        if node.op_type != "Cast" and node.inputs and (first := node.inputs[0]) is not None:
            kind = _TYPES.get(getattr(first.dtype, "name", "FLOAT"), str(first.dtype))
            if kind not in supported:
                found.append(f"{where}: no {kind} input")
        found += [f"{where}: {why}" for why in _restrictions(node)]
    return found


def _restrictions(node: ir.Node) -> list[str]:
    """What the table restricts, for the operators that networks of timm and pliant become."""
    if node.op_type == "TopK":
        k = _constant(node, 1)
        if k is None:
            return ["K is no constant"]
        too_large = [f"K = {k.item()} is not less than {LARGEST_K}"] if k.item() >= LARGEST_K else []
        return too_large + ([] if node.attributes.get_int("sorted", 1) == 1 else ["sorted must be 1"])
    if (
        node.op_type in (*_AXES_FIXED, "Squeeze", "Unsqueeze")
        and len(node.inputs) > 1
        and _constant(node, 1) is None
    ):
        return ["axes are no constant"]
    if node.op_type in ("CumSum", "OneHot") and _constant(node, 1) is None:
        return ["its second input is no constant"]
    if node.op_type == "ScatterND" and node.attributes.get_string("reduction", "none") != "none":
        return ["reduction must be none"]
    if node.op_type == "Resize" and node.attributes.get_int("antialias", 0) != 0:
        return ["antialias is not supported"]
    if node.op_type in ("MaxPool", "AveragePool"):
        dilations = node.attributes.get_ints("dilations", [1])
        return [
            *([] if set(dilations or [1]) == {1} else ["dilations must be 1"]),
            *(["Indices are not supported"] if len([o for o in node.outputs if o.uses()]) > 1 else []),
        ]
    if node.op_type == "LayerNormalization" and any(o.uses() for o in node.outputs[1:]):
        return ["only its first output is supported"]
    return []


def _constant(node: ir.Node, position: int) -> Any:
    """The value of an input where it is constant."""
    import onnx_ir as ir

    value = node.inputs[position] if position < len(node.inputs) else None
    tensor = None if value is None else ir.convenience.get_const_tensor(value)
    return None if tensor is None else tensor.numpy()
