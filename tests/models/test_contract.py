"""Every registered network keeps every promise.

Each network is built, runs and has its parts where they belong, without weights (on the meta
device). Further promises are checked for the smallest networks of each method and family, and
for all of them in `make test-all`.
"""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import timm
import torch
from torch import nn

from _adaptive import dynamo_reads_contexts
from _small import meta
from pliant.anatomy import stages
from pliant.methods.adaptive_depth.depth import at_depth, get_depth
from pliant.methods.condconv import CondConvBlock
from pliant.methods.condconv.layers import CondConv2d, CondLinear
from pliant.methods.mixture_of_depths import MoDBlock
from pliant.models import list_networks
from pliant.models._build import register
from pliant.models.cifar import CIFAR_RESNETS
from pliant.surgery import conversions

NETWORKS = list_networks()
CIFAR = [name for name in NETWORKS if "_cifar" in name]
VIT = [name for name in NETWORKS if name.startswith("vit_")]
CNNS = [name for name in NETWORKS if name not in VIT]
IMAGENET = [name for name in CNNS if "_cifar" not in name]
MOBILE = [name for name in NETWORKS if "mobilenet" in name]
CONDITIONAL = [name for name in NETWORKS if name.startswith("cc_")]
NARROW = {"channels": (8, 16, 24, 32)}

# One for each method and family of blocks, and what makes it small. A selector's hidden
# layer of C // 16 can be dead for a whole batch where C is small: here it is wider.
SMALLEST = {
    "resnet20_cifar": {},
    "resnet20_cifar_mod": {"reduction": 2},
    "resnet18_cifar": NARROW,
    "resnet18_cifar_mod": {**NARROW, "c": 2, "reduction": 2},
    "resnet50_cifar_mod": {**NARROW, "c": 2, "reduction": 2},
    "resnet18_mod": {},
    "mobilenetv1_w025_cifar": {},
    "cc_mobilenetv1_025_cifar": {"experts": 2, "begin": 13},
    "cc_resnet20_cifar": {"experts": 2},
    "resnet20_cifar_adn": {},
}
SMALL = {*SMALLEST, "mobilenetv1_w025", "cc_mobilenetv1_025", "cc_mobilenetv2_050"}
SMALL |= {"resnet18_adn", "vit_tiny_patch16_adn", "resnet20_cifar_mod_cc"}
WIDER = {"reduction": 2}
FEW = {"experts": 2}
CIFAR_MOD = [name for name in CIFAR if name.endswith("_mod")]
OPTIONS = {
    name: SMALLEST.get(name, WIDER if name in CIFAR_MOD else FEW if name in CONDITIONAL else {})
    for name in NETWORKS
}
COSTLY = [
    pytest.param(name, options, marks=() if name in SMALLEST else pytest.mark.slow, id=name)
    for name, options in OPTIONS.items()
]
METHODS = ("resnet20_cifar_mod", "cc_resnet20_cifar", "resnet20_cifar_adn")
COMPILED = [pytest.param(name, marks=() if name in METHODS else pytest.mark.slow) for name in NETWORKS]


def small_ones(names):
    return [pytest.param(name, marks=() if name in SMALL else pytest.mark.slow) for name in names]


def images(name, batch=2, channels=3, size=None):
    size = size or (32 if name in CIFAR else 224 if name in VIT else 64)
    return torch.empty(batch, channels, size, size, device="meta")


def real(name, kwargs) -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(0)
    model = timm.create_model(name, **kwargs)
    size = 16 if name in CIFAR else 224 if name in VIT else 64
    return model, torch.randn(4, 3, size, size)


# --- names -------------------------------------------------------------------------------------


def test_the_networks_that_are_promised():
    promised = {f"resnet{n}_mod" for n in (18, 26, 34, 42, 50, 75, 86, 101, 152)}
    for n in (18, 34, 50, 20, 56):
        promised |= {f"resnet{n}_cifar", f"resnet{n}_cifar_mod", f"cc_resnet{n}_cifar"}
    for width in ("025", "050", "075", "100"):
        promised |= {f"mobilenetv1_w{width}", f"mobilenetv1_w{width}_cifar"}
        promised |= {f"cc_mobilenetv1_{width}", f"cc_mobilenetv1_{width}_cifar"}
    promised |= {"cc_mobilenetv2_050", "cc_mobilenetv2_100", "cc_resnet50"}
    promised |= {f"resnet{n}_adn" for n in (18, 34, 50, 101)}
    promised |= {f"resnet{n}_cifar_adn" for n in (18, 20, 50, 56)}
    promised |= {f"resnet20_cifar_{pair}" for pair in ("mod_adn", "cc_adn", "mod_cc")}
    promised |= {"mobilenetv2_adn", "vit_base_patch32_adn", "vit_tiny_patch16_adn"}
    assert set(NETWORKS) == promised
    assert sorted(NETWORKS) == NETWORKS


