"""Stages and blocks of timm's families, found by looking."""

from __future__ import annotations

import re

import pytest
import timm
import torch
import torchvision
from torch import nn

from _small import meta
from pliant import AdaptiveDepth, CondConv, MixtureOfDepths, convert, plan
from pliant.anatomy import (
    Block,
    RemovedBlock,
    UnknownBlock,
    block_families,
    blocks,
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
        "efficientnet_x_b3",  # folds pixels into channels
        "efficientnet_blur_b0",  # a pool strides, not the convolution
        "mobilenetv4_conv_blur_medium",
        "hrnet_w18_small",
    ],
)
def test_shapes_are_those_of_a_forward(name):
    """What a block says of itself is what its input and output have."""
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
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
    if "hrnet" in name:  # its branches run side by side
        seen, blocks = sorted(seen), {b.module: b for b in sorted(blocks.values(), key=lambda b: b.path)}
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
        ("resnet18", {"features_only": True, "in_chans": 5}, (5, 224, 224)),
        ("csatv2", {}, (3, 512, 512)),  # its first convolution takes 64 frequencies
        ("tresnet_m", {}, (3, 224, 224)),  # and this one 48 folded pixels
        ("cc_mobilenetv1_025", {"begin": 1, "in_chans": 2}, (2, 224, 224)),
    ],
)
def test_input_size(name, kwargs, size):
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    assert input_size(meta(name, **kwargs)) == size


