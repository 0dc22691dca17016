"""What CondConv's conversion keeps of a network, and of other methods' conversions."""

from __future__ import annotations

import re

import pytest
import timm
import torch
from torch import nn

from _small import LATE, images, meta, mobilenet, reasons, small
from pliant import CondConv, MixtureOfDepths, convert, load, save
from pliant.anatomy import RemovedBlock, stages
from pliant.methods.condconv import CondConvBlock
from pliant.methods.condconv.layers import CondConv2d
from pliant.methods.mixture_of_depths import MoDBlock
from pliant.surgery import conversions

# --- what is kept ----------------------------------------------------------------------------------


def snapshot(model):
    return {n: (id(m), type(m), m.training) for n, m in model.named_modules()}, {
        n: (id(p), p.detach().clone()) for n, p in model.state_dict(keep_vars=True).items()
    }


@pytest.mark.parametrize("routing", ["block", "layer", "shared"])
def test_the_network_is_copied_unless_told_otherwise(routing):
    model = mobilenet(drop_rate=0.2)
    modules, tensors = snapshot(model)
    method = CondConv(experts=2, routing=routing, **LATE)
    new = convert(model, method)
    assert snapshot(model)[0] == modules
    assert all(
        i == tensors[n][0] and torch.equal(v, tensors[n][1]) for n, (i, v) in snapshot(model)[1].items()
    )
    assert model.drop_rate == 0.2
    assert not any(m._forward_hooks for m in model.modules())
    assert not {id(p) for p in new.parameters()} & {id(p) for p in model.parameters()}
    kept = model.blocks[3]
    assert convert(model, method, inplace=True) is model
    assert model.blocks[3] is kept
    assert list(model.state_dict()) == list(new.state_dict())


def test_mode_dtype_and_memory_format_are_kept():
    model = mobilenet().train()
    model.blocks[4][1].bn1.eval()  # frozen statistics
    model.blocks[4][0].eval()
    new = convert(model.to(torch.bfloat16, memory_format=torch.channels_last), CondConv(experts=2, **LATE))
    assert {m.training for m in new.blocks[4][0].modules()} == {False}
    block = new.blocks[4][1]
    assert not block.block.bn1.training
    frozen = set(block.block.bn1.modules())
    assert all(m.training for m in block.modules() if m not in frozen)
    assert new.classifier.training
    assert {p.dtype for p in new.parameters()} == {torch.bfloat16}
    assert new.conv_stem.weight.is_contiguous(memory_format=torch.channels_last)
    x = images(2).bfloat16().to(memory_format=torch.channels_last)
    assert new(x).dtype == torch.bfloat16
    features = new.forward_features(x)
    assert features.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("norms_first", [False, True])
def test_parts_that_are_kept_keep_their_own_dtype(norms_first):
    """Norms in full precision in a network of half."""
    model = mobilenet().bfloat16()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.float()
    if norms_first:  # the first parameter of a block does not tell
        block = model.blocks[4][1]
        block._modules = dict(sorted(block._modules.items(), key=lambda item: "conv" in item[0]))
        assert next(block.parameters()).dtype == torch.float32
    model.blocks[4][0].bn1.running_mean += 1e-4  # not to be had in half
    new = convert(model, CondConv(experts=2, **LATE))
    state = new.state_dict()
    for name, value in model.state_dict().items():
        name = re.sub(r"(blocks\.4\.\d)", r"\1.block", name)
        assert state[name].dtype == value.dtype, name
        if "bn" in name:
            assert torch.equal(state[name], value), name
    assert {v.dtype for n, v in state.items() if "router" in n} == {torch.bfloat16}


def test_the_device_is_kept():
    new = convert(meta("mobilenetv1_w025_cifar"), CondConv(experts=2, per_channel=True, begin=1))
    assert all(p.is_meta for p in new.parameters())
    assert new(torch.empty(3, 3, 32, 32, device="meta")).shape == (3, 10)


def test_state_dict_keys():
    """Frozen: checkpoints hold them."""
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    plain = mobilenet()
    new = convert(plain, CondConv(experts=2, begin=14, hidden=1))
    added = {n: tuple(t.shape) for n, t in new.state_dict().items() if n.startswith(("blocks.4.1", "cl"))}
    block = {f"blocks.4.1.block.bn{n}.{what}": () for n in (1, 2) for what in norm}
    assert {n: s if n.endswith(".weight") and "bn" not in n else () for n, s in added.items()} == {
        **block,
        "blocks.4.1.block.conv_dw.weight": (2, 256, 9),
        "blocks.4.1.block.conv_pw.weight": (2, 256, 256),
        "blocks.4.1.router.fc1.weight": (256, 256),
        "blocks.4.1.router.fc1.bias": (),
        "blocks.4.1.router.fc2.weight": (2, 256),
        "blocks.4.1.router.fc2.bias": (),
        "classifier.weight": (2, 10, 256),
        "classifier.bias": (),
        "classifier.router.fc1.weight": (256, 256),
        "classifier.router.fc1.bias": (),
        "classifier.router.fc2.weight": (2, 256),
        "classifier.router.fc2.bias": (),
    }
    others = [n for n in plain.state_dict() if not n.startswith(("blocks.4.1", "classifier"))]
    assert [n for n in new.state_dict() if n not in added] == others
    layer = convert(plain, CondConv(experts=2, begin=14, routing="layer")).state_dict()
    assert [n for n in layer if n.startswith("blocks.4.1.conv_dw")] == [
        "blocks.4.1.conv_dw.weight",
        "blocks.4.1.conv_dw.router.fc2.weight",
        "blocks.4.1.conv_dw.router.fc2.bias",
    ]
    single = convert(plain, CondConv(experts=2, begin=14, routing="single")).state_dict()
    assert not any(n.startswith("classifier.router") for n in single)


