"""The honest count, by hand and against a second public counter."""

from __future__ import annotations

import math
import warnings

import pytest
import timm
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from _small import separable
from pliant import convert
from pliant.counting import count_macs, count_parameters, run_once
from pliant.methods.condconv import CondConv
from pliant.methods.condconv.layers import CondConv2d, CondLinear, Router
from pliant.methods.mixture_of_depths import MoDBlock


def by_fvcore(model: nn.Module, size, broadcast: bool = False) -> int:
    """fvcore's own handles for convolutions and products; everything else counts nothing.

    With `broadcast`, a product counts all its outputs; fvcore's handle looks at the size of
    the left factor alone, and counts a product that is broadcast over the right one once.
    """
    fvcore = pytest.importorskip("fvcore.nn")
    counter = fvcore.FlopCountAnalysis(model.eval(), torch.zeros(1, *size))
    if broadcast:
        counter.set_op_handle("aten::matmul", whole_product)
    counter.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        by_operator = counter.by_operator()
    return sum(by_operator[name] for name in ("conv", "linear", "matmul", "addmm", "bmm", "einsum"))


def whole_product(inputs, outputs):
    """Multiply-accumulates of a traced product: one row and column for each output value."""
    return math.prod(outputs[0].type().sizes()) * inputs[0].type().sizes()[-1]


@pytest.mark.parametrize(
    ("name", "kwargs", "size", "macs"),
    [
        ("resnet50_mod", {}, (3, 64, 64), None),
        ("resnet50_mod", {"selection": "none"}, (3, 64, 64), None),
        ("resnet18_cifar_mod", {}, (3, 32, 32), 253_550_080),
        ("resnet18_cifar_mod", {"order": "index", "fusion": "original"}, (3, 32, 32), 253_550_080),
        ("resnet18_cifar_mod", {"selection": "random"}, (3, 32, 32), None),
        ("resnet18_cifar", {}, (3, 48, 48), None),
    ],
)
def test_agrees_with_fvcore(name, kwargs, size, macs):
    model = timm.create_model(name, **kwargs)
    ours = count_macs(model, size)
    assert ours == by_fvcore(model, size)
    assert macs is None or ours == macs


def test_layers_by_hand():
    assert count_macs(nn.Conv2d(3, 8, 3, padding=1, bias=True), (3, 10, 12)) == 3 * 8 * 9 * 120
    assert count_macs(nn.Conv2d(8, 8, 3, groups=4), (8, 10, 10)) == 8 * 2 * 9 * 64
    assert count_macs(nn.Conv2d(4, 6, 3, stride=2, padding=1, dilation=1), (4, 9, 9)) == 4 * 6 * 9 * 25
    assert count_macs(nn.Sequential(nn.Flatten(), nn.Linear(12, 5)), (3, 2, 2)) == 60
    assert count_macs(nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.AvgPool2d(2)), (3, 8, 8)) == 0
    assert count_macs(nn.Identity(), (3, 8, 8)) == 0


class Attention(nn.Module):
    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        return tokens @ tokens.transpose(1, 2) @ tokens


def test_matrix_products_by_hand():
    assert count_macs(Attention(), (8, 4, 4)) == 2 * 16 * 16 * 8


def test_a_mod_block_by_hand():
    model = timm.create_model("resnet50_mod")
    block = model.layer2[1]
    assert isinstance(block, MoDBlock)
    k, width, pixels = 8, 2, 28 * 28
    core = (k * width + 9 * width * width + width * k) * pixels
    selector = 2 * 512 * 32
    assert count_macs(block, (512, 28, 28)) == core + selector


def test_a_network_by_hand():
    """resnet20 of He et al. 2016: option-A shortcuts cost nothing."""
    stem = 3 * 16 * 9 * 1024
    stage1 = 6 * 16 * 16 * 9 * 1024
    stage2 = (16 * 32 + 5 * 32 * 32) * 9 * 256
    stage3 = (32 * 64 + 5 * 64 * 64) * 9 * 64
    assert stem + stage1 + stage2 + stage3 + 640 == 40_551_040
    assert count_macs(timm.create_model("resnet20_cifar"), (3, 32, 32)) == 40_551_040


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.double])
def test_meta_and_dtypes_count_alike(dtype):
    model = timm.create_model("resnet20_cifar_mod").to(dtype)
    real = count_macs(model, (3, 32, 32))
    assert count_macs(model.to("meta"), (3, 32, 32)) == real


