"""ONNX files: written from a program, made plain, checked, and run by ONNX Runtime.

What the exporter leaves otherwise than engines like it is rewritten: means over all positions
become `GlobalAveragePool` (a blocked layout goes through it), shapes that are known but for the
batch become constants, and reshapes of reshapes one. Notes of the exporter, among them this
machine's paths, are taken out. The logits and channels of a part that ranks get the names
``PATH.logits`` and ``PATH.index``.

Shapes: as in the network; the batch is a symbol where it is open.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import warnings
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.export import ExportedProgram

from pliant.deploy import opsets, tensorrt
from pliant.deploy.extras import onnx_runtime, require
from pliant.deploy.facts import Facts
from pliant.deploy.selections import Result, Run, told_beside

if TYPE_CHECKING:
    import onnx_ir as ir

_WRITTEN = 18  # the oldest opset that PyTorch's exporter writes
DEFAULT_OPSET = 18
LARGEST_FILE = 2**31 - 2**20  # bytes of weights that one protobuf message can hold, and some room
INPUT = "images"
UNPACKED = 2**18  # values of a matrix that outgrows a cache
_SCOPES = "pkg.torch.onnx.name_scopes"


def check_opset(opset: int) -> None:
    """Refuse an opset that cannot be written.

    Raises:
        ValueError: names it, and those that can.
    """
    from torch.onnx._constants import ONNX_MAX_OPSET

    if (
        not isinstance(opset, int)
        or isinstance(opset, bool)
        or not opsets.OLDEST <= opset <= ONNX_MAX_OPSET
    ):
        raise ValueError(
            f"opset {opset!r} is not supported: with PyTorch {torch.__version__}, {opsets.OLDEST} to "
            f"{ONNX_MAX_OPSET} are"
        )


def build(
    program: ExportedProgram,
    outputs: tuple[str, ...],
    opset: int,
    ranking: list[str],
    places: Collection[str] = (),
    note: Callable[[ir.Model], None] | None = None,
) -> ir.Model:
    """The ONNX graph of a program.

    Args:
        program: what `torch.export` made.
        outputs: names of the outputs.
        opset: version of the operators.
        ranking: paths of the parts that rank, to name their tensors.
        places: paths of modules that are a pool, and in the graph a node of their name.
        note: notes in the graph what is told by the modules of its nodes (`scopes`), which then go.

    Raises:
        ValueError: an operator of the program has no ONNX form, or not in this opset.
    """
    written = max(opset, _WRITTEN)
    _drop_idle_dtypes(program)
    try:
        # The exporter prints and logs its steps.
        with quiet():
            made = torch.onnx.export(
                program,
                (),
                dynamo=True,
                opset_version=written,
                input_names=[INPUT],
                output_names=list(outputs),
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise ValueError(
            f"PyTorch could not write the network as ONNX, opset {written}: {error}"
        ) from error
    assert made is not None
    model = made.model
    if model.opset_imports.get("") != written:
        raise ValueError(
            f"opset {written} is not supported for this network: PyTorch wrote "
            f"{model.opset_imports.get('')}"
        )
    _name_selections(model, ranking)
    _name_places(model, places)
    _simplify(model)
    _name_batch(model)
    if note is not None:
        note(model)
    _strip(model)
    if opset < written:
        opsets.lower(model, opset)
    return model


def check_portable(model: ir.Model) -> None:
    """Refuse a graph with something that TensorRT's parser does not document.

    Raises:
        ValueError: names it.
    """
    found = tensorrt.objections(model)
    if found:
        more = f" (and {len(found) - 3} more)" if len(found) > 3 else ""
        raise ValueError(
            f"the graph holds what TensorRT's parser does not document: {'; '.join(found[:3])}{more}; "
            f"portable=False writes it all the same"
        )


def write(model: ir.Model, path: Path, facts: Facts | None) -> list[Path]:
    """Write a graph with its facts, check it, and say which files it became.

    Weights beyond what one protobuf message holds go to ``FILE.data`` beside it.

    Raises:
        ValueError: ONNX's checker refuses the graph.
    """
    import onnx_ir as ir

    if facts is not None:
        model.metadata_props.update(facts.to_metadata())
    graphs = (model.graph, *model.graph.subgraphs())
    values = (value.const_value for graph in graphs for value in graph.initializers.values())
    size = sum(value.nbytes for value in values if value is not None)
    data = f"{path.name}.data" if size > LARGEST_FILE else None
    ir.save(model, path, external_data=data)
    check(path)
    return [path] if data is None else [path, path.with_name(data)]


def check(path: Path) -> None:
    """Have a file checked by ONNX's own checker.

    Raises:
        ValueError: it refuses the graph.
    """
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ValueError(f"ONNX's checker refuses the graph: {error}") from error


def facts_of(path: str | Path) -> Facts:
    """What an ONNX file says of itself.

    Raises:
        ValueError: it is no ONNX file of pliant's.
    """
    onnx = require("onnx")
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:  # protobuf's own, of no common type
        raise ValueError(f"{path} is no ONNX file: {error}") from error
    return Facts.from_metadata({p.key: p.value for p in model.metadata_props})


def load(
    path: str | Path, threads: int | None = None, library: Path | None = None
) -> Callable[[Tensor], tuple[Tensor, ...]]:
    """A function that runs the file by ONNX Runtime on the CPU; arguments as of `open_session`."""
    session = open_session(Path(path), threads, library)

    def run(images: Tensor) -> tuple[Tensor, ...]:
        return tuple(map(torch.from_numpy, session.run(None, {INPUT: images.numpy()})))

    return run


def runner(
    path: Path,
    ranking: list[str],
    tell: Callable[[Any], None] | None = None,
    library: Path | None = None,
) -> Run:
    """Runs the file, its selections as further outputs; these change nothing else in it.

    Args:
        path: path of the file.
        ranking: paths of the parts that rank; where the graph lacks a tensor of one, nothing is told.
        tell: makes nodes of the model give more of what they compute.
        library: as of `open_session`.
    """
    import onnx

    model = onnx.load(str(path), load_external_data=False)
    if tell is not None:
        tell(model)
    outputs = len(model.graph.output)
    names = [name for part in ranking for name in selection_names(part)]
    told = {name for node in model.graph.node for name in node.output}.issuperset(names)
    model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if told)
    probe = path.with_name(f"check-{path.name}")  # beside it, where its external data is found
    probe.write_bytes(model.SerializeToString())
    try:
        call = load(probe, 1, library)
    finally:
        probe.unlink()

    def run(images: Tensor) -> Result:
        found = call(images)
        return told_beside(found, outputs, ranking) if told else Result(found, None)

    return run


def selection_names(path: str) -> tuple[str, str]:
    """What the logits and channels of the part at `path` are called in a graph."""
    return f"{path}.logits", f"{path}.index"


def open_session(
    path: Path, threads: int | None, library: Path | None = None, optimised: Path | None = None
) -> Any:
    """A session of ONNX Runtime on the CPU, with all of its graph optimisations.

    Args:
        path: path of the file.
        threads: for each operator; None: as many as ONNX Runtime takes.
        library: of operators that the file has. It is code, so never one that merely stands there.
        optimised: file to write the optimised graph to.

    Raises:
        ValueError: the library cannot be used here; says why.
    """
    runtime = onnx_runtime()
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    options.inter_op_num_threads = 1
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    if threads is not None:
        options.intra_op_num_threads = threads
    if optimised is not None:
        options.optimized_model_filepath = str(optimised)
    if library is not None:
        try:
            options.register_custom_ops_library(str(library))
        except Exception as error:  # ONNX Runtime's own
            raise ValueError(f"{library.name} cannot be used here: {error}") from error
    return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def library_path(path: Path) -> Path:
    """Where the library stands whose operators a compiled file has.

    Example:
        >>> library_path(Path("net.onnx")).name
        'net.onnx.so'
    """
    return path.with_name(f"{path.name}.so")


@contextlib.contextmanager
def quiet() -> Any:
    """Nothing printed, logged or warned of below an error."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _drop_idle_dtypes(program: ExportedProgram) -> None:
    """Take the dtype from means that have it already: older onnxscript knows none there."""
    for node in program.graph.nodes:
        if node.target is torch.ops.aten.mean.dim and "dtype" in node.kwargs:
            seen = node.args[0].meta["val"]
            if seen.dtype == node.kwargs["dtype"]:
                node.kwargs = {k: v for k, v in node.kwargs.items() if k != "dtype"}
    program.graph_module.recompile()


