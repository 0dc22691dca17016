"""Variants of the Mixture-of-Depths block: each against a reading of its own, its gradients, its files."""

from __future__ import annotations

import copy
from itertools import product

import pytest
import timm
import torch
from timm.models.resnet import BasicBlock, Bottleneck
from torch import nn

import pliant
from _adaptive import scramble
from _export import through_file
from pliant import AdaptiveDepth, MixtureOfDepths, convert, plan
from pliant.anatomy import RemovedBlock
from pliant.counting import count_macs, count_parameters
from pliant.deploy.folding import fold_norms
from pliant.deploy.forms import use_export_forms
from pliant.deploy.loading import open_export
from pliant.deploy.optimize import optimize, unfused
from pliant.methods.mixture_of_depths import MoDBlock
from pliant.methods.mixture_of_depths import training as routed
from pliant.methods.mixture_of_depths.ops import building
from pliant.methods.mixture_of_depths.ops.fused import FusedMoDBlock, fusable
from pliant.methods.mixture_of_depths.ops.mod_block import in_pytorch
from pliant.methods.mixture_of_depths.selectors import ConstantSelector, StaticSelector
from research.analysis.routing import selection_frequency

SOFT = {"temperature": 0.1, "straight_through": True}
VARIANTS = {
    "temperature": {"temperature": 0.1},
    "bias": {"selector_bias": True, "temperature": 0.5},
    "straight-through": SOFT,
    "static": {"selection": "static", "temperature": 0.2},
    "static, straight-through": {"selection": "static", **SOFT},
    "gate of the map": {"gate": "map", "selector_bias": True, "temperature": 0.5},
    "gate of the map, soft": {"gate": "map", **SOFT},
    "gate of the map, first k": {"gate": "map", "selection": "first"},
    "no score": {"gate": "none", **SOFT},
    "no score, static": {"gate": "none", "selection": "static", **SOFT},
    "separable": {"core": "separable"},
}
FUSIONS = ("first", "last", "original", "replace")
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def block_of(variant, kind=BasicBlock, channels=16, k=4, dilation=1, **options) -> MoDBlock:
    torch.manual_seed(0)
    stage = nn.Sequential(
        *(kind(channels, channels // kind.expansion, dilation=dilation) for _ in range(2))
    )
    method = MixtureOfDepths(c=channels // k, **{"reduction": 2, **VARIANTS[variant], **options})
    block = scramble(convert(stage, method))[1]
    assert isinstance(block, MoDBlock)
    for name, p in block.named_parameters():
        if name.endswith(("fc2.bias", "relevance")):
            nn.init.normal_(p)
    return block.eval()


def read(block, x, options):
    """The block for one sample [C, H, W] at a time, in Python's loops."""
    selector, k, t = block.selector, block.k, options.get("temperature", 1.0)
    out = []
    for sample in x:
        if isinstance(selector, StaticSelector):
            logits = selector.relevance / t
        else:
            hidden = (selector.fc1.weight @ sample.mean((1, 2))).clamp(min=0)
            logits = selector.fc2.weight @ hidden
            logits = (logits if selector.fc2.bias is None else logits + selector.fc2.bias) / t
        index = (-logits).argsort(stable=True)[:k].tolist()
        if options.get("selection") == "first":
            index = list(range(k))
        index = sorted(index) if options["order"] == "index" else index
        y = block.core(torch.stack([sample[c] for c in index])[None])[0]
        new = sample.clone()
        for j, c in enumerate(index):
            to = {"first": j, "last": len(sample) - k + j}.get(block.fusion, c)
            score = logits[c].sigmoid() if options.get("gate", "output") == "output" else 1
            new[to] = score * y[j] + (0 if block.fusion == "replace" else sample[to])
        if options.get("gate") == "map":
            new = 2 * logits.sigmoid()[:, None, None] * new
        out.append(new)
    return torch.stack(out)


@every_variant
def test_each_variant_is_its_reading(variant):
    for kind, fusion, order in product((BasicBlock, Bottleneck), FUSIONS, ("score", "index")):
        block = block_of(variant, kind, fusion=fusion, order=order).double()
        x = torch.randn(3, 16, 4, 5, dtype=torch.float64)
        with torch.no_grad():
            expected = read(block, x, {**VARIANTS[variant], "order": order})
            torch.testing.assert_close(block(x), expected, rtol=1e-9, atol=1e-9)


@every_variant
@pytest.mark.parametrize("train", [False, True])
def test_training_operators_give_the_plain_forms_gradients(variant, train, monkeypatch):
    """`routed`, in both memory formats, against PyTorch's own operators."""
    for fusion, form in product(FUSIONS, (torch.contiguous_format, torch.channels_last)):
        block = block_of(variant, fusion=fusion).double().train(train)
        x = torch.randn(3, 16, 4, 5, dtype=torch.float64).contiguous(memory_format=form)
        g = torch.randn_like(x)
        found = []
        for usual in (True, False):
            monkeypatch.setattr(routed, "usual", lambda usual=usual: usual)
            one, at = copy.deepcopy(block), x.clone().requires_grad_()
            out = one(at)
            wanted = [at, *one.parameters()]
            found.append([out, *torch.autograd.grad(out, wanted, g, allow_unused=True)])
        for one, other in zip(*found, strict=True):
            if other is None:
                assert one is None
            else:
                torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


# --- which channels a gradient reaches ---------------------------------------------------------


def gradient_of_logits(**options):
    """Gradient of each channel's logit [C] for one sample, and the channels that it selects."""
    block = block_of("bias", **options).double().train()
    x = torch.randn(1, 16, 4, 4, dtype=torch.float64)
    (block(x) * torch.randn(1, 16, 4, 4, dtype=torch.float64)).sum().backward()
    return block.selector.fc2.bias.grad, block.selector(x)[1][0], block, x


def test_without_straight_through_only_the_selected_channels_learn():
    gradient, index, *_ = gradient_of_logits()
    assert gradient.nonzero().flatten().tolist() == index.sort().values.tolist()


def test_straight_through_reaches_all_channels():
    for order, gate in product(("score", "index"), ("output", "none")):
        gradient, *_ = gradient_of_logits(straight_through=True, order=order, gate=gate)
        assert gradient.count_nonzero() == 16


def test_the_gate_of_the_map_reaches_all_channels():
    gradient, *_ = gradient_of_logits(gate="map")
    assert gradient.count_nonzero() == 16


def test_straight_through_is_the_gradient_of_a_soft_ranking():
    """By hand: a channel's row of the soft ranking, and how much the core wants each channel."""
    block = block_of("no score", k=4, temperature=0.5, selector_bias=True).double().train()
    block.core = nn.Conv2d(4, 4, 1, bias=False).double()
    x, g = torch.randn(2, 1, 16, 3, 3, dtype=torch.float64)
    out = block(x)
    (out * g).sum().backward()
    logits = block.selector.logits(x).detach()[0].requires_grad_()
    index = logits.topk(4).indices
    wanted = torch.einsum("oj,ohw->jhw", block.core.weight[:, :, 0, 0], g[0, :4])
    rows = []
    for j, c in enumerate(index.tolist()):
        near = torch.stack([-(logits[c] - other).abs() for other in logits])
        share = near.exp() / near.exp().sum()
        rows.append(sum(share[c] * (wanted[j] * x[0, c]).sum() for c in range(16)))
    torch.stack(rows).sum().backward()
    torch.testing.assert_close(block.selector.fc2.bias.grad, logits.grad / 0.5, rtol=1e-9, atol=1e-12)


def test_straight_through_changes_no_output():
    block = block_of("straight-through").train()
    plain = copy.deepcopy(block)
    plain.straight_through = False
    x = torch.randn(3, 16, 4, 4)
    torch.testing.assert_close(block(x), plain(x), rtol=1e-5, atol=1e-6)


def test_static_selection_learns_which(monkeypatch):
    """A target that one channel alone can give is found by the ranking."""
    torch.manual_seed(0)
    block = block_of("no score, static", k=1, fusion="replace", temperature=0.3).train()
    block.core = nn.Identity()
    with torch.no_grad():
        block.selector.relevance.zero_()[3] = 0.5
    optimiser = torch.optim.SGD(block.parameters(), lr=0.1)
    for _ in range(60):
        x = torch.randn(8, 16, 2, 2)
        index = block.selector(x)[1]
        picked = block._straight(x.index_select(1, index), x, x, index)
        optimiser.zero_grad()
        (picked[:, 0] - x[:, 9]).square().mean().backward()
        optimiser.step()
    assert block.selector(x)[1].tolist() == [9]


def test_under_autocast():
    for variant in VARIANTS:
        block = block_of(variant).train()
        x = torch.randn(3, 16, 8, 8)
        exact = copy.deepcopy(block).double()(x.double())
        with torch.autocast("cpu", torch.bfloat16):
            out = block(x.bfloat16().requires_grad_())
        assert out.dtype == torch.bfloat16
        out.float().sum().backward()
        off = (out.double() - exact).abs().mean() / exact.abs().mean()
        assert off < 0.05, variant


# --- what is built -----------------------------------------------------------------------------


def test_one_c_for_each_stage_and_none_where_it_is_zero():
    model = timm.create_model("resnet20_cifar_mod", c=[0, 8, 2])
    assert isinstance(model.layer1[1], RemovedBlock)
    assert (model.layer2[1].k, model.layer3[1].k) == (4, 32)
    found = plan(timm.create_model("resnet20_cifar"), MixtureOfDepths(c=(16, 4, 2)))
    assert [r.detail.split(", ")[2] for r in found.replacements] == ["k=1", "k=8", "k=32"]
    with pytest.raises(ValueError, match=r"c=\(4, 2\) is for 2 stages, but ResNet has 3"):
        timm.create_model("resnet20_cifar_mod", c=(4, 2))
    with pytest.raises(ValueError, match=r"layer2\.1: C = 32 channels with c = 33 leave k = 0"):
        timm.create_model("resnet20_cifar_mod", c=(1, 33, 1))


@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_separable_cores_keep_dilation_and_act(kind):
    core = block_of("separable", kind, channels=32, k=8, dilation=2).core
    depthwise, pointwise = core.conv1, core.conv2
    assert (depthwise.groups, depthwise.kernel_size, depthwise.padding, depthwise.dilation) == (
        8,
        (3, 3),
        (2, 2),
        (2, 2),
    )
    assert (pointwise.groups, pointwise.kernel_size, pointwise.padding) == (1, (1, 1), (0, 0))
    assert [type(m).__name__ for m in core] == ["Conv2d", "BatchNorm2d", "ReLU", "Conv2d", "BatchNorm2d"]


@pytest.mark.parametrize(
    ("options", "parameters", "macs"),
    [
        # To the network without the blocks: 172,506 parameters, 26,395,264 multiply-accumulates.
        ({}, 3094, 57984),
        ({"temperature": 0.1, "straight_through": True}, 3094, 57984),
        ({"gate": "map"}, 3094, 57984),
        ({"selector_bias": True}, 3094 + 112, 57984),
        ({"selection": "static", "straight_through": True}, 518, 55296),
        ({"selection": "first"}, 406, 55296),
        # 9k + k^2 and two norms for k = 8, 16, 32; k (9 + k) at 1024, 256, 64 positions.
        ({"c": 2, "core": "separable"}, 2688 + 2072, 2688 + 325632),
        ({"c": (0, 0, 2), "gate": "map"}, 2048 + 18432 + 128, 2048 + 1179648),
    ],
    ids=str,
)
def test_what_variants_cost(options, parameters, macs):
    model = timm.create_model("resnet20_cifar_mod", **options)
    assert count_parameters(model) - 172506 == parameters
    assert count_macs(model, (3, 32, 32)) - 26395264 == macs


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"c": ()}, r"several c must be whole numbers of at least 0, not \(\)"),
        ({"c": (4, -1)}, r"several c must be whole numbers of at least 0, not \(4, -1\)"),
        ({"c": (4, True)}, r"several c must be whole numbers of at least 0, not \(4, True\)"),
        ({"gate": "input"}, "gate must be one of output, map, none; not 'input'"),
        ({"core": "wide"}, "core must be one of block, separable; not 'wide'"),
        ({"temperature": 0}, "temperature must be a positive number, not 0"),
        ({"temperature": True}, "temperature must be a positive number, not True"),
        ({"straight_through": 1}, "straight_through must be True or False, not 1"),
        ({"selector_bias": None}, "selector_bias must be True or False, not None"),
        ({"selection": "first", "straight_through": True}, "selection='first' has none"),
        ({"selection": "none", "straight_through": True}, "is for a ranking; selection='none' has none"),
        ({"selection": "static", "selector_bias": True}, "selector_bias is for a learned selector"),
        *(
            ({"selection": s, **options}, rf"selection='{s}' has none")
            for s in ("first", "random", "fixed", "none")
            for options in ({"temperature": 0.1}, {"selector_bias": True})
        ),
        ({"selection": "fixed", "gate": "map"}, "which selection='fixed' has not"),
        ({"selection": "static", "gate": "map"}, "which selection='static' has not"),
        ({"gate": "none"}, "without a gradient for ever; straight_through gives it one"),
    ],
)
def test_wrong_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        MixtureOfDepths(**options)


