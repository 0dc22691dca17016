"""Distances of the two means of switchable norms (figure 3(b))."""

from __future__ import annotations

import math

import pytest
import timm
import torch
from torch import nn

from _adaptive import SMALL_CONVNEXT
from pliant import AdaptiveDepth, CondConv, MixtureOfDepths, at_depth, convert, get_depth, set_depth
from pliant.methods.adaptive_depth import SwitchableNorm
from research.analysis.norm_distance import NormDistances, norm_distances, plot_norm_distances

NORMS = [f"layer{s}.{b}.bn{n}" for s in (1, 2, 3) for b in (0, 1) for n in (1, 2)]  # resnet20's


def images(n=6, side=16):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def silence(model):
    """Blocks that can be skipped add nothing, as those of a perfectly specialised network."""
    for stage in (model.layer1, model.layer2, model.layer3):
        nn.init.zeros_(stage[2].block.bn2.weight)
        nn.init.zeros_(stage[2].block.bn2.bias)


def test_distances_are_zero_after_conversion():
    plain = timm.create_model("resnet20_cifar").train()
    plain(images())  # running means that are not all zero
    model = convert(plain, AdaptiveDepth())
    found = norm_distances(model)
    assert list(found.layers) == NORMS
    assert found.first == ("layer1.0.bn1", "layer2.0.bn1", "layer3.0.bn1")
    assert list(found.stages.values()) == [0] * 4 + [1] * 4 + [2] * 4
    assert found.images is None
    assert found.distances().tolist() == [0.0] * 12
    for path, mean in found.full.items():
        assert torch.equal(mean, plain.get_submodule(path).running_mean.double())
        assert mean.abs().max() > 0


def test_a_moved_base_norm_and_no_other_has_its_distance():
    model = timm.create_model("resnet20_cifar_adn")
    mean = model.layer2[1].block.bn1.base.running_mean
    mean[3] += 3
    mean[7] -= 4
    found = norm_distances(model)
    at = NORMS.index("layer2.1.bn1")
    assert found.distances()[at] == 5
    assert found.distances().count_nonzero() == 1
    assert found.distances(per_channel=True)[at].item() == pytest.approx(5 / math.sqrt(32))
    assert (found.base["layer2.1.bn1"] - found.full["layer2.1.bn1"])[[3, 7]].tolist() == [3, -4]


def test_a_norm_is_of_its_stages_flag_where_a_stage_cannot_skip():
    model = timm.create_model("resnet20_cifar_adn", skippable=(1, 0, 1))
    found = norm_distances(model)
    assert list(found.layers) == NORMS[:4] + NORMS[8:]
    assert list(found.stages.values()) == [0] * 4 + [1] * 4


def test_measured_means_are_those_of_what_the_norms_get():
    model = timm.create_model("resnet20_cifar_adn")
    x = images()
    # Batches of several sizes: an image counts as much in each. As a loader gives them, or alone.
    found = norm_distances(model, iter([(x[:4], torch.zeros(4)), x[4:]]))
    assert found.images == 6
    model.eval()
    with torch.no_grad():
        stem = model.act1(model.bn1(model.conv1(x)))
        expected = model.layer1[0].block.conv1(stem).double().mean((0, 2, 3))
        for skip in (False, True):
            with at_depth(model, (skip,) * 3):
                second = model.layer2[0].block.conv1(model.layer1(stem)).double().mean((0, 2, 3))
            side = found.base if skip else found.full
            torch.testing.assert_close(side["layer1.0.bn1"], expected)
            torch.testing.assert_close(side["layer2.0.bn1"], second)
    distances = dict(zip(found.layers, found.distances().tolist(), strict=True))
    assert [distances[layer] for layer in NORMS[:4]] == [0] * 4  # nothing was skipped before
    assert distances["layer2.0.bn1"] > 0.01


def test_means_do_not_move_where_skipped_blocks_add_nothing():
    model = timm.create_model("resnet20_cifar_adn")
    silence(model)
    assert norm_distances(model, [images()]).distances().tolist() == [0.0] * 12


