"""What is said of an exported file, in the file itself and beside it.

In the file, where each format keeps such: what it takes, in which precision, from which
network. Beside it, in ``FILE.json``: that, and how the file compared with the network.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

from pydantic import TypeAdapter

from pliant.deploy.parity import Parity

# Of timm's `pretrained_cfg`: what says how test images are prepared, beside size, mean and deviation.
PREPARATION = ("interpolation", "crop_pct", "crop_mode")
_LATE = ("preparation", "library_sha256")  # fields that files of earlier versions have not


@dataclass(frozen=True)
class Facts:
    """What an exported file is. Its fields stand in the file, each as JSON.

    Attributes:
        format: ``pt2``, ``onnx`` or ``openvino``.
        network: its name in timm, or its class.
        methods: that converted it, with their options.
        takes: ``normalised``, ``float`` or ``uint8`` images; see `Preparation`.
        input_size: channels, height and width of the images.
        batch: images of each call; None: any number.
        network_size: channels, height and width that the network sees.
        mean: mean of each channel, that is subtracted from values in [0, 1], in the file unless it
            takes normalised images.
        std: by which they are then divided.
        classes: their names; None: not known.
        outputs: names of the outputs.
        precision: of weights and computation: ``float32``, ``float16``, ``bfloat16`` or ``int8``.
        opset: of an ONNX file, or of the one that an OpenVINO file was made from.
        compiled: the file holds machine code for the kind of machine it was made on.
        machine: that machine, where the file is tied to it more than by its code: of a compiled
            ONNX file the processor, and the channels in a block of its layout; else empty.
        versions: of pliant, and of what wrote the file.
        preparation: how images of a data set become those that the network expects, as far as timm says it
            (`PREPARATION`); for `pliant.evaluate`.
        library_sha256: of ``FILE.so``, the library of a compiled ONNX file; else empty.
    """

    format: str
    network: str
    methods: tuple[str, ...]
    takes: str
    input_size: tuple[int, int, int]
    batch: int | None
    network_size: tuple[int, int, int]
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    classes: tuple[str, ...] | None
    outputs: tuple[str, ...]
    precision: str
    opset: int | None
    compiled: bool
    machine: str
    versions: Mapping[str, str]
    preparation: Mapping[str, float | str] = field(default_factory=dict)
    library_sha256: str = ""

    def to_metadata(self) -> dict[str, str]:
        """Each field as JSON text, under ``pliant.FIELD``."""
        return {f"pliant.{k}": json.dumps(v) for k, v in asdict(self).items()}

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> Facts:
        """What `to_metadata` wrote; fields that earlier versions had not are at their defaults.

        Raises:
            ValueError: it is not there.
        """
        try:
            there = [f.name for f in fields(cls) if f.name not in _LATE or f"pliant.{f.name}" in metadata]
            values = {name: json.loads(metadata[f"pliant.{name}"]) for name in there}
            return TypeAdapter(cls).validate_python(values)
        except (KeyError, ValueError) as error:
            raise ValueError(f"this is no file that pliant exported: it says nothing of {error}") from error


@dataclass(frozen=True)
class ExportReport:
    """What an exported file is, and how it compared with the network.

    Attributes:
        facts: what it is.
        parity: how it compared.
        sha256: of each of its files, by name.
    """

    facts: Facts
    parity: Parity
    sha256: Mapping[str, str]

    def to_json(self) -> str:
        """As text."""
        return json.dumps(asdict(self), indent=2) + "\n"


def report_path(path: Path) -> Path:
    """Where the report of the exported file `path` stands.

    Example:
        >>> report_path(Path("net.onnx")).name
        'net.onnx.json'
    """
    return path.with_name(f"{path.name}.json")


def read_report(path: str | Path) -> ExportReport:
    """The report that `export` wrote beside a file.

    Args:
        path: path of the exported file.

    Raises:
        ValueError: there is none, it is damaged, or a file was changed after it was checked.
    """
    path = Path(path)
    place = report_path(path)
    try:
        report = TypeAdapter(ExportReport).validate_python(json.loads(place.read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ValueError(f"{place} is no report of an exported file: {error}") from error
    if path.name not in report.sha256:
        raise ValueError(
            f"{place} is the report of {', '.join(report.sha256)}, not of {path.name}: keep the name that "
            f"the file was exported under, or export it again"
        )
    for name, digest in report.sha256.items():
        file = path.parent / Path(name).name
        if not file.is_file() or digest_of(file) != digest:
            raise ValueError(f"{file} is not the file that was checked: it is damaged, so export it again")
    return report


def digest_of(path: Path) -> str:
    """SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
