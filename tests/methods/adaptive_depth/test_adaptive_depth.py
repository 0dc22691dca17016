"""Conversion by adaptive depth: what is skipped, what is doubled, and every refusal."""

from __future__ import annotations

import copy
import pickle

import pytest
import timm
import torch
from timm.layers import DropPath
from torch import nn

from _adaptive import FAMILIES, SMALL_CONVNEXT, SMALL_VIT, adaptive, all_skips, images, plain, scramble
from pliant import AdaptiveDepth, at_depth, convert, get_depth, plan, set_depth, subnet
from pliant.anatomy import stages
from pliant.counting import count_parameters
from pliant.methods.adaptive_depth import AdaptiveBlock, Subnet, SwitchableNorm
from pliant.surgery import conversions


def meta(name, **arguments) -> nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **arguments)


def parts(model) -> list[str]:
    """For each stage, its blocks: S skippable, M mandatory, ``-`` as they were."""
    kinds = {True: "S", False: "M"}
    return [
        "".join(
            kinds[b.module.skippable] if isinstance(b.module, AdaptiveBlock) else "-" for b in stage.blocks
        )
        for stage in stages(model)
    ]


# --- at full depth nothing changes ----------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_at_full_depth_the_outputs_are_the_given_ones(family):
    model = plain(family)
    made = convert(model, AdaptiveDepth(**FAMILIES[family][2]))
    x = images()
    with torch.no_grad():
        assert torch.equal(made(x), model(x))
        model.train(), made.train()
        torch.manual_seed(0)
        given = model(x)
        torch.manual_seed(0)
        assert torch.equal(made(x), given)


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_of_mandatory_blocks_start_as_copies_and_others_are_single(family):
    model = plain(family)
    made = convert(model, AdaptiveDepth(**FAMILIES[family][2]))
    doubled = 0
    for block in (m for m in made.modules() if isinstance(m, AdaptiveBlock)):
        pairs = [m for m in block.modules() if isinstance(m, SwitchableNorm)]
        assert bool(pairs) != block.skippable
        for pair in pairs:
            assert pair.full is not pair.base
            assert type(pair.full) is type(pair.base)
            full, base = pair.full.state_dict(), pair.base.state_dict()
            assert full.keys() == base.keys()
            assert all(torch.equal(full[k], base[k]) for k in full)
            assert not {id(t) for t in pair.full.parameters()} & {id(t) for t in pair.base.parameters()}
        doubled += sum(count_parameters(pair.base) for pair in pairs)
    assert count_parameters(made) == count_parameters(model) + doubled
    assert doubled > 0


def test_which_norms_are_doubled():
    doubled = {n for n, m in adaptive("bottleneck").named_modules() if isinstance(m, SwitchableNorm)}
    # The stem's, the shortcut's and the skippable blocks' are not.
    assert doubled == {f"layer{i}.0.block.bn{j}" for i in (1, 2, 3, 4) for j in (1, 2, 3)}
    doubled = {n for n, m in adaptive("vit").named_modules() if isinstance(m, SwitchableNorm)}
    assert doubled == {f"blocks.{i}.block.norm{j}" for i in (0, 2) for j in (1, 2)}


def test_without_switchable_norms_nothing_is_added():
    model = plain("basic")
    made = scramble(convert(model, AdaptiveDepth(switchable_norms=False)), seed=1)
    assert not any(isinstance(m, SwitchableNorm) for m in made.modules())
    assert count_parameters(made) == count_parameters(model)
    x = images()
    with torch.no_grad():
        for skip in all_skips(4):
            with at_depth(made, skip):
                assert torch.equal(made(x), subnet(made, skip)(x))


