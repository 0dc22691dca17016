"""The check of exported files: what it lets through, and what it does not."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

import _export
import pliant
from pliant.deploy.parity import OWN, Parity, ParityError, check_parity, rounding, ties
from pliant.deploy.selections import Result, Selection, rankings, run_eager
from pliant.methods.mixture_of_depths import MoDBlock

FIRST, LAST = "layer1.1.selector", "layer2.1.selector"


class InFloat64(torch.nn.Module):
    """The network in float64, of the same images."""

    def __init__(self, network):
        super().__init__()
        self.network = copy.deepcopy(network).double()

    def forward(self, x):
        return self.network(x.double()).float()


def check(change, *, network=None, tolerance=1e-4, batches=(1, 3), choose=None):
    """Of a file that is the network, its result changed, or its blocks processing other channels."""
    network = network or _export.mod()
    images = [torch.randn(n, 3, 16, 16) for n in batches]

    def run(x):
        return change(run_eager(network, x, choose))

    return check_parity(network, run, images, tolerance, lambda: InFloat64(network))


def untold(result):
    return Result(result.outputs, None)


def told(result, choose):
    """The result of a forward whose blocks chose otherwise, telling what they did."""
    chosen = {path: Selection(s.logits, choose(path, s.logits)) for path, s in result.selections.items()}
    return Result(result.outputs, chosen)


def ranked(network, path, logits):
    return logits.topk(network.get_submodule(path).k, dim=1).indices


def tied(apart=0.0, paths=(FIRST,), **options):
    """A network in which the best two channels of one image have the same scores, or nearly."""
    network = _export.mod(**options)
    image = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(3))
    for path in paths:
        selector, seen = network.get_submodule(path), []
        handle = selector.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        run_eager(network, image)
        handle.remove()
        with torch.no_grad():
            logits, hidden = selector.logits(seen[0])[0], selector.fc1(seen[0].mean((2, 3)))[0].relu()
            best, weight = int(logits.argmax()), selector.fc2.weight
            other = (best + 1) % len(weight)
            # By this image's hidden units, so that other images do not tie.
            weight[other] += hidden * (logits[best] * (1 - apart) - logits[other]) / hidden.square().sum()
    return network, image


def exchanged(network, paths=(FIRST,), ranks=(0, 1)):
    """Lets blocks process the best two channels in each other's place."""

    def choose(path, logits):
        channels = ranked(network, path, logits)
        if path in paths:
            channels[:, list(ranks)] = channels[:, list(ranks)[::-1]]
        return channels

    return choose


def with_first_block(result, change):
    """The result with another selection in its first block."""
    path = next(iter(result.selections))
    return Result(result.outputs, {**result.selections, path: change(result.selections[path])})


def test_the_network_is_itself():
    parity = check(lambda r: r)
    assert parity.holds
    assert (parity.images, parity.selections, parity.batches) == (4, 8, (1, 3))
    assert (parity.max_abs_error, parity.score_error, parity.flips) == (0, 0, 0)


@pytest.mark.parametrize(("off", "holds"), [(1e-6, True), (1e-2, False), (float("nan"), False)])
def test_outputs(off, holds):
    parity = check(lambda r: Result((r.outputs[0] + off,), r.selections))
    assert parity.holds == holds
    if off == off:
        assert parity.max_abs_error == pytest.approx(off, rel=0.2)
    else:
        assert parity.max_rel_error == float("inf")


def test_top1():
    def other_class(r):
        return Result((r.outputs[0].flip(1),), r.selections)

    parity = check(other_class, tolerance=1e9)
    assert parity.top1_differs > parity.top1_ties - 1
    assert not check(other_class).holds


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_rel_error": 2e-3},
        {"max_rel_error": float("nan")},
        {"score_error": 2e-3},
        {"top1_differs": 2},
        {"wrong_selections": 1},
        {"unexplained": 1},
        {"ties": 3},
    ],
    ids=str,
)
def test_each_thing_that_is_wrong_is_enough(wrong):
    right = Parity(
        (1, 2), 4, 1e-3, 1e-4, 1e-4, 1, 1, selections=8, score_error=1e-4, flips=1, wrong_selections=0
    )
    assert right.holds
    assert not replace(right, **wrong).holds


