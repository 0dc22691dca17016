"""What looks at a network in evaluation mode gives each module its own mode back."""

from __future__ import annotations

import pytest
import timm
import torch

import pliant
from pliant.adaptive.scores import evaluate_depths
from pliant.counting import count_macs
from pliant.evaluating import evaluating
from pliant.train import evaluate
from pliant.train.distillation import Distillation, Teaching
from pliant.train.evaluation import score
from research.analysis._passes import watched

SIZE = (1, 8, 8)
NAMES = tuple("0123456789")


def teach(network, folder):
    teacher = timm.create_model("resnet20_cifar", in_chans=1, layers=[2, 1, 1])
    Teaching(teacher, Distillation(), "a teacher").check(network, SIZE)


def watch(network, folder):
    with watched(network, []):
        assert not network.training


LOOKS = {
    "evaluate": lambda network, folder: evaluate(network, "digits", part="val", pixels=8, device="cpu"),
    "depths": lambda network, folder: evaluate_depths(
        network, "digits", skips=["T"], part="val", pixels=8, device="cpu"
    ),
    "score": lambda network, folder: score(
        network, [(torch.zeros(2, *SIZE), torch.zeros(2, dtype=torch.long))], NAMES
    ),
    "count": lambda network, folder: count_macs(network, SIZE),
    "plan": lambda network, folder: pliant.depths(network, SIZE),
    "save": lambda network, folder: pliant.save(network, folder / "net", input_size=SIZE),
    "teach": teach,
    "watch": watch,
}


@pytest.mark.parametrize("name", LOOKS)
def test_each_module_gets_its_own_mode_back(name, tmp_path):
    network = timm.create_model("resnet20_cifar_adn", in_chans=1, num_classes=10, layers=[2, 1, 1])
    frozen = [m for m in network.modules() if isinstance(m, torch.nn.BatchNorm2d)][::2]
    for norm in frozen:
        norm.eval()
    before = {path: module.training for path, module in network.named_modules()}
    assert set(before.values()) == {True, False}
    LOOKS[name](network, tmp_path)
    assert {path: module.training for path, module in network.named_modules()} == before


def test_the_modes_come_back_after_an_error():
    network = torch.nn.Sequential(torch.nn.Dropout(), torch.nn.Dropout().eval())
    with pytest.raises(KeyError), evaluating(network):
        raise KeyError
    assert [m.training for m in network.modules()] == [True, True, False]
