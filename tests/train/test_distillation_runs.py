"""Runs with a frozen teacher, and runs that start from a plain network's weights."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from torch import nn

import _runs
import pliant
from _images import folder_recipe, make_folder
from _objectives import images
from _processes import run_script
from _runs import NARROW, assert_same, killed, stopped
from pliant.checkpoint import save
from pliant.train import Recipe, fit, override, read_run, read_state
from pliant.train.distillation import Teaching, digest
from pliant.train.weights import load_weights

# Of all blocks: CondConv has an option `layers` of its own.
TINY = replace(_runs.TINY, model_args=NARROW)


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
    student = timm.create_model("resnet20_cifar_mod", in_chans=1, **recipe.model_args)
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
    recipe = replace(TINY, teacher="resnet20_cifar_mod", teacher_args=NARROW, teacher_weights=plain)
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
    recipe = replace(taught(plain, "epochs=1"), teacher_weights=place)
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
    assert len(run.history) == 1


def test_a_taught_run_that_stops_within_an_epoch_ends_in_the_same_bits(plain, tmp_path):
    changes = ["epochs=1", "mixup=0.2", "ema=0.9", "distill_args.features=0.5", "test_each=true"]
    recipe = taught(plain, *changes)
    whole = fit(recipe, tmp_path / "whole", progress=False)
    stopped(tmp_path / "run", recipe, 5)
    assert_same(fit(recipe, tmp_path / "run", resume=True, progress=False), whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        ["model_args.zero_init_last=true", "mixup=0.2", "ema=0.9", "test_each=true"],
        ["model=cc_resnet20_cifar", "model_args.upcycle=true"],
        ["model=resnet20_cifar_adn", "objective=specialize", "distill_args.features=1"],
        ["model=resnet20_cifar_adn", "objective=joint"],
    ],
    ids=["mod", "condconv", "specialize", "joint"],
)
def test_taught_runs_that_are_killed_end_in_the_same_bits(plain, tmp_path, changes):
    recipe = override(replace(TINY, teacher="plain", weights=plain), changes)
    whole = fit(recipe, tmp_path / "whole", progress=False)
    killed((tmp_path / "run", recipe, ("write_bytes", ".last-", 4)))
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
                    teacher="plain", distill_args={{"features": 1.0}}, model_args={NARROW!r})
    run = fit(recipe, sys.argv[1], progress=False)
    rank, loss = os.environ["LOCAL_RANK"], run.history[-1]["train_loss"]
    print(rank, digest(run.model), loss, flush=True)
"""
    said = run_script(script, tmp_path)
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
    with pytest.raises(ValueError, match="test_each=true needs test images, and data=folder"):
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
    with pytest.raises(ValueError, match=r"unexpected layer1\.3.* \(compared with its plain form\)"):
        load_weights(timm.create_model("resnet20_cifar_mod"), deeper)
    other = foreign(timm.create_model("resnet20_cifar", num_classes=7), tmp_path / "c.th")
    with pytest.raises(ValueError, match=r"fc\.bias is float \[7\] instead of float \[10\]"):
        load_weights(timm.create_model("resnet20_cifar"), other, new_classifier=False)
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
