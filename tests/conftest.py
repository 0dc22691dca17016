"""What every test gets: fixed seeds, and what several files share by name."""

from __future__ import annotations

import importlib.util
import itertools
import math
import random
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from _checkpoint import make
from _engines import FAKES
from pliant import save
from pliant.compiling import torch_threads
from pliant.measuring import running
from pliant.measuring.clock import Clock
from research.published import CountReport, reproduce_counts

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """No test depends on those that ran before it."""
    random.seed(0)
    np.random.seed(0)  # noqa: NPY002 - the generator that timm draws from
    torch.manual_seed(0)


@pytest.fixture
def shared() -> Path:
    """The folder beside the repository with papers and data sets."""
    if not SHARED.is_dir():
        pytest.skip("the folder ../shared (papers and data sets) is not beside the repository")
    return SHARED


@pytest.fixture
def trained(shared: Path) -> Callable[[str, str], nn.Module]:
    """Networks that others trained on CIFAR-10: a function of name and file."""

    def load(name: str, file: str) -> nn.Module:
        path = shared / "data" / "checkpoints" / file
        if not path.exists():
            pytest.skip(f"{path.name} is not in ../shared/data/checkpoints")
        state = torch.load(path, weights_only=True, map_location="cpu")["state_dict"]
        state = {k.removeprefix("module.").replace("linear.", "fc."): v for k, v in state.items()}
        model = timm.create_model(name)
        model.load_state_dict(state)  # strict: every name and shape is theirs
        return model.eval()

    return load


@pytest.fixture(scope="session")
def cifar10() -> tuple[Tensor, Tensor]:
    """The test images, normalised as those networks want them, and their labels."""
    packed = SHARED / "data" / "cifar10-test_batch.zip"
    if not packed.exists():
        pytest.skip("the CIFAR-10 test set is not in ../shared/data")
    spec = importlib.util.spec_from_file_location("unpack", SHARED / "data" / "unpack.py")
    assert spec is not None
    assert spec.loader is not None
    unpack = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(unpack)
    pixels, labels = unpack.read_cifar(str(packed))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    images = ((torch.from_numpy(pixels.copy()) / 255 - mean) / std).permute(0, 3, 1, 2)
    return images, torch.from_numpy(labels)


@pytest.fixture(scope="session")
def counts_of() -> Callable[[str], CountReport]:
    """A paper's counts beside ours, counted once: a function of the method."""
    return cache(reproduce_counts)


@pytest.fixture
def correct() -> Callable[[nn.Module, tuple[Tensor, Tensor], int], int]:
    """How many of the first n images a network gets right: a function."""

    def count(model: nn.Module, data: tuple[Tensor, Tensor], n: int) -> int:
        images, labels = data[0][:n], data[1][:n]
        with torch.inference_mode():
            return sum(
                int((model(x).argmax(1) == y).sum())
                for x, y in zip(images.split(250), labels.split(250), strict=True)
            )

    return count


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, nn.Module]:
    """A checkpoint of a small network of three classes, not to be changed, and the network."""
    torch.manual_seed(0)
    model = make(num_classes=3)
    return save(model, tmp_path_factory.mktemp("saved") / "net", classes=("cat", "dog", "eel")), model


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A clock that takes its times from `times(entrant, round)` and logs its calls.

    Networks are told apart by their order: each entrant's timer gets a number.
    """
    log = SimpleNamespace(calls=[], threads=[], timers=0, times=lambda entrant, turn: 1.0)

    def fake(call: Callable[[], object], threads: int) -> Clock:
        number, turns = log.timers, itertools.count(-2)  # two times that warm up come before round 0
        log.timers += 1
        log.threads.append(threads)

        def seconds(calls: int) -> float:
            turn = next(turns)
            log.calls.append((number, turn, calls))
            with torch_threads(threads):  # an engine of PyTorch's leaves the pool with its own number
                call()
            return float(log.times(number, turn))

        return seconds

    monkeypatch.setattr(running, "clock", fake)
    monkeypatch.setattr("pliant.measuring.clock.WARM_ENOUGH", math.inf)  # these times are no clock's
    return log


@pytest.fixture
def fakes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The engines of `_engines.FAKES`, which a child process finds as this one does."""
    (tmp_path / "pliant_test_fakes.py").write_text(FAKES)
    monkeypatch.syspath_prepend(tmp_path)
    import pliant_test_fakes

    yield pliant_test_fakes
    del sys.modules["pliant_test_fakes"]
