"""Stages and blocks of timm's families, found by looking."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from _small import meta
from pliant import CondConv, MixtureOfDepths, convert, plan
from pliant.anatomy import (
    Block,
    RemovedBlock,
    block_families,
    classifier,
    convolutions,
    input_size,
    outside_blocks,
    shape_of,
    stages,
    stem_and_head,
    take_dropout,
)


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


# --- convolutions, stem and head, classifier ---------------------------------------------------

DW, PW, SP = "depthwise", "pointwise", "spatial"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet18", [("conv1", SP), ("conv2", SP), ("downsample.0", PW)]),
        ("resnext50_32x4d", [("conv1", PW), ("conv2", SP), ("conv3", PW), ("downsample.0", PW)]),
        ("seresnet50", [("conv1", PW), ("conv2", SP), ("conv3", PW), ("downsample.0", PW)]),
        ("resnet20_cifar", [("conv1", SP), ("conv2", SP)]),
        (
            "regnetx_002",
            [("conv1.conv", PW), ("conv2.conv", SP), ("conv3.conv", PW), ("downsample.conv", PW)],
        ),
        (
            "regnety_002",
            [("conv1.conv", PW), ("conv2.conv", SP), ("conv3.conv", PW), ("downsample.conv", PW)],
        ),
        ("efficientnet_b0", [("conv_pw", PW), ("conv_dw", DW), ("conv_pwl", PW)]),
        ("tf_efficientnet_b0", [("conv_pw", PW), ("conv_dw", DW), ("conv_pwl", PW)]),
        ("mobilenetv1_100", [("conv_dw", DW), ("conv_pw", PW)]),
        ("mobilenetv2_100", [("conv_pw", PW), ("conv_dw", DW), ("conv_pwl", PW)]),
        ("mobilenetv3_small_050", [("conv", PW)]),
        ("convnext_atto", [("conv_dw", DW), ("mlp.fc1", PW), ("mlp.fc2", PW)]),
        ("vit_tiny_patch16_224", []),
    ],
)
def test_convolutions_of_the_last_stages_first_block(name, expected):
    block = stages(meta(name))[-1].blocks[0]
    found = convolutions(block.module)
    assert [(c.path, c.kind) for c in found] == expected
    assert all(block.module.get_submodule(c.path) is c.module for c in found)
    assert shape_of(block.module) == (block.in_channels, block.out_channels, block.stride)


def test_convolutions_of_an_edge_residual_and_both_forms_of_convnext():
    edge = stages(meta("efficientnetv2_rw_t"))[1].blocks[0].module
    assert [(c.path, c.kind) for c in convolutions(edge)] == [("conv_exp", SP), ("conv_pwl", PW)]
    types = []
    for name in ("convnext_atto", "convnext_tiny"):  # 1x1 convolutions, and linear layers
        block = stages(meta(name))[0].blocks[0].module
        types.append([type(c.module) for c in convolutions(block)])
    assert types == [[nn.Conv2d] * 3, [nn.Conv2d, nn.Linear, nn.Linear]]


@pytest.mark.parametrize(
    ("name", "stem", "head", "last"),
    [
        ("resnet18", ["conv1"], [], "fc"),
        ("resnet20_cifar", ["conv1"], [], "fc"),
        ("regnetx_002", ["stem.conv"], [], "head.fc"),
        ("regnety_002", ["stem.conv"], [], "head.fc"),
        ("efficientnet_b0", ["conv_stem"], ["conv_head"], "classifier"),
        ("tf_efficientnet_b0", ["conv_stem"], ["conv_head"], "classifier"),
        ("mobilenetv1_100", ["conv_stem"], [], "classifier"),
        ("mobilenetv2_100", ["conv_stem"], ["conv_head"], "classifier"),
        ("mobilenetv3_small_050", ["conv_stem"], ["conv_head"], "classifier"),
        ("convnext_atto", ["stem.0"], [], "head.fc"),
        ("convnext_atto_ols", ["stem.0", "stem.1"], [], "head.fc"),
        ("vit_tiny_patch16_224", ["patch_embed.proj"], [], "head"),
        ("resnet50d", ["conv1.0", "conv1.3", "conv1.6"], [], "fc"),
    ],
)
def test_stem_head_and_classifier(name, stem, head, last):
    model = meta(name)
    assert tuple([c.path for c in part] for part in stem_and_head(model)) == (stem, head)
    assert classifier(model) == last


def test_convolutions_between_the_blocks():
    assert [(n, c.path) for n, c in outside_blocks(meta("convnext_atto"))] == [
        (0, "stem.0"),
        (2, "stages.1.downsample.1"),
        (4, "stages.2.downsample.1"),
        (10, "stages.3.downsample.1"),
    ]
    assert [(n, c.path) for n, c in outside_blocks(meta("mobilenetv2_100"))] == [
        (0, "conv_stem"),
        (17, "conv_head"),
    ]


def test_networks_without_classifier():
    assert classifier(meta("resnet18", num_classes=0)) is None
    assert classifier(meta("resnet18", features_only=True)) is None
    assert classifier(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU())) is None
    assert classifier(nn.Sequential(nn.Linear(3, 8), nn.ReLU())) is None, "it is not the last module"
    assert classifier(nn.Sequential(nn.ReLU(), nn.Linear(3, 8))) == "1"


@pytest.mark.parametrize("name", ["resnet18", "mobilenetv2_100", "convnext_atto"])
def test_a_classifier_behind_a_network_without_one(name):
    inner = meta(name, num_classes=0)
    linear = nn.Linear(inner.num_features, 5)
    assert classifier(nn.Sequential(inner, linear)) == "1"
    assert classifier(nn.Sequential(inner, nn.Dropout(0.2), linear)) == "2"
    assert classifier(nn.Sequential(inner, nn.Flatten())) is None
    assert classifier(nn.Sequential(meta(name), linear)).startswith("0."), "the network's own comes first"


def test_two_classifiers_are_none():
    assert classifier(meta("deit_tiny_distilled_patch16_224")) is None


@pytest.mark.parametrize("method", [MixtureOfDepths(), CondConv(experts=2)])
def test_a_block_that_cannot_be_read_is_named(method):
    """MixNet has several kernels in what its blocks call one convolution."""
    model = meta("mixnet_s")
    message = r"^InvertedResidual blocks\.2\.0 is built .* cannot be read: 'MixedConv2d' .* 'stride'"
    for call in (stages, lambda model: plan(model, method), lambda model: convert(model, method)):
        with pytest.raises(ValueError, match=message):
            call(model)
    with pytest.raises(ValueError, match=r"^InvertedResidual is built .* cannot be read: .*'stride'"):
        shape_of(model.blocks[2][0])


def test_shape_of_a_block_of_no_known_family():
    with pytest.raises(ValueError, match=r"Linear is no known block; known: .*resnet\.Bottleneck"):
        shape_of(nn.Linear(2, 2))


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18", {}),  # by a function
        ("mobilenetv2_100", {}),
        ("mobilenetv3_small_050", {}),
        ("regnetx_002", {}),  # by a module beside the classifier
        ("convnext_atto", {}),
        ("vit_tiny_patch16_224", {"img_size": 32}),
    ],
)
def test_take_dropout(name, kwargs):
    model = timm.create_model(name, drop_rate=0.4, **kwargs).eval()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    if hasattr(model, "drop_rate"):
        model.training = True
    path = classifier(model)
    x = torch.randn(1, 3, 32, 32)
    seen = []
    model.get_submodule(path).register_forward_hook(lambda module, args, out: seen.append(args[0]))
    with torch.no_grad():
        model(x), model(x)
        assert not torch.equal(seen[0], seen[1]), "it drops before, or this test says nothing"
        assert take_dropout(model, path) == 0.4
        model(x), model(x)
    assert torch.equal(seen[2], seen[3])
    assert take_dropout(model, path) == 0.0


def test_take_dropout_in_a_plain_sequence():
    def build(*layers):
        return nn.Sequential(nn.Flatten(), *layers)

    model = build(nn.Dropout(0.3), nn.Linear(4, 2))
    assert (take_dropout(model, "2"), model[1].p) == (0.3, 0.0)
    model = build(nn.Dropout(0.3), nn.ReLU(), nn.Linear(4, 2))
    assert (take_dropout(model, "3"), model[1].p) == (0.0, 0.3), "not on its input"
    model = nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.3))
    assert (take_dropout(model, "0"), model[1].p) == (0.0, 0.3)


def test_a_block_says_its_shape():
    class Halving(Block):
        pass

    assert shape_of(Halving(8, 16, 2)) == (8, 16, 2)
    assert repr(Halving(8, 16, 2)) == "Halving(channels=8, out_channels=16, stride=2)"
    assert shape_of(Halving(8)) == (8, 8, 1)
    assert repr(Halving(8)) == "Halving(channels=8)"