@pytest.mark.parametrize("name", NETWORKS)
def test_timm_knows_it(name):
    assert name in timm.list_models()
    assert name not in timm.list_models(pretrained=True)
    assert timm.get_pretrained_cfg(name).architecture == name
    model, classes = meta(name), 10 if name in CIFAR else 1000
    assert model.pretrained_cfg["input_size"] == ((3, 32, 32) if name in CIFAR else (3, 224, 224))
    assert model.pretrained_cfg["num_classes"] == model.num_classes == classes
    assert model.get_classifier().weight.shape[-2] == classes


@pytest.mark.parametrize("taken", ["resnet26", "mobilenetv1_100", "resnet50_mod"])
def test_a_taken_name_is_refused(taken):
    before = timm.model_entrypoint(taken)
    with pytest.raises(ValueError, match=f"timm already has a model named '{taken}'; choose another name"):
        register("pliant.methods.mixture_of_depths.networks", taken, CIFAR_RESNETS["resnet18_cifar"])
    assert timm.model_entrypoint(taken) is before


@pytest.mark.parametrize("name", small_ones(NETWORKS))
def test_pretrained_is_a_clear_error(name):
    with torch.device("meta"), pytest.raises(RuntimeError, match=f"No pretrained weights exist for {name}"):
        timm.create_model(name, pretrained=True)


# --- shapes, without weights -------------------------------------------------------------------


@pytest.mark.parametrize("name", small_ones(NETWORKS))
def test_forward_with_other_channels_and_classes(name):
    model = meta(name, in_chans=1, num_classes=7).eval()
    x = images(name, channels=1)
    assert model(x).shape == (2, 7)
    assert model.num_classes == 7
    assert model.forward_head(model.forward_features(x), pre_logits=True).shape == (2, model.num_features)


@pytest.mark.parametrize("name", small_ones(NETWORKS))
def test_reset_classifier(name):
    model = meta(name).eval()
    with torch.device("meta"):
        model.reset_classifier(3)
        assert model(images(name)).shape == (2, 3)
        model.reset_classifier(0)
        assert model(images(name)).shape == (2, model.num_features)
        model.reset_classifier(0, "")
        assert model(images(name)).dim() == (3 if name in VIT else 4)  # a transformer has tokens


@pytest.mark.parametrize("name", small_ones(NETWORKS))
def test_a_network_without_head(name):
    assert meta(name, num_classes=0).eval()(images(name)).dim() == 2


