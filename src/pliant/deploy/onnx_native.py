"""ONNX files for this machine: Mixture-of-Depths blocks as one operator in ONNX Runtime's layout.

ONNX Runtime lays feature maps out in blocks of channels (NCHWc; 16 with AVX512, else 8). An
operator that works in place on such a block costs a tenth of the graph that does the same. So
each block that has a fused form is written as a pool of one position, which ONNX Runtime
keeps in its layout, fuses with nothing and does not drop; ONNX Runtime optimises that graph and
writes it; and the pools become the operator ``pliant.MoDBlock``, whose library stands beside the
file (``ops/mod_block_ort.cpp``). A block whose channels do not come in whole blocks of the
layout gets the operator for planes.

Shapes: x [B, C, H, W]; a block's logits [B, C] and channels [B, k].
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from pliant.deploy import onnx_file
from pliant.deploy.extras import onnx_runtime, require
from pliant.deploy.facts import Facts
from pliant.deploy.selections import Run
from pliant.methods.mixture_of_depths import MoDBlock
from pliant.methods.mixture_of_depths.ops import building
from pliant.methods.mixture_of_depths.ops.fused import FusedMoDBlock, fusable
from pliant.provenance import cpu_model
from pliant.threaded import take_over

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

DOMAIN, OPERATOR = "pliant", "MoDBlock"
BLOCKED = "com.microsoft.nchwc"  # ONNX Runtime's domain of operators in blocks of channels
_PROBED = 64  # channels


class Place(nn.Module):
    """Stands for a block in a graph: the identity, as a pool of one position.

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
    """What a file made here is tied to; builds the operator's library if need be.

    Raises:
        ValueError: no compiler, or one that fails; no blocks of channels on this processor.

    Example:
        >>> machine()  # doctest: +SKIP
        'AMD EPYC, blocks of 16 channels'
    """
    try:
        building.library(building.ORT_SOURCE)
    except building.BuildError as error:
        raise ValueError(f"the operator for ONNX Runtime cannot be built: {error}") from error
    return f"{cpu_model()}, blocks of {block_size()} channels"


def block_size() -> int:
    """Channels in a block of ONNX Runtime's layout on this processor.

    Raises:
        ValueError: it has no such layout here.
    """
    helper, runtime = require("onnx").helper, onnx_runtime()
    shape = [1, _PROBED, 1, 2]
    node = helper.make_node("ReorderInput", ["x"], ["y"], domain=BLOCKED)
    images = [helper.make_tensor_value_info(name, 1, shape) for name in ("x", "y")]
    graph = helper.make_graph([node], "probe", images[:1], images[1:])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid(BLOCKED, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    # The second position of the first channel comes after the first of all channels of its block.
    x = np.arange(_PROBED * 2, dtype=np.float32).reshape(shape)
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


def take_blocks(network: nn.Module) -> dict[str, FusedMoDBlock]:
    """Put a `Place` where each block is that has a fused form, in `network` itself.

    Args:
        network: in evaluation mode, its norms folded.

    Returns:
        The blocks, by path.

    Raises:
        ValueError: there is none; says why.

    Example:
        >>> import timm, torch
        >>> from pliant.deploy.folding import fold_norms
        >>> model = timm.create_model("resnet20_cifar_mod").eval()
        >>> list(take_blocks(fold_norms(model, torch.randn(1, 3, 32, 32))))
        ['layer1.1', 'layer2.1', 'layer3.1']
    """
    blocks = {path: m for path, m in network.named_modules() if isinstance(m, MoDBlock)}
    reasons = {path: fusable(block) for path, block in blocks.items()}
    taken = {path: FusedMoDBlock(blocks[path]) for path, reason in reasons.items() if not reason}
    if not taken:
        found = "; ".join(dict.fromkeys(reasons.values())) or "it has none"
        raise ValueError(
            f"compiled=True of an .onnx is for Mixture-of-Depths blocks that one operator can do, and of "
            f"this network's none can: {found}"
        )
    for path in taken:
        parent, _, name = path.rpartition(".")
        place = Place()
        setattr(network.get_submodule(parent), name, place)
        take_over(place, blocks[path])
    return taken


def write(graph: ir.Model, blocks: Mapping[str, FusedMoDBlock], path: Path, facts: Facts) -> list[Path]:
    """Optimise a graph for this machine, put the operator in its places, and write it.

    Args:
        graph: with a pool of its name for each block.
        blocks: by path.
        path: of the file; the operator's library is written beside it.
        facts: of the file.

    Returns:
        The two files.

    Raises:
        ValueError: ONNX Runtime cannot optimise the graph, or dropped a place.
    """
    import onnx

    before, after = path.with_suffix(".before.onnx"), path.with_suffix(".after.onnx")
    onnx_file.write(graph, before, None)
    _optimise(before, after)
    model = onnx.load(str(after))
    before.unlink()
    after.unlink()
    _put(model, blocks, block_size())
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, facts.to_metadata())
    onnx.save(model, str(path))
    library = onnx_file.library_path(path)
    shutil.copyfile(building.library(building.ORT_SOURCE), library)
    return [path, library]


