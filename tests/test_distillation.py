"""A frozen teacher: its terms by hand, what it leaves alone, and runs with it."""

from __future__ import annotations

import copy
import math
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import pliant
from pliant.checkpoint import save
from pliant.train import Recipe, fit, override, read_run, read_state
from pliant.train.distillation import (
    Distillation,
    Teaching,
    digest,
    distance,
    make_distillation,
    soft_divergence,
)
from pliant.train.objectives import CrossEntropy, Joint, Specialization
from pliant.train.passes import BothPasses, Feature, run_both
from pliant.train.weights import load_weights
from test_data import folder_recipe, make_folder
from test_survival import TINY, assert_same, killed, stopped


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A plain network that knows digits a little, in a folder."""
    torch.manual_seed(0)
    recipe = override(TINY, ["model=resnet20_cifar", "epochs=1"])
    return fit(recipe, tmp_path_factory.mktemp("plain") / "run", progress=False).folder


def taught(plain, *changes):
    return override(
        replace(TINY, teacher="plain", weights=plain), ["model_args.zero_init_last=true", *changes]
    )


def images(n=4, channels=3, pixels=16):
    return torch.randn(n, channels, pixels, pixels)


def kl(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


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
        ({"alpha": 1.5}, r"alpha must be in \[0, 1\], not 1.5"),
        ({"alpha": True}, "alpha must be a number, not True"),
        ({"temperature": 0}, "temperature must be a positive number, not 0.0"),
        ({"features": -1}, "features must be a number of at least 0"),
        ({"match": "all"}, "match must be maps or attention, not 'all'"),
        ({"alpha": 0}, "leaves nothing to learn from the teacher"),
        ({"features": 1, "stages": (1, 1)}, "numbers from 0, each once"),
        ({"features": 1, "stages": ()}, r"stages=\(\) compares no features"),
        ({"stages": (1,)}, "give features=1"),
        ({"tau": 1}, "no option 'tau'; there are alpha, temperature, features, match, stages"),
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
        ("resnet18_cifar", {}, {"features": 1}, "the teacher has 4 stages and the network 3; name those"),
        (
            "resnet18_cifar",
            {},
            {"features": 1, "stages": (0, 1)},
            r"stage 0 of the teacher and of the network: outputs of shape \(64, 8, 8\) and \(16, 8, 8\)",
        ),
        ("resnet18_cifar", {}, {"features": 1, "stages": (3,)}, "no stage 3 in ResNet; it has 0 to 2"),
        ("vgg11", {"num_classes": 10}, {"features": 1}, "no stages are known of VGG"),
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
        (["teacher=plain"], "teacher='plain' is the network of `weights` before its conversion"),
        (["teacher=resnet20_cifar"], "has to have learned something: give teacher_weights"),
        (["teacher_weights=a"], "teacher_weights is of a teacher, and there is none"),
        (["teacher_args.c=2"], "teacher_args is of a teacher, and there is none"),
        (["teacher=plain", "weights=a", "teacher_args.c=2"], "the plain one has model_args"),
        (
            ["teacher=a", "teacher_weights=b", "teacher_args.num_classes=2"],
            "teacher_args holds 'num_classes'",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            override(TINY, changes)
    with pytest.raises(ValueError, match="distill_args are of a teacher, and there is none"):
        fit(override(TINY, ["distill_args.alpha=0.5"]), tmp_path / "a", progress=False)
    recipe = override(TINY, ["teacher=resnet20_cifa", "teacher_weights=x"])
    with pytest.raises(
        ValueError, match="there is no network 'resnet20_cifa'; close names: resnet20_cifar"
    ):
        fit(recipe, tmp_path / "a", progress=False)
    recipe = override(TINY, ["teacher=resnet20_cifar", "teacher_args.sea=1", "teacher_weights=x"])
    with pytest.raises(ValueError, match=r"does not take teacher_args = \{'sea': 1\}"):
        fit(recipe, tmp_path / "a", progress=False)
    with pytest.raises(ValueError, match="two teachers"):
        fit(override(recipe, ["teacher_args.sea=1"]), tmp_path / "a", progress=False, teacher=nn.Identity())
    assert not (tmp_path / "a").exists()


# --- runs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "terms"),
    [
        (["mixup=0.2", "cutmix=1.0", "ema=0.9", "epochs=1"], ["cross_entropy", "distill_logits"]),
        (
            [
                "precision=bf16",
                "channels_last=true",
                "distill_args.features=1",
                "distill_args.alpha=0",
                "epochs=1",
            ],
            ["cross_entropy", "distill_stage0", "distill_stage1", "distill_stage2"],
        ),
    ],
    ids=["mixed, averaged", "features, bf16"],
)
def test_fit_with_a_teacher(plain, tmp_path, monkeypatch, changes, terms):
    """The teacher sees what the student sees, never changes, and is in no file of the run."""
    recipe = taught(plain, *changes)
    shown, hashes = [], []
    look = Teaching._look

    def spy(self, x):
        shown.append(x.clone())
        hashes.append(digest(self.teacher))
        assert not torch.is_inference_mode_enabled()
        return look(self, x)

    monkeypatch.setattr(Teaching, "_look", spy)
    seen = []
    student = timm.create_model("resnet20_cifar_mod", in_chans=1, zero_init_last=True)
    student.register_forward_pre_hook(lambda m, a: seen.append(a[0].clone()) if m.training else None)
    run = fit(recipe, tmp_path / "run", progress=False, model=student)
    assert len(shown) == 1 + 8  # the check, and a step each
    assert len(seen) == 8
    assert all(torch.equal(a, b) for a, b in zip(shown[1:], seen, strict=True))
    assert set(hashes) == {digest(read_run(plain).model)}
    row = run.history[0]
    assert [k.removeprefix("train_") for k in row if k.startswith(("train_c", "train_d"))][
        : len(terms)
    ] == terms
    assert row["train_loss"] == pytest.approx(sum(row[f"train_{t}"] for t in terms))
    assert all(row[f"train_{t}"] > 0 for t in terms)
    state = torch.load(run.folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert len(state["optimizer_states"][0]["state"]) == len(list(student.parameters()))
    assert not [k for k in state["state_dict"] if "teach" in k]
    assert state["pliant"]["teacher"]["sha256"] == hashes[0] == read_state(run.folder).teacher["sha256"]


def test_a_teacher_changes_what_is_learned_and_a_network_given_is_as_good_as_one_named(plain, tmp_path):
    named = fit(taught(plain, "epochs=1"), tmp_path / "named", progress=False)
    teacher = read_run(plain).model.train()
    teacher.fc.weight.requires_grad_(False)
    without = replace(taught(plain, "epochs=1"), teacher=None)
    given = fit(without, tmp_path / "given", progress=False, teacher=teacher)
    alone = fit(without, tmp_path / "alone", progress=False)
    states = [run.model.state_dict() for run in (named, given, alone)]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items())
    assert any(not torch.equal(v, states[2][k]) for k, v in states[0].items())
    # The network given is as it was.
    assert teacher.training
    assert teacher.conv1.weight.requires_grad
    assert read_state(given.folder).teacher["network"] == "resnet20_cifar"


def test_a_named_teacher_of_another_width(plain, tmp_path):
    wide = save(
        timm.create_model("resnet18_cifar", in_chans=1, channels=(8, 16, 24, 32)), tmp_path / "wide"
    )
    recipe = override(
        replace(TINY, teacher="resnet18_cifar", teacher_weights=wide, epochs=1),
        [
            "teacher_args.channels=(8, 16, 24, 32)",
            "distill_args.features=1",
            "distill_args.match=attention",
        ],
    )
    assert Recipe.from_dict(recipe.as_dict()) == recipe
    with pytest.raises(ValueError, match="4 stages and the network 3"):
        fit(recipe, tmp_path / "run", progress=False)
    run = fit(override(recipe, ["distill_args.stages=(0, 1)"]), tmp_path / "run", progress=False)
    assert {"train_distill_logits", "train_distill_stage0", "train_distill_stage1"} <= run.history[0].keys()


def test_a_converted_teacher_needs_weights_of_its_own(plain, tmp_path):
    """From those of the plain network it would start, with cores that have learned nothing."""
    recipe = replace(TINY, teacher="resnet20_cifar_mod", teacher_weights=plain)
    for name in ("resnet20_cifar_mod", "resnet20_cifar_adn"):
        with pytest.raises(ValueError, match="so they have to be its own, not those of its plain form"):
            fit(replace(recipe, teacher=name), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_has_to_have_the_same_teacher(plain, tmp_path):
    teacher = read_run(plain).model
    stopped(tmp_path / "run", without := replace(taught(plain), teacher=None), 3)
    with pytest.raises(
        ValueError, match=r"another teacher: then none, now resnet20_cifar \([0-9a-f]{12}\)"
    ):
        fit(without, tmp_path / "run", resume=True, progress=False, teacher=teacher)

    folder = tmp_path / "taught"
    place = save(teacher, tmp_path / "teacher")
    recipe = replace(taught(plain), teacher_weights=place)
    stopped(folder, recipe, 3)
    with torch.no_grad():
        teacher.fc.bias += 1
    other = save(teacher, tmp_path / "other")
    with pytest.raises(
        ValueError, match="the run began with another teacher: then resnet20_cifar_mod before"
    ):
        fit(replace(recipe, teacher_weights=other), folder, resume=True, progress=False)
    with pytest.raises(ValueError, match="another recipe: teacher"):
        fit(replace(recipe, teacher=None, teacher_weights=None), folder, resume=True, progress=False)
    place.rename(tmp_path / "moved")  # the same weights at another place
    run = fit(replace(recipe, teacher_weights=tmp_path / "moved"), folder, resume=True, progress=False)
    assert len(run.history) == 2


def test_a_taught_run_that_stops_within_an_epoch_ends_in_the_same_bits(plain, tmp_path):
    recipe = taught(plain, "mixup=0.2", "ema=0.9", "distill_args.features=0.5", "test_each=true")
    whole = fit(recipe, tmp_path / "whole", progress=False)
    stopped(tmp_path / "run", recipe, 13)
    assert_same(fit(recipe, tmp_path / "run", resume=True, progress=False), whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        ["model_args.zero_init_last=true", "mixup=0.2", "ema=0.9", "test_each=true"],
        ["model=cc_resnet20_cifar", "model_args.upcycle=true", "precision=bf16"],
        ["model=resnet20_cifar_adn", "objective=specialize", "distill_args.features=1"],
        ["model=resnet20_cifar_adn", "objective=joint"],
    ],
    ids=["mod", "condconv", "specialize", "joint"],
)
def test_taught_runs_that_are_killed_end_in_the_same_bits(plain, tmp_path, changes):
    recipe = override(replace(TINY, teacher="plain", weights=plain), changes)
    whole = fit(recipe, tmp_path / "whole", progress=False)
    killed(tmp_path / "run", recipe, "write_bytes", ".last-", 4)
    assert_same(fit(recipe, tmp_path / "run", resume=True, progress=False), whole)


@pytest.mark.slow
def test_two_processes_learn_from_one_teacher(plain, tmp_path):
    script = f"""
