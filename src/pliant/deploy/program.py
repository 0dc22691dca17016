"""PyTorch programs, ``.pt2``: written, compiled ahead of time, and run.

A program is what `torch.export` made of the network: PyTorch runs or compiles it anywhere,
without pliant. A compiled one (AOTInductor) is machine code for this kind of machine.

Both are packed in memory first: PyTorch's writer ends the process where a disk is full.
"""

from __future__ import annotations

import io
import json
import re
import zipfile
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from pliant._files import NotWrittenError
from pliant.compiling import torch_threads
from pliant.deploy import placing
from pliant.deploy.facts import Facts
from pliant.deploy.selections import Result, Run, Selection, as_tuple

EXTRA = "pliant.json"
_COMPILED = 1 << 20  # bytes of a small network's machine code, which has to fit somewhere first


def write(program: ExportedProgram, path: Path, facts: Facts) -> None:
    """Write a program with its facts."""
    packed = io.BytesIO()
    torch.export.save(program, packed, extra_files={EXTRA: json.dumps(facts.to_metadata())})
    path.write_bytes(packed.getbuffer())


def package(
    program: ExportedProgram, path: Path, metadata: Mapping[str, str], freezing: bool = True
) -> None:
    """Compile a program ahead of time by AOTInductor, and write the package of machine code.

    The package keeps `metadata`. `freezing` lets weights be constants of the code; for CPUs.

    Raises:
        ValueError: this machine cannot compile it; says what the compiler says.
        NotWrittenError: an ``OSError``: the disk with the compiler's own files is full.
    """
    from torch._inductor import aoti_compile_and_package
    from torch._inductor.exc import InductorError

    options = {"aot_inductor.metadata": dict(metadata), "freezing": freezing}
    packed = io.BytesIO()
    try:
        with torch.no_grad():
            aoti_compile_and_package(program, package_path=packed, inductor_configs=options)
    except (InductorError, RuntimeError, OSError) as error:
        _blame_a_full_disk(error)
        raise ValueError(
            f"AOTInductor could not compile the network (it needs a C++ compiler, g++ or clang++): {error}"
        ) from error
    path.write_bytes(packed.getbuffer())


def _blame_a_full_disk(error: Exception) -> None:
    """Raise another error where there was no room for the files that the compiler makes on its way."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = cache_dir()
    full = placing.lack_of_room(Path(folder), _COMPILED)
    if full is not None:
        clear = NotWrittenError(
            f"the compiler's files do not fit into {folder} ({full.strerror}), for which "
            f"TORCHINDUCTOR_CACHE_DIR names another place"
        )
        clear.errno = full.errno
        raise clear from error


# What `torch.export.save` writes for a program of tensors. PyTorch runs whatever machine code it finds
# beside them, and unpickles what it finds elsewhere.
_OF_A_PROGRAM = re.compile(
    r"version|byteorder|archive_format|archive_version|\.format_version|\.storage_alignment|\.data/.*"
    r"|models/model\.json|extra/.*|data/extra/.*|data/weights/(model_weights_config\.json|weight_\d+)"
    r"|data/constants/(model_constants_config\.json|tensor_\d+)|data/sample_inputs/model\.pt"
)
_PAYLOADS = {
    "data/weights/": "model_weights_config.json",
    "data/constants/": "model_constants_config.json",
}


def check_harmless(path: Path) -> None:
    """Refuse a program that is more than a graph and tensors: loading it could run any code.

    Raises:
        ValueError: it is no archive, or holds a file that no program has, or a pickle of anything else.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        root = names[0].partition("/")[0]
        inside = [name.removeprefix(f"{root}/") for name in names]
        odd = [n for n in inside if not _OF_A_PROGRAM.fullmatch(n)] + [
            n for n, count in Counter(names).items() if count > 1 or not n.startswith(f"{root}/")
        ]
        if odd:
            raise ValueError(f"{path} holds {odd[0]}, which no program of tensors has: it is not opened")
        # By PyTorch's own reader: what it would load is what is looked at.
        reader = torch._C.PyTorchFileReader(str(path))
        pickled = ["data/sample_inputs/model.pt"]
        for folder, config in _PAYLOADS.items():
            known = json.loads(reader.get_record(folder + config))["config"].values()
            pickled += [folder + Path(one["path_name"]).name for one in known if one["use_pickle"]]
        for name in pickled:
            torch.load(io.BytesIO(reader.get_record(name)), map_location="cpu", weights_only=True)
    except ValueError:
        raise
    except Exception as error:  # of the archive, of JSON, of the unpickler: of no common type
        raise ValueError(f"{path} is not opened, because it holds more than tensors: {error}") from error


def load(path: str | Path, threads: int | None = None) -> Callable[[Tensor], Any]:
    """A function that runs the program in `path`, compiled or not.

    PyTorch's pool has so many threads during a call; None: as many as it has.

    Raises:
        ValueError: it is no program.
    """
    network: Callable[[Tensor], Any]
    if facts_of(path).compiled:
        from torch._inductor import aoti_load_package

        network = aoti_load_package(str(path))
    else:
        check_harmless(Path(path))
        network = torch.export.load(str(path)).module()

    def run(images: Tensor) -> Any:
        with torch_threads(threads):
            return network(images)

    return run


def facts_of(path: str | Path) -> Facts:
    """What a program says of itself.

    Raises:
        ValueError: it is no program of pliant's.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            extra = [n for n in names if n.endswith(f"/{EXTRA}")]
            compiled = [n for n in names if n.endswith("_metadata.json")]
            text = archive.read((extra or compiled)[0]).decode()
    except (zipfile.BadZipFile, OSError, IndexError) as error:
        raise ValueError(f"{path} is no PyTorch program that pliant exported: {error}") from error
    return Facts.from_metadata(json.loads(text))


def runner(path: Path, ranking: list[str], compiled: bool) -> Run:
    """Runs the program in `path`; tells what the parts `ranking` selected, unless it is compiled."""
    network: Any = load(path) if compiled else torch.export.load(str(path))

    def run(images: Tensor) -> Result:
        with torch.no_grad():
            if compiled:
                return Result(as_tuple(network(images)), None)
            watching = _Watching(network, ranking)
            return Result(as_tuple(watching.run(images)), watching.selections)

    return run


class _Watching(torch.fx.Interpreter):
    """Runs a program's graph, and keeps what the parts `ranking` saw and chose."""

    def __init__(self, program: ExportedProgram, ranking: list[str]) -> None:
        super().__init__(program.module())
        self.ranking = ranking
        self.selections: dict[str, Selection] = {}

    def run_node(self, n: torch.fx.Node) -> Any:
        value = super().run_node(n)
        if n.target is torch.ops.aten.topk.default:
            scopes = [scope for scope, _ in n.meta.get("nn_module_stack", {}).values()]
            for path in self.ranking:
                if any(scope.endswith(f"network.{path}") for scope in scopes):
                    seen = n.args[0]
                    assert isinstance(seen, torch.fx.Node)
                    logits = self.env[seen]
                    self.selections[path] = Selection(logits, value[1])
        return value
