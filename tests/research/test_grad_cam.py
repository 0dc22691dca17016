"""Class activation maps by block (figure 4)."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from pliant import AdaptiveDepth, CondConv, MixtureOfDepths, at_depth, convert, get_depth, subnet
from research.analysis.grad_cam import grad_cam, plot_grad_cam

BASE = (True, True, True)


def images(n=2, side=16):
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(1))


def normalised(cam: Tensor) -> Tensor:
    return cam / cam.amax((1, 2), keepdim=True)


def adaptive():
    """Its base network is another than its whole one already in what its norms do."""
    model = timm.create_model("resnet20_cifar_adn").eval()
    model.layer2[1].block.bn1.base.running_mean += 0.3
    return model


class Hand(nn.Module):
    """Two channels as they come, averaged over the image, and two classes of them."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(2, 2, 1, bias=False)
        self.fc = nn.Linear(2, 2, bias=False)
        with torch.no_grad():
            self.features.weight.copy_(torch.eye(2)[:, :, None, None])
            self.fc.weight.copy_(torch.tensor([[2.0, -1.0], [-1.0, -1.0]]))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.features(x).mean((2, 3)))
        return y


def test_a_map_by_hand():
    x = torch.tensor([[[[1.0, 2.0], [0.0, 3.0]], [[0.0, 2.0], [1.0, 2.0]]]])
    # Class 0: (2 A - B) / 4 is [[2, 2], [-1, 4]] / 4; negative is 0, and the largest is 1.
    found = grad_cam(Hand(), x, [0], ["features"])
    assert found["features"].tolist() == [[[0.5, 0.5], [0.0, 1.0]]]
    # Class 1: -(A + B) / 4 speaks nowhere for it.
    assert grad_cam(Hand(), x, [1], ["features"])["features"].tolist() == [[[0.0, 0.0], [0.0, 0.0]]]


def test_the_gradient_in_front_of_a_linear_head_is_the_weight_over_the_positions():
    model = timm.create_model("resnet20_cifar").eval()
    x = images()
    with torch.no_grad():
        features = model.forward_features(x)
        y = model.forward_head(features).argmax(1)
    weights = model.fc.weight[y] / (4 * 4)
    expected = torch.einsum("bk,bkhw->bhw", weights, features).relu().detach()
    torch.testing.assert_close(grad_cam(model, x, y)["layer3.2"], normalised(expected))


def test_an_early_block_has_the_gradient_of_all_that_follows():
    model = timm.create_model("resnet20_cifar").eval()
    x, y = images(), torch.tensor([3, 7])
    a = model.layer1(model.act1(model.bn1(model.conv1(x)))).detach().requires_grad_()
    scores = model.forward_head(model.layer3(model.layer2(a)))
    (gradient,) = torch.autograd.grad(scores[0, 3] + scores[1, 7], a)
    expected = (gradient.mean((2, 3), keepdim=True) * a).sum(1).relu().detach()
    found = grad_cam(model, x, y)
    assert list(found) == [f"layer{s}.{b}" for s in (1, 2, 3) for b in range(3)]
    torch.testing.assert_close(found["layer1.2"], normalised(expected))
    assert [tuple(found[f"layer{s}.0"].shape) for s in (1, 2, 3)] == [(2, 16, 16), (2, 8, 8), (2, 4, 4)]
    for cam in found.values():
        assert cam.dtype == torch.float32
        assert float(cam.min()) >= 0
        assert float(cam.amax((1, 2)).max()) == 1


def test_an_image_has_the_same_map_in_any_batch():
    model = timm.create_model("resnet20_cifar")
    x, y = images(3), torch.tensor([3, 7, 1])
    together = grad_cam(model, x, y)
    for n in range(3):
        for path, cam in grad_cam(model, x[n : n + 1], y[n : n + 1]).items():
            torch.testing.assert_close(cam, together[path][n : n + 1], atol=1e-5, rtol=1e-4)


def test_super_and_base_are_the_plain_network_and_the_one_cut_out():
    x, y = images(), [3, 7]
    plain = timm.create_model("resnet20_cifar").eval()
    assert_same(grad_cam(convert(plain, AdaptiveDepth()), x, y), grad_cam(plain, x, y))
    model = adaptive()
    base = grad_cam(model, x, y, skip=BASE)
    assert list(base) == [f"layer{s}.{b}" for s in (1, 2, 3) for b in range(2)]
    assert_same(base, grad_cam(subnet(model, BASE), x, y))
    assert not torch.equal(base["layer3.1"], grad_cam(model, x, y)["layer3.1"])


def test_the_depth_is_that_of_the_network_unless_told():
    model, x, y = adaptive(), images(), [3, 7]
    base = grad_cam(model, x, y, skip=BASE)
    assert get_depth(model) == (False, False, False)
    with at_depth(model, BASE):
        assert_same(grad_cam(model, x, y), base)
        assert len(grad_cam(model, x, y, skip=(False, False, True))) == 8
        assert get_depth(model) == BASE


