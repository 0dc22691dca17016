"""Commands that write networks for the engines that people deploy."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from pliant.commands._common import network_of


def export(
    model: Annotated[str, typer.Argument(help="network of timm, or a folder that `save` or `train` wrote")],
    path: Annotated[Path, typer.Argument(help="NAME.pt2, NAME.onnx or NAME.xml; of --depths a folder")],
    depth: Annotated[
        str | None, typer.Option(help="of an adaptive network: TTFF, a letter a stage, T skips")
    ] = None,
    depths: Annotated[
        str | None, typer.Option(help="several, as TTFF,FFFF, or all: into a folder with a manifest")
    ] = None,
    format_: Annotated[str, typer.Option("--format", help="of --depths: onnx, pt2 or xml")] = "onnx",
    threads: Annotated[int | None, typer.Option(help="of --depths: while they are timed", min=1)] = None,
    batch: Annotated[int | None, typer.Option(help="images of each call, if not any number", min=1)] = None,
    pixels: Annotated[int | None, typer.Option(help="height and width, if not the network's own")] = None,
    precision: Annotated[str, typer.Option(help="float32, float16 or bfloat16")] = "float32",
    takes: Annotated[str, typer.Option(help="normalised, float or uint8 images")] = "normalised",
    resize_from: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH of the images, resized in the file")
    ] = None,
    opset: Annotated[int | None, typer.Option(help="of ONNX")] = None,
    compiled: Annotated[bool, typer.Option("--compiled", help="for this machine: .pt2 or .onnx")] = False,
    portable: Annotated[bool, typer.Option(help="of .onnx: only what TensorRT's parser documents")] = True,
    check_images: Annotated[
        Path | None, typer.Option(help="folder of images to check with, if not the digits")
    ] = None,
    tolerance: Annotated[float | None, typer.Option(help="largest relative error")] = None,
) -> None:
    """Write a network as .pt2, .onnx or OpenVINO file, checked against it in its own engine."""
    from pliant.adaptive.manifest import export_depths
    from pliant.deploy.export import export as run
    from pliant.deploy.facts import read_report
    from pliant.methods.adaptive_depth.depth import subnet

    network = _network(model)
    options: dict[str, Any] = {
        "dynamic_batch": batch is None,
        "precision": precision,
        "takes": takes,
        "compiled": compiled,
        "portable": portable,
        "check_images": check_images,
        "tolerance": tolerance,
        "example": _example(network, batch, pixels),
    }
    if opset is not None:
        options["opset"] = opset
    if resize_from is not None:
        options["image_size"] = _size(resize_from)
    if depths is not None:
        if depth is not None:
            raise ValueError("give --depth for a file, or --depths for a folder, not both")
        skips = None if depths == "all" else [_flags(text) for text in depths.split(",")]
        format_name: Any = format_
        made = export_depths(network, path, skips, format=format_name, threads=threads, **options)
        for one in made.depths:
            ms = "not timed" if one.latency_ms is None else f"{one.latency_ms:.2f} ms"
            typer.echo(f"{one.file}: {one.macs / 1e6:.1f} M MACs, {ms}, error {one.max_rel_error:.1e}")
        typer.echo(
            f"{len(made.depths)} depths, timed on {made.threads} threads, and manifest.json are in {path}"
        )
        return
    if threads is not None:
        raise ValueError(
            "--threads is for the latencies of --depths; a file runs on as many as it is told to"
        )
    if depth is not None:
        network = subnet(network, _flags(depth))
    written = run(network, path, **options)
    typer.echo(f"{written}: {read_report(written).parity}")


def _network(name: str) -> Any:
    """A saved network, or one of timm by its name (random weights)."""
    import timm

    found = network_of(name)
    if not isinstance(found, str):
        return found
    if not timm.is_model(found):
        raise ValueError(f"timm has no model named {found!r}, and there is no such folder")
    return timm.create_model(found)


def _example(network: Any, batch: int | None, pixels: int | None) -> Any:
    """Images of the sizes that were asked for; None where the network's own do."""
    import torch

    from pliant.anatomy import input_size

    if batch is None and pixels is None:
        return None
    size = input_size(network)
    if size is None:
        raise ValueError("this network does not say its input size")
    channels, height, width = size
    return torch.zeros(batch or 1, channels, pixels or height, pixels or width)


def _size(text: str) -> tuple[int, int]:
    height, times, width = text.partition("x")
    if not times or not height.isdigit() or not width.isdigit():
        raise ValueError(f"{text!r} is not of the form HEIGHTxWIDTH, such as 480x640")
    return int(height), int(width)


def _flags(text: str) -> tuple[bool, ...]:
    if not text or set(text) - {"T", "F"}:
        raise ValueError(f"{text!r} is no depth: give a letter a stage, T where it skips, such as TTFF")
    return tuple(letter == "T" for letter in text)
