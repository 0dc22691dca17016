"""CondConv's conversion: what it covers, its options, and what it refuses."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from _small import FAMILIES, LATE, images, meta, mobilenet, reasons
from pliant import CondConv, convert, plan
from pliant.methods.condconv.layers import CondConv2d, CondLinear, Router, SharedRouting
from pliant.surgery import conversions


def sites(model, **options) -> list[str]:
    return [site.path for site in CondConv(experts=2, **options).survey(model).sites]


# --- coverage ----------------------------------------------------------------------------------

GOLDEN = """\
blocks.4.0: DepthwiseSeparableConv -> CondConvBlock \
(unit=13, kind=block, experts=4, convolutions=2, routing=own, passes_on=True)
blocks.4.1: DepthwiseSeparableConv -> CondConvBlock \
(unit=14, kind=block, experts=4, convolutions=2, routing=the one before)
classifier: Linear -> CondLinear (unit=15, kind=classifier, experts=4, routing=own)
passed over:
  conv_stem: unit 1; begin=13
  blocks.0.0: unit 2; begin=13
  blocks.1.0: unit 3; begin=13
  blocks.1.1: unit 4; begin=13
  blocks.2.0: unit 5; begin=13
  blocks.2.1: unit 6; begin=13
  blocks.3.0: unit 7; begin=13
  blocks.3.1: unit 8; begin=13
  blocks.3.2: unit 9; begin=13
  blocks.3.3: unit 10; begin=13
  blocks.3.4: unit 11; begin=13
  blocks.3.5: unit 12; begin=13
