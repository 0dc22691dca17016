"""Optional packages: imported on use, and named with their install line where missing."""

from __future__ import annotations

import importlib.util
import os
from types import ModuleType

EXTRA_OF = {
    "onnx": "onnx",
    "onnx_ir": "onnx",
    "onnxscript": "onnx",
    "onnxruntime": "onnx",
    "openvino": "openvino",
    "nncf": "openvino",
}


def install_line(name: str) -> str:
    """How to install an optional package, and what pliant needs beside it.

    Example:
        >>> install_line("onnxruntime")
        'pip install ".[onnx]" in a checkout of pliant'
    """
    return f'pip install ".[{EXTRA_OF[name]}]" in a checkout of pliant'


class MissingExtraError(ImportError, ValueError):
    """A package that an extra of pliant installs is not there; the message has the install line."""


def require(name: str) -> ModuleType:
    """The optional package `name`; NNCF sends no record of its use, unless it was imported before.

    Raises:
        MissingExtraError: an ``ImportError`` and ``ValueError``: it cannot be imported.

    Example:
        >>> require("onnx").__name__  # doctest: +SKIP
        'onnx'
    """
    before = os.environ.get("NNCF_CI")
    try:
        os.environ["NNCF_CI"] = "1"  # NNCF looks at it once, when it is imported
        return importlib.import_module(name)
    except ImportError as error:
        if importlib.util.find_spec(name) is not None:  # it is there, and something else is wrong
            raise MissingExtraError(f"{name} cannot be imported: {error}") from error
        raise MissingExtraError(
            f"this needs {name}, which is not installed: {install_line(name)}"
        ) from error
    finally:
        if before is None:
            del os.environ["NNCF_CI"]
        else:
            os.environ["NNCF_CI"] = before


def onnx_runtime() -> ModuleType:
    """ONNX Runtime, told to keep no record of what runs and to send none.

    Raises:
        MissingExtraError: as `require`.

    Example:
        >>> onnx_runtime().__name__  # doctest: +SKIP
        'onnxruntime'
    """
    runtime = require("onnxruntime")
    runtime.disable_telemetry_events()
    return runtime