def _name_selections(model: ir.Model, ranking: list[str]) -> None:
    """Name the tensors of rankings, by the modules that the exporter noted at each node."""
    named = set()
    for node in model.graph:
        if node.op_type != "TopK":
            continue
        around = scopes(node)
        for path in ranking:
            if f"network.{path}" in around:
                logits, index = selection_names(path)
                seen = node.inputs[0]
                assert seen is not None
                seen.name, node.outputs[1].name = logits, index
                named.add(path)
    if named != set(ranking):
        missing = sorted(set(ranking) - named)
        raise ValueError(f"the graph has no selection for {', '.join(missing)}, so it cannot be checked")


def _name_places(model: ir.Model, places: Collection[str]) -> None:
    """Name the nodes of modules that are a pool, and their outputs, after these modules."""
    for node in model.graph:
        if node.op_type == "MaxPool":
            around = scopes(node)
            for place in places:
                if f"network.{place}" in around:
                    node.name = node.outputs[0].name = place


def scopes(node: ir.Node) -> list[str]:
    """Paths of the modules around a node, as the exporter noted them."""
    text = node.metadata_props.get(_SCOPES, "[]")
    return [str(scope) for scope in json.loads(text.replace("'", '"'))]


def _simplify(model: ir.Model) -> None:
    from onnx_ir.passes import common

    _cast_first(model)
    for node in list(model.graph.all_nodes()):
        if node.op_type == "ReduceMean":
            _as_global_pool(node)
    for node in list(model.graph.all_nodes()):
        if node.op_type == "Reshape":
            _reshape_plainly(model, node)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)
    _sink_weights(model)
    model.graph.sort()


