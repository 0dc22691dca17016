"""ONNX files for this machine: parts as one operator each in ONNX Runtime's own layout.

ONNX Runtime lays feature maps out in blocks of channels (NCHWc; 16 with AVX512, else 8). An
operator that works in place on such a block may cost a tenth of the graph that does the same. So
each part that can be an operator (`pliant.parts.Part.onnx_operator`) is written as a pool of one
position, which ONNX Runtime keeps in its layout, fuses with nothing and does not drop; ONNX
Runtime optimises that graph and writes it; and the pools become the operators, whose library
stands beside the file. A part whose channels do not come in whole blocks of the layout gets the
operator for planes.

Shapes: x [B, C, H, W]; a part's logits [B, C] and channels [B, k].
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.deploy import onnx_file, onnx_kernels
from pliant.deploy.extras import onnx_runtime, require
from pliant.deploy.facts import Facts, digest_of
from pliant.deploy.selections import Run
from pliant.parts import OnnxOperator, Part, hooked, named_operators, parts, replace_parts
from pliant.provenance import cpu_model

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

DOMAIN = "pliant"
BLOCKED = "com.microsoft.nchwc"  # ONNX Runtime's domain of operators in blocks of channels
_PROBED = 64  # channels


class Place(nn.Module):
    """Stands for a part in a graph: the identity, as a pool of one position.

    Example:
        >>> import torch
        >>> x = torch.randn(1, 16, 4, 4)
        >>> torch.equal(Place()(x), x)
        True
    """

    def forward(self, x: Tensor) -> Tensor:
        """`x` [B, C, H, W]."""
        return F.max_pool2d(x, 1)


def machine() -> str:
    """What a file made here is tied to.

    Raises:
        ValueError: no blocks of channels on this processor.

    Example:
        >>> machine()  # doctest: +SKIP
        'AMD EPYC, blocks of 16 channels'
    """
    return f"{cpu_model()}, blocks of {block_size()} channels"


def block_size() -> int:
    """Channels in a block of ONNX Runtime's layout on this processor.

    Raises:
        ValueError: it has no such layout here.
    """
    runtime = onnx_runtime()
    shape = f"float[1, {_PROBED}, 1, 2]"
    model = require("onnx").parser.parse_model(
        f"""<ir_version: 8, opset_import: ["": 18, "{BLOCKED}": 1]>
        probe ({shape} x) => ({shape} y) {{ y = {BLOCKED}.ReorderInput (x) }}"""
    )
    # The second position of the first channel comes after the first of all channels of its block.
    x = np.arange(_PROBED * 2, dtype=np.float32).reshape(1, _PROBED, 1, 2)
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = runtime.InferenceSession(
            model.SerializeToString(), options, providers=["CPUExecutionProvider"]
        )
        (y,) = session.run(None, {"x": x})
    except Exception as error:  # ONNX Runtime's own
        raise ValueError(f"ONNX Runtime has no blocked layout on this processor: {error}") from error
    size = int(np.flatnonzero(y.reshape(-1) == 1)[0])
    if size not in (8, 16):
        raise ValueError(f"ONNX Runtime's blocks of {size} channels are not known to the operator")
    return size


@dataclass(frozen=True)
class Native:
    """What of a network gets a form for this machine.

    Attributes:
        operators: of its parts, by path.
        library: that holds these; None where there are none.
    """

    operators: Mapping[str, OnnxOperator]
    library: Path | None

    @property
    def rankings(self) -> dict[str, str]:
        """Paths of the parts that rank, by the path of the operator that they are in."""
        found = self.operators.items()
        return {path: f"{path}.{op.ranking}" for path, op in found if op.ranking is not None}


def take_parts(network: nn.Module) -> Native:
    """Put a `Place` where each part is that can be an operator, in `network` itself.

    Args:
        network: in evaluation mode, its norms folded.

    Returns:
        The operators, their library built.

    Raises:
        ValueError: no part can be an operator or mixes kernels, the operators are of two libraries, or
            theirs cannot be built; says why.
    """
    taken: dict[str, OnnxOperator] = {}
    reasons: list[str] = []
    libraries: set[str] = set()

    def place(path: str, part: Part) -> nn.Module | None:
        operator = hooked(part) or part.onnx_operator()
        if isinstance(operator, OnnxOperator):
            taken[path] = operator
            libraries.add(part.operators)
            return Place()
        reasons.extend([operator] if operator else [])
        return None

    replace_parts(network, place)
    if not taken and any(part.mixes for part in parts(network).values()):
        return Native({}, None)
    if not taken:
        why = "; ".join(dict.fromkeys(reasons)) or "it has no part of such a method"
        raise ValueError(
            f"compiled=True of an .onnx is for parts that can be one operator, such as "
            f"Mixture-of-Depths blocks, and of this network's none can: {why}"
        )
    if len(libraries) > 1:
        raise ValueError(
            f"a compiled .onnx has operators of one library, and this network's are of "
            f"{', '.join(sorted(libraries))}; write it with compiled=False"
        )
    (operators,) = named_operators(libraries)
    return Native(taken, operators.onnx_library())


def write(graph: ir.Model, native: Native, path: Path, facts: Facts) -> list[Path]:
    """Optimise a graph for this machine, put operators and mixed kernels in their places, and write it.

    The graph has a pool for each operator, by its name. The operators' library, if any, is a second file.

    Raises:
        ValueError: ONNX Runtime cannot optimise the graph, or dropped a place.
    """
    import onnx

    kernels = onnx_kernels.mark(graph)
    before, after = path.with_suffix(".before.onnx"), path.with_suffix(".after.onnx")
    onnx_file.write(graph, before, None)
    try:
        onnx_file.open_session(before, None, optimised=after)
    except Exception as error:  # ONNX Runtime's own
        raise ValueError(f"ONNX Runtime cannot optimise the graph: {error}") from error
    model = onnx.load(str(after))
    before.unlink()
    after.unlink()
    onnx_kernels.put_back(model, kernels)
    _put(model, native.operators, block_size())
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, facts.to_metadata())
    onnx.save(model, str(path))
    if native.library is None:
        return [path]
    library = onnx_file.library_path(path)
    shutil.copyfile(native.library, library)
    return [path, library]


def check_here(path: Path, facts: Facts) -> Path | None:
    """The library of a compiled file, if it has one, and it and this ONNX Runtime are those of the file.

    Raises:
        ValueError: the library is missing or another one, or ONNX Runtime is of another version or has
            another layout than where the file was made.
    """
    library = onnx_file.library_path(path) if facts.library_sha256 else None
    if library is not None and not library.is_file():
        raise ValueError(f"{path.name} was compiled, and its library {library.name} is not beside it")
    if library is not None and digest_of(library) != facts.library_sha256:
        raise ValueError(
            f"{library.name} is not the library that {path.name} was compiled with, so it is not loaded: "
            f"export it again"
        )
    made, here = facts.versions.get("onnxruntime"), str(onnx_runtime().__version__)
    if made != here:
        raise ValueError(
            f"{path.name} was compiled by and for onnxruntime {made}, and this is {here}: export it again"
        )
    if library is None and not facts.machine.endswith(blocks := f"blocks of {block_size()} channels"):
        # An operator's library sees to that by itself.
        raise ValueError(
            f"{path.name} was compiled for {facts.machine}, and ONNX Runtime works in {blocks} here: "
            f"export it again"
        )
    return library


def runner(path: Path, native: Native, others: list[str]) -> Run:
    """Runs the file for a check, what its parts selected as further outputs.

    `others` are paths of the parts that rank in the graph; where ONNX Runtime left no tensor of that
    name, nothing is told of any selection.
    """

    def tell(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.domain == DOMAIN and node.name in native.rankings:
                node.output.extend(onnx_file.selection_names(native.rankings[node.name]))

    library = None if native.library is None else onnx_file.library_path(path)
    return onnx_file.runner(path, [*native.rankings.values(), *others], tell, library)


def _put(model: onnx.ModelProto, operators: Mapping[str, OnnxOperator], size: int) -> None:
    """The operators in the places of the pools."""
    from onnx import helper, numpy_helper

    left = dict(operators)
    for node in model.graph.node:
        path = node.name.removesuffix("_nchwc")  # ONNX Runtime's name of a node in its layout
        operator = left.pop(path, None) if node.op_type == "MaxPool" else None
        if operator is None:
            continue
        weights = {f"{path}.{name}": p for name, p in operator.weights.items()}
        model.graph.initializer.extend(
            numpy_helper.from_array(p.detach().numpy(), name) for name, p in weights.items()
        )
        attributes: dict[str, Any] = {**operator.attributes}
        new = helper.make_node(
            operator.name,
            [node.input[0], *weights],
            list(node.output),
            name=path,
            domain=DOMAIN,
            block=size if node.domain == BLOCKED else 1,
            **attributes,
        )
        node.CopyFrom(new)
    if left:
        raise ValueError(f"ONNX Runtime left no place for {', '.join(left)} in its graph")
    if operators:
        model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
