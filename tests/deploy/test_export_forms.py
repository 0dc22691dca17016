"""Forms for export compute what the layers compute: every option, each target, in PyTorch."""

from __future__ import annotations

import copy

import pytest
import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

import _export
import pliant
from _adaptive import scramble
from pliant import MixtureOfDepths
from pliant.anatomy import stages
from pliant.method import Site
from pliant.methods.condconv import CondConvBlock
from pliant.methods.condconv.exported import EachImage, EachImageBlock, OneImage, SideBySideLinear
from pliant.methods.mixture_of_depths import MoDBlock
from pliant.methods.mixture_of_depths.exported import GraphMoD
from pliant.parts import replace_parts

SELECTIONS = [
    {"selection": "learned", "order": "score"},
    {"selection": "learned", "order": "index"},
    {"selection": "fixed", "order": "score"},
    {"selection": "fixed", "order": "index"},
    {"selection": "first"},
]
ENDS = [{}, {"inner_shortcut": True}, {"last_act": True}, {"inner_shortcut": True, "last_act": True}]
TARGETS = [("program", None), ("onnx", None), ("onnx", 1), ("openvino", None), ("openvino", 1)]


def use_export_forms(model: nn.Module, target, batch) -> nn.Module:
    return replace_parts(model, lambda _, part: part.export_form(target, batch))


def block_of(block: str, **options) -> nn.Module:
    """One Mixture-of-Depths block of 16 channels, 4 of them processed, in a network of its own."""
    plain = (BasicBlock(16, 16) if block == "basic" else Bottleneck(16, 4)).eval()
    method = MixtureOfDepths(c=4, reduction=2, **options)
    return scramble(nn.Sequential(method.replace(plain, Site("", {"C": 16, "k": 4})))).eval()


@pytest.mark.parametrize("fusion", ["first", "last", "original", "replace"])
@pytest.mark.parametrize("block", ["basic", "bottleneck"])
@pytest.mark.parametrize("selection", SELECTIONS, ids=str)
def test_each_form_of_a_block_is_the_block(selection, block, fusion, monkeypatch):
    for end in ENDS:
        model = block_of(block, fusion=fusion, **selection, **end)
        for target, batch in TARGETS:
            formed = use_export_forms(copy.deepcopy(model), target, batch)
            assert isinstance(formed[0], MoDBlock) == (target == "program")
            x = torch.randn(batch or 3, 16, 5, 7)
            with torch.no_grad(), monkeypatch.context() as exporting:
                expected = model(x)
                exporting.setattr(torch.compiler, "is_exporting", lambda: True)
                torch.testing.assert_close(formed(x), expected, rtol=1e-4, atol=1e-4)


def test_which_form_a_block_gets():
    def layer(target, batch, block="bottleneck", **options):
        return use_export_forms(_export.mod(block, **options), target, batch).layer1[1]

    assert type(layer("program", None)) is MoDBlock  # which sees that it is exported
    assert isinstance(layer("onnx", 1), GraphMoD)
    assert isinstance(layer("openvino", None), GraphMoD)


def test_blocks_of_an_exported_form_say_their_shape():
    model = use_export_forms(_export.mod(), "onnx", None)
    assert isinstance(model.layer1[1], GraphMoD)
    assert [len(stage.blocks) for stage in stages(model)] == [2, 2]


@pytest.mark.parametrize(
    "options", [{}, {"per_channel": True}, {"active": 1}, {"routing": "shared"}], ids=str
)
def test_one_image_convolves_with_its_mixed_kernel(options):
    model = _export.condconv(**options)
    formed = use_export_forms(copy.deepcopy(model), "onnx", 1)
    found = [m for m in formed.modules() if isinstance(m, OneImage)]
    assert found
    assert [m.layer1[0].stride for m in (formed, model) if isinstance(m.layer1[0], CondConvBlock)] == [1, 1]
    x = torch.randn(1, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(formed(x), model(x), rtol=1e-4, atol=1e-5)


CONDCONV = [
    {},
    {"per_channel": True},
    {"active": 1},
    {"active": 2, "per_channel": True},
    {"routing": "shared"},
    {"routing": "layer", "active": 1},
]


@pytest.mark.parametrize("options", CONDCONV, ids=str)
def test_any_number_of_images_goes_through_one_loop_a_block(options):
    model = _export.condconv(**options)
    formed = use_export_forms(copy.deepcopy(model), "onnx", None)
    looped = [m for m in formed.modules() if isinstance(m, (EachImage, EachImageBlock))]
    # Four blocks, the stem, and of hard routing the classifier.
    assert len(looped) == (10 if options.get("routing") == "layer" else 5) + ("active" in options)
    assert any(isinstance(m, SideBySideLinear) for m in formed.modules()) == ("active" not in options)
    x = _export.images(3)
    with torch.no_grad():
        torch.testing.assert_close(formed(x), model(x), rtol=1e-4, atol=1e-5)


def test_layers_that_a_matrix_product_runs_need_no_loop():
    for options in ({"layers": "pointwise"}, {"form": "experts"}):
        formed = use_export_forms(_export.condconv(**options), "onnx", None)
        assert not any(isinstance(m, (EachImage, EachImageBlock)) for m in formed.modules())
    assert not any(
        isinstance(m, (OneImage, EachImageBlock, SideBySideLinear))
        for m in use_export_forms(_export.condconv(), "program", None).modules()
    )


def test_same_padding_goes_along():
    from pliant.methods.condconv.layers import CondConv2d, Router

    layer = CondConv2d(3, 4, 3, 2, "same", bias="experts", experts=2, router=Router(3, 2)).eval()
    formed = use_export_forms(nn.Sequential(copy.deepcopy(layer)), "onnx", 1)
    x = torch.randn(1, 3, 7, 8)
    with torch.no_grad():
        torch.testing.assert_close(formed(x), layer(x), rtol=1e-4, atol=1e-5)


def test_what_is_drawn_anew_each_time_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"layer1.1 has selection='random'.*selection='fixed'"):
        pliant.export(_export.mod(selection="random"), tmp_path / "net.pt2")