def _cast_first(model: ir.Model) -> None:
    """Whole numbers go into a cast and nowhere else: few engines take more of them."""
    images = model.graph.inputs[0]
    casts = [user for user, _ in images.uses() if user.op_type == "Cast"]
    if casts:
        for user, position in list(images.uses()):
            if user.op_type == "Shape":
                user.replace_input_with(position, casts[0].outputs[0])


def _as_global_pool(node: ir.Node) -> None:
    """A mean over height and width as a pool; flattened where the axes went."""
    import onnx_ir as ir

    x, y = node.inputs[0], node.outputs[0]
    given = node.inputs[1] if len(node.inputs) > 1 else None
    axes = None if given is None else ir.convenience.get_const_tensor(given)
    if x is None or x.shape is None or len(x.shape) != 4 or axes is None:
        return
    if sorted(int(a) % 4 for a in axes.numpy().reshape(-1)) != [2, 3]:
        return
    notes = dict(node.metadata_props)
    pool = ir.node("GlobalAveragePool", [x], name=f"{node.name}_pool", metadata_props=notes)
    new, last = [pool], pool
    pool.outputs[0].type = y.type
    pool.outputs[0].shape = ir.Shape([x.shape[0], x.shape[1], 1, 1])
    if not node.attributes.get_int("keepdims", 1):
        name = f"{node.name}_flatten"
        last = ir.node("Flatten", [pool.outputs[0]], {"axis": 1}, name=name, metadata_props=notes)
        last.outputs[0].type, last.outputs[0].shape = y.type, y.shape
        new.append(last)
    assert node.graph is not None
    ir.convenience.replace_nodes_and_values(node.graph, node, [node], new, [y], [last.outputs[0]])


def _reshape_plainly(model: ir.Model, node: ir.Node) -> None:
    """A constant target, where all but one dimension is known; from the first of many reshapes."""
    y = node.outputs[0]
    if y.shape is None or (node.attributes.get_int("allowzero", 0) != 0 and 0 in y.shape):
        return
    sizes = [size if isinstance(size, int) else -1 for size in y.shape]
    if sizes.count(-1) > 1:
        return
    before = node.inputs[0].producer() if node.inputs[0] is not None else None
    if before is not None and before.op_type == "Reshape":
        node.replace_input_with(0, before.inputs[0])
    name = "shape_" + "_".join(str(size).replace("-1", "any") for size in sizes)
    if name not in model.graph.initializers:
        initializer(model, name, np.array(sizes, np.int64))
    node.replace_input_with(1, model.graph.initializers[name])
    node.attributes.pop("allowzero", None)


