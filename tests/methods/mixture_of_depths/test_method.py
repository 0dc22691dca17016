"""Conversion by Mixture-of-Depths: the start, what a block keeps, where it goes, and errors."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.layers import BlurPool2d, DropPath
from timm.models.resnet import BasicBlock
from torch import nn

import pliant
from _mod_block import DRAWN, mod_block
from pliant import AdaptiveDepth, MixtureOfDepths, convert, plan
from pliant.anatomy import RemovedBlock
from pliant.counting import count_macs, count_parameters
from pliant.methods.mixture_of_depths import MoDBlock, without_mod_blocks

# --- the start as the network without the blocks --------------------------------------


@pytest.mark.parametrize("fusion", ["first", "last", "original"])
@pytest.mark.parametrize(
    "selection",
    DRAWN,
)
def test_zero_init_last_starts_as_the_network_without_them(selection, fusion):
    torch.manual_seed(0)
    plain = timm.create_model("resnet18_cifar", channels=(16, 32, 64, 128))
    method = MixtureOfDepths(c=4, reduction=2, fusion=fusion, zero_init_last=True, selection=selection)
    assert "trained again" not in str(plan(plain, method))
    model = convert(plain, method)
    bare = convert(plain, MixtureOfDepths(selection="none"))
    x = torch.randn(4, 3, 16, 16)
    for train in (False, True):
        with torch.no_grad():
            out = model.train(train)(x)
            assert torch.equal(out, without_mod_blocks(model)(x))
            # Batch norm without momentum's memory: the same statistics, so the same output.
            assert torch.equal(out, bare.train(train)(x))
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        optimiser.zero_grad()
        nn.functional.cross_entropy(model(x), torch.arange(4)).backward()
        optimiser.step()
    for name, p in model.named_parameters():
        assert p.grad.abs().sum() > 0, f"{name} does not learn"


def test_without_zero_init_the_start_is_another():
    torch.manual_seed(0)
    model = timm.create_model("resnet18_cifar_mod", channels=(16, 32, 64, 128), c=4).eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert not torch.equal(model(x), without_mod_blocks(model)(x))


def test_zero_for_ever_is_refused():
    with pytest.raises(ValueError, match="gradient of zero for ever"):
        MixtureOfDepths(last_act=True, zero_init_last=True)
    # With an inner shortcut before the activation, everything learns from the first or second step.
    made = mod_block(16, 4, reduction=4, last_act=True, zero_init_last=True, inner_shortcut=True)
    nn.init.zeros_(made.core.bn2.weight)  # mod_block draws the norms
    nn.init.zeros_(made.core.bn2.bias)
    optimiser = torch.optim.SGD(made.parameters(), lr=0.1)
    x = torch.randn(4, 16, 5, 5, dtype=torch.double)
    for _ in range(2):
        optimiser.zero_grad()
        made(x).square().mean().backward()
        optimiser.step()
    for name, p in made.named_parameters():
        assert p.grad.abs().sum() > 0, f"{name} does not learn"


@pytest.mark.parametrize("options", [{"fusion": "replace"}, {"inner_shortcut": True}])
def test_zero_init_last_that_starts_otherwise_says_so(options):
    model = timm.create_model("resnet18_cifar", channels=(16, 32, 64, 128)).eval()
    method = MixtureOfDepths(c=4, reduction=4, zero_init_last=True, **options)
    assert "a trained network has to be trained again" in str(plan(model, method))
    made = convert(model, method)
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert not torch.equal(made(x), without_mod_blocks(made)(x))


def test_without_mod_blocks():
    model = timm.create_model("resnet20_cifar_mod")
    bare = without_mod_blocks(model)
    assert sum(isinstance(m, RemovedBlock) for m in bare.modules()) == 3
    assert not any(isinstance(m, MoDBlock) for m in bare.modules())
    assert sum(isinstance(m, MoDBlock) for m in model.modules()) == 3, "a copy is changed, not the model"
    assert bare.layer1[0].conv1.weight is not model.layer1[0].conv1.weight
    with pytest.raises(ValueError, match="ResNet has no Mixture-of-Depths block"):
        without_mod_blocks(bare)


# --- what the block keeps of the one it replaces --------------------------------------------


def test_dilation_and_padding_are_kept():
    model = timm.create_model("resnet50_mod", output_stride=8)
    dilation = {path: m.core.conv2.dilation for path, m in model.named_modules() if isinstance(m, MoDBlock)}
    assert dilation == {
        "layer1.1": (1, 1),
        "layer2.1": (1, 1),
        "layer2.3": (1, 1),
        "layer3.1": (2, 2),
        "layer3.3": (2, 2),
        "layer3.5": (2, 2),
        "layer4.1": (4, 4),
    }
    assert model.layer4[1].core.conv2.padding == (4, 4)
    with torch.no_grad():
        assert model.eval().forward_features(torch.zeros(1, 3, 64, 64)).shape == (1, 2048, 8, 8)


def test_drop_path_is_kept():
    model = timm.create_model("resnet20_cifar_mod", drop_path_rate=0.5)
    plain = timm.create_model("resnet20_cifar", drop_path_rate=0.5)
    for path in ("layer1.1", "layer3.1"):
        kept, was = model.get_submodule(path).drop_path, plain.get_submodule(path).drop_path
        assert isinstance(kept, DropPath)
        assert kept.drop_prob == was.drop_prob > 0
    made = mod_block(16, 4, drop_path=0.5).train()
    x = torch.randn(64, 16, 2, 2, dtype=torch.double)
    dropped = (made(x) == x).flatten(1).all(1)
    assert 10 < int(dropped.sum()) < 54, "whole samples are passed on untouched"
    assert not (made.eval()(x) == x).flatten(1).all(1).any()
    assert isinstance(mod_block(16, 4).drop_path, nn.Identity)


def test_eps_momentum_and_activation_are_kept():
    torch.manual_seed(0)
    stage = nn.Sequential(*(BasicBlock(16, 16, act_layer=nn.SiLU) for _ in range(2)))
    for m in stage.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.eps, m.momentum = 1e-3, 0.01
    core = convert(stage, MixtureOfDepths(c=2))[1].core
    assert isinstance(core.act1, nn.SiLU)
    assert (core.bn1.eps, core.bn1.momentum, core.bn2.eps) == (1e-3, 0.01, 1e-3)


def test_padding_mode_and_process_group_are_kept():
    stage = nn.Sequential(*(BasicBlock(16, 16) for _ in range(2)))
    stage[1].conv2 = nn.Conv2d(16, 16, 3, padding=1, padding_mode="circular", bias=False)
    stage = nn.SyncBatchNorm.convert_sync_batchnorm(stage, process_group="some of them")
    core = convert(stage, MixtureOfDepths(c=2))[1].core
    assert (core.conv1.padding_mode, core.conv2.padding_mode) == ("zeros", "circular")
    assert isinstance(core.bn1, nn.SyncBatchNorm)
    assert core.bn1.process_group == core.bn2.process_group == "some of them"


# --- options and errors ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"c": 0}, "c: give a whole number from 1, or one from 0 for each stage, not 0"),
        ({"c": -4}, "c: give a whole number from 1, or one from 0 for each stage, not -4"),
        ({"c": 2.0}, r"c: give a whole number from 1, or one from 0 for each stage, not 2\.0"),
        ({"c": True}, "c: give a whole number from 1, or one from 0 for each stage, not True"),
        ({"c": "64"}, "c: give a whole number from 1, or one from 0 for each stage, not '64'"),
        ({"c": ()}, r"c: give a whole number from 1, or one .* not \(\)"),
        ({"c": (4, -1)}, r"c: give a whole number from 1, or one .* not \(4, -1\)"),
        ({"c": (4, True)}, r"c: give a whole number from 1, or one .* not \(4, True\)"),
        ({"reduction": 0}, "reduction must be greater than or equal to 1, not 0"),
        ({"reduction": None}, "reduction must be a valid integer, not None"),
        (
            {"selection": "best"},
            "selection must be 'learned', 'random', 'fixed', 'first' or 'none', not 'best'",
        ),
        ({"order": "channel"}, "order must be 'score' or 'index', not 'channel'"),
        ({"fusion": "middle"}, "fusion must be 'first', 'last', 'original' or 'replace', not 'middle'"),
        ({"blocks": "even"}, "blocks: give 'odd', 'all' or a tuple of paths, not 'even'"),
        ({"blocks": "layer1.1"}, "blocks: give 'odd', 'all' or a tuple of paths, not 'layer1.1'"),
        ({"blocks": (1,)}, r"blocks: give 'odd', 'all' or a tuple of paths, not \(1,\)"),
        ({"blocks": None}, "blocks: give 'odd', 'all' or a tuple of paths, not None"),
        ({"stages": 1}, "stages must be a list, or none, not 1"),
        ({"stages": ("0",)}, "stages.0 must be a valid integer, not '0'"),
        ({"stages": (True,)}, "stages.0 must be a valid integer, not True"),
        ({"stages": (-1,)}, "stages.0 must be greater than or equal to 0, not -1"),
        ({"blocks": ("layer1.1",), "stages": (3,)}, r"stages=\(3,\) goes with blocks='odd' or 'all' only"),
        ({"inner_shortcut": "no"}, "inner_shortcut must be a valid boolean, not 'no'"),
        ({"last_act": 1}, "last_act must be a valid boolean, not 1"),
        ({"zero_init_last": None}, "zero_init_last must be a valid boolean, not None"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MixtureOfDepths(**options)


def test_options_are_keywords_frozen_and_comparable():
    with pytest.raises(TypeError):
        MixtureOfDepths(64)
    method = MixtureOfDepths(blocks=["layer1.1"])
    assert method == MixtureOfDepths(blocks=("layer1.1",))
    assert MixtureOfDepths(stages=[0, 1]) == MixtureOfDepths(stages=(0, 1))
    assert method.name == "MixtureOfDepths"
    with pytest.raises(AttributeError):
        method.c = 3


@pytest.mark.parametrize(
    ("network", "c", "message"),
    [
        ("resnet18", 65, r"layer1\.1: C = 64 channels with c = 65 leave k = 0"),
        ("resnet50", 65, r"layer1\.1: C = 256 channels with c = 65 leave k = 3 .* 0 inside its core"),
        ("resnet20_cifar", 17, r"layer1\.1: C = 16 channels with c = 17 leave k = 0"),
    ],
)
def test_a_c_too_large_names_block_and_values(network, c, message):
    model = timm.create_model(network)
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        convert(model, MixtureOfDepths(c=c), inplace=True)
    assert not any(isinstance(m, MoDBlock) for m in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    convert(model, MixtureOfDepths(c=c - 1))


@pytest.mark.parametrize(
    ("network", "c"), [("resnet18", 64), ("resnet50", 64), ("resnet20_cifar", 16), ("resnet50_cifar", 64)]
)
def test_default_c_is_the_width_of_the_first_block(network, c):
    model = convert(timm.create_model(network), MixtureOfDepths())
    for block in model.modules():
        if isinstance(block, MoDBlock):
            assert block.k == block.channels // c


def test_one_c_for_each_stage_and_no_block_where_it_is_zero():
    model = timm.create_model("resnet20_cifar_mod", c=[0, 8, 2])
    assert isinstance(model.layer1[1], RemovedBlock)
    assert (model.layer2[1].k, model.layer3[1].k) == (4, 32)
    found = plan(timm.create_model("resnet20_cifar"), MixtureOfDepths(c=(16, 4, 2)))
    assert [r.detail.split(", ")[2] for r in found.replacements] == ["k=1", "k=8", "k=32"]
    with pytest.raises(ValueError, match=r"c=\(4, 2\) is for 2 stages, but ResNet has 3"):
        timm.create_model("resnet20_cifar_mod", c=(4, 2))
    with pytest.raises(ValueError, match=r"layer2\.1: C = 32 channels with c = 33 leave k = 0"):
        timm.create_model("resnet20_cifar_mod", c=(1, 33, 1))


def test_one_c_for_each_stage_with_adaptive_depth_is_saved_and_loaded(tmp_path):
    both = convert(timm.create_model("resnet20_cifar"), MixtureOfDepths(c=(16, 0, 2)), AdaptiveDepth())
    pliant.save(both, tmp_path / "net")
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(pliant.load(tmp_path / "net")(x), both.eval()(x))


@pytest.mark.parametrize(
    ("options", "parameters", "macs"),
    [
        # To the network without the blocks: 172,506 parameters, 26,395,264 multiply-accumulates.
        ({}, 3094, 57984),
        ({"selection": "first"}, 406, 55296),
        ({"c": (0, 0, 2)}, 2048 + 18432 + 128, 2048 + 1179648),
    ],
    ids=str,
)
def test_what_the_blocks_cost(options, parameters, macs):
    model = timm.create_model("resnet20_cifar_mod", **options)
    assert count_parameters(model) - 172506 == parameters
    assert count_macs(model, (3, 32, 32)) - 26395264 == macs


def mod_paths(model):
    return [path for path, m in model.named_modules() if isinstance(m, (MoDBlock, RemovedBlock))]


@pytest.mark.parametrize(
    ("options", "paths"),
    [
        ({}, ["layer1.1", "layer2.1", "layer2.3", "layer3.1", "layer3.3", "layer3.5", "layer4.1"]),
        ({"stages": (1,)}, ["layer2.1", "layer2.3"]),
        ({"stages": (3, 0)}, ["layer1.1", "layer4.1"]),
        ({"blocks": "all", "stages": (2,)}, [f"layer3.{i}" for i in range(1, 6)]),
        ({"blocks": "all", "stages": (0, 3)}, ["layer1.1", "layer1.2", "layer4.1", "layer4.2"]),
        ({"blocks": ("layer2.2", "layer4.1")}, ["layer2.2", "layer4.1"]),
        # VGG-like: the first block of a stage may be named where it keeps its shape.
        ({"blocks": ("layer1.0",), "selection": "none"}, ["layer1.0"]),
    ],
)
@pytest.mark.parametrize("selection", ["learned", "none"])
def test_where(options, paths, selection):
    model = convert(timm.create_model("resnet34"), MixtureOfDepths(**{"selection": selection, **options}))
    assert mod_paths(model) == paths


def test_one_block_stages_stay():
    model = timm.create_model("resnet18_cifar", channels=(16, 32, 64, 128), layers=(1, 2, 1, 3))
    assert mod_paths(convert(model, MixtureOfDepths(c=4))) == ["layer2.1", "layer4.1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"blocks": ("layer2.0",)}, r"layer2\.0 has stride 2 and goes from 64 to 128 channels"),
        ({"blocks": ("layer1.1", "layer3.0")}, r"layer3\.0 has stride 2 and goes from 128 to 256"),
        ({"blocks": ("layer9.1",)}, r"blocks names 'layer9\.1', which is no block; blocks: layer1\.0, "),
        ({"stages": (4,)}, "stages holds 4, but ResNet has 4 stages"),
        ({"blocks": ()}, "MixtureOfDepths matches nothing in ResNet"),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_where_not(options, message, inplace):
    model = timm.create_model("resnet18")
    names = {name: type(m) for name, m in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        convert(model, MixtureOfDepths(**options), inplace=inplace)
    assert {name: type(m) for name, m in model.named_modules()} == names


def test_widening_without_stride_is_refused():
    with pytest.raises(ValueError, match=r"layer1\.0 has stride 1 and goes from 64 to 256 channels"):
        convert(timm.create_model("resnet50"), MixtureOfDepths(blocks=("layer1.0",)))


@pytest.mark.parametrize(
    ("network", "reason"),
    [
        ("resnext50_32x4d", "grouped convolutions: a core of k channels cannot keep the groups"),
        ("seresnet50", r"channel attention \(SEModule\) has no narrow form here"),
        ("resnet50_gn", "GroupNorm: a core needs batch norm"),
        ("convnext_atto", "no Mixture-of-Depths core for a convnext.ConvNeXtBlock"),
        ("vit_tiny_patch16_224", "no Mixture-of-Depths core for a vision_transformer.Block"),
        ("regnetx_002", "no Mixture-of-Depths core for a regnet.Bottleneck"),
    ],
)
def test_networks_without_a_core_are_passed_over_with_the_reason(network, reason):
    model = timm.create_model(network)  # older timm cannot build RegNet on meta
    with pytest.raises(ValueError, match=rf"(?s)matches nothing in \w+:.*: {reason}"):
        convert(model, MixtureOfDepths())


def test_anti_aliased_blocks_are_passed_over():
    # timm's networks have anti-aliasing in blocks that stride, so the others can be replaced.
    with torch.device("meta"):
        model = convert(timm.create_model("resnetblur50"), MixtureOfDepths())
    assert len(mod_paths(model)) == 7
    assert isinstance(model.layer2[0].aa, BlurPool2d)
    stage = nn.Sequential(BasicBlock(16, 16), BasicBlock(16, 16, first_dilation=2, aa_layer=BlurPool2d))
    with pytest.raises(ValueError, match=r"1: anti-aliasing \(BlurPool2d\) has no narrow form here"):
        convert(stage, MixtureOfDepths(c=4))


def test_a_mixed_network_is_covered_where_it_can_be():
    stage = nn.Sequential(*(BasicBlock(16, 16) for _ in range(4)))
    stage[1] = BasicBlock(16, 16, attn_layer="se")
    covered = plan(stage, MixtureOfDepths(c=4))
    assert [r.path for r in covered.replacements] == ["3"]
    assert {p.path: p.reason for _, p in covered.passed_over} == {
        "0": "a stage's first block stays",
        "1": "channel attention (SEModule) has no narrow form here",
        "2": "an even block stays",
    }


def test_a_block_that_is_named_is_replaced_or_refused():
    stage = nn.Sequential(*(BasicBlock(16, 16) for _ in range(4)))
    stage[1] = BasicBlock(16, 16, attn_layer="se")
    with pytest.raises(ValueError, match=r"blocks names 1, which cannot be replaced: channel attention"):
        convert(stage, MixtureOfDepths(c=4, blocks=("1", "3")))


def test_plain_module_is_refused_with_what_is_known():
    with pytest.raises(ValueError, match=r"no block of a known family \(known: .*resnet\.BasicBlock"):
        convert(nn.Sequential(nn.Conv2d(3, 8, 3)), MixtureOfDepths())


def test_no_block_means_no_parameters_and_the_input_itself():
    model = timm.create_model("resnet20_cifar_mod", selection="none")
    x = torch.randn(1, 16, 2, 2)
    assert model.layer1[1](x) is x
    assert not list(model.layer1[1].parameters())
    # c means nothing where the blocks are gone.
    convert(timm.create_model("resnet18"), MixtureOfDepths(selection="none", c=1000))


def test_a_sample_count_of_zero_passes_through():
    made = mod_block(16, 4)
    assert made(torch.zeros(0, 16, 4, 4, dtype=torch.double)).shape == (0, 16, 4, 4)


@pytest.mark.parametrize(
    ("name", "c"),
    [
        ("resnet50", 64),
        ("resnet18", 64),
        ("resnet101s", 64),
        ("hrnet_w18_small", 16),
        ("resnet20_cifar", 16),
    ],
)
def test_c_fits_every_block_unless_told(name, c):
    with torch.device("meta"):
        made = convert(timm.create_model(name), MixtureOfDepths())
    ks = [(m.channels, m.k) for m in made.modules() if isinstance(m, MoDBlock)]
    assert all(k == channels // c >= 1 for channels, k in ks)


def test_a_c_that_does_not_fit_names_one_that_does():
    with torch.device("meta"):
        model = timm.create_model("resnet101s")
    with pytest.raises(ValueError, match=r"layer1\.1: .* c = 128 .* choose a c of at most 64, or leave"):
        convert(model, MixtureOfDepths(c=128))
    convert(model, MixtureOfDepths(c=64))


def test_blocks_that_were_changed_by_hand_are_passed_over():
    with torch.device("meta"):
        model = timm.create_model("resnet50")
    model.layer1[1].conv2 = nn.Sequential(model.layer1[1].conv2)
    model.layer2[1].conv3 = nn.Sequential(model.layer2[1].conv3)
    model.layer3[1].bn1 = timm.layers.freeze_batch_norm_2d(nn.BatchNorm2d(256))
    left = {p.path: p.reason for _, p in plan(model, MixtureOfDepths(c=64)).passed_over}
    core = "a core needs"
    assert (
        left["layer1.1"] == f"conv2 is a torch.nn.modules.container.Sequential: {core} plain convolutions"
    )
    assert "resnet.Bottleneck is built as no other of its type" in left["layer2.1"]
    assert left["layer3.1"].startswith(f"FrozenBatchNorm2d: {core} batch norm that learns")
