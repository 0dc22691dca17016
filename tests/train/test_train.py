"""`fit`: what it learns, keeps, repeats, resumes and refuses."""

from __future__ import annotations

import csv
import json
import signal
from dataclasses import replace

import pytest
import timm
import torch
from lightning.pytorch.callbacks import Callback

import _runs
from _processes import run_script
from _runs import SMALL, StopAfter
from pliant.checkpoint import load, read_config
from pliant.objectives import CrossEntropy
from pliant.recipes import get_recipe
from pliant.train import Recipe, evaluate, fit, override, read_run
from pliant.train.optimizing import make_optimizer, rate
from pliant.train.run import claimed
from pliant.train.seeds import seed_torch
from pliant.train.tasks import NonFiniteLossError

TINY = replace(_runs.TINY, epochs=3)


def weights(run):
    return run.model.state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return fit(TINY, tmp_path_factory.mktemp("runs") / "tiny", progress=False)


def test_the_folder_holds_what_is_promised(tiny):
    names = {p.name for p in tiny.folder.iterdir()}
    assert {"recipe.json", "environment.json", "metrics.csv", "run.json", "best", "checkpoints"} <= names
    assert any(p.name.startswith("events.") for p in (tiny.folder / "tensorboard").iterdir())
    assert {p.name for p in (tiny.folder / "checkpoints").iterdir()} == {"last.ckpt", "previous.ckpt"}
    assert not [name for name in names if name.startswith(".")]
    assert Recipe.from_dict(json.loads((tiny.folder / "recipe.json").read_text())) == TINY
    assert json.loads((tiny.folder / "environment.json").read_text())["torch"] == torch.__version__
    with (tiny.folder / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(r["val_accuracy"]) for r in rows] == [h["val_accuracy"] for h in tiny.history]
    assert [r["epoch"] for r in rows] == ["0", "1", "2"]


def test_history_and_best(tiny):
    accuracies = [row["val_accuracy"] for row in tiny.history]
    assert tiny.best_epoch == accuracies.index(max(accuracies))
    assert tiny.val_accuracy == max(accuracies)
    for row in tiny.history:
        assert row["gap"] == row["train_accuracy"] - row["val_accuracy"]
        assert row["train_loss"] == row["train_cross_entropy"]
        assert row["unreadable"] == 0
    assert tiny.history[-1]["train_loss"] < tiny.history[0]["train_loss"]
    assert tiny.history[-1]["lr"] == pytest.approx(0.1 * rate(TINY, 3 * 8 - 1, 8))
    assert tiny.seconds == sum(row["seconds"] for row in tiny.history)


def test_the_saved_network_is_the_best_one_and_scores_the_same(tiny):
    assert same(load(tiny.folder / "best").state_dict(), weights(tiny))
    config = read_config(tiny.folder / "best")
    assert config.input_size == (1, 8, 8)
    assert config.classes == tuple("0123456789")
    again = evaluate(tiny.folder, "digits", device="cpu")
    assert again.top1 == tiny.test_accuracy
    assert evaluate(tiny.model, "digits", device="cpu").top1 == tiny.test_accuracy
    assert tiny.model.default_cfg is tiny.model.pretrained_cfg
    saved = load(tiny.folder / "best").pretrained_cfg
    for name in ("input_size", "mean", "std", "crop_pct", "crop_mode", "interpolation", "label_names"):
        assert tiny.model.pretrained_cfg[name] == saved[name]
    assert evaluate(tiny.folder / "best", "digits", device="cpu", batch=7).top1 == pytest.approx(again.top1)
    held_out = evaluate(tiny.folder, "digits", part="val", device="cpu", batch=50)
    assert held_out.top1 == pytest.approx(tiny.val_accuracy)
    assert held_out.loss == pytest.approx(tiny.history[tiny.best_epoch]["val_loss"], rel=1e-5)


def test_a_run_is_read_back(tiny):
    again = read_run(tiny.folder)
    assert replace(again, model=tiny.model) == tiny
    assert same(weights(again), weights(tiny))


def test_the_same_seed_gives_the_same_bits_and_another_does_not(tiny, tmp_path):
    torch.manual_seed(123)
    state = torch.random.get_rng_state()
    again = fit(TINY, tmp_path / "a", progress=False)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert same(weights(again), weights(tiny))
    other = fit(override(TINY, ["seed=1"]), tmp_path / "b", progress=False)
    assert not same(weights(other), weights(tiny))


