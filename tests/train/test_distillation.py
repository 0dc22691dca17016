"""A frozen teacher: its terms by hand, what it leaves alone, and what is refused."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

from _objectives import images, kl
from _runs import TINY
from pliant.methods.adaptive_depth import Joint, Specialization
from pliant.methods.adaptive_depth.passes import BothPasses, run_both
from pliant.objectives import CrossEntropy, Feature
from pliant.train import fit, override
from pliant.train.distillation import (
    Distillation,
    Teaching,
    digest,
    distance,
    make_distillation,
    soft_divergence,
)


def soft(logits, t):
    powers = [math.exp(v / t) for v in logits]
    return [p / sum(powers) for p in powers]


# --- the logits' term -----------------------------------------------------------------------------

TEACHER, STUDENT = [[2.0, 0.0, -1.0], [0.5, 1.5, 0.0]], [[0.0, 1.0, 0.0], [1.0, -1.0, 3.0]]


@pytest.mark.parametrize(("temperature", "expected"), [(1.0, 1.563265), (4.0, 1.804612)])
def test_the_logits_term_is_the_one_by_hand(temperature, expected):
    by_hand = sum(
        temperature**2 * kl(soft(v, temperature), soft(z, temperature))
        for v, z in zip(TEACHER, STUDENT, strict=True)
    )
    found = soft_divergence(torch.tensor(TEACHER), torch.tensor(STUDENT), temperature)
    assert float(found) == pytest.approx(by_hand / 2, rel=1e-5)
    assert float(found) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_logits_gradient_is_t_times_the_difference_of_the_soft_outputs(temperature):
    z, v = torch.tensor(STUDENT, requires_grad=True), torch.tensor(TEACHER)
    soft_divergence(v, z, temperature).backward()
    expected = temperature * ((z / temperature).softmax(1) - (v / temperature).softmax(1)) / 2
    torch.testing.assert_close(z.grad, expected.detach())


def test_at_a_high_temperature_logits_of_mean_zero_are_matched():
    """Equation 4 of the paper: the gradient is (z - v) / N."""
    z, v = torch.randn(1, 5), torch.randn(1, 5)
    z, v = (z - z.mean()).requires_grad_(), v - v.mean()
    soft_divergence(v, z, 300.0).backward()
    torch.testing.assert_close(z.grad, ((z - v) / 5).detach(), rtol=0.02, atol=2e-3)


# --- the features' term ---------------------------------------------------------------------------


def test_the_distance_is_the_one_by_hand():
    a, b = (Feature(torch.tensor(v).view(1, 2, 1, 2), 1) for v in ([3.0, 0, 0, 4.0], [4.0, 0, 3.0, 0]))
    assert float(distance(a, b)) == pytest.approx(1 - 12 / 25)
    # Energies of the two positions, up to 1/2: (9, 16) and (25, 0).
    cosine = 9 * 25 / (math.hypot(9, 16) * 25)
    assert float(distance(a, b, "attention")) == pytest.approx(1 - cosine, rel=1e-5)
    assert float(distance(a, a)) == pytest.approx(0, abs=1e-7)
    assert float(distance(a, Feature(-a.h, 1))) == pytest.approx(2)
    assert float(distance(a, Feature(7 * b.h, 1))) == pytest.approx(1 - 12 / 25)


@pytest.mark.parametrize("match", ["maps", "attention"])
def test_the_distances_gradient_is_that_of_one_minus_the_cosine(match):
    teacher, h = torch.randn(3, 4, 5, 2), torch.randn(3, 4, 5, 2, requires_grad=True)
    distance(Feature(teacher, 1), Feature(h, 1), match).backward()
    found, h.grad = h.grad, None
    one, two = (t if match == "maps" else t.square().mean(1) for t in (teacher, h))
    (1 - F.cosine_similarity(one.flatten(1), two.flatten(1))).mean().backward()
    torch.testing.assert_close(found, h.grad)


@pytest.mark.parametrize("match", ["maps", "attention"])
def test_layouts_of_the_same_values_are_equally_far(match):
    a, b = torch.randn(2, 5, 3, 4), torch.randn(2, 5, 3, 4)
    once = float(distance(Feature(a, 1), Feature(b, 1), match))
    last = float(distance(Feature(a, 1), Feature(b.permute(0, 2, 3, 1), 3), match))
    assert once > 0.01
    assert last == pytest.approx(once, rel=1e-6)
    tokens = [Feature(t.flatten(2).mT, 2) for t in (a, b)]
    assert float(distance(*tokens, match)) == pytest.approx(once, rel=1e-5)


def test_shapes_that_differ_are_named():
    a, b, c = (Feature(torch.randn(2, *s), 1) for s in ((4, 3, 3), (6, 3, 3), (4, 2, 2)))
    with pytest.raises(ValueError, match=r"\(4, 3, 3\) and \(6, 3, 3\).*match=attention compares"):
        distance(a, b)
    assert 0 < float(distance(a, b, "attention")) < 1
    for match in ("maps", "attention"):
        with pytest.raises(ValueError, match=r"\(4, 3, 3\) and \(4, 2, 2\) \(channels first\)"):
            distance(a, c, match)


# --- the loss -------------------------------------------------------------------------------------


class Fixed(nn.Module):
    """The same logits for any image."""

    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x):
        return self.logits[: len(x)]


def test_the_loss_is_the_mixture_by_hand():
    teaching = Teaching(Fixed(TEACHER), Distillation(alpha=0.3, temperature=2.0), "fixed")
    y, z = torch.tensor([0, 2]), torch.tensor(STUDENT)
    terms = teaching.terms(CrossEntropy()(z, y), CrossEntropy(), z, {}, images(2))
    entropy = -(math.log(soft(STUDENT[0], 1)[0]) + math.log(soft(STUDENT[1], 1)[2])) / 2
    pairs = zip(TEACHER, STUDENT, strict=True)
    divergence = 4 * sum(kl(soft(v, 2), soft(s, 2)) for v, s in pairs) / 2
    assert {k: float(t) for k, t in terms.items()} == pytest.approx(
        {"cross_entropy": 0.7 * entropy, "distill_logits": 0.3 * divergence}, rel=1e-5
    )
    # An objective of one's own gives way as a whole, whatever its terms are called.
    own = teaching.terms({"a": z.sum(), "b": z.mean()}, lambda *_: {}, z, {}, images(2))
    assert {k: float(t) for k, t in own.items()} == pytest.approx(
        {"a": 0.7 * 4, "b": 0.7 * 4 / 6, "distill_logits": 0.3 * divergence}, rel=1e-5
    )


@pytest.mark.parametrize("objective", [Joint(alpha=0.6), Specialization(alpha=0.6)])
def test_of_two_depths_the_labels_alone_give_way(objective):
    base = [[0.0, 0.0, 1.0], [2.0, 0.0, 0.0]]
    passes = BothPasses(torch.tensor(STUDENT), torch.tensor(base), {}, {})
    y = torch.tensor([0, 2])
    plain = objective(passes, y)
    teaching = Teaching(Fixed(TEACHER), Distillation(alpha=0.25, temperature=2.0), "fixed")
    terms = teaching.terms(plain, objective, passes, {}, images(2))
    whole, shallow = (
        4 * sum(kl(soft(v, 2), soft(s, 2)) for v, s in zip(TEACHER, student, strict=True)) / 2
        for student in (STUDENT, base)
    )
    expected = {k: (0.75 if k.startswith("cross_entropy") else 1) * float(t) for k, t in plain.items()}
    expected["distill_logits"] = 0.6 * 0.25 * whole
    if type(objective) is Joint:
        expected["distill_logits_base"] = 0.4 * 0.25 * shallow
    assert {k: float(t) for k, t in terms.items()} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("objective", [Joint(alpha=0.6), Specialization(alpha=0.6)])
def test_features_of_each_depth_are_those_of_its_pass(objective):
    student = timm.create_model("resnet20_cifar_adn").train()
    teacher = timm.create_model("resnet20_cifar")
    teaching = Teaching(teacher, Distillation(alpha=0, features=2.0, stages=(0, 2)), "t")
    x, y = images(), torch.tensor([0, 1, 2, 3])
    with teaching.watch(student) as seen:
        passes = objective.run(student, x)
    terms = teaching.terms(objective(passes, y), objective, passes, seen, x)
    both = run_both(student, x)  # the same, in training mode
    kept = {}
    for n, stage in enumerate((teacher.layer1, teacher.layer2, teacher.layer3)):
        stage.register_forward_hook(lambda _m, _a, h, n=n: kept.__setitem__(n, Feature(h, 1)))
    with torch.no_grad():
        teacher(x)
    for n in (0, 2):
        for suffix, weight, stages in (("", 0.6, both.stages), ("_base", 0.4, both.base_stages)):
            name = f"distill_stage{n}{suffix}"
            if suffix and type(objective) is not Joint:
                assert name not in terms
                continue
            expected = weight * 2 * float(distance(kept[n], stages[n]).detach())
            assert float(terms[name].detach()) == pytest.approx(expected, rel=1e-4)
    assert "distill_logits" not in terms
    assert "distill_stage1" not in terms
    assert float(terms["cross_entropy"].detach()) == pytest.approx(
        float(objective(passes, y)["cross_entropy"].detach())
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"alpha": 1.5}, "alpha must be less than or equal to 1, not 1.5"),
        ({"alpha": True}, "alpha must be a valid number, not True"),
        ({"temperature": 0}, "temperature must be greater than 0, not 0"),
        ({"features": -1}, "features must be greater than or equal to 0, not -1"),
        ({"match": "all"}, "match must be 'maps' or 'attention', not 'all'"),
        ({"alpha": 0}, "leaves nothing to learn from the teacher"),
        ({"features": 1, "stages": (1, 1)}, "give each number once"),
        ({"features": 1, "stages": ()}, r"stages=\(\) compares no features"),
        ({"stages": (1,)}, "set features=1"),
        ({"tau": 1}, "no option 'tau'; known: alpha, temperature, features, match, stages"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        make_distillation(options)
    with pytest.raises(ValueError, match=message):
        replace(TINY, distill_args=options)


def test_options_at_their_ends():
    assert make_distillation({"alpha": 1, "features": 0.5, "stages": [0, 2]}).stages == (0, 2)
    assert make_distillation({"alpha": 0, "features": 1}).stages is None
    assert make_distillation({}) == Distillation(alpha=0.9, temperature=4.0, features=0.0, match="maps")


# --- the teacher ----------------------------------------------------------------------------------


def test_a_teacher_is_frozen_and_no_part_of_its_student():
    teacher = timm.create_model("resnet20_cifar").train()
    teaching = Teaching(teacher, Distillation(), "t")
    assert not any(m.training for m in teacher.modules())
    assert not any(p.requires_grad for p in teacher.parameters())
    assert copy.deepcopy(teaching) is teaching
    assert teaching.identity == {"network": "t", "sha256": digest(teacher)}
    before = digest(teacher)
    z = images(2).mean((2, 3)).repeat(1, 4)[:, :10].requires_grad_()
    terms = teaching.terms({"a": z.sum()}, None, z, {}, images(2))
    sum(terms.values()).backward()
    assert z.grad is not None
    assert all(p.grad is None for p in teacher.parameters())
    assert digest(teacher) == before
    with torch.no_grad():
        teacher.fc.bias[0] += 1e-6
    assert digest(teacher) != before


def test_teachers_that_do_not_fit_are_refused():
    student = timm.create_model("resnet20_cifar_mod").train()
    student.bn1.eval()
    state = copy.deepcopy(student.state_dict())
    cases = [
        ("resnet20_cifar", {"num_classes": 7}, {}, "t gives 7 classes, the network 10"),
        (
            "resnet18_cifar",
            {},
            {"features": 1},
            "the teacher has 4 stages and the network 3; name",
        ),
        (
            "resnet18_cifar",
            {},
            {"features": 1, "stages": (0, 1)},
            r"stage 0 of the teacher and of the network: outputs of shape \(64, 8, 8\) and \(16, 8, 8\)",
        ),
        ("resnet18_cifar", {}, {"features": 1, "stages": (3,)}, "no stage 3 in ResNet; it has 0 to 2"),
        ("vgg11", {"num_classes": 10}, {"features": 1}, "features of VGG cannot be compared"),
    ]
    for name, arguments, options, message in cases:
        with torch.device("meta" if name == "vgg11" else "cpu"):
            teacher = timm.create_model(name, **arguments)
        if name == "vgg11":
            teaching = Teaching(nn.Linear(1, 1), make_distillation(options), "t")
            teaching.teacher = teacher
            with pytest.raises(ValueError, match=message), teaching.watch(teacher):
                pass
            continue
        with pytest.raises(ValueError, match=message):
            Teaching(teacher, make_distillation(options), "t").check(student, (3, 8, 8))
    wide = {"features": 1, "match": "attention", "stages": (0, 1, 2)}
    wider = timm.create_model("resnet18_cifar")
    Teaching(wider, make_distillation(wide), "t").check(student, (3, 8, 8))
    # And looking has changed nothing.
    assert student.training
    assert not student.bn1.training
    assert all(torch.equal(v, state[k]) for k, v in student.state_dict().items())


def test_recipes_without_what_a_teacher_needs_are_refused(tmp_path):
    for changes, message in (
        (["teacher=plain"], "teacher=plain needs the weights of the network before"),
        (["teacher=resnet20_cifar"], "teacher=resnet20_cifar needs trained weights; set teacher_weights"),
        (["teacher_weights=a"], "teacher_weights needs a teacher; set teacher="),
        (["teacher_args.c=2"], "teacher_args needs a teacher"),
        (
            ["teacher=plain", "weights=a", "teacher_args.c=2"],
            "teacher=plain takes model_args; remove teacher_args",
        ),
        (
            ["teacher=a", "teacher_weights=b", "teacher_args.num_classes=2"],
            "teacher_args must not hold 'num_classes'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            override(TINY, changes)
    with pytest.raises(ValueError, match="distill_args needs a teacher; set teacher="):
        fit(override(TINY, ["distill_args.alpha=0.5"]), tmp_path / "a", progress=False)
    recipe = override(TINY, ["teacher=resnet20_cifa", "teacher_weights=x"])
    with pytest.raises(
        ValueError, match="timm has no network 'resnet20_cifa'; did you mean resnet20_cifar"
    ):
        fit(recipe, tmp_path / "a", progress=False)
    recipe = override(TINY, ["teacher=resnet20_cifar", "teacher_args.sea=1", "teacher_weights=x"])
    with pytest.raises(ValueError, match=r"does not take teacher_args = \{'sea': 1\}"):
        fit(recipe, tmp_path / "a", progress=False)
    with pytest.raises(ValueError, match="two teachers"):
        fit(override(recipe, ["teacher_args.sea=1"]), tmp_path / "a", progress=False, teacher=nn.Identity())
    assert not (tmp_path / "a").exists()