import os, sys
from pliant.train import fit, Recipe
from pliant.train.distillation import digest
if __name__ == "__main__":
    recipe = Recipe(name="d", model="resnet20_cifar_adn", pixels=8, epochs=2, devices=2, strategy="ddp",
                    accelerator="cpu", threads=1, objective="specialize", weights={str(plain)!r},
                    teacher="plain", distill_args={{"features": 1.0}})
    run = fit(recipe, sys.argv[1], progress=False)
    rank, loss = os.environ["LOCAL_RANK"], run.history[-1]["train_loss"]
    print(rank, digest(run.model), loss, flush=True)
"""
    (tmp_path / "script.py").write_text(script)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "script.py"), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    said = dict(line.split(" ", 1) for line in done.stdout.splitlines() if line[:2] in ("0 ", "1 "))
    assert said["0"] == said["1"]
    assert said["0"].split()[0] == digest(read_run(tmp_path / "run").model)


def test_test_images_are_scored_after_each_epoch_if_asked(tmp_path):
    recipe = override(TINY, ["model=resnet20_cifar_adn", "objective=specialize", "epochs=1"])
    silent = fit(recipe, tmp_path / "a", progress=False)
    run = fit(override(recipe, ["test_each=true"]), tmp_path / "b", progress=False)
    assert all("test_accuracy" not in row for row in silent.history)
    assert [row["test_accuracy"] for row in run.history][run.best_epoch] == run.test_accuracy
    assert all(0 < row["test_accuracy_base"] < 1 for row in run.history)
    states = [r.model.state_dict() for r in (silent, run)]
    assert all(torch.equal(v, states[1][k]) for k, v in states[0].items() if isinstance(v, torch.Tensor))


def test_test_images_that_are_not_there_are_told_before_anything_is_written(tmp_path):
    for part in ("train", "val"):
        make_folder(tmp_path / "images" / part, 4)
    recipe = folder_recipe(tmp_path / "images", val_fraction=None, test_each=True)
    with pytest.raises(ValueError, match=r"test_each=true scores test images, and folder at .* has none"):
        fit(recipe, tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


# --- weights of a plain network -------------------------------------------------------------------


def foreign(network, path, classifier="linear"):
    """A file as `pytorch_resnet_cifar10` writes it: other names, and no counts of batches."""
    names = {k: k.replace("fc.", f"{classifier}.") for k in network.state_dict() if "num_batches" not in k}
    state = {f"module.{new}": network.state_dict()[old] for old, new in names.items()}
    torch.save({"state_dict": state, "best_prec1": 91.73}, path)
    return path


def lively(network):
    """Norms with statistics that are not those of the start."""
    for norm in network.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.running_mean, std=0.1)
    return network.eval()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("resnet20_cifar", {}),
        ("resnet20_cifar_mod", {"zero_init_last": True}),
        ("cc_resnet20_cifar", {"upcycle": True, "experts": 3}),
        ("resnet20_cifar_adn", {}),
        ("resnet20_cifar_cc_adn", {"upcycle": True, "experts": 3}),
        ("resnet20_cifar_mod_adn", {"zero_init_last": True}),
        ("resnet20_cifar_mod_cc", {"zero_init_last": True, "upcycle": True, "experts": 3}),
    ],
)
def test_a_plain_networks_weights_start_its_converted_forms(name, options, tmp_path):
    plain = lively(timm.create_model("resnet20_cifar"))
    x = images()
    expected = plain
    if "mod" in name:
        expected = pliant.convert(plain, pliant.MixtureOfDepths(selection="none"))
    with torch.no_grad():
        expected = expected(x)
    for place in (foreign(plain, tmp_path / "net.th"), save(plain, tmp_path / "net")):
        model = timm.create_model(name, **options).eval()
        kinds = [type(m) for m in model.modules()]
        load_weights(model, place)
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected, rtol=1e-3, atol=1e-4)
            if name.endswith("resnet20_cifar_adn"):
                assert torch.equal(model(x), expected)
        assert [type(m) for m in model.modules()] == kinds
        assert any("bn1.num_batches_tracked" in k for k in model.state_dict())


def test_plain_weights_that_a_converted_network_cannot_take_are_refused(tmp_path):
    plain = timm.create_model("resnet20_cifar")
    with pytest.raises(ValueError, match=r"experts start at random; let .* model_args.upcycle=true"):
        load_weights(timm.create_model("cc_resnet20_cifar"), foreign(plain, tmp_path / "a.th"))
    further = timm.create_model("resnet20_cifar_mod")
    further = pliant.convert(further, pliant.AdaptiveDepth())
    with pytest.raises(ValueError, match="resnet20_cifar_mod was converted once more"):
        load_weights(further, tmp_path / "a.th")
    deeper = foreign(timm.create_model("resnet56_cifar"), tmp_path / "b.th")
    with pytest.raises(ValueError, match=r"unexpected layer1\.3.* \(held against its plain form\)"):
        load_weights(timm.create_model("resnet20_cifar_mod"), deeper)
    other = foreign(timm.create_model("resnet20_cifar", num_classes=7), tmp_path / "c.th")
    with pytest.raises(ValueError, match=r"fc\.bias is float \[7\] instead of float \[10\]"):
        load_weights(timm.create_model("resnet20_cifar"), other)
    torch.save({**plain.state_dict(), "more.weight": torch.ones(1)}, tmp_path / "d.th")
    with pytest.raises(ValueError, match=r"unexpected more\.weight"):
        load_weights(timm.create_model("resnet20_cifar"), tmp_path / "d.th")


def test_files_of_others_as_they_are(trained, shared):
    for name, file in (("resnet20", "resnet20-12fca82f.th"), ("resnet56", "resnet56-4bfd9763.th")):
        expected = trained(f"{name}_cifar", file)
        model = timm.create_model(f"{name}_cifar_adn").eval()
        load_weights(model, shared / "data" / "checkpoints" / file)
        x = images(2, pixels=32)
        with torch.no_grad():
            assert torch.equal(model(x), expected(x))
