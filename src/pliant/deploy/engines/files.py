"""The files of engines that take ONNX or what is made of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pliant.methods.mixture_of_depths import MoDBlock


def write_file(
    model: nn.Module,
    example: Tensor,
    path: Path,
    optimized: bool,
    dynamic_batch: bool,
    compiled: bool = False,
) -> Path:
    """Write a network as ONNX or OpenVINO file, by the ending of `path`.

    A network with Mixture-of-Depths blocks goes as it is through PyTorch's exporter, as ONNX, unless
    their best form is asked for; that, and every other network, is what `export` writes.

    Args:
        model: in evaluation mode.
        example: images [B, C, H, W], float32.
        path: of the file.
        optimized: bring Mixture-of-Depths blocks into the form that suits the engine.
        dynamic_batch: the file takes any number of images; otherwise that of `example`.
        compiled: as `export` takes it; that is then the best form.
    """
    from pliant.deploy.export import export  # on use: it is not needed to import pliant

    example = example.contiguous()
    if optimized or compiled or not any(isinstance(m, MoDBlock) for m in model.modules()):
        how: dict[str, Any] = {"dynamic_batch": dynamic_batch, "compiled": compiled}
        return export(model, path, example, batches=(1,), **how)
    # What PyTorch makes of it, for any batch.
    images = example[:1].repeat(2, 1, 1, 1)  # of one image it would make a file for one image
    batch: Any = torch.export.Dim("batch", min=1)
    with torch.no_grad():
        torch.onnx.export(
            model, (images,), str(path), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
        )
    return path


def write_int8(model: nn.Module, example: Tensor, folder: Path, optimized: bool) -> Path:
    """Write a network as ONNX file in 8-bit integers, for any batch (`pliant.deploy.int8`).

    Its ranges are those of random images: it is for timing. ONNX Runtime and OpenVINO run the same
    file; the arguments are those of `write_file`.
    """
    from pliant.deploy.int8 import quantise, random_images

    source = write_file(model, example, folder / "float32.onnx", optimized, dynamic_batch=True)
    return quantise(source, folder / "network.onnx", random_images(example))