# --- which blocks ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("resnet50", {}, ["MMS", "MMSS", "MMMSSS", "MMS"]),
        ("resnet18", {}, ["MS", "MS", "MS", "MS"]),
        ("resnet101", {}, ["MMS", "MMSS", "M" * 12 + "S" * 11, "MMS"]),
        ("resnet56_cifar", {}, ["MMMMMSSSS"] * 3),
        ("resnet50", {"skippable": (0, 3, 0, 1)}, ["---", "MSSS", "------", "MMS"]),
        ("resnet50", {"skippable": [0, 0, 5, 0]}, ["---", "----", "MSSSSS", "---"]),
        ("mobilenetv2_100", {}, ["-", "MS", "MMS", "MMSS", "MMS", "MMS", "-"]),
        ("vit_tiny_patch16_224", {}, ["MMSMMSMMSMMS"]),
        ("vit_tiny_patch16_224", {"groups": 2}, ["MMMSSSMMMSSS"]),
        ("vit_tiny_patch16_224", {"skippable": (0, 2, 1, 0)}, ["---MSSMMS---"]),
        ("convnext_atto", {}, ["MS", "MS", "MMMSSS", "MS"]),
        ("regnetx_002", {}, ["-", "-", "MMSS", "MMMMSSS"]),
        ("efficientnet_b0", {}, ["-", "MS", "MS", "MMS", "MMS", "MMSS", "-"]),
    ],
)
def test_partition(name, options, expected):
    # An older timm cannot build RegNets without memory.
    given = timm.create_model(name) if name.startswith("regnet") else meta(name)
    model = convert(given, AdaptiveDepth(**options))
    assert parts(model) == expected
    flags = len(get_depth(model))
    blocks = [m for m in model.modules() if isinstance(m, AdaptiveBlock)]
    assert sorted({b.flag for b in blocks}) == list(range(flags))
    assert [b.flag for b in blocks] == sorted(b.flag for b in blocks)


def test_mobilenetv2_by_name_has_four_flags():
    assert parts(meta("mobilenetv2_adn")) == ["-", "--", "MMS", "MMMS", "MMS", "MMS", "-"]


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("resnet18_adn", 4),
        ("resnet34_adn", 4),
        ("resnet50_adn", 4),
        ("resnet101_adn", 4),
        ("resnet20_cifar_adn", 3),
        ("resnet56_cifar_adn", 3),
        ("resnet50_cifar_adn", 4),
        ("mobilenetv2_adn", 4),
        ("vit_base_patch32_adn", 4),
        ("vit_tiny_patch16_adn", 4),
    ],
)
def test_named_networks(name, flags):
    model = meta(name, num_classes=7, in_chans=1).eval()
    assert get_depth(model) == (False,) * flags
    (done,) = conversions(model)
    assert done.named
    side = 32 if "cifar" in name else 224
    with at_depth(model, (True,) * flags):
        assert model(torch.empty(2, 1, side, side, device="meta")).shape == (2, 7)


def test_options_are_keywords_of_create_model():
    model = meta("resnet50_adn", skippable=(0, 1, 2, 1), switchable_norms=False)
    assert parts(model) == ["---", "MMMS", "MMMMSS", "MMS"]
    assert not any(isinstance(m, SwitchableNorm) for m in model.modules())
    assert get_depth(meta("vit_tiny_patch16_adn", groups=3)) == (False,) * 3


