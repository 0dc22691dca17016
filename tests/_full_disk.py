"""Exports to a folder with too little room, and prints what each error was: a process of its own.

Called with a folder, the size in bytes that one file may have (which stands for a full disk where none
can be mounted; 0: any), and what to write as ENDING:ROOM, where ROOM bytes are left free on the disk.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path


def main(folder: Path, limit: int, wanted: list[str]) -> None:
    import torch

    import _export
    import pliant

    torch.set_num_threads(1)
    network = _export.mod()
    if limit:
        import resource

        hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # Python ignores the signal
    for what in wanted:
        ending, room = what.split(":")
        path, filler = folder / f"net{ending.removeprefix('compiled')}", folder / "filler"
        path.write_bytes(b"old")
        if not limit:
            filler.write_bytes(bytes(shutil.disk_usage(folder).free - int(room)))
        try:
            pliant.export(network, path, batches=(1,), compiled=ending.startswith("compiled"))
            said = ["nothing", "", 0]
        except Exception as error:
            said = [type(error).__name__, str(error), getattr(error, "errno", None)]
        filler.unlink(missing_ok=True)
        left = {p.name: p.read_bytes().decode(errors="replace") for p in folder.iterdir() if p.is_file()}
        path.unlink(missing_ok=True)
        print("::", json.dumps([what, *said, left]), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])