def test_a_top1_that_ties_is_excused_and_counted():
    class Ties(torch.nn.Module):
        def forward(self, x):
            return torch.tensor([[1.0, 1.0, 0.0]]).repeat(len(x), 1)

    def other(r):
        return Result((r.outputs[0] + torch.tensor([0.0, 1e-7, 0.0]),), r.selections)

    parity = check(other, network=Ties())
    assert (parity.top1_differs, parity.top1_ties, parity.holds) == (4, 4, True)


def test_other_channels_are_wrong_where_their_scores_are_apart():
    for order, wrong in (
        ("score", 4),
        ("index", 0),
    ):  # a core that gets them in their own order sees nothing
        network = _export.mod(order=order)
        choose = exchanged(network, ranks=(0, 3))
        parity = check(lambda r, c=choose: told(r, c), network=network, choose=choose)
        assert (parity.images, parity.selections, parity.flips) == (4, 8, 0)
        assert parity.wrong_selections == wrong
        assert parity.max_abs_error == 0  # behind the same channels
        assert parity.holds == (not wrong)


@pytest.mark.parametrize(
    "damage",
    [lambda c: c.clamp(min=99), lambda c: -1 - c, lambda c: c[:, :1].expand(-1, 4)],
    ids=["beyond", "below", "twice"],
)
@pytest.mark.parametrize("order", ["score", "index"])
def test_channels_that_there_are_not_are_wrong(damage, order):
    def change(r):
        return with_first_block(r, lambda s: Selection(s.logits, damage(s.channels)))

    assert check(change, network=_export.mod(order=order)).wrong_selections >= 4


@pytest.mark.parametrize(
    ("off", "where", "excused"),
    [(2e-6, "exchanged", True), (1e-7, "exchanged", False), (2e-6, "another", False)],
)
def test_a_flip_is_excused_within_the_error_of_the_two_scores(off, where, excused):
    """Other scores, off by more, excuse nothing; and what follows a flip is compared as well."""
    network, image = tied(apart=1e-6)
    choose = exchanged(network)
    clean = run_eager(network, image).selections[FIRST]

    def file(wrong=0.0):
        def run(x):
            found = told(run_eager(network, x, choose), choose)
            logits = clean.logits.clone()
            rank = 0 if where == "exchanged" else 3
            logits[0, found.selections[FIRST].channels[0, rank]] += off * logits.abs().max()
            chosen = {**found.selections, FIRST: Selection(logits, found.selections[FIRST].channels)}
            return Result((found.outputs[0] + wrong,), chosen)

        return check_parity(network, run, [image], 1e-4, lambda: InFloat64(network))

    parity = file()
    assert (parity.flips, parity.wrong_selections) == ((1, 0) if excused else (0, 1))
    assert (parity.images, parity.selections, parity.max_abs_error) == (1, 2, 0)
    assert parity.score_error == pytest.approx(off, rel=0.6)
    assert parity.holds == excused
    wrong = file(wrong=1.0)
    assert not wrong.holds
    assert (wrong.flips, wrong.max_abs_error) == (parity.flips, pytest.approx(1, rel=1e-3))


def test_scores_that_are_off_do_not_excuse_a_flip():
    def scramble(selection):
        logits = selection.logits + torch.randn_like(selection.logits)
        return Selection(logits, logits.topk(selection.channels.shape[1], dim=1).indices)

    parity = check(lambda r: with_first_block(r, scramble))
    assert parity.wrong_selections >= 4
    assert parity.score_error > 0.01
    assert not parity.holds


def test_of_a_silent_selector_any_channels_are_right_and_are_compared():
    """All its scores are zero; the file may process others, and then what it makes of those counts."""
    network = _export.mod()
    torch.nn.init.zeros_(network.layer1[1].selector.fc2.weight)

    def choose(path, logits):
        channels = ranked(network, path, logits)
        return logits.shape[1] - 1 - channels if path == FIRST else channels

    parity = check(lambda r: told(r, choose), network=network, choose=choose)
    assert (parity.images, parity.flips, parity.wrong_selections) == (4, 4, 0)
    assert parity.max_rel_error == 0
    assert parity.holds
    # The same selection told of a file that processed the first ones.
    parity = check(lambda r: told(r, choose), network=network)
    assert parity.flips == 4
    assert parity.max_rel_error > 1e-3
    assert not parity.holds


# --- files that do not tell their selections -----------------------------------------------------------


