"""What networks declare, and what stands outside their blocks."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from _small import Attention, meta, own
from pliant import CondConv
from pliant.anatomy import (
    blocks,
)
from pliant.outside import classifier, input_size, outside_blocks, stem_and_head, take_dropout


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
    model = meta(name, **kwargs)
    if name == "tresnet_m" and not hasattr(model, "in_chans"):
        pytest.skip(f"TResNet of timm {timm.__version__} does not say how many channels its images have")
    assert input_size(model) == size


def test_input_size_of_a_stem_put_in_by_hand():
    model = meta("resnet18")
    model.conv1 = nn.Conv2d(1, 64, 7, stride=2, padding=3)
    assert input_size(model) == (1, 224, 224)
    model.conv1 = nn.Conv2d(6, 64, 7, stride=2, padding=3)
    assert input_size(model) == (6, 224, 224)


def test_input_size_unknown():
    assert input_size(nn.Conv2d(3, 8, 3)) is None
    assert input_size(nn.Linear(3, 8)) is None


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


def test_behind_an_unknown_block_there_is_no_head():
    model = own()
    model.insert(3, Attention())
    assert [type(b).__name__ for b in blocks(model)] == ["BlockInfo", "BlockInfo", "UnknownBlock"]
    assert stem_and_head(model)[1] == []
    left = {p.path: p.reason for p in CondConv(experts=2, begin=1).survey(model).passed_over}
    assert left["4"] == "beside blocks of no known family, in no unit"


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
