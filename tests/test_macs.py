"""The honest count, by hand and against a second public counter."""

from __future__ import annotations

import warnings

import pytest
import timm
import torch
from torch import nn

from pliant.measuring.macs import count_macs, count_parameters
from pliant.methods.mixture_of_depths import MoDBlock


def by_fvcore(model: nn.Module, size) -> int:
    """fvcore's own handles for convolutions and products; everything else counts nothing."""
    fvcore = pytest.importorskip("fvcore.nn")
    counter = fvcore.FlopCountAnalysis(model.eval(), torch.zeros(1, *size))
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_operator = counter.by_operator()
    return sum(by_operator[name] for name in ("conv", "linear", "matmul", "addmm", "bmm", "einsum"))


@pytest.mark.parametrize(
    ("name", "kwargs", "size", "macs"),
    [
        ("resnet50_mod", {}, (3, 224, 224), 2_561_987_008),
        ("resnet50_mod", {"selection": "none"}, (3, 224, 224), None),
        ("resnet18_cifar_mod", {}, (3, 32, 32), 253_550_080),
        ("resnet18_cifar_mod", {"order": "index", "fusion": "original"}, (3, 32, 32), 253_550_080),
        ("resnet18_cifar_mod", {"selection": "random"}, (3, 32, 32), None),
        ("resnet18_cifar", {}, (3, 48, 48), None),
    ],
)
def test_agrees_with_fvcore(name, kwargs, size, macs):
    model = timm.create_model(name, **kwargs)
    ours = count_macs(model, size)
    assert ours == by_fvcore(model, size)
    assert macs is None or ours == macs


def test_layers_by_hand():
    assert count_macs(nn.Conv2d(3, 8, 3, padding=1, bias=True), (3, 10, 12)) == 3 * 8 * 9 * 120
    assert count_macs(nn.Conv2d(8, 8, 3, groups=4), (8, 10, 10)) == 8 * 2 * 9 * 64
    assert count_macs(nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=1), (4, 9, 9)) == 4 * 6 * 9 * 25
    assert count_macs(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), (3, 2, 2)) == 60
    assert count_macs(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2)), (3, 8, 8)) == 0
    assert count_macs(nn.Identity(), (3, 8, 8)) == 0


class Attention(nn.Module):
    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        return tokens @ tokens.transpose(1, 2) @ tokens


def test_matrix_products_by_hand():
    assert count_macs(Attention(), (8, 4, 4)) == 2 * 16 * 16 * 8


def test_a_mod_block_by_hand():
    model = timm.create_model("resnet50_mod")
    block = model.layer2[1]
    assert isinstance(block, MoDBlock)
    k, width, pixels = 8, 2, 28 * 28
    core = (k * width + 9 * width * width + width * k) * pixels
    selector = 2 * 512 * 32
    assert count_macs(block, (512, 28, 28)) == core + selector


def test_a_network_by_hand():
    """resnet20 of He et al. 2016: option-A shortcuts cost nothing."""
    stem = 3 * 16 * 9 * 1024
    stage1 = 6 * 16 * 16 * 9 * 1024
    stage2 = (16 * 32 + 5 * 32 * 32) * 9 * 256
    stage3 = (32 * 64 + 5 * 64 * 64) * 9 * 64
    assert stem + stage1 + stage2 + stage3 + 640 == 40_551_040
    assert count_macs(timm.create_model("resnet20_cifar"), (3, 32, 32)) == 40_551_040


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.double])
def test_meta_and_dtypes_count_alike(dtype):
    model = timm.create_model("resnet20_cifar_mod").to(dtype)
    real = count_macs(model, (3, 32, 32))
    assert count_macs(model.to("meta"), (3, 32, 32)) == real


def test_nothing_is_left_behind():
    model = timm.create_model("resnet20_cifar_mod").train()
    model.layer1.eval()
    modes = {name: m.training for name, m in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    count_macs(model, (3, 32, 32))
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(p.grad is None for p in model.parameters())


def test_modes_come_back_after_an_error():
    model = timm.create_model("resnet20_cifar").train()
    with pytest.raises(RuntimeError):
        count_macs(model, (5, 32, 32))
    assert all(m.training for m in model.modules())


def test_parameters_are_counted_once():
    shared = nn.Linear(3, 2)
    assert count_parameters(nn.Sequential(shared, nn.ReLU(), shared)) == 8
    frozen = nn.Linear(3, 2).requires_grad_(False)
    assert count_parameters(nn.Sequential(frozen, nn.BatchNorm1d(2))) == 12