def test_a_run_that_goes_on_after_an_epoch_ends_in_the_same_bits(tmp_path):
    changes = [
        "ema=0.9",
        "mixup=0.2",
        "cutmix=1.0",
        "erasing=0.5",
        "warmup=1",
        "optimizer=adamw",
        "lr=0.01",
    ]
    recipe = override(TINY, changes)
    whole = fit(recipe, tmp_path / "whole", progress=False)
    with pytest.raises(KeyError, match="killed"):
        fit(recipe, tmp_path / "halves", progress=False, callbacks=[StopAfter(2)])
    assert not (tmp_path / "halves" / "run.json").exists()
    resumed = fit(recipe, tmp_path / "halves", resume=True, progress=False)
    assert same(weights(resumed), weights(whole))
    drop = {"seconds"}
    assert [{k: v for k, v in r.items() if k not in drop} for r in resumed.history] == [
        {k: v for k, v in r.items() if k not in drop} for r in whole.history
    ]
    last = [
        torch.load(tmp_path / name / "checkpoints" / "last.ckpt", weights_only=True)
        for name in ("whole", "halves")
    ]
    assert same(last[0]["state_dict"], last[1]["state_dict"])
    with (tmp_path / "halves" / "metrics.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 3


def test_resume_after_the_last_epoch_and_of_a_finished_run(tiny, tmp_path):
    class KilledAtTheEnd(Callback):
        def on_train_end(self, trainer, pl_module):
            raise KeyError("killed")

    with pytest.raises(KeyError, match="killed"):
        fit(TINY, tmp_path / "run", progress=False, callbacks=[KilledAtTheEnd()])
    resumed = fit(TINY, tmp_path / "run", resume=True, progress=False)
    assert same(weights(resumed), weights(tiny))
    assert resumed.best_epoch == tiny.best_epoch
    again = fit(override(TINY, ["workers=0"]), tmp_path / "run", resume=True, progress=False)
    assert again.history == resumed.history


def test_a_run_killed_in_its_first_epoch_starts_again(tiny, tmp_path):
    with pytest.raises(KeyError, match="killed"):
        fit(TINY, tmp_path / "run", progress=False, callbacks=[StopAfter(0)])
    assert same(weights(fit(TINY, tmp_path / "run", resume=True, progress=False)), weights(tiny))


def test_an_interrupted_run_says_so_and_continues(tiny, tmp_path):
    class CtrlC(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if trainer.global_step == 12:
                signal.raise_signal(signal.SIGINT)

    # A shell's background job ignores Ctrl-C, and so would this test there.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt, match=r"pliant train command with --resume"):
            fit(TINY, tmp_path / "run", progress=False, callbacks=[CtrlC()])
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)
    resumed = fit(TINY, tmp_path / "run", resume=True, progress=False)
    assert same(weights(resumed), weights(tiny))


def test_folders_that_are_taken_are_refused(tiny, tmp_path):
    with pytest.raises(ValueError, match=r"holds this run already; to continue it, .* with resume=True"):
        fit(TINY, tiny.folder, progress=False)
    with pytest.raises(ValueError, match=r"another recipe: epochs \(3 and 4\), seed \(0 and 5\)"):
        fit(override(TINY, ["epochs=4", "seed=5"]), tiny.folder, resume=True, progress=False)
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="not empty and holds no run"):
        fit(TINY, tmp_path, progress=False)
    with pytest.raises(ValueError, match="no run to resume"):
        fit(TINY, tmp_path / "none", resume=True, progress=False)
    assert not (tmp_path / "none").exists()
    with pytest.raises(FileNotFoundError, match="holds no run"):
        read_run(tmp_path)