def test_a_converted_network_can_still_be_read():
    model = small("mobilenetv2_035")
    new = convert(model, CondConv(experts=2))
    for before, after in zip(stages(model), stages(new), strict=True):
        assert before.path == after.path
        for b, a in zip(before.blocks, after.blocks, strict=True):
            assert (a.path, a.in_channels, a.out_channels, a.stride) == (
                b.path,
                b.in_channels,
                b.out_channels,
                b.stride,
            )
    assert repr(new.blocks[5][0]).startswith("CondConvBlock(\n  channels=32, out_channels=56, stride=2")


@pytest.mark.parametrize("routing", ["block", "single"])
def test_a_network_inside_another(routing):
    class Normalise(nn.Module):
        def forward(self, x):
            return x / 2

    for name in ("resnet20_cifar", "regnetx_002"):
        plain = nn.Sequential(Normalise(), small(name)).eval()
        new = convert(plain, CondConv(experts=2, activation="softmax", routing=routing))
        assert all(site.startswith("1.") for site in conversions(new)[0].sites)
        assert conversions(new)[0].sites[-1] == ("1.fc" if "resnet" in name else "1.head.fc")
        with torch.no_grad():
            x = images()
            torch.testing.assert_close(new(x), plain(x), rtol=1e-4, atol=1e-4)


# --- with other methods -------------------------------------------------------------------------


def step(model):
    """A training step that reaches what is new; in float32 on few images."""
    x = images(8, 16)
    loss = nn.functional.cross_entropy(model.train()(x), torch.arange(8) % 5)
    loss.backward()
    assert loss.isfinite()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


@pytest.mark.parametrize("routing", ["layer", "hierarchical"])
def test_condconv_after_mixture_of_depths_takes_what_that_left(tmp_path, routing):
    method = CondConv(experts=2, routing=routing)
    model = convert(timm.create_model("resnet20_cifar"), MixtureOfDepths(reduction=4), method)
    kinds = {path: type(model.get_submodule(path)) for path in ("layer2.0", "layer2.1", "layer2.2")}
    assert kinds["layer2.1"] is MoDBlock
    assert (kinds["layer2.0"] is CondConvBlock) == (routing != "layer")
    convolutions = [m for m in model.modules() if isinstance(m, CondConv2d)]
    assert len(convolutions) == 8, "two of each of the two blocks that are left in each stage"
    assert (
        reasons(convert(timm.create_model("resnet20_cifar"), MixtureOfDepths(reduction=4)))["layer2.1"]
        == "already another method's MoDBlock"
    )
    step(model)
    again = load(save(model, tmp_path / "net"))
    x = images(2)
    with torch.no_grad():
        assert torch.equal(again(x), model.eval()(x))
    assert [c.method.name for c in conversions(again)] == ["MixtureOfDepths", "CondConv"]


def test_condconv_after_removed_blocks():
    model = convert(
        timm.create_model("resnet20_cifar", num_classes=5),
        MixtureOfDepths(selection="none"),
        CondConv(experts=2, routing="single"),
    )
    assert sum(isinstance(m, RemovedBlock) for m in model.modules()) == 3
    step(model)


def test_mixture_of_depths_after_condconv_takes_what_that_left(tmp_path):
    late = CondConv(experts=2, begin=8, routing="single")  # the last of three stages
    model = convert(timm.create_model("resnet20_cifar"), late, MixtureOfDepths(reduction=4))
    assert [path for path, m in model.named_modules() if isinstance(m, MoDBlock)] == [
        "layer1.1",
        "layer2.1",
    ]
    assert sum(isinstance(m, CondConvBlock) for m in model.modules()) == 3
    step(model)
    again = load(save(model, tmp_path / "net"))
    x = images(2)
    with torch.no_grad():
        assert torch.equal(again(x), model.eval()(x))


def test_mixture_of_depths_may_not_undo_condconv():
    per_layer = convert(timm.create_model("resnet20_cifar"), CondConv(experts=2, routing="layer"))
    with pytest.raises(
        ValueError,
        match=r"MixtureOfDepths at layer2\.1 overlaps CondConv at layer2\.1\.conv1.*apply Mixture",
    ):
        convert(per_layer, MixtureOfDepths(reduction=4))
    whole = convert(timm.create_model("resnet20_cifar"), CondConv(experts=2, begin=2))
    with pytest.raises(ValueError, match=r"(?s)matches nothing.*layer1\.1: no .* for a .*CondConvBlock"):
        convert(whole, MixtureOfDepths(reduction=4))


def test_condconv_twice_takes_what_the_first_left():
    first = CondConv(experts=2, begin=10, routing="single")
    model = convert(small("resnet20_cifar"), first, CondConv(experts=3, begin=7, routing="shared"))
    assert [c.sites for c in conversions(model)] == [
        ("layer3.2", "fc"),
        ("layer2.2", "layer3.0", "layer3.1"),
    ]
    step(model)
    with pytest.raises(ValueError, match="CondConv matches nothing"):
        convert(convert(small("resnet20_cifar"), CondConv(begin=1)), CondConv(begin=1))