def test_a_file_that_does_not_tell_is_held_by_its_outputs():
    parity = check(untold)
    assert parity.holds
    assert (parity.images, parity.selections, parity.told, parity.unexplained) == (4, 0, False, 0)
    assert str(parity).endswith("the file does not tell its selections")
    for off in (1e-3, 1, float("nan")):
        parity = check(lambda r, off=off: Result((r.outputs[0] + off,), None))
        assert (parity.images, parity.flips, parity.unexplained) == (4, 0, 4)
        assert not parity.holds


def without_ties(network):
    """Two images that do not tie: another of the few hidden units is active for them."""
    generator = torch.Generator().manual_seed(5)
    colours = 3 * torch.randn(64, 3, 1, 1, generator=generator)
    images = torch.randn(64, 3, 16, 16, generator=generator) + colours
    selections = run_eager(network, images).selections
    found = rankings(network).items()
    tie = torch.stack([ties(selections[path].logits, r.k, r.by_index, 1e-5) for path, r in found])
    return images[~tie.any(0)][:2]


@pytest.mark.parametrize(
    ("paths", "options"),
    [
        ((FIRST,), {}),
        ((FIRST, LAST), {}),
        ((FIRST,), {"c": 16}),  # of one channel: it changes places with one that is not selected
        ((FIRST,), {"c": 16, "order": "index"}),
    ],
)
@pytest.mark.parametrize("wrong", [0.0, 1e-2])
def test_images_whose_scores_tie_may_differ_and_are_counted(paths, options, wrong):
    """An image without a tie may not, however many tie beside it."""
    network, image = tied(paths=paths, **options)

    def choose(path, logits):
        k = network.get_submodule(path).k
        channels = logits.topk(k + 1, dim=1).indices
        if path in paths:
            channels[:, :2] = channels[:, :2].flip(1)
        return channels[:, :k]

    def run(x):
        outputs = run_eager(network, x).outputs[0] + wrong
        other = run_eager(network, x[-1:], choose).outputs[0]
        assert (other - outputs[-1:]).abs().max() > 5e-4
        outputs[-1:] = other
        return Result((outputs,), None)

    images = [torch.cat((without_ties(network), image)), image]
    parity = check_parity(network, run, images, 1e-4, lambda: InFloat64(network))
    assert (parity.images, parity.selections, parity.flips, parity.ties) == (4, 0, 0, 2)
    assert 0 < parity.score_error < 1e-5
    assert parity.unexplained == (2 if wrong else 0)
    assert parity.holds == (not wrong)
    said = f"other outputs for {4 if wrong else 2} images, 2 of them with scores that tie"
    assert said in str(parity)
    if not wrong:
        assert parity.max_rel_error < 1e-6  # of the images that are compared


def test_a_file_all_of_whose_images_tie_is_not_shown_to_be_the_network():
    network, image = tied()
    parity = check_parity(
        network,
        lambda x: Result((torch.zeros(len(x), 5),), None),
        [image],
        1e-4,
        lambda: InFloat64(network),
    )
    assert (parity.ties, parity.unexplained) == (1, 0)
    assert not parity.holds
    assert "too many to tell whether it is the network" in str(parity)


def test_no_number_is_no_tie():
    network, image = tied()
    parity = check_parity(
        network,
        lambda x: Result((torch.full((len(x), 5), torch.nan),), None),
        [image],
        1e-4,
        lambda: InFloat64(network),
    )
    assert (parity.ties, parity.unexplained, parity.holds) == (0, 1, False)


def test_scores_that_are_apart_are_no_tie():
    network, image = tied(apart=1e-3)
    choose = exchanged(network)
    parity = check_parity(
        network, lambda x: untold(run_eager(network, x, choose)), [image], 1e-4, lambda: InFloat64(network)
    )
    assert (parity.ties, parity.unexplained) == (0, 1)
    assert not parity.holds


def test_the_error_of_scores_is_measured_behind_the_same_selections():
    network, image = tied()
    noise = rounding(network, InFloat64(network), image).scores
    assert set(noise) == {FIRST, LAST}
    assert all(1e-9 < n < 1e-5 for n in noise.values())
    # In a network whose scores are another's, it is as large as they are.
    assert rounding(network, InFloat64(_export.mod(reduction=4)), image).scores[FIRST] > 0.1