@pytest.mark.parametrize("name", small_ones(CNNS))
def test_features(name):
    model = meta(name, features_only=True, in_chans=5).eval()
    x = images(name, channels=5)
    features = model(x)
    channels, reduction = model.feature_info.channels(), model.feature_info.reduction()
    # timm's EfficientNet gives one for each resolution, its ResNet the stem's and one a stage.
    levels = 5 if name in MOBILE else len(stages(meta(name))) + 1
    assert len(features) == len(channels) == levels
    for f, c, r in zip(features, channels, reduction, strict=True):
        assert f.shape == (2, c, x.shape[2] // r, x.shape[3] // r)
    assert reduction[0] == (1 if name in CIFAR else 2)


@pytest.mark.parametrize("name", small_ones(CNNS))
def test_chosen_features(name):
    model = meta(name, features_only=True, out_indices=(1, 3)).eval()
    assert model.feature_info.out_indices == (1, 3) or list(model.feature_info.out_indices) == [1, 3]
    whole = meta(name, features_only=True).eval()(images(name))
    assert [f.shape for f in model(images(name))] == [whole[1].shape, whole[3].shape]


@pytest.mark.parametrize("name", VIT)
def test_features_of_a_transformer_are_those_of_its_groups(name):
    model = meta(name, features_only=True, in_chans=5).eval()
    assert list(model.feature_info.out_indices) == [2, 5, 8, 11]
    (patch,) = set(model.feature_info.reduction())
    for f, c in zip(model(images(name, channels=5)), model.feature_info.channels(), strict=True):
        assert f.shape == (2, c, 224 // patch, 224 // patch)


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("name", small_ones(IMAGENET))
def test_output_stride(name, stride):
    model = meta(name, output_stride=stride).eval()
    assert model.forward_features(images(name, size=128)).shape[2:] == (128 // stride, 128 // stride)
    features = meta(name, features_only=True, output_stride=stride).eval()
    assert features.feature_info.reduction()[-1] == stride
    assert features(images(name, size=128))[-1].shape[2] == 128 // stride


@pytest.mark.parametrize("stride", [2, 4, 8, 16])
@pytest.mark.parametrize("name", small_ones(CIFAR))
def test_output_stride_behind_a_3x3_stem(name, stride):
    if stride == 16 and name not in MOBILE:
        with pytest.raises(ValueError, match="output_stride must be 2, 4 or 8 behind a 3x3 stem, not 16"):
            meta(name, output_stride=stride)
        return
    features = meta(name, features_only=True, output_stride=stride).eval()
    last = min(stride, 4) if "resnet20" in name or "resnet56" in name else stride
    assert features.feature_info.reduction()[-1] == last
    assert features(images(name))[-1].shape[2] == 32 // last


def test_other_output_strides_are_refused_behind_a_3x3_stem():
    with pytest.raises(ValueError, match="output_stride must be one of 2, 4, 8, 16; not 32"):
        timm.create_model("mobilenetv1_w025_cifar", output_stride=32)
    with pytest.raises(ValueError, match="output_stride must be one of 2, 4, 8, 16, 32; not 3"):
        timm.create_model("mobilenetv1_w025", output_stride=3)


@pytest.mark.parametrize("name", small_ones(CIFAR))
def test_a_headless_cifar_network_is_built_where_it_is_asked_for(name):
    assert all(p.is_meta for p in meta(name, num_classes=0).parameters())


def test_networks_of_others_are_not_listed(monkeypatch):
    from timm.models import _registry

    ours = _registry._module_to_models["cifar"]
    monkeypatch.setitem(_registry._module_to_models, "cifar", {*ours, "resnet18"})
    assert list_networks() == NETWORKS


@pytest.mark.parametrize("name", [name for name in NETWORKS if name.endswith("_mod")])
def test_mod_networks_are_their_plain_ones_with_blocks_replaced(name):
    model = meta(name)
    (done,) = conversions(model)
    assert done.named
    odd = [b.path for stage in stages(model) for i, b in enumerate(stage.blocks) if i % 2]
    assert list(done.sites) == odd
    first = 16 if name in ("resnet20_cifar_mod", "resnet56_cifar_mod") else 64
    for path in odd:
        block = model.get_submodule(path)
        assert isinstance(block, MoDBlock)
        assert block.k == block.channels // first
    bare = meta(name, selection="none")
    assert not any(isinstance(m, MoDBlock) for m in bare.modules())
    assert list(conversions(bare)[0].sites) == odd


FROM = {  # the first unit that is conditional: the stem is 1 and the classifier the last
    "cc_mobilenetv1": 7,
    "cc_mobilenetv2": 8,
    "cc_resnet18_cifar": 6,
    "cc_resnet20_cifar": 5,
    "cc_resnet34_cifar": 9,
    "cc_resnet50_cifar": 9,
    "cc_resnet56_cifar": 11,
    "cc_resnet50": 15,
}


@pytest.mark.parametrize("name", CONDITIONAL)
def test_conditional_networks_are_their_plain_ones_with_the_last_units_replaced(name):
    begin = next(number for start, number in FROM.items() if name.startswith(start))
    model = meta(name, experts=3)
    (done,) = conversions(model)
    assert done.named
    assert done.method.upcycle is False
    blocks = [b.path for stage in stages(model) for b in stage.blocks]
    for number, path in enumerate(blocks, 2):
        inside = [m for m in model.get_submodule(path).modules() if isinstance(m, CondConv2d)]
        assert bool(inside) == (number >= begin), path
        assert all(m.weight.shape[0] == 3 for m in inside)
        assert isinstance(model.get_submodule(path), CondConvBlock) == (number >= begin), path
    assert isinstance(model.get_classifier(), CondLinear)
    assert not any(isinstance(m, CondConv2d) and m.bias is not None for m in model.modules())
    assert isinstance(getattr(model, "conv_head", None), CondConv2d) == ("mobilenetv2" in name)
    last = meta(name, begin=len(blocks) + 2 + ("mobilenetv2" in name))
    assert [isinstance(m, (CondConv2d, CondLinear)) for m in last.modules()].count(True) == 1


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("cc_mobilenetv1_025", [1, 2, 2, 6, 2]),
        ("mobilenetv1_w075_cifar", [1, 2, 2, 6, 2]),
        ("cc_mobilenetv2_050", [1, 2, 3, 4, 3, 3, 1]),
        ("cc_resnet50", [3, 4, 6, 3]),
        ("resnet18_mod", [2, 2, 2, 2]),
        ("resnet26_mod", [2, 2, 3, 4]),
        ("resnet34_mod", [3, 4, 6, 3]),
        ("resnet42_mod", [3, 3, 6, 6]),
        ("resnet50_mod", [3, 4, 6, 3]),
        ("resnet75_mod", [3, 4, 14, 3]),
        ("resnet86_mod", [3, 4, 18, 3]),
        ("resnet101_mod", [3, 4, 23, 3]),
        ("resnet152_mod", [3, 8, 36, 3]),
        ("resnet20_cifar", [3, 3, 3]),
        ("resnet56_cifar_mod", [9, 9, 9]),
        ("resnet34_cifar", [3, 4, 6, 3]),
    ],
)
def test_layers(name, layers):
    assert [len(stage.blocks) for stage in stages(meta(name))] == layers


def test_every_option_of_the_method_is_a_keyword():
    model = meta("resnet50_mod", c=16, order="index", fusion="original", stages=(1,), inner_shortcut=True)
    (done,) = conversions(model)
    assert done.sites == ("layer2.1", "layer2.3")
    assert (done.method.c, done.method.order, done.method.fusion) == (16, "index", "original")
    with pytest.raises(ValueError, match="order must be 'score' or 'index'"):
        meta("resnet50_mod", order="random")
    with pytest.raises(TypeError):
        meta("resnet50_mod", not_an_option=1)
    (done,) = conversions(meta("cc_mobilenetv1_025", experts=4, begin=15, routing="shared", drop_rate=0.2))
    assert done.sites == ("classifier",)
    assert (done.method.experts, done.method.routing) == (4, "shared")
    with pytest.raises(ValueError, match="experts must be a whole number from 1 to 64, not 65"):
        meta("cc_resnet20_cifar", experts=65)


def test_other_keywords_of_timm_reach_the_network():
    model = meta("resnet18_mod", drop_path_rate=0.1, stem_type="deep", stem_width=32)
    assert isinstance(model.conv1, nn.Sequential)
    assert model.layer4[1].drop_path.drop_prob == pytest.approx(0.1)


# --- the CIFAR networks --------------------------------------------------------------------------


@pytest.mark.parametrize("name", small_ones(CIFAR))
def test_cifar_stem(name):
    model = meta(name)
    stem = model.conv_stem if name in MOBILE else model.conv1
    assert (stem.kernel_size, stem.stride, stem.bias) == ((3, 3), (1, 1), None)
    if name not in MOBILE:
        assert isinstance(model.maxpool, nn.Identity)
    last = 8 if "resnet20" in name or "resnet56" in name else 2 if name in MOBILE else 4
    assert model.forward_features(images(name)).shape[2] == last


@pytest.mark.parametrize(
    ("channels", "message"),
    [
        ((16, 32), r"channels must name three or four stages, not \(16, 32\)"),
        ((15, 32, 64), r"the stem's width, channels\[0\] = 15, must be even"),
    ],
)
def test_cifar_widths_are_checked(channels, message):
    with pytest.raises(ValueError, match=message):
        timm.create_model("resnet18_cifar", channels=channels)


def test_option_a_shortcut_is_that_of_he():
    model = timm.create_model("resnet20_cifar")
    x = torch.randn(2, 16, 7, 7)
    out = model.layer2[0].downsample(x)
    assert out.shape == (2, 32, 4, 4)
    assert torch.equal(out[:, 8:24], x[:, :, ::2, ::2])
    assert not out[:, :8].any()
    assert not out[:, 24:].any()
    # 6n + 2 layers, 0.27 M and 0.85 M parameters (He et al. 2016, table 6).
    assert sum(p.numel() for p in model.parameters()) == 269_722
    assert sum(p.numel() for p in timm.create_model("resnet56_cifar").parameters()) == 853_018


# --- trained networks of others -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file", "right"),
    [
        ("resnet20_cifar", "resnet20-12fca82f.th", 915),
        pytest.param("resnet56_cifar", "resnet56-4bfd9763.th", 926, marks=pytest.mark.slow),
    ],
)
def test_trained_networks_load_and_score_on_1000_images(trained, cifar10, correct, name, file, right):
    assert correct(trained(name, file), cifar10, 1000) == right


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "file", "right"),
    [("resnet20_cifar", "resnet20-12fca82f.th", 9173), ("resnet56_cifar", "resnet56-4bfd9763.th", 9339)],
)
def test_trained_networks_score_what_their_readme_says(trained, cifar10, correct, name, file, right):
    assert correct(trained(name, file), cifar10, 10_000) == right


