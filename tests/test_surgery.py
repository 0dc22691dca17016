"""Surgery: what is replaced, what is refused, and what is left untouched."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import timm
import torch
from torch import nn

from _surgery import SELECTIONS, Run, ShareTheMean, assert_untouched, converted, small, snapshot
from pliant import MixtureOfDepths, convert, plan
from pliant.method import Method, Site, Survey
from pliant.methods.mixture_of_depths import MoDBlock
from pliant.surgery import conversions
from pliant.threaded import thread, threaded


@dataclass(frozen=True, kw_only=True)
class Selfish(ShareTheMean):
    """The same, but it cannot hold what another method made."""

    wraps: ClassVar[bool] = False


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
        ValueError,
        match=r"Broken (at layer1\.1 overlaps Selfish at layer1|goes inside the blocks of Share\w+)",
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