def leave_unpacked(model: ir.Model, prefix: str = "") -> None:
    """Keep ONNX Runtime from packing large matrices of which a product uses each value once an image.

    It packs every constant on the right of a product, which pays where rows are many. For one row, a
    packed matrix takes 1.7 times as long to read as one left as it is; for many, it is packed on the
    way. So such a matrix passes a reshape to its own sizes, which the batch's size keeps from being a
    constant. Matrices count that are 4 times as long as wide, or more: experts' kernels side by side.

    Only products are looked at whose names begin with `prefix`.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common

    same = None
    for node in list(model.graph):
        if node.op_type not in ("MatMul", "Gemm") or not str(node.name).startswith(prefix):
            continue
        rows, matrix = node.inputs[:2]
        assert rows is not None
        assert matrix is not None
        values = constant(matrix)
        open_rows = rows.shape is not None and len(rows.shape) == 2 and not isinstance(rows.shape[0], int)
        if not open_rows or values is None or values.ndim != 2:
            continue
        if values.size < UNPACKED or max(values.shape) < 4 * min(values.shape):
            continue
        if same is None:
            zeros = initializer(model, "zeros", np.zeros(2, np.int64))
            sizes = ir.node("Shape", [rows], name="sizes")
            same = ir.node("Mul", [sizes.outputs[0], zeros], name="same_sizes")  # 0: the size that it has
            model.graph.insert_before(node, [sizes, same])
        held = initializer(model, f"{matrix.name}.unpacked", values)
        passed = ir.node("Reshape", [held, same.outputs[0]], name=f"{matrix.name}.reshape")
        passed.outputs[0].type, passed.outputs[0].shape = held.type, held.shape
        model.graph.insert_before(node, [passed])
        node.replace_input_with(1, passed.outputs[0])
    common.RemoveUnusedNodesPass()(model)


def constant(value: ir.Value) -> np.ndarray | None:
    """What a value is where it is constant, or one reshaped."""
    if value.const_value is not None:
        return value.const_value.numpy()
    maker = value.producer()
    if maker is None or maker.op_type != "Reshape" or value.shape is None or not value.shape.is_static():
        return None
    given = maker.inputs[0]
    values = None if given is None else constant(given)
    return None if values is None else values.reshape(value.shape.numpy())


def initializer(model: ir.Model, name: str, values: np.ndarray) -> ir.Value:
    """Give a graph a constant."""
    import onnx_ir as ir

    tensor = ir.tensor(values, name=name)
    value = ir.Value(
        name=name, const_value=tensor, shape=ir.Shape(values.shape), type=ir.TensorType(tensor.dtype)
    )
    model.graph.register_initializer(value)
    return value


def _sink_weights(model: ir.Model) -> None:
    """Weights that only the body of one loop uses go into it: engines pack constants of the same graph."""
    for value in list(model.graph.initializers.values()):
        graphs = {user.graph for user, _ in value.uses()}
        body = graphs.pop() if len(graphs) == 1 else None
        if body is not None and body is not model.graph and not value.is_graph_output():
            del model.graph.initializers[str(value.name)]
            body.register_initializer(value)


def _name_batch(model: ir.Model) -> None:
    """Call the open dimension of images and outputs what it is."""
    import onnx_ir as ir

    for value in (*model.graph.inputs, *model.graph.outputs):
        if value.shape is not None and not isinstance(value.shape[0], int):
            value.shape = ir.Shape(["batch", *list(value.shape)[1:]])


def _strip(model: ir.Model) -> None:
    """Take the exporter's notes out."""
    from onnx_ir.passes import common

    common.ClearMetadataAndDocStringPass()(model)  # of graphs and nodes
    model.metadata_props.clear()
    graphs = (model.graph, *model.graph.subgraphs())
    named = (v for g in graphs for v in (*g.inputs, *g.outputs, *g.initializers.values()))
    made = (value for node in model.graph.all_nodes() for value in node.outputs)
    for value in (*named, *made):
        value.metadata_props.clear()