# --- composition, files, engines ---------------------------------------------------------------


def network(variant) -> nn.Module:
    model = scramble(timm.create_model("resnet20_cifar_mod", c=4, **VARIANTS[variant]))
    for name, p in model.named_parameters():
        if name.endswith("fc1.weight"):
            p.data.abs_()  # no hidden unit is silent: equal logits may be ranked in any order
    return model.eval()


@every_variant
def test_saved_and_loaded(variant, tmp_path):
    model = network(variant)
    x = torch.randn(2, 3, 16, 16)
    pliant.save(model, tmp_path / "net")
    with torch.no_grad():
        assert torch.equal(pliant.load(tmp_path / "net")(x), model(x))


def test_with_adaptive_depth_and_by_stage(tmp_path):
    model = timm.create_model("resnet20_cifar")
    both = convert(model, MixtureOfDepths(c=(16, 0, 2), gate="map", selector_bias=True), AdaptiveDepth())
    pliant.save(both, tmp_path / "net")
    again = pliant.load(tmp_path / "net").eval()
    x = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        assert torch.equal(again(x), both.eval()(x))


@every_variant
def test_each_form_for_export_is_the_block(variant):
    targets = [("program", None), ("onnx", None), ("onnx", 1), ("openvino", None), ("openvino", 1)]
    for kind, fusion, order in product((BasicBlock, Bottleneck), FUSIONS, ("score", "index")):
        model = nn.Sequential(block_of(variant, kind, fusion=fusion, order=order))
        for target, batch in targets:
            formed = use_export_forms(copy.deepcopy(model), target, batch)
            x = torch.randn(batch or 3, 16, 5, 4)
            with torch.no_grad():
                torch.testing.assert_close(formed(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["static", "no score, static"])
def test_an_optimised_network_has_the_forms_too(variant):
    model, x = network(variant), torch.randn(2, 3, 16, 16)
    ready = optimize(model, x)
    assert isinstance(ready.layer1[1].selector, ConstantSelector)
    for target in ("program", "onnx", "openvino"):
        formed = use_export_forms(copy.deepcopy(ready), target, None)
        with torch.no_grad():
            torch.testing.assert_close(formed(x), model(x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("variant", ["temperature", "static", "gate of the map"])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_traced_with_gradients_saved_and_loaded(variant, train, tmp_path):
    """TorchScript cannot save functions of Python, which training uses."""
    block = block_of(variant).train(train)
    plain, x = copy.deepcopy(block), torch.randn(3, 16, 4, 5)
    torch.jit.trace(block, x, check_trace=False).save(tmp_path / "block.pt")
    again = torch.jit.load(tmp_path / "block.pt")
    for batch in (x, torch.randn(1, 16, 7, 3)):
        torch.testing.assert_close(again(batch), plain(batch), rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@every_variant
@pytest.mark.parametrize("ending", [".pt2", ".onnx", ".xml"])
def test_files_are_held_against_the_network(variant, ending, tmp_path):
    found, expected = through_file(network(variant), tmp_path / f"net{ending}")
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("variant", "reason"),
    [
        ("gate of the map, first k", "not chosen by a learned selector"),
        ("gate of the map", "its selector has a bias"),
        ("bias", "its selector has a bias"),
        ("static", "not chosen by a learned selector"),
        ("separable", "another padding, dilation or stride|neither 1x1, 3x3, 1x1 nor 3x3 twice"),
    ],
)
def test_what_the_operator_does_not_know_keeps_the_plain_form(variant, reason):
    model = network(variant)
    x = torch.randn(2, 3, 16, 16)
    ready = optimize(model, x)
    assert not any(isinstance(m, FusedMoDBlock) for m in ready.modules())
    for why in unfused(ready).values():
        assert any(part in why for part in reason.split("|")), why
    with torch.no_grad():
        torch.testing.assert_close(ready(x), model(x), rtol=1e-4, atol=1e-4)
        bare = {path: m for path, m in ready.named_modules() if isinstance(m, MoDBlock)}
    constant = [isinstance(m.selector, ConstantSelector) for m in bare.values()]
    assert all(constant) if variant == "static" else not any(constant)


@pytest.mark.parametrize(
    "variant", ["temperature", "straight-through", "gate of the map, soft", "no score"]
)
def test_the_operator_has_temperature_and_gates(variant):
    model = network(variant)
    x = torch.randn(2, 3, 16, 16)
    ready = optimize(model, x)
    assert unfused(ready) == {}
    with torch.no_grad():
        torch.testing.assert_close(ready(x), model(x), rtol=1e-4, atol=1e-4)
    assert ready(x.requires_grad_()).requires_grad


@pytest.mark.parametrize("gate", ["map", "none"])
@pytest.mark.parametrize("kind", [BasicBlock, Bottleneck])
def test_gates_in_the_native_operator(gate, kind):
    """Against the same in PyTorch, in both precisions, several images at once and one by itself."""
    if not building.ready():
        pytest.skip(f"no native form here: {building.why_not()}")
    for fusion, dtype in product(FUSIONS, (torch.float32, torch.bfloat16)):
        block = block_of("no score", kind, channels=48, k=12, gate=gate, fusion=fusion)
        x = torch.randn(5, 48, 12, 13).contiguous(memory_format=torch.channels_last).to(dtype)
        fused = FusedMoDBlock(fold_norms(nn.Sequential(block), x[:1].float())[0]).to(dtype)
        weights = [None if p is None else p.double() for p in fused._parameters.values()]
        for images in (x, x[:1]):
            with torch.no_grad():
                want = images.double()
                in_pytorch(want, *weights, 1, "score", fusion, gate)
                got = fused(images).double()
            off = float((got - want).norm() / want.norm())
            assert off < (4e-7 if dtype == torch.float32 else 2e-2)


def test_a_native_onnx_file_of_what_the_operator_lacks_is_refused_by_name(tmp_path):
    pytest.importorskip("onnxruntime")
    with pytest.raises(ValueError, match="its selector has a bias"):
        pliant.export(network("bias"), tmp_path / "net.onnx", compiled=True)


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["temperature", "gate of the map, soft", "no score"])
def test_native_onnx_files_are_held_against_the_network(variant, tmp_path):
    pytest.importorskip("onnxruntime")
    model = network(variant)
    path = pliant.export(model, tmp_path / "net.onnx", compiled=True, batches=(1, 3))
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(open_export(path)(x), model(x), rtol=1e-3, atol=1e-3)


def test_native_training_has_the_temperature(monkeypatch):
    from pliant.methods.mixture_of_depths.ops import mod_training

    if not mod_training.ready():
        pytest.skip(f"not built: {mod_training._outcome}")
    block = block_of("temperature").train()
    x, found = torch.randn(3, 16, 4, 5), []
    for variant in set(VARIANTS) - {"temperature"}:
        assert block_of(variant).train()._native(x) is None, variant
    optimised = block_of("static").train()
    optimised.selector = optimised.selector.constant()
    assert optimised._native(x) is None
    for name in ("TrainedBlockBackward", "FuseBackward"):
        one, at = copy.deepcopy(block), x.clone().requires_grad_()
        out = one(at)
        assert out.grad_fn.name() == name
        found.append([out, *torch.autograd.grad(out.square().sum(), [at, *one.parameters()])])
        monkeypatch.setattr(mod_training, "unfit", lambda _x: "left out")
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_selections_of_variants_are_counted():
    data = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 1, 0]))]
    for variant in ("static", "gate of the map", "gate of the map, first k"):
        found = selection_frequency(network(variant), data, ["cat", "dog"])
        assert found.counts["layer3.1"].sum(1).tolist() == [32, 32]
    assert found.always("layer2.1").tolist() == list(range(8))


def test_fusable_says_nothing_of_the_papers_block():
    block = block_of("temperature")
    block.core.bn1, block.core.bn2 = nn.Identity(), nn.Identity()
    assert fusable(block) == ""