def test_nothing_is_left_behind():
    model = timm.create_model("resnet20_cifar_mod").train()
    model.layer1.eval()
    modes = {name: m.training for name, m in model.named_modules()}
    state = {name: value.clone() for name, value in model.state_dict().items()}
    count_macs(model, (3, 32, 32))
    assert {name: m.training for name, m in model.named_modules()} == modes
    assert all(torch.equal(state[name], value) for name, value in model.state_dict().items())
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(p.grad is None for p in model.parameters())


class Token(nn.Module):
    """Hands a view of a parameter to a module, as CaiT does with its class token."""

    def __init__(self):
        super().__init__()
        self.token, self.norm = nn.Parameter(torch.zeros(1, 1, 8)), nn.LayerNorm(8)
        self.project = nn.Linear(8, 4)

    def forward(self, x):
        return self.project(self.norm(self.token.expand(len(x), -1, -1)))


def test_a_view_of_a_parameter_is_counted():
    model = Token()
    model.norm.weight.requires_grad_(False)
    assert count_macs(model, (3, 2, 2)) == 8 * 4
    assert [name for name, p in model.named_parameters() if not p.requires_grad] == ["norm.weight"]


def test_modes_come_back_after_an_error():
    model = timm.create_model("resnet20_cifar").train()
    with pytest.raises(RuntimeError):
        count_macs(model, (5, 32, 32))
    assert all(m.training for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_parameters_are_counted_once():
    shared = nn.Linear(3, 2)
    assert count_parameters(nn.Sequential(shared, nn.ReLU(), shared)) == 8
    frozen = nn.Linear(3, 2).requires_grad_(False)
    assert count_parameters(nn.Sequential(frozen, nn.BatchNorm1d(2))) == 12


def by_layer(model: nn.Module, size, form: str) -> int:
    """The sum over the layers of what the method says that each costs.

    Fused: one convolution and E P to mix its kernel of P values. Experts: E convolutions
    and E for each value of the output. Routers, and the layers that stayed, beside.
    """
    total = 0

    def see(layer, args, y):
        nonlocal total
        if isinstance(layer, (CondConv2d, CondLinear)):
            experts, _, taps = layer.weight.shape
            convolution = taps * y.numel()
            fused = convolution + layer.weight.numel()
            total += fused if form == "fused" else experts * (convolution + y.numel())
            total += layer.bias.numel() if layer.bias is not None and layer.bias.dim() == 2 else 0
        elif isinstance(layer, (nn.Conv2d, nn.Linear)):
            total += layer.weight[0].numel() * y.numel()

    handles = [module.register_forward_hook(see) for module in model.modules()]
    run_once(model, size)
    for handle in handles:
        handle.remove()
    return total


VARIANTS = [
    {},
    {"routing": "layer"},
    {"routing": "single"},
    {"routing": "shared"},
    {"routing": "hierarchical"},
    {"hidden": 1 / 8},
    {"hidden": 8},
    {"activation": "softmax"},
    {"per_channel": True},
    {"per_channel": True, "routing": "layer"},
    {"active": 2},
    {"layers": "pointwise"},
    {"layers": "depthwise"},
    {"features": False},
    {"classifier": False},
    {"begin": 1},
]


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_condconv_agrees_with_fvcore_and_by_layer(options):
    size = (3, 32, 32)
    for form in ("fused", "experts"):
        model = separable(form=form, **options)
        ours = count_macs(model, size)
        assert ours == by_layer(model, size, form), form
        assert ours == by_fvcore(model, size, broadcast=form == "experts"), form


@pytest.mark.parametrize(
    "name",
    [
        "mobilenetv2_050",
        "mobilenetv3_small_050",
        "resnet18_cifar",
        "resnet20_cifar",
        "regnetx_002",
        "convnext_atto",
    ],
)
def test_converted_families_agree_with_fvcore_and_by_layer(name):
    size = (3, 32, 32)
    for form in ("fused", "experts"):
        model = convert(timm.create_model(name, num_classes=7), CondConv(experts=2, form=form))
        ours = count_macs(model, size)
        assert ours == by_layer(model, size, form), form
        assert ours == by_fvcore(model, size, broadcast=form == "experts"), form


def test_what_fvcore_leaves_out_of_the_experts_form():
    """Mixing a depthwise layer's outputs: counted for one of its groups only."""
    size = (3, 32, 32)
    model = timm.create_model("cc_mobilenetv1_025_cifar", experts=3, form="experts")
    depthwise = [(64, 4 * 4)] + 5 * [(128, 4 * 4)] + [(128, 2 * 2), (256, 2 * 2)]  # groups, positions
    left_out = sum(3 * (groups - 1) * positions for groups, positions in depthwise)
    assert count_macs(model, size) - by_fvcore(model, size) == left_out == 38_088


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("bias", [None, "shared", "experts"])
def test_a_conditional_convolution_by_hand(per_channel, bias):
    outputs, convolution = 32 * 5 * 5, 32 * 4 * 9 * 25
    router = 16 * 4 * (32 if per_channel else 1)
    mixed_bias = 4 * 32 if bias == "experts" else 0
    options = {"stride": 2, "padding": 1, "groups": 4, "bias": bias, "experts": 4}
    counted = {}
    for form in ("fused", "experts"):
        route = Router(16, 4, outputs=32 if per_channel else None)
        layer = CondConv2d(16, 32, 3, **options, router=route, form=form)
        counted[form] = count_macs(layer, (16, 9, 9)) - router - mixed_bias
    assert counted["fused"] == convolution + 4 * (32 * 4 * 9)
    assert counted["experts"] == 4 * convolution + 4 * outputs


def test_a_conditional_linear_layer_by_hand():
    matrix = 24 * 10
    for form, macs in (("fused", matrix + 4 * matrix), ("experts", 4 * matrix + 4 * 10)):
        layer = CondLinear(24, 10, "shared", experts=4, router=Router(24, 4), form=form)
        network = nn.Sequential(nn.Flatten(), layer)
        assert count_macs(network, (6, 2, 2)) == macs + 24 * 4


@pytest.mark.parametrize("form", ["fused", "experts"])
@pytest.mark.parametrize("options", [{}, {"per_channel": True}], ids=str)
def test_each_example_mixes_its_own_kernels(form, options):
    """So the cost is one image's times the batch: no kernel is mixed once for all."""
    model = timm.create_model("cc_mobilenetv1_025_cifar", experts=3, form=form, **options).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.randn(5, 3, 32, 32))
    assert counter.get_total_flops() == 5 * 2 * count_macs(model, (3, 32, 32))


