"""Write a network for the engines that people deploy, checked before it gets its name: `export`.

Shapes: images [B, C, H, W] as the file takes them; outputs as the network gives them, float32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import timm
import torch
from timm.utils import unwrap_model
from torch import Tensor, nn

from pliant import outside
from pliant._version import __version__
from pliant.deploy import int8, onnx_file, onnx_native, openvino_file, placing, program
from pliant.deploy.calibration import Calibration, calibration, in_batches, in_whole_batches
from pliant.deploy.extras import require
from pliant.deploy.facts import PREPARATION, ExportReport, Facts, digest_of, report_path
from pliant.deploy.folding import fold_norms
from pliant.deploy.inputs import Preparation, Prepared, Takes
from pliant.deploy.parity import TOLERANCE, ParityError, check_agreement, check_parity
from pliant.deploy.selections import Result, Run, rankings
from pliant.parts import Part, Target, hooked, parts, replace_parts
from pliant.surgery import conversions

Precision = Literal["float32", "float16", "bfloat16", "int8"]
Progress = Callable[[int, int, str], None]

FORMATS: dict[str, Target] = {".pt2": "program", ".onnx": "onnx", ".xml": "openvino"}
# OpenVINO computes in bfloat16 by a hint to the engine; ONNX Runtime's CPU cannot convolve in it.
PACKAGES: dict[Target, tuple[str, ...]] = {
    "program": (),
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
}
PRECISIONS: dict[Target, tuple[Precision, ...]] = {
    "program": ("float32", "float16", "bfloat16"),
    "onnx": ("float32", "float16", "int8"),
    "openvino": ("float32", "float16", "int8"),
}


def export(
    model: nn.Module,
    path: str | Path,
    example: Tensor | None = None,
    *,
    dynamic_batch: bool = True,
    opset: int = onnx_file.DEFAULT_OPSET,
    precision: Precision = "float32",
    takes: Takes = "normalised",
    image_size: tuple[int, int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    classes: Sequence[str] | None = None,
    compiled: bool = False,
    portable: bool = True,
    batches: Sequence[int] = (1, 2, 5),
    calibrate: Calibration | None = None,
    calibrate_images: int = 256,
    check_images: str | Path | None = None,
    tolerance: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Path:
    """Write a network as a file that an engine runs, after comparing the file with the network.

    The file is written under another name, run in its own engine on random and on real images,
    at each of `batches`, and compared with the network in eager mode: outputs, best class, and
    the channels that each ranking part (the selector of a Mixture-of-Depths block) selects. Only
    then it gets its name, and beside it a report, ``FILE.json`` (`pliant.deploy.facts.read_report`).

    A file in 8-bit integers is another function than the network. It is compared by its answers to real
    images, which did not calibrate it: the report has the share of them with the same best class. The
    loss of accuracy is the difference of `pliant.evaluate` for the network and for the file.

    Args:
        model: a network, plain or converted, on any device; it stays as it is. Norms are folded
            into convolutions. An adaptive network is refused: choose a depth by `pliant.subnet`.
        path: the ending says the format: ``.pt2``, a PyTorch program; ``.onnx``; ``.xml``, for
            OpenVINO (with a ``.bin``). A file that is there is replaced.
        example: images [B, C, H, W] as the network takes them, of which only the shape counts;
            by default of the size that the network states.
        dynamic_batch: the file takes any number of images; otherwise the example's.
        opset: ONNX opset of an ONNX file, and of the ONNX graph that an OpenVINO file is made from.
        precision: precision that the file computes in: ``float32``, ``float16``, or in a program
            ``bfloat16``; compared with the network in float32. ``int8``, in ``.onnx`` and ``.xml``: static
            quantisation by ONNX Runtime and by NNCF; the selectors of Mixture-of-Depths blocks, and
            conditional layers with their routers, stay in float32 (`pliant.parts.Part.in_float`).
        takes: images that the file takes: ``"normalised"`` ones, as the network does; ``"float"``
            in [0, 1] or ``"uint8"``, which the file normalises.
        image_size: height and width of the images, which the file then resizes to the
            network's (bilinear, without antialiasing).
        mean: mean of each channel; by default what timm says of the network. `std` and
            `classes` have such defaults, too.
        std: standard deviation of each channel.
        classes: names of the classes, stated in the file.
        compiled: compile the file for this kind of machine. A ``.pt2`` is then machine code by
            AOTInductor. It does not tell what it selected, so its outputs alone are compared;
            images whose scores tie may differ, and are counted. An ``.onnx`` is the graph as ONNX
            Runtime optimises it here, each learned Mixture-of-Depths block one operator, whose
            library, ``FILE.so``, is written beside it (`onnx_native`); in float32.
        portable: allow only what TensorRT's parser documents in the graph of an ``.onnx`` that is
            not compiled.
        batches: batch sizes to check at; a file of a fixed batch is checked at that alone.
        calibrate: images that the activations of an ``int8`` file get their ranges from, such as the file
            will get: a folder of images, a set of images (`pliant.train.images.ImageSet`), or batches
            [B, C, H, W], with or without labels, as the file takes them (`takes`, `image_size`). Of a
            folder or set, images all over it are taken, resized to the file's size; of batches, the first
            ones, so their classes should be mixed.
        calibrate_images: images that set the ranges, at most; and images that are compared on.
        check_images: folder of images to check with; by default scikit-learn's digits, for ``int8`` every
            second image of `calibrate`.
        tolerance: largest relative error. By default 1e-4 in float32, 2e-2 in float16, 1e-1 in
            bfloat16; four times what rounding alone moves the network by, where that is more. For ``int8``
            the largest share of images that get another best class, and how far the mean cosine similarity
            of the outputs may be below 1; by default 0.1.
        seed: seed of the random images.
        progress: called with steps done, steps in all, and what comes next: writing, then each check.

    Returns:
        `path`.

    Raises:
        ParityError: a ``ValueError``: the file does not compute what the network does, or in ``int8``
            does not answer as it does; has the numbers. No file is left.
        ValueError: an ending, precision or opset that there is not; an adaptive network; a
            selection that is drawn at random; an example that the network does not take; an
            operator without a form in the format; no images to calibrate with, or images that set no
            ranges; a package that is missing
            (`MissingExtraError`, with its install line); no compiler for what is compiled.
        OSError: the file cannot be written, or the disk is full; what stood there before still does.

    Example:
        >>> import tempfile, timm
        >>> from pliant.deploy.facts import read_report
        >>> model = timm.create_model("resnet20_cifar_mod").eval()
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = export(model, f"{folder}/net.pt2", takes="uint8")
        ...     report = read_report(path)
        >>> report.facts.takes, report.parity.batches, report.parity.max_rel_error < 1e-4
        ('uint8', (1, 2, 5), True)
    """
    path = Path(path)
    target = _target(path, precision, opset, compiled)
    network = _plain_copy(model)
    size = _size(network, example)
    count = 1 if example is None else len(example)
    if not batches or not all(isinstance(n, int) and n > 0 for n in batches):
        raise ValueError(f"batches must hold numbers of images, such as (1, 2, 5), not {batches!r}")
    config = getattr(network, "pretrained_cfg", None) or {}
    preparation = Preparation(
        takes,
        (size[0], *(image_size or size[1:])),
        size,
        _stated(mean, config.get("mean"), size[0]),
        _stated(std, config.get("std"), size[0]),
    )
    sizes = sorted(set(batches)) if dynamic_batch else [count]
    folder = None if check_images is None else Path(check_images)
    ranges: list[Tensor] = []
    if quantised := precision == "int8":
        setting, others = calibration(calibrate, preparation, calibrate_images, folder)
        ranges = [*in_whole_batches(setting, sizes[0])]
    elif calibrate is not None:
        raise ValueError(f"calibrate is for precision='int8'; remove it for {precision}")
    # Of one image, torch.export would make a program for one image.
    images = preparation.random(2 if dynamic_batch else count, torch.Generator().manual_seed(seed))
    truth = Prepared(network, preparation).eval()
    outputs = _outputs(network, preparation, images)
    batch = None if dynamic_batch else count
    names = classes if classes is not None else config.get("label_names")
    facts = Facts(
        format=path.suffix[1:] if target != "openvino" else "openvino",
        network=outside.name_of(network),
        methods=tuple(repr(c.method) for c in conversions(network)),
        takes=takes,
        input_size=preparation.size,
        batch=batch,
        network_size=size,
        mean=preparation.mean,
        std=preparation.std,
        classes=None if names is None else tuple(map(str, names)),
        outputs=tuple(f"output{n}" for n in range(outputs)) if outputs > 1 else ("output",),
        precision=precision,
        opset=None if target == "program" else opset,
        compiled=compiled,
        machine=onnx_native.machine() if compiled and target == "onnx" else "",
        versions=_versions(target, precision),
        preparation={name: config[name] for name in PREPARATION if config.get(name) is not None},
    )
    generator = torch.Generator().manual_seed(seed + 1)
    if quantised:
        checks = [*(in_batches(others, sizes) if dynamic_batch else in_whole_batches(others, count))]
    else:
        checks = [
            made for n in sizes for made in (preparation.random(n, generator), preparation.real(n, folder))
        ]

    def otherwise() -> nn.Module:  # in the file's precision, or in float64 if that is the network's own
        dtype = torch.float64 if precision == "float32" else getattr(torch, precision)
        return Prepared(copy.deepcopy(network).to(dtype), preparation, dtype).eval()

    steps = 1 + len(checks)
    tell = progress or (lambda _done, _total, _what: None)
    tell(0, steps, f"writing {path.name}")
    with placing.workshop(path, _weight(network, facts)) as place:
        files, run, facts = _write(place / path.name, facts, network, preparation, images, portable, ranges)
        done = iter(range(1, steps))

        def watched(images: Tensor) -> Result:
            tell(next(done, steps - 1), steps, f"checking {path.name} on {len(images)} images")
            return run(images)

        admitted = TOLERANCE[precision] if tolerance is None else tolerance
        if quantised:
            parity = check_agreement(truth, watched, checks, admitted)
        else:
            parity = check_parity(truth, watched, checks, admitted, otherwise, follow=tolerance is None)
        if not parity.holds:
            what = "does not answer as the network does" if quantised else "is not the network"
            raise ParityError(f"{path} is not written: it {what}: {parity}", parity)
        report = ExportReport(facts, parity, {file.name: digest_of(file) for file in files})
        files.append(report_path(place / path.name))
        files[-1].write_text(report.to_json(), encoding="utf-8")
        placing.put_in_place(files, path.parent)
    tell(steps, steps, "done")
    return path


def _target(path: Path, precision: str, opset: int, compiled: bool) -> Target:
    """The format that an ending says, if everything else fits it."""
    target = FORMATS.get(path.suffix)
    if target is None:
        raise ValueError(f"{path.name}: the ending must be one of {', '.join(FORMATS)}")
    if precision not in PRECISIONS[target]:
        choices = ", ".join(PRECISIONS[target])
        raise ValueError(f"precision must be one of {choices} for {path.suffix}; not {precision!r}")
    if compiled and target == "openvino":
        raise ValueError(f"compiled=True is for .pt2 and .onnx files, not for {path.suffix}")
    if compiled and target == "onnx" and precision != "float32":
        raise ValueError(f"compiled=True of an .onnx is for float32, not for {precision}")
    if target != "program":
        onnx_file.check_opset(opset)
        with onnx_file.quiet():  # some say what they miss
            for name in _packages(target, precision):
                require(name)
    return target


def _plain_copy(model: nn.Module) -> nn.Module:
    """A copy on the CPU, in float32, for inference, of a network that a file can hold."""
    model = unwrap_model(model)
    for path, part in parts(model).items():
        if reason := part.no_export():
            raise ValueError(f"{path or type(model).__name__} {reason}")
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise ValueError(f"the {type(model).__name__} has no weights: it is on the meta device")
    network: nn.Module = copy.deepcopy(model).to("cpu", torch.float32).eval()
    return network.requires_grad_(False)


def _size(network: nn.Module, example: Tensor | None) -> tuple[int, int, int]:
    if example is not None:
        if example.dim() != 4 or not len(example):
            raise ValueError(f"example must be images [B, C, H, W], not of shape {tuple(example.shape)}")
        return (example.shape[1], example.shape[2], example.shape[3])
    config = getattr(network, "pretrained_cfg", None) or {}
    size = outside.input_size(network) or config.get("input_size")
    if size is None:
        raise ValueError(
            "nothing says which images this network takes; pass an example, such as "
            "torch.zeros(1, 3, 224, 224)"
        )
    return (size[0], size[1], size[2])


def _stated(given: Sequence[float] | None, known: Sequence[float] | None, channels: int) -> Any:
    if given is not None:
        return tuple(float(v) for v in given)
    return tuple(known) if known is not None and len(known) in (1, channels) else None


def _outputs(network: nn.Module, preparation: Preparation, images: Tensor) -> int:
    """How many outputs the network has for `images`.

    Raises:
        ValueError: it does not take them, or gives what no file can give or nobody could compare.
    """
    name = type(network).__name__
    try:
        with torch.no_grad():
            given = network(_as_seen(preparation, images))
    except Exception as error:  # the network's own
        raise ValueError(f"the network takes no images of shape {tuple(images.shape)}: {error}") from error
    if isinstance(given, Mapping):
        keys = ", ".join(map(repr, given))
        raise ValueError(
            f"the {name} gives a {type(given).__name__} with {keys}; a file gives a tensor, or several in "
            f"a tuple: export a module whose forward returns model(x)[{next(iter(given), '...')!r}], say"
        )
    several = given if isinstance(given, (tuple, list)) else (given,)
    for n, y in enumerate(several):
        if not isinstance(y, Tensor):
            raise ValueError(
                f"output {n} of the {name} is a {type(y).__name__}; a file gives a tensor, or several in a "
                f"tuple: export a module whose forward returns that"
            )
        if not y.is_floating_point():
            raise ValueError(
                f"output {n} of the {name} is {y.dtype}: a decision (argmax, say) that rounding may turn, "
                f"so no file can be compared with it; export a module that returns the scores"
            )
        if y.dim() == 0 or len(y) != len(images):
            raise ValueError(
                f"output {n} of the {name} has shape {tuple(y.shape)} for {len(images)} images; export a "
                f"module whose outputs have the images as their first dimension"
            )
    return len(several)


def _as_seen(preparation: Preparation, images: Tensor) -> Tensor:
    """What reaches the network of `images`."""
    x: Tensor = Prepared(nn.Identity(), preparation)(images)
    return x


def _weight(network: nn.Module, facts: Facts) -> int:
    """Bytes that the weights take on the disk, at their most while the files are written."""
    width = _dtype(facts.precision).itemsize
    tensors = (*network.parameters(), *network.buffers())
    once: int = sum(t.numel() * (width if t.is_floating_point() else t.itemsize) for t in tensors)
    by_way = facts.format == "openvino" or facts.machine or facts.precision == "int8"
    return once * 2 if by_way else once  # by way of an ONNX file


def _dtype(precision: str) -> torch.dtype:
    """What the network is in when it is traced; an int8 file is made of one in float32."""
    return torch.float32 if precision == "int8" else getattr(torch, precision)


def _write(
    path: Path,
    facts: Facts,
    network: nn.Module,
    preparation: Preparation,
    images: Tensor,
    portable: bool,
    ranges: list[Tensor],
) -> tuple[list[Path], Run, Facts]:
    """Write the files, the main one first; how they are run for the check, and their facts.

    `images` are as the file takes them, two or more for an open batch, and so are `ranges`, which set the
    ranges in 8-bit integers; the network stays as it is.
    """
    target, dtype, quantised = FORMATS[path.suffix], _dtype(facts.precision), facts.precision == "int8"
    shapes = ({0: torch.export.Dim("batch", min=1)},) if facts.batch is None else None

    def form(_path: str, part: Part) -> nn.Module:  # hooks of a user's run in the file too
        return part if hooked(part) else part.export_form(target, facts.batch)

    with torch.no_grad():
        network = fold_norms(network, _as_seen(preparation, images))
        native = onnx_native.take_parts(network) if target == "onnx" and facts.compiled else None
        ranking = list(rankings(network))
        in_float = [place for place, part in parts(network).items() if part.in_float]
        formed = replace_parts(network.to(dtype), form)
        prepared = Prepared(formed, preparation, dtype).eval().requires_grad_(False)
        try:
            made = torch.export.export(prepared, (images,), dynamic_shapes=shapes)
        except Exception as error:  # torch.export raises many kinds
            raise ValueError(f"torch.export cannot trace the {type(network).__name__}: {error}") from error
    if target == "program":
        if facts.compiled:
            program.package(made, path, facts.to_metadata())
        else:
            program.write(made, path, facts)
        return [path], program.runner(path, ranking, facts.compiled), facts
    assert facts.opset is not None
    places = () if native is None else native.operators
    note = partial(int8.mark, in_float=in_float) if quantised else None
    graph = onnx_file.build(made, facts.outputs, facts.opset, ranking, places, note)
    if target == "onnx":
        onnx_file.leave_unpacked(graph, prefix=int8.FLOAT if quantised else "")
    if native is not None:
        if native.library is not None:
            facts = replace(facts, library_sha256=digest_of(native.library))
        files = onnx_native.write(graph, native, path, facts)
        return files, onnx_native.runner(path, native, ranking), facts
    if target == "onnx":
        if portable:
            onnx_file.check_portable(graph)
        if not quantised:
            return onnx_file.write(graph, path, facts), onnx_file.runner(path, ranking), facts
    between = path.with_name(f"float32-{path.stem}.onnx")
    written = onnx_file.write(graph, between, facts)
    if target == "onnx":
        files = int8.quantise(between, path, ranges, external=len(written) > 1)
        return files, onnx_file.runner(path, ranking), facts
    change = partial(int8.quantise_openvino, images=ranges) if quantised else None
    return openvino_file.write(between, path, facts, change), openvino_file.runner(path, ranking), facts


def _packages(target: Target, precision: str) -> tuple[str, ...]:
    """What has to be installed to write a file."""
    quantiser = ("nncf",) if target == "openvino" and precision == "int8" else ()
    return (*PACKAGES[target], *quantiser)


def _versions(target: Target, precision: str) -> dict[str, str]:
    found = {"pliant": __version__, "torch": str(torch.__version__), "timm": timm.__version__}
    return {**found, **{name: str(require(name).__version__) for name in _packages(target, precision)}}
