"""The check of exported files: what it lets through, and what it does not."""

from __future__ import annotations

import pytest
import torch

import _export
import pliant
from pliant.deploy.forms import ProgramMoD
from pliant.deploy.parity import ParityError, Result, Selection, check_parity, run_eager

NONE = frozenset()


def shifted(network, change):
    """Runs the network, its result changed."""

    def run(images):
        return change(run_eager(network, images))

    return run


def check(change, *, network=None, tolerance=1e-4, by_index=NONE, batches=(1, 3)):
    network = network or _export.mod()
    images = [torch.randn(n, 3, 16, 16) for n in batches]
    return check_parity(network, shifted(network, change), images, tolerance, by_index)


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


def test_a_top1_that_ties_is_excused_and_counted():
    class Ties(torch.nn.Module):
        def forward(self, x):
            return torch.tensor([[1.0, 1.0, 0.0]]).repeat(len(x), 1)

    def other(r):
        return Result((r.outputs[0] + torch.tensor([0.0, 1e-7, 0.0]),), r.selections)

    parity = check(other, network=Ties())
    assert (parity.top1_differs, parity.top1_ties, parity.holds) == (4, 4, True)


def test_other_channels_are_wrong_where_their_scores_are_apart():
    def swap(selection):
        other = selection.channels.clone()
        other[:, [0, -1]] = other[:, [-1, 0]]
        return Selection(selection.logits, other)

    parity = check(lambda r: with_first_block(r, swap))
    assert parity.wrong_selections == 4
    assert parity.flips == parity.images == 0
    assert not parity.holds
    # A core that gets its channels in their own order does not see it.
    parity = check(lambda r: with_first_block(r, swap), by_index=frozenset({"layer1.1"}))
    assert parity.wrong_selections == parity.flips == 0
    assert parity.holds


def test_a_flip_within_the_error_of_the_scores_is_excused_and_ends_the_comparison():
    network = _export.mod()

    class Close(torch.nn.Module):
        """The selector's logits, the first two so near that rounding may exchange them."""

        def forward(self, x):
            return network(x)

    selector = network.layer1[1].selector
    true_logits = selector.logits

    def near(x):
        logits = true_logits(x).clone()
        best = logits.topk(2, dim=1)
        return logits.scatter(1, best.indices[:, 1:], best.values[:, :1] - 1e-6)

    selector.logits = near

    def flip(selection):
        logits, channels = selection.logits.clone(), selection.channels.clone()
        channels[:, [0, 1]] = channels[:, [1, 0]]
        first = channels[:, :1]
        logits.scatter_(1, first, logits.gather(1, first) + 2e-6)
        return Selection(logits, channels)

    def of_the_first_image(r):
        flipped = with_first_block(r, flip)
        path = next(iter(r.selections))
        keep, new = r.selections[path], flipped.selections[path]
        mixed = Selection(*(torch.cat((n[:1], k[1:])) for n, k in zip(new, keep, strict=True)))
        outputs = r.outputs[0].clone()
        outputs[0] += 100  # behind the flip everything is another
        return Result((outputs,), {**r.selections, path: mixed})

    parity = check(of_the_first_image, network=network)
    assert (parity.flips, parity.wrong_selections, parity.images) == (2, 0, 2)
    assert parity.holds
    assert parity.max_abs_error == 0
    assert 0 < parity.score_error < 1e-4


def test_scores_that_are_off_do_not_excuse_a_flip():
    def scramble(selection):
        logits = selection.logits + torch.randn_like(selection.logits)
        return Selection(logits, logits.topk(selection.channels.shape[1], dim=1).indices)

    parity = check(lambda r: with_first_block(r, scramble))
    assert parity.wrong_selections == 4
    assert parity.score_error > 0.01
    assert not parity.holds


def test_ties_for_all_images_are_said(tmp_path):
    """Of a silent selector all scores are zero, and any channels are right."""
    network = _export.mod()
    for block in (network.layer1[1], network.layer2[1]):
        torch.nn.init.zeros_(block.selector.fc2.weight)

    def last_ones(r):
        def other(s):
            return Selection(s.logits, s.logits.shape[1] - 1 - s.channels)

        return with_first_block(r, other)

    parity = check(last_ones, network=network)
    assert (parity.images, parity.flips, parity.wrong_selections) == (0, 4, 0)
    assert not parity.holds
    assert "scores of selectors tie for every image" in str(parity)


def test_an_engine_that_does_not_tell_its_selections_is_held_by_outputs():
    assert check(lambda r: Result(r.outputs, None)).holds
    assert not check(lambda r: Result((r.outputs[0] + 1,), None)).holds


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
    init = ProgramMoD.__init__

    def tampered(self, block):
        init(self, block)
        layer = self.core[-2] if where == "core" else self.selector.fc2
        if self.channels == 24:  # the last one: nothing is selected behind it
            layer.weight.data.mul_(-1.01)

    monkeypatch.setattr(ProgramMoD, "__init__", tampered)
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