parameters: 470,072 -> 1,544,896 (328.7%)
MACs at 3x224x224: 41,030,272 -> 42,462,848 (103.5%)
note: starts as the given network: experts are copies of its layers (upcycle=False: afresh)"""


def test_the_plan_of_a_network():
    """Units are numbered as in the paper: 15 in MobileNetV1, of which the default begins at 7."""
    method = CondConv(experts=4, begin=13, routing="shared", form="fused")
    assert str(plan(meta("mobilenetv1_w025"), method)) == GOLDEN
    afresh = str(plan(meta("mobilenetv1_w025"), CondConv(experts=4, upcycle=False)))
    assert afresh.endswith("experts and routers start at random; biases and norms are the network's")


@pytest.mark.parametrize(
    ("name", "kwargs", "first", "count"),
    [
        ("mobilenetv1_w025", {}, (7, "blocks.3.0"), 9),
        ("mobilenetv1_w025", {"output_stride": 16}, (5, "blocks.2.0"), 11),  # a resolution less
        ("mobilenetv2_100", {}, (8, "blocks.3.0"), 13),
        ("mobilenetv3_small_050", {}, (5, "blocks.2.0"), 11),
        ("efficientnet_b0", {}, (7, "blocks.3.0"), 13),
        ("resnet18", {}, (6, "layer3.0"), 5),
        ("resnet50", {}, (9, "layer3.0"), 10),
        ("regnetx_002", {}, (4, "s3.b1"), 12),
        ("regnety_002", {}, (4, "s3.b1"), 12),
        ("convnext_atto", {}, (6, "stages.2.blocks.0"), 9),  # it halves between its stages
        ("resnet20_cifar", {}, (5, "layer2.0"), 7),
    ],
)
def test_where_it_begins_unless_told(name, kwargs, first, count):
    found = CondConv(experts=2).survey(meta(name, **kwargs)).sites
    assert (found[0].detail["unit"], found[0].path) == first
    assert len(found) == count


@pytest.mark.parametrize("name", FAMILIES)
def test_every_convolution_is_a_site_or_passed_over_with_a_reason(name):
    model = meta(name, **FAMILIES[name])
    found = CondConv(experts=2, begin=3).survey(model)
    named = {place.path for place in (*found.sites, *found.passed_over)}
    new = convert(model, CondConv(experts=2, begin=3))
    for path, module in new.named_modules():
        if isinstance(module, (nn.Conv2d, nn.Linear, CondConv2d, CondLinear)) and "router" not in path:
            assert any(path == n or path.startswith(f"{n}.") for n in named), path
        if isinstance(module, nn.Conv2d) and any(path.startswith(f"{s.path}.") for s in found.sites):
            assert ".se." in path, f"{path} is left in a block that was replaced"


def test_which_layers():
    model = meta("mobilenetv2_100")
    kinds = {}
    for layers in ("all", "pointwise", "depthwise"):
        new = convert(model, CondConv(experts=2, layers=layers))
        block = new.blocks[4][0].block
        kinds[layers] = [
            isinstance(getattr(block, conv), CondConv2d) for conv in ("conv_pw", "conv_dw", "conv_pwl")
        ]
        assert isinstance(new.conv_head, CondConv2d) == (layers != "depthwise")
        assert isinstance(new.classifier, CondLinear)
    assert kinds == {
        "all": [True, True, True],
        "pointwise": [True, False, True],
        "depthwise": [False, True, False],
    }


def test_features_and_classifier_can_be_left_out():
    model = meta("mobilenetv1_w025")
    assert sites(model, classifier=False) == sites(model)[:-1]
    assert reasons(model, classifier=False)["classifier"] == "classifier=False"
    assert sites(model, features=False) == ["classifier"]
    assert set(reasons(model, features=False).values()) == {"features=False"}
    assert sites(model, begin=15) == ["classifier"]
    assert sites(model, begin=1)[:2] == ["conv_stem", "blocks.0.0"]
    # Of a network whose blocks hold no convolution, the classifier can be replaced all the same.
    assert sites(meta("vit_tiny_patch16_224"), features=False) == ["head"]


def test_squeeze_and_excitation_stays():
    new = convert(meta("regnety_002"), CondConv(experts=2, begin=2))
    gates = [m for path, m in new.named_modules() if path.endswith(("se.fc1", "se.fc2"))]
    assert len(gates) == 26
    assert all(type(m) is nn.Conv2d for m in gates)


def routers(model) -> dict[str, str]:
    return {
        path.removesuffix(".router"): type(m).__name__ + (" with the one before" if m.previous else "")
        if isinstance(m, Router)
        else type(m).__name__
        for path, m in model.named_modules()
        if isinstance(m, (Router, SharedRouting))
    }


def test_who_computes_routings():
    names = ["blocks.3.5", "blocks.4.0", "blocks.4.1", "classifier"]
    own, shared, after = "Router", "SharedRouting", "Router with the one before"
    expected = {
        "block": [own] * 4,
        "single": [own, shared, shared, shared],
        "shared": [own, shared, own, shared],
        "hierarchical": [own, after, after, after],
    }
    for routing, kinds in expected.items():
        found = routers(convert(mobilenet(), CondConv(experts=2, begin=12, routing=routing)))
        assert found == dict(zip(names, kinds, strict=True)), routing
    layer = routers(convert(mobilenet(), CondConv(experts=2, begin=14, routing="layer")))
    assert layer == {
        "blocks.4.1.conv_dw": own,
        "blocks.4.1.conv_pw": own,
        "classifier": own,
    }


def test_a_shared_routing_is_the_same_tensor_everywhere():
    model = convert(mobilenet(), CondConv(experts=2, begin=12, routing="single", upcycle=False))
    seen = []
    for module in model.modules():
        if isinstance(module, (Router, SharedRouting)):
            module.register_forward_hook(lambda module, args, out: seen.append(out))
    model(images(2))
    assert len(seen) == 4
    assert all(out is seen[0] for out in seen)


@pytest.mark.parametrize(("hidden", "units"), [(0.125, 32), (1, 256), (8, 2048), (0.0001, 1)])
def test_hidden_layers(hidden, units):
    model = convert(mobilenet(), CondConv(experts=2, begin=14, hidden=hidden))
    assert model.blocks[4][1].router.fc1.weight.shape == (units, 256)
    assert model.classifier.router.fc1.weight.shape == (units, 256)


def test_weights_per_channel():
    model = convert(mobilenet(), CondConv(experts=2, begin=14, per_channel=True))
    block = model.blocks[4][1]
    assert block.router.fc1.weight.shape == (128, 256), "half as many hidden units, unless told"
    assert block.router.outputs == 256 + 256, "of both convolutions"
    assert model.classifier.router.outputs == 10
    x = torch.randn(3, 256, 2, 2)
    assert block.router(x).shape == (3, 2, 512)
    with torch.no_grad():  # each convolution gets the weights of its own channels
        nn.init.normal_(block.router.fc2.weight)
        routing = block.router(x)
        y = block.block.bn1(block.block.conv_dw(x, routing[:, :, :256]))
        y = block.block.bn2(block.block.conv_pw(y, routing[:, :, 256:]))
        torch.testing.assert_close(block(x), y)


def test_hard_routing_uses_so_many_experts():
    model = convert(mobilenet(), CondConv(experts=4, active=2, activation="softmax", **LATE))
    routing = model.blocks[4][0].router(torch.randn(5, 128, 4, 4))
    assert ((routing > 0).sum(1) == 2).all()
    torch.testing.assert_close(routing.sum(1), torch.ones(5))


@pytest.mark.parametrize("form", ["auto", "fused", "experts"])
def test_the_form_reaches_every_layer(form):
    model = convert(mobilenet(), CondConv(experts=2, form=form, **LATE))
    forms = [m.form for m in model.modules() if isinstance(m, (CondConv2d, CondLinear))]
    assert forms == [form] * 5


# --- options that are refused --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"experts": 0}, "experts must be a whole number from 1 to 64, not 0"),
        ({"experts": 65}, "experts must be a whole number from 1 to 64, not 65"),
        ({"experts": 2.0}, r"experts must be a whole number from 1 to 64, not 2\.0"),
        ({"experts": True}, "experts must be a whole number from 1 to 64, not True"),
        ({"experts": None}, "experts must be a whole number from 1 to 64, not None"),
        ({"experts": 4, "active": 5}, "active must be a whole number from 1 to 4, not 5"),
        ({"active": 0}, "active must be a whole number from 1 to 8, not 0"),
        ({"begin": 0}, "begin must be greater than or equal to 1, or none, not 0"),
        ({"begin": 1.5}, r"begin must be a valid integer, or none, not 1\.5"),
        ({"begin": True}, "begin must be a valid integer, or none, not True"),
        ({"features": 1}, "features must be a valid boolean, not 1"),
        ({"classifier": None}, "classifier must be a valid boolean, not None"),
        ({"per_channel": "no"}, "per_channel must be a valid boolean, not 'no'"),
        ({"upcycle": 0}, "upcycle must be a valid boolean, not 0"),
        ({"layers": "dw"}, "layers must be 'all', 'pointwise' or 'depthwise', not 'dw'"),
        (
            {"routing": "global"},
            "routing must be 'block', 'layer', 'single', 'shared' or 'hierarchical', not 'global'",
        ),
        ({"activation": "relu"}, "activation must be 'sigmoid' or 'softmax', not 'relu'"),
        ({"form": "grouped"}, "form must be 'auto', 'fused' or 'experts', not 'grouped'"),
        ({"hidden": 0}, "hidden must be greater than 0, or none, not 0"),
        ({"hidden": -1.0}, r"hidden must be greater than 0, or none, not -1\.0"),
        ({"hidden": "small"}, "hidden must be a valid number, or none, not 'small'"),
        ({"hidden": float("inf")}, "hidden must be a finite number, or none, not inf"),
        ({"noise": float("nan")}, "noise must be a finite number, not nan"),
        ({"noise": -1}, "noise must be greater than or equal to 0, not -1"),
        ({"noise": True}, "noise must be a valid number, not True"),
        ({"noise": 0}, r"noise=0 leaves equal experts, which could never part; take noise=0\.1"),
        (
            {"features": False, "classifier": False},
            "features=False with classifier=False leaves nothing to replace",
        ),
        (
            {"per_channel": True, "routing": "shared"},
            r"routing='shared' shares them between units: take routing='block' or 'layer'",
        ),
        (
            {"active": 2},
            r"with active=2, upcycling needs activation='softmax': .* \(or set upcycle=False\)",
        ),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        CondConv(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"noise": 0, "activation": "softmax"},
        {"noise": 0, "experts": 1},
        {"noise": 0, "upcycle": False},
        {"active": 2, "upcycle": False},
        {"active": 8},
        {"experts": 64},
        {"experts": 1, "active": 1},
    ],
)
def test_options_that_are_right_together(options):
    method = CondConv(**options)
    assert {name: getattr(method, name) for name in options} == options


def test_options_are_keywords_frozen_and_comparable():
    with pytest.raises(TypeError):
        CondConv(8)
    assert CondConv(experts=8) == CondConv()
    with pytest.raises(AttributeError):
        CondConv().experts = 3


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "mobilenetv1_w025_cifar",
            {"begin": 16},
            "begin=16, but the classifier of EfficientNet is unit 15, the last",
        ),
        ("resnet20_cifar", {"begin": 12}, "begin=12, but the classifier of ResNet is unit 11, the last"),
        (
            "resnet20_cifar",
            {"layers": "depthwise"},
            r"(?s)matches nothing in ResNet:.*layer2\.0 to layer3\.2 .*: no depthwise convolution",
        ),
        (
            "mobilenetv1_w025_cifar",
            {"begin": 15, "classifier": False},
            "(?s)matches nothing in EfficientNet:.*classifier: classifier=False",
        ),
    ],
)
def test_what_does_not_fit_a_network_leaves_it_untouched(name, options, message, inplace):
    model = timm.create_model(name)
    before = {path: (id(m), type(m)) for path, m in model.named_modules()}
    with pytest.raises(ValueError, match=message):
        convert(model, CondConv(**options), inplace=inplace)
    assert {path: (id(m), type(m)) for path, m in model.named_modules()} == before


def test_networks_without_a_convolution_to_replace_say_so():
    with pytest.raises(
        ValueError,
        match=r"matches nothing in VisionTransformer:(?s:.*)blocks.0 to blocks.11 \(12 places\): no conv",
    ):
        convert(meta("vit_tiny_patch16_224"), CondConv())
    with pytest.raises(ValueError, match=r"CondConv matches nothing in Sequential"):
        convert(nn.Sequential(nn.ReLU()), CondConv())


def test_layers_that_are_more_than_their_weight_are_passed_over():
    model = meta("resnet20_cifar")
    for conv in ("conv1", "conv2"):
        getattr(model.layer3[1], conv).padding_mode = "reflect"
    why = reasons(model)["layer3.1"]
    assert why == "conv1 is a Conv2d that cannot be mixed"
    for conv in ("conv1", "conv2"):
        getattr(model.layer3[1], conv).padding_mode = "zeros"
    assert "layer3.1" not in reasons(model)


def test_layers_with_hooks_are_passed_over():
    model = mobilenet()
    nn.utils.spectral_norm(model.blocks[4][0].conv_pw)
    model.blocks[4][1].conv_dw.register_forward_hook(lambda *call: None)
    model.blocks[4][1].conv_pw.register_forward_pre_hook(lambda *call: None)
    reason = "has forward hooks (pruning and spectral_norm have), which a mixture would lose"
    assert {path: why for path, why in reasons(model, **LATE).items() if "blocks.4" in path} == {
        "blocks.4.0.conv_pw": reason,
        "blocks.4.1": f"conv_dw {reason}",
    }
    new = convert(model, CondConv(experts=2, **LATE))
    assert isinstance(new.blocks[4][0].block.conv_dw, CondConv2d)
    assert type(new.blocks[4][0].block.conv_pw) is nn.Conv2d
    with torch.no_grad():
        x = images()
        torch.testing.assert_close(new(x), model(x), rtol=1e-4, atol=1e-4)


def test_a_classifier_with_hooks_or_of_another_type_is_passed_over():
    model = mobilenet()
    nn.utils.spectral_norm(model.classifier)
    assert reasons(model, **LATE)["classifier"].startswith("has forward hooks")
    model = mobilenet()
    nn.utils.parametrizations.weight_norm(model.classifier)
    assert reasons(model, **LATE)["classifier"] == "is a ParametrizedLinear that cannot be mixed"


def test_hooks_that_hand_a_routing_on_are_no_obstacle():
    first = CondConv(experts=2, begin=13, routing="shared", classifier=False)
    model = convert(mobilenet(), first)
    assert model.classifier._forward_hooks
    assert sites(model, features=False) == ["classifier"]


def test_a_classifier_that_is_not_found_is_told():
    model = timm.create_model("mobilenetv1_w025_cifar", num_classes=0)
    assert reasons(model, **LATE)["(classifier)"] == "no linear classifier found"
    assert "(classifier)" not in reasons(model, **LATE, classifier=False)
    assert "(classifier)" not in reasons(mobilenet(), **LATE)
    with pytest.raises(ValueError, match=r"matches nothing in EfficientNet:(?s:.*)no linear classifier"):
        convert(model, CondConv(features=False))
    with pytest.raises(ValueError, match="matches nothing in Sequential: no block of a known family"):
        convert(nn.Sequential(nn.ReLU()), CondConv())


@pytest.mark.parametrize("routing", ["block", "single"])
@pytest.mark.parametrize("drop", [[], [nn.Dropout(0.5)]])
def test_a_classifier_behind_a_network_without_one(drop, routing):
    inner = mobilenet(num_classes=0)
    plain = nn.Sequential(inner, *drop, nn.Linear(inner.num_features, 5)).eval()
    new = convert(plain, CondConv(experts=2, routing=routing, begin=14))
    assert conversions(new)[0].sites == ("0.blocks.4.1", str(1 + len(drop)))
    assert new[-1].drop == 0.5 * len(drop)
    assert all(m.p == 0 for m in new.modules() if isinstance(m, nn.Dropout))
    x = images()
    with torch.no_grad():
        torch.testing.assert_close(new(x), plain(x), rtol=1e-4, atol=1e-4)


# --- networks that are read with care -------------------------------------------------------------


def test_timms_own_mixtures_are_passed_over_by_name():
    model = meta("tf_efficientnet_cc_b0_4e")
    found = reasons(model, begin=2)
    odd = {path for path, why in found.items() if "CondConvResidual mixes its kernels" in why}
    assert odd == {f"blocks.{n}" for n in ("4.0", "4.1", "4.2", "5.0", "5.1", "5.2", "5.3", "6.0")}
    new = convert(model, CondConv(experts=2, begin=2))
    assert all(type(new.get_submodule(path).routing_fn) is nn.Linear for path in odd)


@pytest.mark.parametrize(
    "name", ["efficientnet_x_b3", "efficientnet_blur_b0", "mobilenetv4_conv_blur_medium"]
)
def test_blocks_that_lower_the_resolution_in_their_own_way(name):
    if not timm.is_model(name):
        pytest.skip(f"this timm has no {name}")
    made = convert(meta(name, num_classes=3), CondConv(experts=2, begin=2)).eval()
    assert made(torch.empty(2, 3, 64, 64, device="meta")).shape == (2, 3)


def test_what_a_block_takes_goes_through():
    class Scaled(timm.models.resnet.BasicBlock):
        def forward(self, x, scale=1.0, *, shift=0.0):
            return super().forward(x) * scale + shift

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.other = Scaled(8, 8), timm.models.resnet.BasicBlock(8, 8)

        def forward(self, x):
            return self.other(self.block(x, 2.0, shift=1.0))

    torch.manual_seed(0)
    plain, x = Net().eval(), torch.randn(2, 8, 4, 4)
    made = convert(plain, CondConv(experts=2, activation="softmax", begin=2))
    torch.testing.assert_close(made(x), plain(x))


def test_an_adapter_in_a_block_is_left_alone():
    class Adapter(nn.Module):  # as peft's layers are
        def __init__(self, base):
            super().__init__()
            self.base, self.down = base, nn.Linear(base.in_features, base.out_features)

        def forward(self, x):
            return self.base(x) + self.down(x)

    model = timm.create_model("convnext_tiny", dims=(8, 16, 24, 32), depths=(1, 1, 2, 1)).eval()
    block = model.stages[3].blocks[0]
    nn.init.constant_(block.gamma, 0.5)
    block.mlp.fc1 = Adapter(block.mlp.fc1)
    why = f"lies in a {Adapter.__module__}.{Adapter.__qualname__}"
    found = reasons(model)
    assert {p: w for p, w in found.items() if "fc1" in p} == {
        f"stages.3.blocks.0.mlp.fc1.{name}": why for name in ("base", "down")
    }
    made = convert(model, CondConv(experts=2, activation="softmax"))
    assert type(made.stages[3].blocks[0].block.mlp.fc1.down) is nn.Linear
    x = images(2)
    torch.testing.assert_close(made(x), model(x), rtol=1e-4, atol=1e-4)
