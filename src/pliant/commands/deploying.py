"""Commands that write networks as files for inference engines."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated, Any

import typer

from pliant.commands._common import Network, Pixels, built, going_on, progress_of


def export(
    model: Network,
    path: Annotated[
        Path, typer.Argument(help="File to write: NAME.pt2, NAME.onnx or NAME.xml; with --depths a folder")
    ],
    depth: Annotated[
        str | None,
        typer.Option(help="Depth of an adaptive network: a letter a stage, T skips, such as TTFF"),
    ] = None,
    depths: Annotated[
        str | None, typer.Option(help="Several depths, as TTFF,FFFF, or all: a folder with a manifest")
    ] = None,
    format_: Annotated[str, typer.Option("--format", help="With --depths: onnx, pt2 or xml")] = "onnx",
    threads: Annotated[
        int | None, typer.Option(help="With --depths: CPU threads while the files are timed", min=1)
    ] = None,
    batch: Annotated[
        int | None, typer.Option(help="Images of each call; by default the file takes any number", min=1)
    ] = None,
    pixels: Pixels = None,
    precision: Annotated[str, typer.Option(help="float32, float16, bfloat16 or int8")] = "float32",
    takes: Annotated[
        str, typer.Option(help="Images that the file takes: normalised, float or uint8")
    ] = "normalised",
    resize_from: Annotated[
        str | None, typer.Option(help="HEIGHTxWIDTH of the images; the file resizes them")
    ] = None,
    opset: Annotated[int | None, typer.Option(help="Version of ONNX's operators, for .onnx")] = None,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="Compile for this machine; for .pt2 and .onnx")
    ] = False,
    portable: Annotated[
        bool, typer.Option(help="For .onnx: only operators that TensorRT's parser documents")
    ] = True,
    calibrate: Annotated[
        str | None,
        typer.Option(
            help="With int8: folder of images, digits, cifar10:PATH, cifar100:PATH or shards:PATH; by "
            "default the run's training images"
        ),
    ] = None,
    calibrate_images: Annotated[
        int, typer.Option(help="With int8: images to calibrate with, and to check with", min=1)
    ] = 256,
    check_images: Annotated[
        Path | None, typer.Option(help="Folder of images for the check; by default digits")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(
            help="Largest relative error of the check; with int8 largest share of images with another top-1"
        ),
    ] = None,
) -> None:
    """Write a network as .pt2, .onnx or OpenVINO (.xml) file.

    The file's outputs are checked in its engine against the network's; FILE.json is the report.
    """
    from pliant.adaptive.manifest import export_depths
    from pliant.deploy.export import export as run
    from pliant.deploy.facts import read_report
    from pliant.methods.adaptive_depth.depth import subnet

    network = built(model)
    if not Path(model).is_dir():
        logging.getLogger(__name__).warning(
            "%s is the name of a network, so the file will hold random weights; to export trained weights, "
            "give the folder that pliant train or pliant.save wrote",
            model,
        )  # fmt: skip
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
    if precision == "int8":
        images = _calibration(model, network, calibrate)
        options |= {"calibrate": images, "calibrate_images": calibrate_images}
    elif calibrate is not None:
        raise ValueError(f"--calibrate is for --precision int8; remove it for {precision}")
    if opset is not None:
        options["opset"] = opset
    if resize_from is not None:
        options["image_size"] = _size(resize_from)
    if depths is not None:
        if depth is not None:
            raise ValueError(
                "--depth and --depths exclude each other: --depth is for a file, --depths for a folder"
            )
        skips = None if depths == "all" else depths.split(",")
        format_name: Any = format_
        advice = f"the finished depths are in {path}; run the same command again for the others"
        with going_on(advice), progress_of("exporting") as step:
            made = export_depths(
                network, path, skips, format=format_name, threads=threads, progress=step, **options
            )
        for one in made.depths:
            ms = "not timed" if one.latency_ms is None else f"{one.latency_ms:.2f} ms"
            typer.echo(f"{one.file}: {one.macs / 1e6:.1f} M MACs, {ms}, error {one.max_rel_error:.1e}")
        typer.echo(
            f"{len(made.depths)} depths, timed on {made.threads} threads, and manifest.json are in {path}"
        )
        return
    if threads is not None:
        raise ValueError(
            f"--threads {threads} is for the latencies of --depths; remove it: a file runs on as many "
            f"threads as its engine is told to"
        )
    if depth is not None:
        network = subnet(network, depth)
    with going_on(f"{path} was not written; run the same command again"), progress_of("exporting") as step:
        written = run(network, path, progress=step, **options)
    typer.echo(f"{written}: {read_report(written).parity}")


def _example(network: Any, batch: int | None, pixels: int | None) -> Any:
    """Images of the sizes that were asked for; None: the network's own sizes."""
    import torch

    from pliant.outside import input_size

    if batch is None and pixels is None:
        return None
    size = input_size(network)
    if size is None:
        raise ValueError(
            "this network does not say its input size; export it by pliant.export(..., example=images)"
        )
    channels, height, width = size
    return torch.zeros(batch or 1, channels, pixels or height, pixels or width)


def _calibration(model: str, network: Any, given: str | None) -> Any:
    """The images that `--calibrate` names, or those that the run `model` was trained on; None: neither."""
    from pliant.outside import input_size
    from pliant.train.data import load_data
    from pliant.train.recipe import Recipe
    from pliant.train.run import read_division, read_recipe, run_of

    if given is None:
        run = run_of(Path(model))
        own = None if run is None else read_recipe(run)
        return None if run is None or own is None else load_data(own, read_division(run)).train
    if Path(given).is_dir():
        return given
    kind, _, place = given.partition(":")
    if kind not in ("digits", "cifar10", "cifar100", "shards") or (kind == "digits") == bool(place):
        raise ValueError(
            f"--calibrate is {given!r}, which is no folder of images; give one, or digits, cifar10:PATH, "
            f"cifar100:PATH or shards:PATH"
        )
    channels, *sides = input_size(network) or (3, 32, 32)
    recipe = Recipe.from_dict(
        {
            "name": "calibrate",
            "model": type(network).__name__,
            "model_args": {"in_chans": channels},
            "data": kind,
            "path": place or None,
            "pixels": max(sides),
        }
    )
    return load_data(recipe).train


def _size(text: str) -> tuple[int, int]:
    height, times, width = text.partition("x")
    if not times or not height.isdigit() or not width.isdigit():
        raise ValueError(f"--resize-from is {text!r}; write HEIGHTxWIDTH, such as 480x640")
    return int(height), int(width)
