"""What the table of speed times computes what the plain network computes: each network, each engine."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pliant.deploy.engines import ENGINES, FileEngine
from pliant.deploy.folding import fold_norms
from pliant.deploy.optimize import optimize
from pliant.measuring.candidates import fresh
from pliant.methods.mixture_of_depths.ops import building

pytestmark = pytest.mark.slow
NETWORKS = ("resnet50_mod", "resnet75_mod", "resnet86_mod")
IMAGES = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(3))


@cache
def network(name: str) -> nn.Module:
    torch.manual_seed(0)
    return fresh(name).eval()


@cache
def expected(name: str) -> Tensor:
    """Of the plain form, as it is written, in double precision, so that its own error is not in it."""
    with torch.inference_mode():
        return network(name).double()(IMAGES.double()).clone()


def error(found: object, name: str) -> float:
    """Largest difference over the largest logit."""
    assert isinstance(found, Tensor)
    exact = expected(name)
    return float((found.double() - exact).abs().max() / exact.abs().max())


@pytest.mark.parametrize(
    "engine", ["eager", "compile", "aoti", "onnxruntime", "onnxruntime native", "openvino"]
)
@pytest.mark.parametrize("name", NETWORKS)
def test_in_each_engines_best_form_to_1e_5(name: str, engine: str, tmp_path: Path) -> None:
    how, _, native = engine.partition(" ")
    runs = ENGINES[how]
    if runs.missing:
        pytest.skip(runs.missing)
    if (runs.by_pytorch or native) and not building.ready():
        pytest.skip(building.why_not())
    expected(name)
    model = fold_norms(network(name).float(), IMAGES[:1])
    images = IMAGES
    if runs.by_pytorch:
        images = images.to(memory_format=torch.channels_last)
        model = optimize(model.to(memory_format=torch.channels_last), images[:1], channels_last=True)
    if isinstance(runs, FileEngine):
        form = {} if runs.by_pytorch else {"native": True} if native else {"optimized": True}
        run = runs.load(runs.write(model, images, tmp_path, **form), images)
    else:
        run = runs.prepare(model, images)
    assert error(run(images), name) < 1e-5
