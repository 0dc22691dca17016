"""An exported file is scored as the network that it is of, in its own engine."""

from __future__ import annotations

import pytest
import timm
import torch

import pliant
from _cli import run
from _export import need
from pliant.train import evaluate

SIDE = 16


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = timm.create_model("resnet20_cifar_mod", in_chans=1)
    model.pretrained_cfg = {
        **model.pretrained_cfg,
        "input_size": (1, SIDE, SIDE),
        "mean": (0.3,),
        "std": (0.4,),
        "crop_pct": 0.8,
    }
    return model.eval()


@pytest.mark.parametrize(
    ("ending", "options"),
    [
        (".pt2", {}),
        (".pt2", {"takes": "float"}),
        (".pt2", {"dynamic_batch": False, "example": torch.zeros(7, 1, SIDE, SIDE)}),
        pytest.param(".onnx", {"takes": "float"}, marks=pytest.mark.slow),
        pytest.param(".xml", {}, marks=pytest.mark.slow),
    ],
)
def test_a_file_scores_as_its_network(network, tmp_path, ending, options):
    need(ending)
    path = pliant.export(network, tmp_path / f"net{ending}", batches=(2,), **options)
    expected, found = (evaluate(m, "digits", device="cpu", batch=100) for m in (network, path))
    assert found.images == expected.images == 540
    assert found.top1 == expected.top1
    assert found.loss == pytest.approx(expected.loss, rel=1e-4)


def test_whole_numbers_are_the_images_of_the_file(network, tmp_path):
    path = pliant.export(network, tmp_path / "net.pt2", batches=(2,), takes="uint8")
    expected, found = (evaluate(m, "digits", device="cpu") for m in (network, path))
    assert found.loss == pytest.approx(expected.loss, rel=1e-2)  # 256 levels


def test_the_command_scores_a_file(network, tmp_path):
    path = pliant.export(network, tmp_path / "net.pt2", batches=(2,))
    assert "(540 images)" in run("evaluate", path, "--device", "cpu")