@pytest.mark.parametrize("name", ["cc_mobilenetv1_025_cifar", "cc_resnet18_cifar"])
def test_auto_is_counted_as_the_method_costs_whatever_it_runs(name):
    """At 16 pixels auto runs many layers in the experts form; that is about speed alone."""
    size, counted = (3, 16, 16), {}
    for form in ("auto", "fused", "experts"):
        with torch.device("meta"):
            model = timm.create_model(name, experts=4, form=form)
        counted[form] = count_macs(model, size)
    assert counted["auto"] == counted["fused"] == by_layer(model, size, "fused")
    assert counted["experts"] == by_layer(model, size, "experts") > counted["fused"]
    real = timm.create_model(name, experts=4)
    assert count_macs(real, size) == counted["auto"]
    with FlopCounterMode(display=False) as counter:
        run_once(real, size)
    assert counter.get_total_flops() != 2 * counted["auto"]


@pytest.mark.parametrize("experts", [2, 5])
def test_a_form_that_somebody_chose_is_counted_as_it_runs(experts):
    counted = {}
    for form in ("auto", "fused", "experts"):
        options = {"padding": 1, "experts": experts, "form": form}
        counted[form] = count_macs(CondConv2d(8, 6, 3, **options, router=Router(8, experts)), (8, 4, 4))
    router, convolution = 8 * experts, 6 * 8 * 9 * 16
    assert counted["auto"] == counted["fused"] == router + convolution + experts * 6 * 8 * 9
    assert counted["experts"] == router + experts * convolution + experts * 6 * 16


def test_counting_leaves_each_form_as_it_was():
    def layer(form):
        return CondConv2d(3, 3, 1, experts=2, router=Router(3, 2), form=form)

    forms = ["auto", "fused", "experts", "auto"]
    network = nn.Sequential(*map(layer, forms))
    count_macs(network, (3, 4, 4))
    assert [m.form for m in network] == forms
    with pytest.raises(ValueError, match="wanted images of"):
        count_macs(network, (5, 4, 4))
    assert [m.form for m in network] == forms