@pytest.mark.parametrize("name", ["resnet18_adn", "mobilenetv2_adn", "vit_tiny_patch16_adn"])
def test_features_switch_too(name):
    options = {"img_size": 32} if name.startswith("vit") else {}
    model = scramble(timm.create_model(name, features_only=True, in_chans=1, **options)).eval()
    x = images(size=32)[:, :1]
    with torch.no_grad():
        whole = model(x)
        with at_depth(model, (True,) * 4):
            base = model(x)
    assert [f.shape for f in base] == [f.shape for f in whole]
    assert [f.shape[1] for f in whole] == model.feature_info.channels()
    assert [32 // f.shape[2] for f in whole] == model.feature_info.reduction()
    stem = 0 if name.startswith("vit") else 1 + name.startswith("mobilenet")
    assert all(torch.equal(a, b) for a, b in zip(whole[:stem], base[:stem], strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(whole[stem:], base[stem:], strict=True))


@pytest.mark.parametrize("name", ["resnet50_adn", "mobilenetv2_adn"])
def test_output_stride(name):
    model = meta(name, output_stride=8).eval()
    x = torch.empty(1, 3, 64, 64, device="meta")
    assert model.forward_features(x).shape[2:] == (8, 8)
    with at_depth(model, (True,) * 4):
        assert model.forward_features(x).shape[2:] == (8, 8)


def test_the_plan_says_what_is_passed_over_and_how_many_depths():
    found = plan(meta("mobilenetv2_100"), AdaptiveDepth())
    assert [(p.path, p.reason) for _, p in found.passed_over] == [
        ("blocks.0.0", "stage 0 has nothing to skip"),
        ("blocks.6.0", "stage 6 has nothing to skip"),
    ]
    assert "blocks.1.0: InvertedResidual -> AdaptiveBlock (flag=0, part=mandatory, norms=3)" in str(found)
    assert "blocks.1.1: InvertedResidual -> AdaptiveBlock (flag=0, part=skippable)" in str(found)
    assert "note: 5 flags: 32 depths; train it so that all work (the base network is new)" in str(found)
    assert found.macs is not None
    assert found.macs[0] == found.macs[1]


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"skippable": 2}, "skippable must be a list, or none, not 2"),
        ({"skippable": (1, -1)}, "skippable.1 must be greater than or equal to 0, not -1"),
        ({"skippable": (1, True)}, "skippable.1 must be a valid integer, not True"),
        ({"skippable": (1.0,)}, "skippable.0 must be a valid integer, not 1.0"),
        ({"skippable": (0, 0)}, r"skippable=\(0, 0\) lets no stage skip a block"),
        ({"skippable": ()}, r"skippable=\(\) lets no stage skip a block"),
        ({"groups": 0}, "groups must be greater than or equal to 1, or none, not 0"),
        ({"groups": True}, "groups must be a valid integer, or none, not True"),
        ({"switchable_norms": 1}, "switchable_norms must be a valid boolean, not 1"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveDepth(**options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "resnet50",
            {"skippable": (1, 2, 3)},
            r"skippable=\(1, 2, 3\) is for 3 stages; ResNet has 4: 3 4 6 3 blocks",
        ),
        (
            "resnet50",
            {"skippable": (1, 2, 3, 3)},
            "stage 3 has 3 blocks and cannot skip 3: its first block stays",
        ),
        (
            "resnet50",
            {"skippable": (0, 9, 0, 0)},
            "stage 1 has 4 blocks and cannot skip 9: its first block stays",
        ),
        (
            "mobilenetv2_100",
            {"skippable": (1, 0, 0, 0, 0, 0, 0)},
            "stage 0 has 1 blocks and cannot skip 1: its first block stays",
        ),
        (
            "vit_tiny_patch16_224",
            {"groups": 5},
            "12 blocks of blocks make no 5 equal groups",
        ),
        (
            "vit_tiny_patch16_224",
            {"groups": 12},
            "(?s)AdaptiveDepth matches nothing in VisionTransformer.*stage 0 has nothing to skip",
        ),
        # No block of MobileNetV1 adds its input to its output.
        (
            "mobilenetv1_100",
            {},
            "(?s)AdaptiveDepth matches nothing in EfficientNet.*blocks.0.0: stage 0 has nothing to skip",
        ),
        (
            "mobilenetv1_100",
            {"skippable": (0, 0, 0, 1, 0)},
            r"blocks.3.5 cannot be skipped: it does not add its input to its output \(512 to 512 channels",
        ),
        ("vgg11", {}, r"(?s)matches nothing in VGG:.*vgg\.ConvMlp is no block of a known family"),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_networks_that_do_not_fit_are_refused_and_left_alone(name, options, message, inplace):
    model = meta(name)
    before = [(path, id(m)) for path, m in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        convert(model, AdaptiveDepth(**options), inplace=inplace)
    assert [(path, id(m)) for path, m in model.named_modules()] == before


def test_twice_is_refused():
    with pytest.raises(ValueError, match=r"AdaptiveDepth at layer1\.0 overlaps AdaptiveDepth at layer1\.0"):
        convert(meta("resnet18_adn"), AdaptiveDepth())


# --- kinds of networks ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "float64"])
def test_dtype_is_kept_at_both_depths(kind):
    model = plain("basic").to(getattr(torch, kind))
    made = convert(model, AdaptiveDepth())
    assert {p.dtype for p in made.parameters()} == {getattr(torch, kind)}
    x = images().to(getattr(torch, kind))
    with torch.no_grad():
        assert torch.equal(made(x), model(x))
        with at_depth(made, (True,) * 4):
            assert made(x).dtype == x.dtype


def test_channels_last_is_kept():
    model = plain("bottleneck").to(memory_format=torch.channels_last)
    made = convert(model, AdaptiveDepth())
    x = images().to(memory_format=torch.channels_last)
    kernels = [p for p in made.parameters() if p.dim() == 4]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)
    with torch.no_grad():
        assert torch.equal(made(x), model(x))
    before = [p.stride() for p in made.parameters()]
    cut = subnet(made, (True,) * 4)
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in cut.parameters() if p.dim() == 4)
    assert [p.stride() for p in made.parameters()] == before