# --- costly promises, with weights ------------------------------------------------------------------


@pytest.mark.parametrize("name", ["resnet20_cifar", "resnet20_cifar_mod", "resnet18_cifar"])
def test_no_channel_is_dead_from_the_start(name):
    """A channel whose pre-activation is exactly zero for every image never learns."""
    model, x = real(name, {})
    loss = nn.functional.cross_entropy(model(x), torch.arange(len(x)))
    loss.backward()
    for n, p in model.named_parameters():
        if n.endswith("0.bn2.weight"):  # a stage's first block, where channels are added
            assert (p.grad != 0).all(), n


@pytest.mark.parametrize(("name", "kwargs"), COSTLY)
def test_a_training_step_reaches_every_parameter(name, kwargs):
    model, x = real(name, kwargs)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    optimiser = torch.optim.SGD(model.parameters(), lr=0.01)  # at 0.1 routers saturate
    # Twice: timm starts a block's last norm at zero, so what is behind it learns from step 2.
    for _ in range(2):
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(x), torch.arange(len(x)))
        if name.endswith("_adn"):  # half of its norms belong to the base network
            with at_depth(model, [True] * len(get_depth(model))):
                loss = loss + nn.functional.cross_entropy(model(x), torch.arange(len(x)))
        loss.backward()
        optimiser.step()
    assert loss.isfinite()
    for n, p in model.named_parameters():
        assert p.grad is not None, n
        assert p.grad.isfinite().all(), n
        assert p.grad.abs().max() > 0, n
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert {n for n in before if n.endswith("conv1.weight") or "selector" in n} <= moved


