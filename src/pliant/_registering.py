"""pliant's networks are registered with timm as soon as timm is imported, and not before.

torch and timm take seconds to import. ``import pliant`` (and so ``pliant --help``) leaves that to
whoever needs them. After ``import pliant``, in either order with ``import timm``,
``timm.create_model("resnet50_mod")`` works all the same: a finder waits for timm.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any


def register_networks() -> None:
    """Register pliant's networks with timm: now, if timm is imported; else right after it is."""
    if "timm" in sys.modules:
        for name in ("pliant.models", "pliant.methods"):
            importlib.import_module(name)
    else:
        sys.meta_path.insert(0, _Waiting())


class _Waiting(MetaPathFinder):
    """Has `register_networks` called again after the next import that may bring timm.

    That is timm's own, or one of pliant's modules: what registers needs these whole, so it cannot
    run in the middle of them. Imports within an import are not waited for.
    """

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The module's own spec, with a loader that calls back."""
        if name != "timm" and not name.startswith("pliant."):
            return None
        found = (f.find_spec(name, path, target) for f in sys.meta_path if f is not self)
        spec = next(filter(None, found), None)
        if spec is None or spec.loader is None:
            return None
        spec.loader = _CallingBack(spec.loader, self)
        return spec


class _CallingBack(Loader):
    def __init__(self, loader: Loader, finder: _Waiting) -> None:
        self._loader, self._finder = loader, finder

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)  # runpy, say, asks for a module's code

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader  # nothing of this stays
        waiting = self._finder in sys.meta_path
        if waiting:
            sys.meta_path.remove(self._finder)
        try:
            self._loader.exec_module(module)
        except BaseException:
            if waiting:
                sys.meta_path.insert(0, self._finder)
            raise
        if waiting:
            register_networks()