def test_a_network_of_no_numbers_is_refused():
    with pytest.raises(ValueError, match="own outputs are not finite"):
        check(lambda r: r, network=torch.nn.Threshold(1e9, float("inf")))


def test_another_shape_is_an_error():
    with pytest.raises(ValueError, match=r"the file gives \(1, 4\), the network \(1, 5\)"):
        check(lambda r: Result((r.outputs[0][:, 1:],), r.selections))
    with pytest.raises(ValueError, match="the file gives 2 outputs, the network 1"):
        check(lambda r: Result((*r.outputs, r.outputs[0]), r.selections))


@pytest.mark.parametrize("where", ["core", "selector"])
def test_a_wrong_file_is_an_error_with_the_numbers_and_leaves_nothing(tmp_path, monkeypatch, where):
    path = tmp_path / "net.pt2"
    path.write_text("an older file")

    def tampered(self, target, batch):
        layer = self.core[-2] if where == "core" else self.selector.fc2
        if self.channels == 24:  # the last one: nothing is selected behind it
            layer.weight.data.mul_(-1.01)
        return self

    monkeypatch.setattr(MoDBlock, "export_form", tampered)
    with pytest.raises(ParityError, match=r"net.pt2 is not written.*largest error \d") as caught:
        pliant.export(_export.mod(), path, batches=(2,))
    parity = caught.value.parity
    assert not parity.holds
    if where == "core":
        assert parity.max_rel_error > 1e-3
    else:
        assert parity.wrong_selections > 0
    assert [p.name for p in tmp_path.iterdir()] == ["net.pt2"]
    assert path.read_text() == "an older file"


class Cancels(torch.nn.Module):
    """A network whose float32 is far from float64: it subtracts what it has added."""

    def __init__(self, much=1e3):
        super().__init__()
        self.much, self.fc = much, torch.nn.Linear(3 * 16 * 16, 5)

    def forward(self, x):
        return (self.fc(x.flatten(1)) + self.much) - self.much


def rounded_otherwise(network, factor):
    """A file that is as far from the network as `factor` times its own error in float32."""
    exact = copy.deepcopy(network).double()

    def run(x):
        with torch.no_grad():
            y, true = network(x), exact(x.double()).float()
            return Result((y + factor * (true - y),), {})

    return run


@pytest.mark.parametrize(
    ("much", "factor", "follow", "holds"),
    [
        (1e3, 1, True, True),  # another rounding
        (1e3, 1, False, False),  # by a tolerance that the caller gave
        (1e3, -50, True, False),  # no rounding
        (1e7, 0.5, True, False),  # rounding that leaves nothing to compare
        (0, 1, True, True),
    ],
)
def test_the_bound_follows_how_far_rounding_moves_the_network(much, factor, follow, holds):
    torch.manual_seed(0)
    network = Cancels(much).eval()
    run = rounded_otherwise(network, factor)
    x = torch.randn(4, 3, 16, 16)
    parity = check_parity(network, run, [x], 1e-5, lambda: InFloat64(network), follow)
    assert parity.holds == holds
    if much == 1e3 and follow:
        assert parity.own_error > 1e-5
        assert parity.tolerance == pytest.approx(OWN * parity.own_error)
        assert "times what rounding alone moves the network by" in str(parity)
    else:
        assert (parity.own_error, parity.tolerance) == (0, 1e-5) or much == 1e7


@pytest.mark.parametrize("factor", [1, 100])
def test_scores_follow_it_too(factor):
    """A selector whose logits are what is left of large numbers."""
    network = _export.mod()
    selector, logits = network.get_submodule(LAST), network.get_submodule(LAST).logits
    selector.logits = lambda x: (logits(x) + 1e3) - 1e3
    other = InFloat64(network)
    exact = other.network.get_submodule(LAST)
    exact.logits = type(exact).logits.__get__(exact)

    def run(x):
        found, true = run_eager(network, x), run_eager(other, x).selections[LAST].logits.float()
        seen = found.selections[LAST].logits
        told = Selection(seen + factor * (true - seen), found.selections[LAST].channels)
        return Result(found.outputs, {**found.selections, LAST: told})

    x = torch.randn(3, 3, 16, 16)
    parity = check_parity(network, run, [x], 1e-6, lambda: other)
    assert parity.own_error > 1e-6
    assert parity.holds == (factor == 1)