@pytest.mark.parametrize(("name", "kwargs"), COSTLY)
def test_a_sample_alone_is_as_in_a_batch(name, kwargs):
    model, x = real(name, kwargs)
    with torch.no_grad():
        model.train()(x)  # statistics that are not those of the start
        together = model.eval()(x)
        alone = torch.cat([model(sample[None]) for sample in x])
    torch.testing.assert_close(alone, together, rtol=1e-4, atol=1e-5)
    assert together.std() > 1e-3, "samples must differ for this to say anything"


@pytest.mark.parametrize("name", COMPILED)
def test_compiles_without_a_break(name):
    torch._dynamo.reset()
    model, x = real(name, OPTIONS[name])
    model.eval()
    if "_adn" in name and not dynamo_reads_contexts():
        pytest.skip("this torch cannot compile the reading of a ContextVar")
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), model(x))
        with torch.compiler.set_stance("fail_on_recompile"):
            torch.testing.assert_close(compiled(x + 1), model(x + 1))
    torch._dynamo.reset()


@pytest.mark.parametrize(("name", "kwargs"), COSTLY)
def test_copies_are_equal(name, kwargs):
    model, x = real(name, kwargs)
    model.eval()
    stored = io.BytesIO(pickle.dumps(model))
    for again in (copy.deepcopy(model), pickle.load(stored)):
        with torch.no_grad():
            assert torch.equal(again(x), model(x))
        assert conversions(again) == conversions(model)
        assert not {id(p) for p in again.parameters()} & {id(p) for p in model.parameters()}


@pytest.mark.parametrize(("name", "kwargs"), COSTLY)
def test_state_goes_into_a_fresh_network(name, kwargs):
    model, x = real(name, kwargs)
    torch.manual_seed(99)
    fresh = timm.create_model(name, **kwargs)
    with torch.no_grad():
        out = model.eval()(x)
        # timm's zero-initialised last norms make two fresh networks alike only in part.
        assert not torch.equal(fresh.eval()(x), out)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh(x), out)