def test_skipped_blocks_that_were_named_are_missing():
    model, x = adaptive(), images()
    wanted = ["layer3.2", "layer3.1", "layer2.2.block.conv1"]
    assert list(grad_cam(model, x, [3, 7], wanted, skip=BASE)) == ["layer3.1"]
    assert set(grad_cam(model, x, [3, 7], wanted)) == set(wanted)
    with pytest.raises(ValueError, match="every block that was asked for is skipped"):
        grad_cam(model, x, [3, 7], ["layer3.2"], skip=BASE)


def assert_same(one, other):
    assert list(one) == list(other)
    assert all(torch.equal(one[path], other[path]) for path in one)


@pytest.mark.parametrize("caller", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_network_is_left_as_it_was(caller):
    model, x, y = adaptive(), images(), torch.tensor([3, 7])
    expected = grad_cam(model, x, y)
    model.train().layer2.eval()
    model.conv1.weight.requires_grad_(False)
    model.fc.weight.grad = torch.ones_like(model.fc.weight)
    modes = [m.training for m in model.modules()]
    before = {name: value.clone() for name, value in model.state_dict().items() if torch.is_tensor(value)}
    with caller():
        found = grad_cam(model, x, y)
    assert_same(found, expected)
    assert [m.training for m in model.modules()] == modes
    assert not any(m._forward_hooks for m in model.modules())
    assert [name for name, p in model.named_parameters() if p.grad is not None] == ["fc.weight"]
    assert torch.equal(model.fc.weight.grad, torch.ones_like(model.fc.weight))
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["conv1.weight"]
    assert not x.requires_grad
    after = model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_hooks_are_gone_after_an_error():
    model = adaptive().train()
    with pytest.raises(ValueError, match="target 10 is none of the 10 classes"):
        grad_cam(model, images(), [3, 10], skip=BASE)
    assert not any(m._forward_hooks for m in model.modules())
    assert all(m.training for m in model.modules())
    assert get_depth(model) == (False, False, False)


def test_frozen_checkpointed_and_compiled_networks_give_the_same_maps():
    model, x, y = adaptive(), images(), [3, 7]
    expected = grad_cam(model, x, y)
    assert_same(grad_cam(model.requires_grad_(False), x, y), expected)
    assert_same(grad_cam(torch.compile(model, backend="eager"), x, y), expected)
    model.requires_grad_(True).set_grad_checkpointing(True)
    assert_same(grad_cam(model, x, y), expected)
    half = grad_cam(model.bfloat16(), x, y)
    assert half["layer3.2"].dtype == torch.float32
    torch.testing.assert_close(half["layer3.2"], expected["layer3.2"], atol=0.1, rtol=0)


@pytest.mark.parametrize(
    ("name", "options", "last"),
    [
        ("mobilenetv2_050", {}, "blocks.6.0"),
        ("efficientnet_lite0", {}, "blocks.6.0"),
        ("regnetx_002", {}, "s4.b7"),
        ("convnext_atto", {"depths": (2, 2, 2, 2), "dims": (8, 16, 24, 32)}, "stages.3.blocks.1"),
    ],
)
def test_other_families_plain_and_adaptive(name, options, last):
    plain = timm.create_model(name, num_classes=10, **options).eval()
    model = convert(plain, AdaptiveDepth())
    x, y = images(side=32), [3, 7]
    found = grad_cam(plain, x, y)
    assert list(found)[-1] == last
    assert_same(grad_cam(model, x, y), found)
    flags = len(get_depth(model))
    with at_depth(model, (True,) * flags):
        base = grad_cam(model, x, y)
    assert base.keys() < found.keys()
    for cam in base.values():
        assert cam.isfinite().all()
        assert cam.shape[:1] == (2,)


@pytest.mark.parametrize("method", [MixtureOfDepths(c=4, reduction=4), CondConv(experts=2)])
def test_networks_of_other_methods(method):
    model = convert(timm.create_model("resnet20_cifar"), method)
    found = grad_cam(model, images(), [3, 7])
    assert len(found) == 9
    assert float(found["layer3.1"].max()) == 1


def test_removed_blocks_have_no_map():
    model = timm.create_model("resnet20_cifar_mod", selection="none")
    assert list(grad_cam(model, images(), [3, 7])) == [f"layer{s}.{b}" for s in (1, 2, 3) for b in (0, 2)]


def test_a_network_of_no_known_family_takes_named_modules():
    model = Plain()
    with pytest.raises(ValueError, match="no block of a known family; name modules"):
        grad_cam(model, images(), [0, 1])
    found = grad_cam(model, images(), [0, 1], ["conv", "act"])
    assert {path: tuple(cam.shape) for path, cam in found.items()} == {
        "conv": (2, 16, 16),
        "act": (2, 16, 16),
    }


class Plain(nn.Module):
    """A network in which an activation works in place, and one module runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.act, self.twice = nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(inplace=True), nn.Tanh()
        self.idle, self.fc = nn.Conv2d(3, 4, 1), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc(self.twice(self.twice(self.act(self.conv(x)))).mean((2, 3)))
        return y


def test_errors_name_block_and_reason():
    x, y = images(), [0, 1]
    vit = timm.create_model(
        "vit_tiny_patch16_adn", img_size=16, embed_dim=24, num_heads=2, depth=4, groups=2
    )
    with pytest.raises(ValueError, match=r"blocks\.0 is a block of a transformer"):
        grad_cam(vit, x, y)
    with pytest.raises(ValueError, match=r"norm gives no feature map .* \(2, 2, 24\)"):
        grad_cam(vit, x, y, ["norm"])
    model = timm.create_model("resnet20_cifar")
    with pytest.raises(ValueError, match=r"no block 'layer4\.0' in this ResNet; there are layer1\.0"):
        grad_cam(model, x, y, ["layer4.0"])
    with pytest.raises(ValueError, match="blocks must be a list"):
        grad_cam(model, x, y, "layer3.0")
    with pytest.raises(ValueError, match="blocks must be a list"):
        grad_cam(model, x, y, [])
    with pytest.raises(ValueError, match="no adaptive depth"):
        grad_cam(model, x, y, skip=BASE)
    with pytest.raises(ValueError, match="skip has 2 flags"):
        grad_cam(adaptive(), x, y, skip=(True, True))
    with pytest.raises(ValueError, match="twice ran twice"):
        grad_cam(Plain(), x, y, ["twice"])
    with pytest.raises(ValueError, match="idle did not run"):
        grad_cam(Plain(), x, y, ["conv", "idle"])
    with pytest.raises(ValueError, match="gives no scores"):
        grad_cam(Plain().conv, x, y, [""])


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([1], "for each of 2 images"),
        ([[1], [2]], "for each of 2 images"),
        ([1.0, 2.0], "whole number"),
        ([True, False], "whole number"),
        ([0, -1], "classes from 0, not -1"),
        ([0, 12], "target 12 is none of the 10 classes"),
    ],
)
def test_targets_must_be_classes(targets, message):
    with pytest.raises(ValueError, match=message):
        grad_cam(timm.create_model("resnet20_cifar"), images(), targets)


def test_images_must_be_a_batch():
    with pytest.raises(ValueError, match="images must be"):
        grad_cam(timm.create_model("resnet20_cifar"), images()[0], [1])


def maps_of_three():
    model, x, y = adaptive(), images(), [3, 7]
    plain = grad_cam(subnet(model, (False,) * 3), x, y)
    return {"plain": plain, "super": grad_cam(model, x, y), "base": grad_cam(model, x, y, skip=BASE)}


def test_plot_has_a_column_for_each_block_of_each_network(tmp_path):
    maps = maps_of_three()
    pictures = [np.zeros((16, 16, 3), dtype=np.uint8), torch.rand(32, 32, 1)]
    text = plot_grad_cam(maps, pictures, tmp_path / "cam.svg").read_text()
    assert [text.count(f">{name}<") for name in ("plain", "super", "base", "image")] == [1, 1, 1, 1]
    # The third stage, whose last block the base network skips.
    assert [text.count(f">layer3.{b}<") for b in range(3)] == [3, 3, 2]
    assert "layer2" not in text
    assert text.count("<image ") == 2 + 2 * (3 + 3 + 2) + 1  # alone, with a map over it, and the bar

    chosen = plot_grad_cam(
        maps, pictures, tmp_path / "two.svg", blocks=["layer1.2", "layer2.2"]
    ).read_text()
    assert ">layer2.2<" in chosen
    assert ">base<" not in chosen  # it skips both


def test_plot_refuses_what_it_cannot_draw(tmp_path):
    maps, path = maps_of_three(), tmp_path / "cam.png"
    pictures = [np.zeros((16, 16))] * 2
    with pytest.raises(ValueError, match="suffix"):
        plot_grad_cam(maps, pictures, tmp_path / "cam.gif")
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_grad_cam({}, pictures, path)
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_grad_cam(maps, [], path)
    with pytest.raises(ValueError, match=r"1 pictures for 2 maps of layer3\.0 in plain"):
        plot_grad_cam(maps, pictures[:1], path)
    with pytest.raises(ValueError, match=r"no network has a map of 'layer9\.0'"):
        plot_grad_cam(maps, pictures, path, blocks=["layer9.0"])
    with pytest.raises(ValueError, match=r"not \(3, 16, 16\)"):
        plot_grad_cam(maps, [np.zeros((3, 16, 16))] * 2, path)
    assert not list(tmp_path.iterdir())
