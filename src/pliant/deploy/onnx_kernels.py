"""Kernels that a loop of an ONNX file computes, in the blocked layout of ONNX Runtime.

ONNX Runtime convolves in blocks of channels where a kernel is constant, because it lays out kernels when
it loads a file. Where a file mixes a kernel for each image, by a product with a constant matrix, the
matrix can be laid out instead: its columns are the kernel's values, and a layout only moves them. So
constant marks stand for such kernels while ONNX Runtime optimises the graph. They tell where each value
goes. Then the matrix's columns go there, and the convolutions get the mixed kernels again.

Shapes in this file::

    K  rows of a matrix, such as experts    kernel  [O, C/g, h, w]
    P  values of a kernel                   matrix  [K, P]
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from pliant.deploy.onnx_file import constant, initializer

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

# Marks are the numbers from 1.0 on, told apart by their bits; no number is lost up to infinity.
FIRST_MARK = int(np.float32(1.0).view(np.int32))
MOST_MARKS = int(np.float32(np.inf).view(np.int32)) - FIRST_MARK


@dataclass(frozen=True)
class Computed:
    """A kernel that a loop's convolution gets from outside, a product with a constant matrix.

    Attributes:
        name: of the loop's input.
        shaped: name of the kernels of all images, which the loop goes through.
        matrix: name of the constant.
        size: values of the kernel.
        first: number of its first mark.
    """

    name: str
    shaped: str
    matrix: str
    size: int
    first: int


def mark(model: ir.Model) -> list[Computed]:
    """Put marks in the places of computed kernels, in `model` itself."""
    import onnx_ir as ir

    found: list[Computed] = []
    for loop in [node for node in model.graph if node.op_type == "Scan"]:
        body = loop.attributes["body"].as_graph()
        for conv in [node for node in body if node.op_type == "Conv"]:
            kernel = conv.inputs[1]
            position = next((n for n, value in enumerate(body.inputs) if value is kernel), None)
            if kernel is None or position is None or kernel.shape is None or not kernel.shape.is_static():
                continue
            shaped = loop.inputs[position]
            product = None if shaped is None else _product_of(shaped)
            first = found[-1].first + found[-1].size if found else 0
            size = math.prod(kernel.shape.numpy())
            if shaped is None or product is None or first + size > MOST_MARKS:
                continue
            matrix = _matrix_of(model, product, f"{shaped.name}.matrix")
            if matrix is None or matrix.shape is None or matrix.shape[1] != size:
                continue
            bits = np.arange(FIRST_MARK + first, FIRST_MARK + first + size, dtype=np.int32)
            values = ir.tensor(bits.view(np.float32).reshape(kernel.shape.numpy()))
            marks = ir.Value(
                name=f"{shaped.name}.marks", const_value=values, shape=kernel.shape, type=kernel.type
            )
            body.register_initializer(marks)
            conv.replace_input_with(1, marks)
            found.append(Computed(str(kernel.name), str(shaped.name), str(matrix.name), size, first))
    return found


def put_back(model: onnx.ModelProto, kernels: Sequence[Computed]) -> None:
    """Lay the matrices out as ONNX Runtime laid out the marks, and take these away again.

    Raises:
        ValueError: ONNX Runtime lost the marks of a kernel.
    """
    from onnx import numpy_helper

    left = {kernel.first: kernel for kernel in kernels}
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    makers = {name: node for node in model.graph.node for name in node.output}
    loops = [node for node in model.graph.node if node.op_type == "Scan"]
    for loop in loops:
        (body,) = (attribute.g for attribute in loop.attribute if attribute.name == "body")
        inputs = {value.name: value for value in body.input}
        weights = {tensor.name: tensor for tensor in body.initializer}
        for node in body.node:
            tensor = weights.get(node.input[1]) if len(node.input) > 1 else None
            if tensor is None or tensor.data_type != tensor.FLOAT:
                continue
            laid_out = numpy_helper.to_array(tensor)
            marks = laid_out.reshape(-1).view(np.int32) - FIRST_MARK
            kernel = left.get(int(marks[marks >= 0].min())) if (marks >= 0).any() else None
            if kernel is None or not _all_of(marks, kernel):
                continue
            del left[kernel.first]
            matrix = numpy_helper.to_array(constants[kernel.matrix])
            padded = np.concatenate((matrix, np.zeros_like(matrix[:, :1])), 1)
            order = np.where(marks >= 0, marks - kernel.first, kernel.size)  # what fills blocks up is zero
            constants[kernel.matrix].CopyFrom(numpy_helper.from_array(padded[:, order], kernel.matrix))
            target = f"{kernel.shaped}.shape"
            sizes = np.array([-1, *laid_out.shape], np.int64)
            model.graph.initializer.append(numpy_helper.from_array(sizes, target))
            makers[kernel.shaped].input[1] = target
            dims = inputs[kernel.name].type.tensor_type.shape.dim
            for dim, length in zip(dims, laid_out.shape, strict=True):
                dim.dim_value = length
            node.input[1] = kernel.name
            body.initializer.remove(tensor)
        _rename(body, f"{loop.output[0]}.")
    if left:
        raise ValueError(f"ONNX Runtime lost the kernels {', '.join(k.name for k in left.values())}")
    del model.graph.value_info[:]  # some shapes are others now


def _rename(body: onnx.GraphProto, prefix: str) -> None:
    """Give a body's values names of their own: ONNX Runtime takes some twice, and refuses such a file."""
    own = {value.name for value in (*body.input, *body.initializer)}
    own |= {name for node in body.node for name in node.output}
    for value in (*body.input, *body.output, *body.initializer):
        value.name = prefix + value.name
    for node in body.node:
        node.input[:] = [prefix + name if name in own else name for name in node.input]
        node.output[:] = [prefix + name if name else name for name in node.output]
    del body.value_info[:]


def _product_of(shaped: ir.Value) -> ir.Node | None:
    """The product that made the kernels of all images, before they were shaped."""
    reshape = shaped.producer()
    if reshape is None or reshape.op_type != "Reshape" or reshape.inputs[0] is None:
        return None
    product = reshape.inputs[0].producer()
    return product if product is not None and product.op_type == "MatMul" else None


def _matrix_of(model: ir.Model, product: ir.Node, name: str) -> ir.Value | None:
    """The constant [K, P] on the right of a product, as an initializer."""
    right = product.inputs[1]
    values = None if right is None else constant(right)
    if right is None or values is None or values.ndim != 2:
        return None
    maker = right.producer()
    held = right if maker is None else maker.inputs[0]  # through a reshape to its own sizes
    if held is not None and held.const_value is not None and held.shape == right.shape:
        return held
    held = initializer(model, name, values)
    product.replace_input_with(1, held)
    return held


def _all_of(marks: np.ndarray, kernel: Computed) -> bool:
    found = np.sort(marks[marks >= 0])
    return np.array_equal(found, np.arange(kernel.first, kernel.first + kernel.size))
