"""Run a script that imports timm, such as timm's own, with pliant's networks among timm's.

``python -m pliant.timm train.py DATA --model resnet50_mod`` runs timm's ``train.py`` as
``python train.py DATA --model ...`` does. Only pliant is imported before, which registers its networks as
soon as the script imports timm. With several processes: ``torchrun -m pliant.timm train.py ...``.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path


def main() -> None:
    """Run the script that the first argument names, with the other arguments as its own."""
    if len(sys.argv) < 2 or not Path(sys.argv[1]).is_file():
        sys.exit("pliant.timm: name a script and its arguments: python -m pliant.timm train.py ...")
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as Python itself does for a script
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
