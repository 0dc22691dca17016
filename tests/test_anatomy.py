"""Stages and blocks of timm's families, found by looking."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from pliant import MixtureOfDepths, convert
from pliant.anatomy import Block, RemovedBlock, block_families, input_size, stages


def meta(name, **kwargs):
    """Moved there, because older versions of timm cannot build every family there."""
    return timm.create_model(name, **kwargs).to("meta")


@pytest.mark.parametrize(
    ("name", "path", "blocks"),
    [
        ("resnet18", "layer1", [2, 2, 2, 2]),
        ("resnet101", "layer1", [3, 4, 23, 3]),
        ("resnet20_cifar", "layer1", [3, 3, 3]),
        ("resnext50_32x4d", "layer1", [3, 4, 6, 3]),
        ("regnetx_002", "s1", [1, 1, 4, 7]),
        ("convnext_atto", "stages.0.blocks", [2, 2, 6, 2]),
        ("mobilenetv2_100", "blocks.0", [1, 2, 3, 4, 3, 3, 1]),
        ("mobilenetv1_100", "blocks.0", [1, 2, 2, 6, 2]),
        ("efficientnetv2_rw_t", "blocks.0", [2, 4, 4, 6, 9, 14]),
        ("vit_tiny_patch16_224", "blocks", [12]),
    ],
)
def test_stages(name, path, blocks):
    found = stages(meta(name))
    assert found[0].path == path
    assert [len(stage.blocks) for stage in found] == blocks
    assert found[0].blocks[0].path == f"{path}.{'b1' if name == 'regnetx_002' else 0}"


def shapes(model, stage):
    return [(b.in_channels, b.out_channels, b.stride) for b in stages(model)[stage].blocks]


@pytest.mark.parametrize(
    ("name", "stage", "expected"),
    [
        ("resnet18", 1, [(64, 128, 2), (128, 128, 1)]),
        ("resnet50", 0, [(64, 256, 1), (256, 256, 1), (256, 256, 1)]),
        ("resnet50", 3, [(1024, 2048, 2), (2048, 2048, 1), (2048, 2048, 1)]),
        ("regnetx_002", 1, [(24, 56, 2)]),
        ("convnext_atto", 0, [(40, 40, 1)] * 2),
        ("mobilenetv2_100", 1, [(16, 24, 2), (24, 24, 1)]),
        ("mobilenetv1_100", 2, [(128, 256, 2), (256, 256, 1)]),
        ("efficientnetv2_rw_t", 1, [(24, 40, 2), (40, 40, 1), (40, 40, 1), (40, 40, 1)]),
        ("vit_tiny_patch16_224", 0, [(192, 192, 1)] * 12),
    ],
)
def test_shapes(name, stage, expected):
    assert shapes(meta(name), stage) == expected


@pytest.mark.parametrize(
    "name",
    [
        "resnet18",
        "resnet50",
        "resnet56_cifar",
        "resnet50_cifar",
        "regnetx_002",
        "mobilenetv2_100",
        "mobilenetv1_100",
        "efficientnetv2_rw_t",
    ],
)
def test_shapes_are_those_of_a_forward(name):
    """What a block says of itself is what its input and output have."""
    model = meta(name)
    blocks = {b.module: b for stage in stages(model) for b in stage.blocks}
    seen = []

    def look(module, args, out):
        block = blocks[module]
        assert args[0].shape[1] == block.in_channels, block.path
        assert out.shape[1] == block.out_channels, block.path
        assert (args[0].shape[2] + block.stride - 1) // block.stride == out.shape[2], block.path
        seen.append(block.path)

    for module in blocks:
        module.register_forward_hook(look)
    model.eval()(torch.empty(1, 3, 64, 64, device="meta"))
    assert seen == [b.path for b in blocks.values()], "and they are in the order of the forward"


def test_output_stride_turns_strides_into_dilations():
    strides = [s.blocks[0].stride for s in stages(meta("resnet50", output_stride=8))]
    assert strides == [1, 2, 1, 1]


def test_kinds_and_families():
    found = {b.kind for s in stages(meta("mobilenetv2_100")) for b in s.blocks}
    assert found == {
        "_efficientnet_blocks.DepthwiseSeparableConv",
        "_efficientnet_blocks.InvertedResidual",
    }
    assert "resnet.Bottleneck" in block_families()
    assert not any(name.endswith(".Block") and "anatomy" in name for name in block_families())


def test_a_converted_network_can_still_be_read():
    model = timm.create_model("resnet18_cifar", channels=(16, 32, 64, 128))
    for selection in ("learned", "none"):
        changed = convert(model, MixtureOfDepths(c=4, selection=selection))
        assert [[b.path for b in s.blocks] for s in stages(changed)] == [
            [b.path for b in s.blocks] for s in stages(model)
        ]
        for stage in range(4):
            assert shapes(changed, stage) == shapes(model, stage)


def test_subclasses_of_a_known_block_are_blocks():
    class Own(timm.models.resnet.BasicBlock):
        pass

    (stage,) = stages(nn.Sequential(nn.Identity(), Own(8, 16, stride=2, downsample=nn.Identity())))
    assert [(b.path, b.in_channels, b.out_channels, b.stride) for b in stage.blocks] == [("1", 8, 16, 2)]


def test_nothing_known_means_no_stage():
    assert stages(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())) == []
    assert stages(nn.Linear(2, 2)) == []


def test_blocks_inside_blocks_are_not_looked_for():
    class Outer(Block):
        def __init__(self):
            super().__init__(8)
            self.inner = nn.Sequential(timm.models.resnet.BasicBlock(8, 8))

    (stage,) = stages(nn.ModuleDict({"stage": nn.Sequential(Outer())}))
    assert [b.path for b in stage.blocks] == ["stage.0"]


def test_removed_block_says_its_shape():
    block = RemovedBlock(7)
    x = torch.ones(1, 7, 2, 2)
    assert block(x) is x
    assert repr(block) == "RemovedBlock(channels=7)"


@pytest.mark.parametrize(
    ("name", "kwargs", "size"),
    [
        ("resnet50", {}, (3, 224, 224)),
        ("resnet50", {"in_chans": 1}, (1, 224, 224)),
        ("resnet20_cifar_mod", {"in_chans": 4}, (4, 32, 32)),
        ("vit_base_patch16_384", {}, (3, 384, 384)),
        ("resnet18", {"features_only": True}, (3, 224, 224)),
    ],
)
def test_input_size(name, kwargs, size):
    assert input_size(meta(name, **kwargs)) == size


def test_input_size_unknown():
    assert input_size(nn.Conv2d(3, 8, 3)) is None
    assert input_size(nn.Linear(3, 8)) is None