@pytest.mark.parametrize(("accelerator", "named"), [("auto", "cuda"), ("cpu", "cpu")])
def test_the_environment_names_the_gpu_that_trains(accelerator, named, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("pliant.train.run.provenance", lambda device: {"gpu": device.type})
    with claimed(tmp_path / "run", replace(TINY, accelerator=accelerator), resume=False) as checkpoint:
        assert checkpoint is None
    assert json.loads((tmp_path / "run" / "environment.json").read_text()) == {"gpu": named}


def test_a_loss_that_is_nan_stops_the_run_and_names_epoch_step_and_term(tmp_path):
    class Poisoned:
        def __call__(self, logits, target):
            terms = CrossEntropy()(logits, target)
            self.calls = getattr(self, "calls", 0) + 1
            # 8 steps an epoch, then a batch of validation: the third step of epoch 1.
            return {**terms, "extra": logits.sum() * (float("nan") if self.calls == 12 else 0.0)}

    with pytest.raises(NonFiniteLossError, match=r"term extra is nan in epoch 1, step 10; .*Lower lr"):
        fit(TINY, tmp_path / "run", progress=False, objective=Poisoned())
    kept = torch.load(tmp_path / "run" / "checkpoints" / "last.ckpt", weights_only=True)
    assert kept["epoch"] == 0
    assert all(v.isfinite().all() for v in kept["state_dict"].values())
    with (tmp_path / "run" / "metrics.csv").open() as file:
        assert next(csv.DictReader(file))["train_extra"] == "0.0"


def test_a_rate_that_explodes_is_told(tmp_path):
    with pytest.raises(NonFiniteLossError, match="epoch 0"):
        fit(override(TINY, ["lr=1e30", "schedule=constant"]), tmp_path / "run", progress=False)
    assert not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize(
    "changes",
    [
        ["channels_last=true", "clip=1"],
        ["optimizer=adamw", "lr=0.005", "decay_all=false", "smoothing=0.1", "augmentation=flip_crop"],
        ["schedule=step", "step_size=2", "nesterov=true", "model=resnet20_cifar", "val_fraction=0.2"],
    ],
)
def test_options_run_and_learn(changes, tmp_path):
    run = fit(override(TINY, changes), tmp_path / "run", progress=False)
    assert run.test_accuracy > 0.25
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"]


def test_bfloat16_is_computed_in_and_not_trained(tmp_path):
    """The network is narrow: a processor without bfloat16 is very slow in it."""
    seen = set()
    model = timm.create_model("resnet20_cifar", in_chans=1, channels=(8, 8, 8))
    model.layer3.register_forward_hook(lambda _m, _a, y: seen.add(y.dtype) if model.training else None)
    recipe = override(TINY, ["precision=bf16", "channels_last=true"])
    run = fit(recipe, tmp_path / "run", progress=False, model=model)
    assert seen == {torch.bfloat16}
    assert {v.dtype for v in weights(run).values() if v.is_floating_point()} == {torch.float32}
    assert run.history[-1]["train_loss"] < run.history[0]["train_loss"]


def test_own_network_and_callbacks(tmp_path):
    seen, orders = [], []

    class Listener(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 0:
                orders.append(batch[1].tolist())

        def on_train_epoch_end(self, trainer, pl_module):
            seen.append(pl_module.history[-1]["epoch"])

    model = timm.create_model("resnet20_cifar", in_chans=1, num_classes=10, **SMALL)
    run = fit(
        override(TINY, ["epochs=2"]), tmp_path / "run", model=model, progress=False, callbacks=[Listener()]
    )
    assert seen == [0, 1]
    assert orders[0] != orders[1]  # each epoch has its own order
    assert run.model is model
    assert not model.training


def test_networks_that_do_not_fit_are_refused(tmp_path):
    wrong = timm.create_model("resnet20_cifar", in_chans=1, num_classes=7)
    with pytest.raises(ValueError, match="7"):
        fit(TINY, tmp_path / "a", model=wrong, progress=False)
    with pytest.raises(
        ValueError, match=r"no network 'resnet20_cifar_mop'; did you mean .*resnet20_cifar_mod"
    ):
        fit(override(TINY, ["model=resnet20_cifar_mop"]), tmp_path / "b", progress=False)
    with pytest.raises(ValueError, match=r"does not take model_args = \{.*'sea': 3\}"):
        fit(override(TINY, ["model_args.sea=3"]), tmp_path / "c", progress=False)
    with pytest.raises(ValueError, match="timm"):
        fit(TINY, tmp_path / "d", model=torch.nn.Linear(2, 2), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_progress_is_silent_when_told_and_shown_otherwise(tmp_path, capfd):
    recipe = override(TINY, ["epochs=1"])
    fit(recipe, tmp_path / "a", progress=False)
    out, err = capfd.readouterr()
    assert (out, err) == ("", "")
    fit(recipe, tmp_path / "b")
    out, err = capfd.readouterr()
    assert "Epoch 0/0" in out + err
    assert "litlogger" not in out + err
    assert "Warning" not in out + err


def test_rates_by_schedule():
    step = Recipe(name="x", model="x", epochs=90, schedule="step", step_size=30)
    assert [rate(step, e * 10, 10) for e in (0, 29, 30, 60)] == pytest.approx([1, 1, 0.1, 0.01])
    cosine = Recipe(name="x", model="x", epochs=10, warmup=2)
    rates = [rate(cosine, s, 4) for s in range(40)]
    assert rates[:8] == pytest.approx([i / 8 for i in range(1, 9)])
    assert rates[8:] == sorted(rates[8:], reverse=True)
    assert rates[24] == pytest.approx(0.5)
    assert 0 < rates[-1] < 0.01
    constant = Recipe(name="x", model="x", epochs=10, schedule="constant")
    assert {rate(constant, s, 4) for s in range(40)} == {1.0}


def test_optimisers_take_the_recipe():
    model = timm.create_model("resnet20_cifar")
    sgd = make_optimizer(model, Recipe(name="x", model="x", nesterov=True, momentum=0.8))
    assert (sgd.defaults["nesterov"], sgd.defaults["momentum"]) == (True, 0.8)
    adamw = make_optimizer(model, Recipe(name="x", model="x", optimizer="adamw", lr=1e-3, decay_all=False))
    assert isinstance(adamw, torch.optim.AdamW)
    for group in adamw.param_groups:
        assert all((p.ndim <= 1) == (group["weight_decay"] == 0) for p in group["params"])


@pytest.mark.slow
@pytest.mark.parametrize("network", ["resnet18", "resnet18_mod", "resnet20_mod"])
def test_the_digits_recipe_reaches_95_percent(network, tmp_path):
    recipe = override(get_recipe(f"digits.{network}"), ["accelerator=cpu"])
    assert fit(recipe, tmp_path / "run", progress=False).test_accuracy >= 0.95


@pytest.mark.slow
def test_two_processes_train_and_score_as_one(tmp_path):
    """DDP without a search for unused parameters; every image is scored once."""
    script = """
import os, sys
from pliant.train import fit, Recipe
if __name__ == "__main__":
    recipe = Recipe(name="d", model="resnet20_cifar_mod", pixels=8, epochs=2, devices=2, strategy="ddp",
                    accelerator="cpu", threads=1)
    run = fit(recipe, sys.argv[1], progress=False)
    print(f"{os.environ['LOCAL_RANK']} {run.test_accuracy} {run.history[-1]['train_loss']}", flush=True)
"""
    said = run_script(script, tmp_path)
    assert said["0"] == said["1"]
    run = read_run(tmp_path / "run")
    assert float(said["0"].split()[0]) == run.test_accuracy
    assert evaluate(run.folder, "digits", device="cpu").top1 == pytest.approx(run.test_accuracy)


def test_tensorboard_has_the_gap_of_every_epoch(tiny):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tiny.folder / "tensorboard")).Reload()
    logged = [event.value for event in events.Scalars("gap")]
    assert logged == pytest.approx([row["gap"] for row in tiny.history], abs=1e-6)
    assert [event.step for event in events.Scalars("step/lr")] == [9, 19]  # of 24
    assert [event.step for event in events.Scalars("step/cross_entropy")] == [9, 19]


def test_steps_are_logged_after_a_run_has_gone_on_as_before(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    recipe = replace(TINY, checkpoint_minutes=0)
    with pytest.raises(KeyError, match="killed"):
        fit(recipe, tmp_path / "run", progress=False, callbacks=[StopAfter(1)])
    fit(recipe, tmp_path / "run", resume=True, progress=False)
    events = accumulator.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("step/lr")] == [9, 19]


@pytest.mark.parametrize(("kind", "seeded"), [("cpu", []), ("cuda", ["cuda"]), ("mps", ["all"])])
def test_the_generators_of_the_cpu_and_the_device_are_seeded(kind, seeded, monkeypatch):
    seen = []
    monkeypatch.setattr(torch.cuda, "manual_seed", lambda value: seen.append("cuda"))
    monkeypatch.setattr(torch, "manual_seed", lambda value: seen.append("all"))
    seed_torch(3, torch.device(kind))
    assert seen == seeded
    assert torch.equal(torch.rand(2), torch.rand(2, generator=torch.Generator().manual_seed(3)))


@pytest.fixture(scope="module")
def one_epoch(tmp_path_factory):
    return fit(override(TINY, ["epochs=1"]), tmp_path_factory.mktemp("runs") / "one", progress=False)


@pytest.mark.parametrize(
    "change",
    ["ema=0.5", "mixup=0.5", "cutmix=1", "smoothing=0.2", "clip=0.01", "erasing=1"],
)
def test_an_option_changes_what_is_learnt(one_epoch, change, tmp_path):
    changed = fit(override(one_epoch.recipe, [change]), tmp_path / "run", progress=False)
    assert not same(weights(one_epoch), weights(changed))


def test_averaged_weights_are_the_weights_of_all_steps_and_indices_are_not_averaged(tmp_path):
    seen = []

    class Watch(Callback):
        def on_train_batch_end(self, trainer, task, *_):
            seen.append({name: value.clone() for name, value in task.model.state_dict().items()})

    changes = ["epochs=1", "ema=0.4", "batch=512", "model_args.selection=fixed"]
    run = fit(override(TINY, changes), tmp_path / "run", progress=False, callbacks=[Watch()])
    assert len(seen) == 2
    # The second step's share is 1 - min(0.4, 2/11).
    name = "conv1.weight"
    expected = 2 / 11 * seen[0][name] + 9 / 11 * seen[1][name]
    assert torch.allclose(weights(run)[name], expected, atol=1e-6)
    assert not torch.allclose(seen[0][name], seen[1][name], atol=1e-4)
    whole = {name: value for name, value in seen[1].items() if not value.is_floating_point()}
    chosen = [name for name in whole if name.endswith("selector.index")]
    assert chosen
    assert any(bool(whole[name].bool().any()) for name in chosen)
    assert same({name: weights(run)[name] for name in whole}, whole)