def test_input_size_of_a_stem_put_in_by_hand():
    model = meta("resnet18")
    model.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3)
    assert input_size(model) == (1, 224, 224)
    model.conv1 = nn.Conv2d(6, 64, 7, stride=2, padding=3)
    assert input_size(model) == (6, 224, 224)


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

    class Heads(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = meta("resnet18", num_classes=0)
            self.classes, self.boxes = nn.Linear(512, 3), nn.Linear(512, 12)

    assert classifier(Heads()) is None, "of a detector, say"
    assert classifier(nn.Sequential(meta("resnet18", num_classes=0), Attention())) is None


def test_a_network_whose_classifier_was_deleted():
    """As encoders of segmentation_models_pytorch are."""
    encoder = meta("efficientnet_b0")
    del encoder.classifier
    net = nn.Sequential(encoder, Attention(1280), nn.Conv2d(1280, 2, 1))
    assert classifier(net) is None
    found = CondConv(experts=2).survey(net)
    assert "0.blocks.6.0" in {site.path for site in found.sites}
    left = {p.path: p.reason for p in found.passed_over}
    assert left["(classifier)"] == "no linear classifier found"
    assert left["2"] == "beside blocks of no known family, in no unit"
    assert "Attention is no block" in left["1"]


def test_a_block_that_cannot_be_read_is_named_and_left_alone():
    """MixNet has several kernels in what its blocks call one convolution."""
    model = meta("mixnet_s")
    odd = [block for block in blocks(model) if isinstance(block, UnknownBlock)]
    assert odd[0].path == "blocks.2.0"
    reason = (
        r"^timm's _efficientnet_blocks\.InvertedResidual is built as no other .*: 'MixedConv2d' .* 'stride'"
    )
    made = plan(model, CondConv(experts=2, begin=2))
    left = {p.path: p.reason for _, p in made.passed_over}
    for block in odd:
        assert re.match(reason, left[block.path])
        with pytest.raises(ValueError, match=reason):
            shape_of(block.module)
    with pytest.raises(ValueError, match=r"blocks\.2\.0.* cannot be read"):
        plan(model, MixtureOfDepths())


# --- blocks that nobody knows -----------------------------------------------------------------------


class Attention(nn.Module):
    """A block of somebody's: two convolutions."""

    def __init__(self, channels=8):
        super().__init__()
        self.query, self.key = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return x + self.query(x) * self.key(x)


def own(*middle: nn.Module) -> nn.Module:
    """A stem, known blocks with others among them, a head convolution and a classifier."""
    block = timm.models.resnet.BasicBlock
    stem = nn.Conv2d(3, 8, 3)
    return nn.Sequential(
        stem, block(8, 8), *middle, block(8, 8), nn.Conv2d(8, 16, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(16, 5),
    )  # fmt: skip


def test_unknown_blocks_are_named_and_nothing_in_them_is_touched():
    model = own(Attention(), nn.Sequential(Attention(), nn.Conv2d(8, 8, 1)))
    assert [(type(b).__name__, b.path) for b in blocks(model)] == [
        ("BlockInfo", "1"),
        ("UnknownBlock", "2"),
        ("UnknownBlock", "3.0"),
        ("BlockInfo", "4"),
    ]
    assert [(n, c.path) for n, c in outside_blocks(model)] == [(0, "0"), (3, "3.1"), (4, "5")]
    assert tuple([c.path for c in part] for part in stem_and_head(model)) == (["0"], ["5"])
    kinds = {path: type(m) for path, m in model.named_modules()}
    for method in (MixtureOfDepths(c=2, blocks="all"), CondConv(experts=2, begin=1), AdaptiveDepth()):
        made, new = plan(model, method), convert(model, method)
        left = {p.path: p.reason for _, p in made.passed_over}
        for path in ("2", "3.0"):
            assert left[path] == f"{Attention.__module__}.Attention is no block of a known family"
            inner = new.get_submodule(path)
            assert {f"{path}.{p}".strip("."): type(m) for p, m in inner.named_modules()} == {
                p: kind for p, kind in kinds.items() if f"{p}.".startswith(f"{path}.")
            }
    found = CondConv(experts=2, begin=1).survey(model)
    assert [(s.path, s.detail["unit"]) for s in found.sites] == [
        ("0", 1),
        ("1", 2),
        ("4", 5),
        ("5", 6),
        ("8", 7),
    ]
    assert {p.path: p.reason for p in found.passed_over}["3.1"] == "between the blocks, in no unit"


def test_behind_an_unknown_block_there_is_no_head():
    model = own()
    model.insert(3, Attention())
    assert [type(b).__name__ for b in blocks(model)] == ["BlockInfo", "BlockInfo", "UnknownBlock"]
    assert stem_and_head(model)[1] == []
    left = {p.path: p.reason for p in CondConv(experts=2, begin=1).survey(model).passed_over}
    assert left["4"] == "beside blocks of no known family, in no unit"


def test_a_network_of_unknown_blocks_is_refused_unless_the_classifier_is_asked_for():
    model = torchvision.models.resnet18().eval()
    with pytest.raises(ValueError, match="matches nothing") as error:
        plan(model, CondConv(experts=2))
    lines = str(error.value).splitlines()
    assert lines[0] == "CondConv matches nothing in ResNet:"
    assert lines[1] == (
        "  layer1.0 to layer4.1 (8 places): "
        "torchvision.models.resnet.BasicBlock is no block of a known family"
    )
    assert lines[2] == (
        "  fc: no block is converted; for the classifier alone, set features=False or begin=10"
    )
    assert lines[3].startswith("(known: timm's _efficientnet_blocks.ConvBnAct, ")
    for asked in ({"features": False}, {"begin": 10}):
        assert [r.path for r in plan(model, CondConv(experts=2, **asked)).replacements] == ["fc"]
    for method in (MixtureOfDepths(), AdaptiveDepth()):
        with pytest.raises(ValueError, match=r"layer1\.0 to layer4\.1 \(8 places\): torchvision"):
            plan(model, method)


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "maxvit_rmlp_pico_rw_256", "densenet121"])
def test_unknown_blocks_are_named_one_by_one(name):
    """The blocks, not the stages around them; and all that has weights lies in one, or between them."""
    model = meta(name)
    found = blocks(model)
    assert all(isinstance(block, UnknownBlock) for block in found)
    expected = {"swin_tiny_patch4_window7_224": 12, "maxvit_rmlp_pico_rw_256": 11, "densenet121": 4}
    assert sum("Block" in type(block.module).__name__ for block in found) == expected[name]


@pytest.mark.parametrize(
    "name",
    [
        "mobilenetv4_hybrid_medium",
        "ghostnet_100",
        "repghostnet_050",
        "mobilenetv5_base",
        "mobilevit_xxs",
        "hrnet_w18_small",
        "vit_base_r50_s16_224",
        "convnext_tiny_hnf",
    ],
)
def test_every_layer_of_a_network_known_in_part_is_accounted_for(name):
    """Each convolution is in a site, in what is passed over, or in an unknown block that is as it was."""
    model = meta(name)
    method = CondConv(experts=2, begin=2, layers="all")
    made = method.survey(model)
    named = [place.path for place in (*made.sites, *made.passed_over)]
    for path, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and made.sites:
            assert any(f"{path}.".startswith(f"{n}.") for n in named), path
    new = convert(model, method) if made.sites else model
    for block in blocks(model):
        assert any(f"{block.path}.".startswith(f"{n}.") for n in named), block.path
        if isinstance(block, UnknownBlock):
            inner = [type(m) for m in new.get_submodule(block.path).modules()]
            assert inner == [type(m) for m in block.module.modules()], block.path


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
