"""Surgery: what is replaced, what is refused, and what a converted network can do."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import dataclass
from typing import ClassVar

import pytest
import timm
import torch
from torch import nn

from pliant import MixtureOfDepths, convert, plan
from pliant.anatomy import Block, stages
from pliant.measuring.macs import count_macs, count_parameters
from pliant.methods.mixture_of_depths import MoDBlock
from pliant.surgery import Method, PassedOver, Site, Survey, conversions
from pliant.threaded import thread, threaded

SELECTIONS = ("learned", "random", "fixed", "first", "none")
NARROW = {"channels": (16, 32, 64, 128)}


def small(name="resnet18_cifar", **kwargs) -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model(name, **NARROW, **kwargs).eval()


def converted(selection="learned", **options) -> nn.Module:
    """A narrow network with one Mixture-of-Depths block in each stage."""
    return convert(small(), MixtureOfDepths(c=4, reduction=4, selection=selection, **options))


def snapshot(model):
    """Everything that a surgery could change: types, weights by identity and value, modes."""
    return (
        {name: (id(m), type(m), m.training) for name, m in model.named_modules()},
        {name: (id(p), p.detach().clone()) for name, p in model.state_dict(keep_vars=True).items()},
        sorted(vars(model)),
    )


def assert_untouched(model, before):
    now = snapshot(model)
    assert now[0] == before[0]
    assert now[2] == before[2]
    assert now[1].keys() == before[1].keys()
    for name, (identity, value) in now[1].items():
        assert identity == before[1][name][0]
        assert torch.equal(value, before[1][name][1])


# --- toy methods: a run of blocks with a threaded value, and one that takes blocks -----------


class Counted(Block):
    """A block that passes on what the first of them saw."""

    def __init__(self, block: nn.Module, channels: int) -> None:
        super().__init__(channels)
        self.block = block

    def forward(self, x):
        value = threaded(x, "mean")
        value = x.mean() if value is None else value
        return thread(self.block(x) + value, "mean", value)


class Run(nn.Sequential):
    """What a stage becomes."""


@dataclass(frozen=True, kw_only=True)
class ShareTheMean(Method):
    """Thread a value along all blocks; the sites are runs of blocks."""

    wraps: ClassVar[tuple[str, ...]] = ("MixtureOfDepths",)
    stages: tuple[int, ...] | None = None

    def survey(self, model: nn.Module) -> Survey:
        found = list(enumerate(stages(model)))
        return Survey(
            tuple(
                Site(s.path, {"blocks": len(s.blocks)})
                for n, s in found
                if not self.stages or n in self.stages
            ),
            tuple(
                PassedOver(s.path, "not asked for")
                for n, s in found
                if self.stages and n not in self.stages
            ),
        )

    def replace(self, module: nn.Module, site: Site) -> nn.Module:
        run = Run()
        for name, block in module.named_children():
            run.add_module(name, Counted(block, 0))
        return run


@dataclass(frozen=True, kw_only=True)
class Selfish(ShareTheMean):
    """The same, but it cannot hold what another method made."""

    wraps: ClassVar[tuple[str, ...]] = ()


@dataclass(frozen=True, kw_only=True)
class Broken(Method):
    """Fails on its second site, as a method with a mistake would."""

    def survey(self, model: nn.Module) -> Survey:
        return Survey((Site("layer1.1"), Site("layer2.1")))

    def replace(self, module: nn.Module, site: Site) -> nn.Module:
        if site.path == "layer2.1":
            raise ValueError("layer2.1 does not fit")
        return nn.Identity()


@dataclass(frozen=True, kw_only=True)
class Nested(Method):
    """Names one site inside another, or one twice."""

    paths: tuple[str, ...] = ("layer1", "layer1.1")

    def survey(self, model: nn.Module) -> Survey:
        return Survey(tuple(Site(path) for path in self.paths))

    def replace(self, module: nn.Module, site: Site) -> nn.Module:
        return nn.Identity()


# --- copy, in place, errors -----------------------------------------------------------------


@pytest.mark.parametrize("selection", SELECTIONS)
def test_convert_copies(selection):
    model = small()
    before = snapshot(model)
    new = convert(model, MixtureOfDepths(c=4, selection=selection))
    assert new is not model
    assert_untouched(model, before)
    assert not {id(p) for p in new.parameters()} & {id(p) for p in model.parameters()}
    kept = {n: p for n, p in new.state_dict().items() if not n.startswith(tuple(conversions(new)[0].sites))}
    assert kept
    assert all(torch.equal(p, model.state_dict()[name]) for name, p in kept.items())


def test_convert_in_place():
    model = small()
    untouched = model.layer1[0]
    assert convert(model, MixtureOfDepths(c=4), inplace=True) is model
    assert model.layer1[0] is untouched
    assert isinstance(model.layer1[1], MoDBlock)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ((), "no method given; pass one"),
        (
            (MixtureOfDepths,),
            r"MixtureOfDepths'> is no method; pass an instance, for example MixtureOfDepths\(\)",
        ),
        ((None,), r"None is no method; pass an instance, for example MixtureOfDepths\(\)"),
        (
            (Nested(paths=("",)),),
            "Nested would replace the whole network, a ResNet; put it into a container",
        ),
        ((MixtureOfDepths(c=17),), r"layer1\.1: C = 16 channels with c = 17 leave k = 0"),
        ((MixtureOfDepths(stages=(9,)),), "stages holds 9"),
        # The first fits, the second does not: nothing may be left of the first.
        ((MixtureOfDepths(c=4, stages=(0,)), MixtureOfDepths(c=4, stages=(9,))), "stages holds 9"),
        ((MixtureOfDepths(c=4), MixtureOfDepths(c=4)), "MixtureOfDepths matches nothing"),
        ((Broken(),), r"layer2\.1 does not fit"),
        ((Nested(),), r"Nested names the site layer1\.1 twice, or one inside another"),
        (
            (Nested(paths=("layer1", "layer1")),),
            "Nested names the site layer1 twice, or one inside another",
        ),
    ],
)
def test_an_error_leaves_the_model_untouched(methods, message, inplace):
    model = small()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        convert(model, *methods, inplace=inplace)
    assert_untouched(model, before)
    with pytest.raises(ValueError, match=message):
        plan(model, *methods)
    assert_untouched(model, before)


def test_the_same_method_twice_is_refused_and_says_why():
    with pytest.raises(
        ValueError, match=r"(?s)matches nothing.*layer1\.1: no Mixture-of-Depths core for a .*MoDBlock"
    ):
        convert(converted(), MixtureOfDepths(c=4))


def test_the_same_method_on_other_stages_is_welcome():
    model = convert(small(), MixtureOfDepths(c=2, stages=(0,)), MixtureOfDepths(c=8, stages=(3,)))
    assert [c.sites for c in conversions(model)] == [("layer1.1",), ("layer4.1",)]
    assert (model.layer1[1].k, model.layer4[1].k) == (8, 16)


@pytest.mark.parametrize("train", [False, True])
def test_mode_dtype_and_grad_are_kept(train):
    model = small().double().train(train)
    model.layer1.eval()  # frozen statistics of one stage
    new = convert(model, MixtureOfDepths(c=4))
    assert {m.training for m in new.layer1[1].modules()} == {False}
    assert {m.training for m in new.layer2[1].modules()} == {train}
    assert {p.dtype for p in new.parameters()} == {torch.double}
    assert all(p.requires_grad for p in new.parameters())


def test_conversions_are_recorded():
    method = MixtureOfDepths(c=4)
    model = small()
    assert conversions(model) == ()
    (done,) = conversions(convert(model, method))
    assert done.method == method
    assert done.sites == ("layer1.1", "layer2.1", "layer3.1", "layer4.1")
    assert not done.named
    (named,) = conversions(small("resnet18_cifar_mod", c=4))
    assert named.named
    assert named.method == MixtureOfDepths(c=4)
    again = convert(small("resnet18_cifar_mod", c=4), ShareTheMean())
    assert [(c.method.name, c.named) for c in conversions(again)] == [
        ("MixtureOfDepths", True),
        ("ShareTheMean", False),
    ]


# --- composition --------------------------------------------------------------------------------


def test_a_method_that_wraps_may_come_second():
    model = convert(small(), MixtureOfDepths(c=4), ShareTheMean())
    assert isinstance(model.layer1, Run)
    assert isinstance(model.layer1[1].block, MoDBlock)
    assert model(torch.zeros(2, 3, 16, 16)).shape == (2, 10)
    assert [c.method.name for c in conversions(model)] == ["MixtureOfDepths", "ShareTheMean"]


@pytest.mark.parametrize(
    ("wrapper", "message"),
    [
        (ShareTheMean, "apply MixtureOfDepths first, then ShareTheMean"),
        (Selfish, "MixtureOfDepths matches nothing"),
    ],
)
def test_a_method_that_wraps_may_not_come_first(wrapper, message):
    model = small()
    before = snapshot(model)
    # Its blocks are no longer the family's own, so nothing is there to convert.
    with pytest.raises(ValueError, match=message):
        convert(model, wrapper(), MixtureOfDepths(c=4), inplace=True)
    # And where a method would find them inside, the overlap is refused.
    with pytest.raises(
        ValueError, match=r"Broken at layer1\.1 overlaps \w+ at layer1, which was applied before"
    ):
        convert(model, wrapper(), Broken(), inplace=True)
    assert_untouched(model, before)


def test_a_method_that_does_not_wrap_is_refused():
    with pytest.raises(
        ValueError, match=r"Selfish at layer1 overlaps MixtureOfDepths at layer1\.1.*apply Selfish first"
    ):
        convert(small(), MixtureOfDepths(c=4), Selfish())
    # Other stages are no overlap.
    model = convert(small(), MixtureOfDepths(c=4, stages=(0,)), Selfish(stages=(3,)))
    assert isinstance(model.layer4, Run)


def test_what_a_backbone_went_through_counts():
    net = nn.ModuleDict({"backbone": small("resnet18_cifar_mod", c=4)})
    with pytest.raises(
        ValueError, match=r"Selfish at backbone\.layer1 overlaps MixtureOfDepths at backbone\.layer1\.1"
    ):
        convert(net, Selfish())
    assert isinstance(convert(net, ShareTheMean())["backbone"].layer1, Run)


def test_what_features_only_took_over_counts():
    features = small("resnet18_cifar_mod", c=4, features_only=True)
    (done,) = conversions(features)
    assert done.named
    assert done == conversions(small("resnet18_cifar_mod", c=4))[0]
    with pytest.raises(ValueError, match=r"Selfish at layer1 overlaps MixtureOfDepths at layer1\.1"):
        convert(features, Selfish())
    first = small("resnet18_cifar_mod", c=4, features_only=True, out_indices=(0, 1))
    assert conversions(first)[0].sites == ("layer1.1",)


def test_wrapping_twice_is_refused():
    with pytest.raises(ValueError, match="ShareTheMean at layer1 overlaps ShareTheMean at layer1"):
        convert(small(), ShareTheMean(), ShareTheMean())


# --- threading ------------------------------------------------------------------------------------


def test_a_threaded_value_reaches_all_blocks_and_is_stored_nowhere():
    plain = nn.Sequential(*(timm.models.resnet.BasicBlock(8, 8) for _ in range(3))).eval()
    run = convert(nn.ModuleDict({"stage": plain}), ShareTheMean())["stage"]
    x = torch.randn(2, 8, 4, 4)
    attributes = {name: sorted(vars(m)) for name, m in run.named_modules()}
    with torch.no_grad():
        out = run(x)
        expected = x
        for block in plain:
            expected = block(expected) + x.mean()
        torch.testing.assert_close(out, expected)
        assert torch.equal(threaded(out, "mean"), x.mean())
        # A value that comes with the input is used in place of an own one.
        other = run(thread(x.clone(), "mean", torch.tensor(2.0)))
    assert threaded(other, "mean") == 2
    assert not torch.allclose(other, out)
    assert {name: sorted(vars(m)) for name, m in run.named_modules()} == attributes


def test_state_dict_keys_of_a_converted_network():
    keys = [key for key in converted().state_dict() if key.startswith("layer1.1.")]
    core = [f"layer1.1.core.{name}" for name in ("conv1.weight", "conv2.weight")]
    norms = [
        f"layer1.1.core.bn{n}.{what}"
        for n in (1, 2)
        for what in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    ]
    selector = ["layer1.1.selector.fc1.weight", "layer1.1.selector.fc2.weight"]
    assert sorted(keys) == sorted(core + norms + selector)


@pytest.mark.parametrize("selection", SELECTIONS)
def test_a_forward_stores_nothing(selection):
    model = converted(selection).train()
    model(torch.randn(2, 3, 16, 16)).sum().backward()
    assert {key for m in model.modules() for key in vars(m)} == {
        key for m in converted(selection).modules() for key in vars(m)
    }
    copy.deepcopy(model)  # a stored tensor of the graph could not be copied


# --- what a converted network can do -----------------------------------------------------------------


@pytest.mark.parametrize("selection", SELECTIONS)
def test_copies_and_pickles(selection):
    model = converted(selection)
    x = torch.randn(2, 3, 16, 16)

    def run(network):
        torch.manual_seed(1)
        with torch.no_grad():
            return network(x)

    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    again = {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(stored, weights_only=False),
    }
    for how, network in again.items():
        assert torch.equal(run(network), run(model)), how
        assert conversions(network) == conversions(model), how


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.double])
def test_moves(selection, dtype):
    model = converted(selection).to(dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    with torch.no_grad():
        assert model(torch.randn(2, 3, 16, 16, dtype=dtype)).dtype == dtype
        meta = model.to("meta")(torch.empty(5, 3, 32, 32, dtype=dtype, device="meta"))
    assert meta.shape == (5, 10)
    assert meta.is_meta


def test_converting_on_meta_and_in_half():
    with torch.device("meta"):
        model = timm.create_model("resnet50")
    assert all(p.is_meta for p in convert(model, MixtureOfDepths()).parameters())
    half = convert(small().bfloat16(), MixtureOfDepths(c=4))
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("selection", SELECTIONS)
def test_channels_last(selection):
    model = converted(selection)
    x = torch.randn(2, 3, 16, 16)
    torch.manual_seed(1)
    with torch.no_grad():
        plain = model(x)
        torch.manual_seed(1)
        last = model.to(memory_format=torch.channels_last)(x.to(memory_format=torch.channels_last))
        torch.testing.assert_close(last, plain, rtol=1e-4, atol=1e-5)
        features = model.layer1[1](torch.randn(2, 16, 8, 8).to(memory_format=torch.channels_last))
    if selection != "none":
        assert features.is_contiguous(memory_format=torch.channels_last), "the layout is kept"


def test_memory_format_is_kept():
    for wanted in (torch.channels_last, torch.contiguous_format):
        new = convert(small().to(memory_format=wanted), MixtureOfDepths(c=4))
        assert all(p.is_contiguous(memory_format=wanted) for p in new.parameters() if p.dim() == 4)
        assert new.layer1[1].core.conv1.weight.shape[2:] == (3, 3), "where the two differ"


def test_new_parts_learn_in_a_frozen_network():
    new = convert(small().requires_grad_(False), MixtureOfDepths(c=4))
    assert {p.requires_grad for p in new.layer1[1].parameters()} == {True}
    assert {p.requires_grad for p in new.layer1[0].parameters()} == {False}


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("fusion", ["first", "original"])
def test_compiles_without_a_break_and_only_once(selection, fusion):
    torch._dynamo.reset()
    model = converted(selection, fusion=fusion)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        for n in range(2):
            x = torch.randn(2, 3, 16, 16)
            torch.manual_seed(n)
            plain = model(x)
            torch.manual_seed(n)
            if n == 0:
                assert torch.equal(compiled(x), plain)
            else:
                with torch.compiler.set_stance("fail_on_recompile"):
                    assert torch.equal(compiled(x), plain)
    torch._dynamo.reset()


def test_a_threaded_network_compiles_and_trains():
    torch._dynamo.reset()
    model = convert(small(), MixtureOfDepths(c=4, reduction=4), ShareTheMean()).train()
    x = torch.randn(4, 3, 16, 16)
    eager = copy.deepcopy(model)
    torch.compile(model, backend="eager", fullgraph=True)(x).sum().backward()
    eager(x).sum().backward()
    for (name, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, msg=name)
    torch._dynamo.reset()


@pytest.mark.parametrize("selection", SELECTIONS)
def test_exports_with_a_dynamic_batch(selection):
    model = converted(selection)
    batch = torch.export.Dim("batch", min=1, max=64)
    program = torch.export.export(
        model, (torch.randn(2, 3, 16, 16),), dynamic_shapes={"x": {0: batch}}
    ).module()
    x = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        torch.manual_seed(0)
        plain = model(x)
        torch.manual_seed(0)
        torch.testing.assert_close(program(x), plain, rtol=1e-5, atol=1e-6)


# --- the plan --------------------------------------------------------------------------------------------


def test_plan_counts_are_those_of_the_converted_network():
    model = small()
    for method in (
        MixtureOfDepths(c=4),
        MixtureOfDepths(selection="none"),
        MixtureOfDepths(c=2, blocks="all"),
    ):
        before = snapshot(model)
        made = plan(model, method)
        assert_untouched(model, before)
        real = convert(model, method)
        assert made.parameters == (count_parameters(model), count_parameters(real))
        assert made.input_size == (3, 32, 32)
        assert made.macs == (count_macs(model, (3, 32, 32)), count_macs(real, (3, 32, 32)))
        assert made.macs[1] < made.macs[0]
    other = plan(model, method, input_size=(3, 64, 64))
    assert other.input_size == (3, 64, 64)
    assert other.macs[0] == count_macs(model, (3, 64, 64))


def test_plan_of_two_methods_counts_both():
    method = MixtureOfDepths(c=4)
    made = plan(small(), method, ShareTheMean(stages=(1,)))
    assert [(r.method, r.path, r.before, r.after) for r in made.replacements] == [
        ("MixtureOfDepths", "layer1.1", "BasicBlock", "MoDBlock"),
        ("MixtureOfDepths", "layer2.1", "BasicBlock", "MoDBlock"),
        ("MixtureOfDepths", "layer3.1", "BasicBlock", "MoDBlock"),
        ("MixtureOfDepths", "layer4.1", "BasicBlock", "MoDBlock"),
        ("ShareTheMean", "layer2", "Sequential", "Run"),
    ]
    assert ("ShareTheMean", PassedOver("layer1", "not asked for")) in made.passed_over


def test_printed_plan_mentions_every_block():
    model = timm.create_model("resnet50")
    text = str(plan(model, MixtureOfDepths(c=64)))
    lines = text.splitlines()
    assert lines[0] == "layer1.1: Bottleneck -> MoDBlock (C=256, c=64, k=4, hidden=16)"
    assert "  layer1.0: a stage's first block stays" in lines
    assert "  layer1.2: an even block stays" in lines
    for stage in stages(model):
        for block in stage.blocks:
            assert sum(line.strip().startswith(f"{block.path}:") for line in lines) == 1, block.path
    assert "parameters: 25,557,032 -> 18,105,949 (70.8%)" in lines
    assert "MACs at 3x224x224: 4,089,184,256 -> 2,561,987,008 (62.7%)" in lines
    assert lines[-1].startswith("note: the new blocks are narrow and start fresh")
    for quiet in (MixtureOfDepths(zero_init_last=True), MixtureOfDepths(selection="none")):
        assert "note:" not in str(plan(model, quiet))


def test_plan_without_a_known_input_size():
    stage = nn.Sequential(*(timm.models.resnet.BasicBlock(16, 16) for _ in range(2)))
    made = plan(stage, MixtureOfDepths(c=4))
    assert made.macs is None
    assert "MACs: not counted (the network does not say its input size)" in str(made)
    counted = plan(stage, MixtureOfDepths(c=4), input_size=(16, 8, 8))
    assert counted.macs[0] == 4 * 16 * 16 * 9 * 64


def test_plan_needs_no_weights():
    """It plans on a copy without weights: nothing real is allocated for the new blocks."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and not out.is_meta:
                Largest.seen = max(Largest.seen, out.numel())
            return out

    model = small()
    with Largest():
        plan(model, MixtureOfDepths(c=4))
    assert Largest.seen < 64
