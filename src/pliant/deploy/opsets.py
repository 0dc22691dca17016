"""ONNX graphs in older opsets than PyTorch's exporter writes, where their operators allow it: `lower`.

PyTorch writes opset 18 at least. Most operators of a vision network did not change between 16 and
18, and what changed is mostly where an axis or a default stands. onnx's own converter gives the tensors
other names (the parity check finds selections by theirs), and does not say which operator it lacks.

Shapes: as in the graph.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import onnx_ir as ir

OLDEST = 16
_REDUCE = ("L1", "L2", "LogSum", "LogSumExp", "Max", "Mean", "Min", "Prod", "SumSquare")


def lower(model: ir.Model, opset: int) -> None:
    """Write a graph in an older opset, in place.

    Args:
        model: of the standard domain alone, in a newer opset.
        opset: at least `OLDEST`.

    Raises:
        ValueError: an operator that the opset has not, or has otherwise; names it and the node.
    """
    import onnx
    from onnx_ir.passes import common

    now = model.opset_imports[""]
    for node in model.graph.all_nodes():
        if node.domain:
            continue
        new = onnx.defs.get_schema(node.op_type, now)
        try:
            old = onnx.defs.get_schema(node.op_type, opset)
        except onnx.defs.SchemaError:
            raise ValueError(
                f"opset {opset} has no {node.op_type} ({node.name}), which came with opset "
                f"{_first(node.op_type, now)}; choose that or a newer one"
            ) from None
        if old.since_version != new.since_version and not _CHANGES.get(node.op_type, _never)(node):
            raise ValueError(
                f"opset {opset} has no {node.op_type} such as {node.name} is; choose opset "
                f"{new.since_version} or a newer one"
            )
    common.RemoveUnusedNodesPass()(model)  # axes that were inputs
    model.opset_imports[""] = opset
    # What reads such old opsets reads no newer format of the file either.
    least = onnx.helper.find_min_ir_version_for([onnx.helper.make_opsetid("", opset)])
    model.ir_version = min(model.ir_version, least)


def _first(operator: str, newest: int) -> int:
    """The opset with which an operator came."""
    import onnx

    known = onnx.defs.get_schema(operator, newest).since_version
    while True:
        try:
            known = onnx.defs.get_schema(operator, known - 1).since_version
        except onnx.defs.SchemaError:
            return int(known)


def _set(node: ir.Node, name: str) -> bool:
    """Whether an attribute is there that is a number other than 0."""
    attribute = node.attributes.get(name)
    return attribute is not None and attribute.as_int() != 0


def _never(_node: ir.Node) -> bool:
    return False


def _axes_as_attribute(node: ir.Node) -> bool:
    """A reduction: its axes were an attribute; no axes meant all, as they do by default."""
    import onnx_ir as ir

    given = node.inputs[1] if len(node.inputs) > 1 else None
    if given is not None:
        axes = ir.convenience.get_const_tensor(given)
        if axes is None:
            return False
        node.attributes["axes"] = ir.AttrInt64s("axes", [int(a) for a in axes.numpy().reshape(-1)])
        node.resize_inputs(1)
    elif _set(node, "noop_with_empty_axes"):
        return False
    node.attributes.pop("noop_with_empty_axes", None)
    return True


def _split(node: ir.Node) -> bool:
    """Equal parts need not be numbered: the outputs are."""
    node.attributes.pop("num_outputs", None)
    return True


def _pad(node: ir.Node) -> bool:
    """It had no axes, and padded all."""
    return len(node.inputs) < 4 or node.inputs[3] is None


def _resize(node: ir.Node) -> bool:
    """It had no antialiasing, no axes, and stretched."""
    policy = node.attributes.get_string("keep_aspect_ratio_policy", "stretch")
    if _set(node, "antialias") or "axes" in node.attributes or policy != "stretch":
        return False
    for name in ("antialias", "keep_aspect_ratio_policy"):
        node.attributes.pop(name, None)
    return True


def _scatter(node: ir.Node) -> bool:
    """It could add and multiply, not compare."""
    return node.attributes.get_string("reduction", "none") in ("none", "add", "mul")


_CHANGES: dict[str, Callable[[ir.Node], bool]] = {
    **{f"Reduce{kind}": _axes_as_attribute for kind in _REDUCE},
    "Split": _split,
    "Pad": _pad,
    "Resize": _resize,
    "ScatterElements": _scatter,
    "ScatterND": _scatter,
}