def test_of_a_frozen_network_the_second_norms_learn():
    made = convert(plain("option A").requires_grad_(False), AdaptiveDepth())
    learning = {n for n, p in made.named_parameters() if p.requires_grad}
    assert learning == {n for n, _ in made.named_parameters() if ".base." in n}
    assert learning


def test_mode_is_kept():
    model = plain("option A").train()
    model.layer1.eval()
    made = convert(model, AdaptiveDepth())
    assert made.layer2.training
    for stage, training in (("layer1", False), ("layer2", True)):
        pairs = [m for m in made.get_submodule(stage).modules() if isinstance(m, SwitchableNorm)]
        assert {(m.full.training, m.base.training) for m in pairs} == {(training, training)}


@pytest.mark.parametrize("again", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_switch_for_themselves(again):
    model = adaptive()
    other = again(model)
    set_depth(model, (True, True, True))
    set_depth(other, (False, True, False))
    x = images()
    assert (get_depth(model), get_depth(other)) == ((True, True, True), (False, True, False))
    with torch.no_grad():
        assert torch.equal(other(x), subnet(model, (False, True, False))(x))
    assert not {id(p) for p in model.parameters()} & {id(p) for p in other.parameters()}


def test_a_copy_keeps_the_default():
    model = adaptive()
    set_depth(model, (True, False, True))
    assert get_depth(copy.deepcopy(model)) == get_depth(pickle.loads(pickle.dumps(model)))
    assert get_depth(copy.deepcopy(model)) == (True, False, True)
    fresh = adaptive()
    fresh.load_state_dict(model.state_dict())
    assert get_depth(fresh) == (True, False, True)
    other = convert(timm.create_model("resnet18_cifar"), AdaptiveDepth())
    with pytest.raises(ValueError, match="skip has 3 flags"):
        other.layer1[0].depth.set_extra_state([True, False, True])


def test_drop_path_is_kept():
    model = timm.create_model("convnext_atto", **SMALL_CONVNEXT, drop_path_rate=0.5)
    made = convert(model, AdaptiveDepth())
    rates = [m.drop_prob for m in model.modules() if isinstance(m, DropPath)]
    assert len(set(rates)) == 7
    assert [m.drop_prob for m in made.modules() if isinstance(m, DropPath)] == rates


def test_gradients_reach_what_runs_and_nothing_else():
    model = adaptive().train()
    with at_depth(model, (True, False, True)):
        model(images(4)).square().mean().backward()
    without = {n for n, p in model.named_parameters() if p.grad is None}
    skipped = [(1, 2), (3, 2)]
    expected = {n for n, _ in model.named_parameters() if n.startswith("layer2") and ".base." in n}
    expected |= {n for n, _ in model.named_parameters() if n[:6] in ("layer1", "layer3") and ".full." in n}
    for stage, block in skipped:
        expected |= {n for n, _ in model.named_parameters() if n.startswith(f"layer{stage}.{block}.")}
    assert without == expected


def test_running_statistics_are_of_their_own_depth():
    model = adaptive().train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    with at_depth(model, (True, True, True)):
        model(images(4))
    moved = {n for n, b in model.named_buffers() if not torch.equal(b, before[n])}
    assert not any(".full." in n for n in moved)
    assert any(".base." in n for n in moved)
    assert {"bn1.running_mean", "bn1.num_batches_tracked"} <= moved


# --- subnet as a method ---------------------------------------------------------------------------


def test_subnet_is_a_method():
    model = timm.create_model("vit_tiny_patch16_224", **SMALL_VIT)
    made = convert(model, AdaptiveDepth(groups=2), Subnet(skip=[True, False]))
    assert [type(block).__name__ for block in made.blocks] == ["Block", "RemovedBlock", "Block", "Block"]
    x = images()
    model.blocks[1] = nn.Identity()
    with torch.no_grad():
        assert torch.equal(made.eval()(x), model.eval()(x))


@pytest.mark.parametrize(
    ("skip", "message"),
    [
        (True, "skip is True; give one flag for each stage that can skip, such as 'TTFF'"),
        ((1, 0), r"skip is \(1, 0\); give one flag"),
    ],
)
def test_subnet_needs_flags(skip, message):
    with pytest.raises(ValueError, match=message):
        Subnet(skip=skip)


def test_subnet_needs_an_adaptive_network():
    with pytest.raises(ValueError, match=r"has no adaptive depth: convert it by AdaptiveDepth\(\) first"):
        convert(meta("resnet18"), Subnet(skip=(True,) * 4))
    with pytest.raises(ValueError, match=r"skip has 3 flags, .*; this network has 4"):
        convert(meta("resnet18_adn"), Subnet(skip=(True,) * 3))


# --- what a block takes, frozen norms, groups -----------------------------------------------------


def test_what_a_transformers_block_takes_goes_through():
    model = scramble(timm.create_model("vit_tiny_patch16_224", **SMALL_VIT)).eval()
    made = scramble(convert(model, AdaptiveDepth()), seed=1)
    mask = torch.zeros(1, 1, 5, 5)  # a class token and four patches
    mask[..., 3] = float("-inf")
    with torch.no_grad():
        for skip in ("FF", "TF", "TT"):
            with at_depth(made, skip):
                masked, all_tokens = made(images(), attn_mask=mask), made(images())
            assert not torch.equal(masked, all_tokens)
            assert torch.equal(subnet(made, skip)(images(), attn_mask=mask), masked)


@pytest.mark.parametrize("name", timm.list_models("naflexvit_base_patch16_gap"))
def test_blocks_that_are_called_with_options(name):
    made = convert(meta(name, num_classes=3), AdaptiveDepth()).eval()
    for skip in ("FFFF", "TTTT"):
        with at_depth(made, skip):
            assert made(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 3)


@pytest.mark.parametrize("family", ["basic", "mobilenetv2"])
def test_frozen_norms_are_doubled_and_their_second_form_learns(family):
    model = plain(family)
    timm.utils.freeze(model)
    given = model(images())
    made = convert(model, AdaptiveDepth())
    pairs = [m for m in made.modules() if isinstance(m, SwitchableNorm)]
    assert pairs
    for pair in pairs:
        assert "Frozen" in type(pair.full).__name__
        assert isinstance(pair.base, nn.BatchNorm2d)
        assert all(torch.equal(pair.base.state_dict()[k], v) for k, v in pair.full.state_dict().items())
    assert torch.equal(made(images()), given)
    flags = len(get_depth(made))
    with at_depth(made, "T" * flags):
        torch.testing.assert_close(made(images()), subnet(made, "T" * flags)(images()))
        made.train()(images(4)).sum().backward()
    assert {n for n, p in made.named_parameters() if p.grad is not None} >= {
        n for n, p in made.named_parameters() if ".base." in n
    }
    assert AdaptiveDepth().take_plain(made, lambda network: "")


def test_norms_that_cannot_be_switched_are_noted():
    model = timm.create_model("resnet18", norm_layer=timm.layers.FilterResponseNormTlu2d)
    (note,) = [n for n in plan(model, AdaptiveDepth()).notes if "norms" in n]
    assert note == (
        "both depths share 8 norms of a kind that cannot be switched, layer1.0.bn1 to layer4.0.bn2: "
        "timm's filter_response_norm.FilterResponseNormTlu2d"
    )
    assert not any("norms" in n for n in plan(meta("resnet18"), AdaptiveDepth()).notes)


@pytest.mark.parametrize(
    ("name", "kwargs", "expected"),
    [
        ("pit_ti_224", {}, ["MS", "MSMSMS", "MSMS"]),
        ("mobilevit_xxs", {}, ["MS", "MSMS", "MMS"]),
        ("vit_tiny_patch16_224", {"depth": 14}, ["MMMMSSSMMMMSSS"]),
        ("vit_tiny_patch16_224", {"depth": 8}, ["MSMSMSMS"]),
        ("vit_tiny_patch16_224", {"depth": 7}, ["MMMMSSS"]),
    ],
)
def test_groups_fit_each_run_of_blocks_unless_told(name, kwargs, expected):
    assert [s for s in parts(convert(meta(name, **kwargs), AdaptiveDepth())) if s.strip("-")] == expected


def test_groups_that_do_not_fit_name_those_that_do():
    message = "2 blocks of transformers.0.blocks make no 4 equal groups; take groups=1 or 2, or leave"
    with pytest.raises(ValueError, match=message):
        convert(meta("pit_ti_224"), AdaptiveDepth(groups=4))