def test_layer_norms_are_measured_over_tokens():
    model = timm.create_model("vit_tiny_patch16_adn", img_size=32, embed_dim=24, num_heads=2)
    with pytest.raises(ValueError, match=r"blocks\.0\.norm1 is a LayerNorm without a running mean"):
        norm_distances(model)
    x = images(side=32)
    found = norm_distances(model, [x])
    assert found.layers == tuple(f"blocks.{b}.norm{n}" for b in (0, 1, 3, 4, 6, 7, 9, 10) for n in (1, 2))
    with torch.no_grad():
        tokens = model.eval().norm_pre(model.patch_drop(model._pos_embed(model.patch_embed(x))))
    torch.testing.assert_close(found.full["blocks.0.norm1"], tokens.double().mean((0, 1)))
    distances = dict(zip(found.layers, found.distances().tolist(), strict=True))
    assert distances["blocks.1.norm2"] == 0
    assert distances["blocks.3.norm1"] > 0


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_layer_norms_of_convnext_are_measured_over_positions(conv_mlp):
    # A map of 8 x 8 with 8 channels: only the norm tells where these are.
    plain = timm.create_model(
        "convnext_atto", depths=(2, 1, 1, 1), dims=(8, 8, 8, 8), conv_mlp=conv_mlp, ls_init_value=1.0
    )
    model = convert(plain, AdaptiveDepth())
    x = images(side=32)
    found = norm_distances(model, [x])
    assert found.layers == ("stages.0.blocks.0.norm",)
    with torch.no_grad():
        y = plain.eval().stages[0].blocks[0].conv_dw(plain.stem(x))
    assert y.shape == (6, 8, 8, 8)
    torch.testing.assert_close(found.base["stages.0.blocks.0.norm"], y.double().mean((0, 2, 3)))


@pytest.mark.parametrize("conv_mlp", [False, True])
def test_root_mean_square_norms_are_switched_and_measured(conv_mlp):
    """They are neither batch nor layer norms by type, and were left single without a word."""
    model = timm.create_model(
        "convnext_atto_rms", **{**SMALL_CONVNEXT, "conv_mlp": conv_mlp}, num_classes=5
    )
    model = convert(model, AdaptiveDepth()).eval()
    found = norm_distances(model, [images(2, 32)])
    assert len(found.layers) == 4  # one in each block that stays, of the stages that can skip
    assert [found.full[path].shape for path in found.layers] == [(8,), (24,), (24,), (32,)]
    with torch.no_grad():
        before = model(images(2, 32))
        for module in model.modules():
            if isinstance(module, SwitchableNorm):
                module.base.weight.mul_(2)
        assert torch.equal(model(images(2, 32)), before)


@pytest.mark.parametrize("inner", [MixtureOfDepths(c=4, reduction=2, blocks="all"), CondConv(experts=2)])
def test_norms_of_composed_networks_are_found(inner):
    model = convert(timm.create_model("resnet20_cifar"), inner, AdaptiveDepth())
    assert norm_distances(model).distances().count_nonzero() == 0
    measured = norm_distances(model, [images()])
    assert measured.layers == norm_distances(model).layers
    assert measured.distances()[0] == 0
    assert measured.distances()[-1] > 0


def test_the_network_is_left_as_it_was():
    model = timm.create_model("resnet20_cifar_adn").train()
    model.layer2.eval()
    set_depth(model, (False, True, False))
    modes = [m.training for m in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items() if torch.is_tensor(value)}
    norm_distances(model, [images()])
    assert [m.training for m in model.modules()] == modes
    assert get_depth(model) == (False, True, False)
    assert not any(m._forward_hooks for m in model.modules())
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_compiled_network_is_measured():
    model = timm.create_model("resnet20_cifar_adn")
    x = images()
    compiled = norm_distances(torch.compile(model, backend="eager"), [x])
    assert torch.equal(compiled.distances(), norm_distances(model, [x]).distances())


def test_errors_name_the_reason():
    with pytest.raises(ValueError, match="no adaptive depth"):
        norm_distances(timm.create_model("resnet20_cifar"))
    with pytest.raises(ValueError, match="no switchable norm"):
        norm_distances(timm.create_model("resnet20_cifar_adn", switchable_norms=False))
    model = timm.create_model("resnet20_cifar_adn")
    with pytest.raises(ValueError, match="no images to average"):
        norm_distances(model, [])
    model.layer1[0].block.bn2.base.running_mean = None
    with pytest.raises(ValueError, match=r"layer1\.0\.bn2 is a BatchNorm2d without a running mean"):
        norm_distances(model)


def test_plot_names_every_norm(tmp_path):
    model = timm.create_model("resnet20_cifar_adn")
    model.layer2[1].block.bn1.base.running_mean[0] = 2
    found = norm_distances(model)
    path = plot_norm_distances(found, tmp_path / "norms.svg")
    text = path.read_text()
    assert all(f">{layer}<" in text for layer in found.layers)
    assert ">stage 2<" in text
    assert "running means" in text
    other = plot_norm_distances(
        norm_distances(model, [images()]), tmp_path / "measured.svg", per_channel=True
    ).read_text()
    assert "6 images" in other
    assert "per channel" in other
    with pytest.raises(ValueError, match="suffix"):
        plot_norm_distances(found, tmp_path / "norms.gif")
    with pytest.raises(ValueError, match="no norms to draw"):
        plot_norm_distances(NormDistances({}, {}, {}), tmp_path / "none.png")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["measured.svg", "norms.svg"]
