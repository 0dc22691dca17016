"""Training at both depths: the terms of Algorithm 1, and what they reach."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F

import pliant
from _objectives import TERMS, adaptive, images, kl
from pliant.methods.adaptive_depth import Joint, Specialization, SwitchableNorm
from pliant.methods.adaptive_depth.depth import subnet
from pliant.methods.adaptive_depth.passes import BothPasses, run_both
from pliant.objectives import Feature, channel_dim, divergence


def tiny_vit():
    vit = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=8, num_heads=2, num_classes=5
    )
    return pliant.convert(vit, pliant.AdaptiveDepth(groups=2))


def logs(*shares):
    """What a softmax turns into these shares."""
    return torch.tensor(shares).log()


def maps(*positions):
    """A map [1, C, 1, W] of distributions, one a position."""
    return torch.stack([logs(*p) for p in positions], 1)[None, :, None]


def passes(teacher, student, dim=1, logits=None):
    logits = logits or (torch.zeros(len(teacher), 2), torch.zeros(len(teacher), 2))
    return BothPasses(*logits, {0: Feature(teacher, dim)}, {0: Feature(student, dim)})


# --- the divergence -------------------------------------------------------------------------------


def test_divergence_is_the_one_by_hand_averaged_over_positions():
    p, q = [(0.75, 0.25), (0.9, 0.1)], [(0.5, 0.5), (0.2, 0.8)]
    by_hand = (kl(p[0], q[0]) + kl(p[1], q[1])) / 2
    assert by_hand == pytest.approx(0.638269, abs=1e-6)
    assert float(divergence(maps(*p), maps(*q))) == pytest.approx(by_hand, rel=1e-5)
    # It is not symmetric: the super-net's distribution comes first.
    assert float(divergence(maps(*q), maps(*p))) == pytest.approx(
        (kl(q[0], p[0]) + kl(q[1], p[1])) / 2, rel=1e-5
    )
    assert float(divergence(maps(*p), maps(*p))) == pytest.approx(0, abs=1e-7)


def test_divergence_does_not_depend_on_how_many_images_and_positions_there_are():
    p, q = torch.randn(2, 6, 3, 4), torch.randn(2, 6, 3, 4)
    once = divergence(p, q)
    tiled = divergence(p.repeat(1, 1, 2, 2), q.repeat(1, 1, 2, 2))
    assert float(tiled) == pytest.approx(float(once), rel=1e-6)
    assert float(divergence(p.repeat(3, 1, 1, 1), q.repeat(3, 1, 1, 1))) == pytest.approx(
        float(once), rel=1e-6
    )
    # torch's own mean over the batch alone grows with the map.
    batchmean = F.kl_div(F.log_softmax(q, 1), F.log_softmax(p, 1), log_target=True, reduction="batchmean")
    assert float(batchmean) == pytest.approx(12 * float(once), rel=1e-5)


def test_each_position_and_pooled_maps():
    p, q = [(0.75, 0.25), (0.25, 0.75)], [(0.25, 0.75), (0.75, 0.25)]
    both = passes(maps(*p), maps(*q))
    each = Specialization(alpha=0.5, logits=False)(both, torch.tensor([0]))
    assert float(each["kl_stage0"]) == pytest.approx(0.5 * 0.5 * math.log(3), rel=1e-5)
    # The mean over positions is the same for both: pooled, nothing is seen.
    pooled = Specialization(positions="pooled", logits=False)(both, torch.tensor([0]))
    assert float(pooled["kl_stage0"]) == pytest.approx(0, abs=1e-7)
    other = passes(maps((0.9, 0.1), (0.4, 0.6)), maps((0.5, 0.5), (0.5, 0.5)))
    means = [
        math.exp(0.5 * (math.log(0.9) + math.log(0.4))),
        math.exp(0.5 * (math.log(0.1) + math.log(0.6))),
    ]
    shares = [m / sum(means) for m in means]
    pooled = Specialization(positions="pooled", logits=False)(other, torch.tensor([0]))
    assert float(pooled["kl_stage0"]) == pytest.approx(0.5 * kl(shares, (0.5, 0.5)), rel=1e-5)


@pytest.mark.parametrize("positions", ["each", "pooled"])
def test_layouts_of_the_same_values_give_the_same_term(positions):
    objective = Specialization(positions=positions, logits=False)
    p, q = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    target = torch.tensor([0, 1])
    found = [
        objective(passes(p, q), target),
        objective(passes(p.permute(0, 2, 3, 1), q.permute(0, 2, 3, 1), 3), target),
        objective(passes(p.flatten(2).mT, q.flatten(2).mT, 2), target),  # tokens
    ]
    values = [float(terms["kl_stage0"]) for terms in found]
    assert values[0] > 0.01
    assert values[1:] == pytest.approx([values[0]] * 2, rel=1e-5)


def test_channel_dimensions():
    assert channel_dim(torch.zeros(2, 8, 4, 4), 8) == 1
    assert channel_dim(torch.zeros(2, 4, 4, 8), 8) == 3
    assert channel_dim(torch.zeros(2, 8, 8, 8), 8) == 1
    assert channel_dim(torch.zeros(2, 9, 8), 8) == 2
    with pytest.raises(ValueError, match=r"\(2, 4, 4, 9\) has no dimension of 8 channels"):
        channel_dim(torch.zeros(2, 4, 4, 9), 8)


# --- the terms ------------------------------------------------------------------------------------


def test_the_terms_are_algorithm_1():
    model, x, y = adaptive().train(), images(), torch.tensor([0, 1, 2, 3])
    both = run_both(model, x)
    terms = Specialization(alpha=0.7, smoothing=0.1)(both, y)
    assert list(terms) == TERMS
    expected = [0.7 * F.cross_entropy(both.logits, y, label_smoothing=0.1)]
    for n in range(3):
        teacher, student = (s[n].h.softmax(1) for s in (both.stages, both.base_stages))
        expected.append(0.3 * (teacher * (teacher / student).log()).sum(1).mean())
    teacher, student = both.logits.softmax(1), both.base_logits.softmax(1)
    expected.append(0.3 * (teacher * (teacher / student).log()).sum(1).mean())
    assert [t.item() for t in terms.values()] == pytest.approx([t.item() for t in expected], rel=1e-4)
    assert all(t.item() > 0 for t in terms.values())

    some = Specialization(stages=[2], logits=False)(run_both(model, x, [2]), y)
    assert list(some) == ["cross_entropy", "kl_stage2"]
    assert list(Specialization(stages=())(run_both(model, x, ()), y)) == ["cross_entropy", "kl_logits"]


def test_joint_is_the_mean_of_both_cross_entropies():
    both = run_both(adaptive().train(), images(), ())
    y = torch.tensor([0, 1, 2, 3])
    terms = Joint()(both, y)
    assert {k: v.item() for k, v in terms.items()} == pytest.approx(
        {
            "cross_entropy": 0.5 * F.cross_entropy(both.logits, y).item(),
            "cross_entropy_base": 0.5 * F.cross_entropy(both.base_logits, y).item(),
        }
    )
    assert Joint(alpha=0.9)(both, y)["cross_entropy_base"].item() == pytest.approx(
        0.2 * terms["cross_entropy_base"].item()
    )


def test_targets_may_be_mixed():
    both = run_both(adaptive().train(), images(2))
    shares = F.one_hot(torch.tensor([1, 2]), 10).float()
    for objective in (Joint(), Specialization()):
        hard, soft = objective(both, torch.tensor([1, 2])), objective(both, shares)
        assert {k: v.item() for k, v in hard.items()} == pytest.approx(
            {k: v.item() for k, v in soft.items()}
        )


@pytest.mark.parametrize("detach", [True, False])
def test_detached_divergences_reach_only_the_student(detach):
    leaves = [torch.randn(2, 4, 3, 3, requires_grad=True) for _ in range(2)]
    logits = [torch.randn(2, 5, requires_grad=True) for _ in range(2)]
    terms = Specialization(detach=detach)(passes(*leaves, logits=tuple(logits)), torch.tensor([0, 1]))
    (terms["kl_stage0"] + terms["kl_logits"]).backward()
    for teacher, student in (leaves, logits):
        assert student.grad.abs().sum() > 0
        assert (teacher.grad is None) == detach
    if not detach:
        assert all(leaf.grad.abs().sum() > 0 for leaf in (leaves[0], logits[0]))


def test_terms_are_float32_whatever_the_features_are():
    p, q = torch.randn(2, 64, 8, 8).bfloat16(), torch.randn(2, 64, 8, 8).bfloat16()
    logits = torch.randn(2, 7).bfloat16(), torch.randn(2, 7).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        terms = Specialization()(passes(p, q, logits=logits), torch.tensor([0, 1]))
    assert {t.dtype for t in terms.values()} == {torch.float32}
    exact = 0.5 * float(divergence(p.double(), q.double()))
    assert float(terms["kl_stage0"]) == pytest.approx(exact, rel=1e-5)  # bfloat16 has 8 bits
    assert float(terms["kl_logits"]) == pytest.approx(
        0.5 * float(divergence(*(t.double() for t in logits))), rel=1e-5
    )


# --- both passes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "shapes"),
    [
        (adaptive, [(4, 16, 16, 16), (4, 32, 8, 8), (4, 64, 4, 4)]),
        (tiny_vit, [(4, 17, 24)] * 2),
        (
            lambda: timm.create_model("mobilenetv2_adn", width=0.25),
            [(4, 8, 4, 4), (4, 16, 2, 2), (4, 24, 2, 2), (4, 40, 1, 1)],
        ),
    ],
    ids=["resnet", "vit", "mobilenet"],
)
def test_stages_are_collected_at_both_depths(make, shapes):
    model, x = make().eval(), images(pixels=32 if make is not adaptive else 16)
    with torch.no_grad():
        both = run_both(model, x)
        base = subnet(model, (True,) * len(shapes))
        assert torch.equal(both.logits, model(x))
        assert torch.equal(both.base_logits, base(x))
    for stages in (both.stages, both.base_stages):
        assert [tuple(f.h.shape) for f in stages.values()] == shapes
    assert all(not torch.equal(both.stages[n].h, both.base_stages[n].h) for n in both.stages)


def test_a_stage_is_what_the_next_one_gets():
    """After the last activation; of a stage that skips, the same map that its blocks pass on."""
    model, x, got = adaptive().train(), images(), []
    model.layer2[0].register_forward_pre_hook(lambda _, args: got.append(args[0]))
    both = run_both(model, x)
    assert both.stages[0].h is got[0]
    assert both.base_stages[0].h is got[1]
    assert all(f.h.min().item() >= 0 for f in (*both.stages.values(), *both.base_stages.values()))


def test_collecting_leaves_nothing_behind():
    model = adaptive()
    before = {name: len(m._forward_hooks) for name, m in model.named_modules()}
    with pytest.raises(RuntimeError):
        run_both(model, images(channels=5))
    run_both(model, images())
    assert {name: len(m._forward_hooks) for name, m in model.named_modules()} == before
    assert pliant.get_depth(model) == (False,) * 3
    with pytest.raises(ValueError, match="no stage 3 in ResNet; it has 0 to 2"):
        run_both(model, images(), [3])
    assert {name: len(m._forward_hooks) for name, m in model.named_modules()} == before
    with pytest.raises(ValueError, match="convert it by AdaptiveDepth"):
        run_both(timm.create_model("resnet20_cifar"), images())


def test_running_statistics_see_the_passes_that_run_through_them():
    model = adaptive().train()
    run_both(model, images())
    seen = {
        name: int(m.num_batches_tracked) for name, m in model.named_modules() if hasattr(m, "running_mean")
    }
    for name, count in seen.items():
        both = ".full" not in name and ".base" not in name and ".2." not in name  # blocks 2 skip
        assert count == (2 if both else 1), name
    assert seen["bn1"] == 2
    pairs = [m for m in model.modules() if isinstance(m, SwitchableNorm)]
    assert len(pairs) == 12
    # At the start the first stage is the same at both depths up to the blocks that skip.
    means = [torch.equal(m.full.running_mean, m.base.running_mean) for m in pairs]
    assert means == [True] * 4 + [False] * 8
    # Shortcuts of a network with projections are shared too.
    wide = pliant.convert(timm.create_model("resnet18", num_classes=3), pliant.AdaptiveDepth()).train()
    run_both(wide, images(2, 32))
    assert int(wide.layer2[0].block.downsample[1].num_batches_tracked) == 2


@pytest.mark.parametrize(
    "objective",
    [
        Specialization(),
        Specialization(detach=False, positions="pooled"),
        Specialization(stages=(2,), logits=False),
        Specialization(stages=()),
        Joint(),
    ],
    ids=["default", "pooled", "last stage", "logits", "joint"],
)
@pytest.mark.parametrize("make", [adaptive, tiny_vit], ids=["resnet", "vit"])
def test_all_parameters_get_gradients(objective, make):
    model = make().train()
    if objective == Specialization(stages=(2,), logits=False) and make is tiny_vit:
        objective = replace(objective, stages=(1,))
    objective.check(model)
    both = objective.run(model, images(pixels=32))
    torch.stack(list(objective(both, torch.tensor([0, 1, 2, 3])).values())).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("make", [adaptive, tiny_vit], ids=["resnet", "vit"])
def test_gradient_checkpointing_changes_nothing(make):
    """Blocks run again in the backward, after both depths were left."""
    plain, x, y = make().train(), images(pixels=32), torch.tensor([0, 1, 2, 3])
    frugal = copy.deepcopy(plain)
    frugal.set_grad_checkpointing()
    objective = Specialization()
    for model in (plain, frugal):
        torch.stack(list(objective(objective.run(model, x), y).values())).sum().backward()
    for (name, p), q in zip(plain.named_parameters(), frugal.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_one_depth_alone_leaves_norms_without_gradient():
    """So that a search for unused parameters would be needed; and what a warning is for."""
    model = adaptive().train()
    F.cross_entropy(model(images()), torch.tensor([0, 1, 2, 3])).backward()
    left = [name for name, p in model.named_parameters() if p.grad is None]
    assert len(left) == 2 * 12
    assert all(".base." in name for name in left)


def test_a_step_draws_the_base_network_to_the_whole_one():
    """On features that the super-net does not change meanwhile: the divergence falls."""
    torch.manual_seed(3)
    model, x, y = adaptive().train(), images(8), torch.arange(8)
    objective = Specialization()
    base = [p for name, p in model.named_parameters() if ".base." in name]
    optimizer = torch.optim.SGD(base, lr=0.5)
    found = []
    for _ in range(12):
        terms = objective(objective.run(model, x), y)
        found.append(sum(v.item() for k, v in terms.items() if k.startswith("kl")))
        optimizer.zero_grad()
        torch.stack(list(terms.values())).sum().backward()
        optimizer.step()
    assert found[-1] < 0.9 * found[0]