def check_here(path: Path, facts: Facts) -> None:
    """Refuse a compiled file whose library is missing, or that another ONNX Runtime made.

    Raises:
        ValueError: it cannot be run here; says why.
    """
    library = onnx_file.library_path(path)
    if not library.is_file():
        raise ValueError(f"{path.name} was compiled, and its library {library.name} is not beside it")
    made, here = facts.versions.get("onnxruntime"), str(onnx_runtime().__version__)
    if made != here:
        raise ValueError(
            f"{path.name} was compiled by and for onnxruntime {made}, and this is {here}: export it again"
        )


def runner(path: Path, native: list[str], others: list[str]) -> Run:
    """Runs the file for a check, what blocks selected as further outputs.

    Args:
        path: of the file.
        native: paths of the blocks that are the operator.
        others: of those with a selector in the graph; where ONNX Runtime left no tensor of that
            name, nothing is told of any selection.
    """

    def tell(model: onnx.ModelProto) -> None:
        for node in model.graph.node:
            if node.op_type == OPERATOR:
                node.output.extend(onnx_file.selection_names(node.name))

    return onnx_file.runner(path, [*native, *others], tell)


def _optimise(before: Path, after: Path) -> None:
    """What ONNX Runtime makes of a graph on this machine."""
    runtime: Any = onnx_runtime()
    options = runtime.SessionOptions()
    options.log_severity_level = 4  # it warns that the file is for this machine
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.optimized_model_filepath = str(after)
    try:
        runtime.InferenceSession(str(before), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime's own
        raise ValueError(f"ONNX Runtime cannot optimise the graph: {error}") from error


def _put(model: onnx.ModelProto, blocks: Mapping[str, FusedMoDBlock], size: int) -> None:
    """The operator in the places of the pools."""
    from onnx import helper, numpy_helper

    left = dict(blocks)
    for node in model.graph.node:
        path = node.name.removesuffix("_nchwc")  # ONNX Runtime's name of a node in its layout
        block = left.pop(path, None) if node.op_type == "MaxPool" else None
        if block is None:
            continue
        weights = {f"{path}.{name}": p for name, p in block.named_parameters()}
        model.graph.initializer.extend(
            numpy_helper.from_array(p.detach().numpy(), name) for name, p in weights.items()
        )
        new = helper.make_node(
            OPERATOR,
            [node.input[0], *weights],
            list(node.output),
            name=path,
            domain=DOMAIN,
            block=size if node.domain == BLOCKED else 1,
            dilation=block.dilation,
            order=block.order,
            fusion=block.fusion,
        )
        node.CopyFrom(new)
    if left:
        raise ValueError(f"ONNX Runtime left no place for {', '.join(left)} in its graph")
    model.opset_import.append(helper.make_opsetid(DOMAIN, 1))
