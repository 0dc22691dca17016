"""Two processes take the step of one: gradients on the joint batch, for all three methods.

The processes run `fit`. In the test's own process the same images are put together from the order of
the epoch, and the gradient is taken without Lightning and without DDP.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from torch import nn

from _processes import run_two
from pliant.objectives import ManyPasses
from pliant.train import Recipe, evaluate, read_run
from pliant.train.data import load_data
from pliant.train.networks import build
from pliant.train.objectives import make_objective
from pliant.train.seeds import seeded
from pliant.train.tasks import rate

TWO = Recipe(
    name="two",
    model="resnet20_cifar_mod",
    pixels=8,
    epochs=1,
    batch=64,
    augmentation="crop",
    accelerator="cpu",
    threads=1,
    devices=2,
    strategy="ddp",
)
METHODS = {
    "mod": TWO,
    "condconv": replace(TWO, model="cc_resnet20_cifar"),
    "adn": replace(TWO, model="resnet20_cifar_adn", objective="specialize"),
}
KINDS = ("frozen", "own", "fsdp")

PROGRAM = """
import json, sys, torch
from torch import nn
from lightning.pytorch.callbacks import Callback
from pliant.train import Recipe, fit
from pliant.train.processes import place

class First(Callback):
    # Keep the gradients of the first step, as the optimiser gets them; end after it.
    def __init__(self, frozen, path):
        self.frozen, self.path = frozen, path
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        for module in pl_module.modules():
            if self.frozen and isinstance(module, nn.BatchNorm2d):
                module.eval()
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if trainer.global_step == 0:
            grads = {n: p.grad for n, p in pl_module.model.named_parameters()}
            whole = [g.full_tensor() if hasattr(g, "full_tensor") else g.clone() for g in grads.values()]
            found = dict(zip(grads, whole))
            torch.save(found, f"{self.path}-{place()[0]}.pt")

folder, recipes, kinds = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
for name, recipe in recipes.items():
    for kind in kinds:
        path = f"{folder}/{name}-{kind}"
        callbacks = [First(kind == "frozen", path)]
        strategy = "fsdp" if kind == "fsdp" else "ddp"
        fit(Recipe.from_dict({**recipe, "strategy": strategy}), path, progress=False, callbacks=callbacks)
        print("done", name, kind, flush=True)
"""


@pytest.fixture(scope="module")
def gradients(tmp_path_factory):
    """What both processes give to their optimisers: a function of method, kind, process."""
    folder = tmp_path_factory.mktemp("two")
    recipes = json.dumps({name: recipe.as_dict() for name, recipe in METHODS.items()})
    said = run_two(PROGRAM, folder, recipes, json.dumps(KINDS))
    assert all(text.count("done") == len(METHODS) * len(KINDS) for text in said), said

    def load(name, kind, rank):
        return torch.load(folder / f"{name}-{kind}-{rank}.pt", weights_only=True)

    load.folder = folder
    return load


def taken(recipe, frozen):
    """Gradients of one process: on the joint batch, and on each half by itself; and the halves."""
    alone = replace(recipe, devices=1, strategy="auto", batch=2 * recipe.batch)
    data = load_data(alone)
    x, y = next(iter(data.batches("train")))
    objective = make_objective(recipe.objective, recipe.objective_args)
    found = []
    # Process r of two has every second image of the shuffled order, from the r-th on.
    for part in (slice(None), slice(0, None, 2), slice(1, None, 2)):
        with seeded(recipe.seed, "weights"):
            load_data(alone)
            network = build(alone, len(data.classes)).train()
        for module in network.modules():
            if frozen and isinstance(module, nn.BatchNorm2d):
                module.eval()
        outputs = objective.run(network, x[part]) if isinstance(objective, ManyPasses) else network(x[part])
        torch.stack(list(objective(outputs, y[part]).values())).sum().backward()
        found.append({n: p.grad for n, p in network.named_parameters()})
    return found


def distance(one, two):
    """Of two sets of gradients, over the length of the second."""
    assert one.keys() == two.keys()
    apart = sum(float((one[n].double() - two[n].double()).square().sum()) for n in two)
    return (apart / sum(float(g.double().square().sum()) for g in two.values())) ** 0.5


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_with_norms_frozen_two_processes_give_the_gradient_of_the_joint_batch(gradients, name):
    joint, first, second = taken(METHODS[name], frozen=True)
    assert all(g is not None for g in joint.values())
    for rank in range(2):
        assert distance(gradients(name, "frozen", rank), joint) < 1e-5
    assert distance(first, joint) > 0.01  # a process alone is far from it
    assert distance(second, joint) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["own", "fsdp"])
@pytest.mark.parametrize("name", METHODS)
def test_norms_take_the_statistics_of_their_own_process(gradients, name, kind):
    """So the gradient is the mean of the halves', and not that of the joint batch."""
    joint, first, second = taken(METHODS[name], frozen=False)
    mean = {n: (first[n] + second[n]) / 2 for n in joint}
    for rank in range(2):
        assert distance(gradients(name, kind, rank), mean) < 1e-4
    assert distance(mean, joint) > 0.01


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
def test_both_strategies_train_the_same_network(gradients, name):
    """Of DDP, running statistics are the first process's too."""
    ddp, fsdp = (read_run(gradients.folder / f"{name}-{kind}") for kind in ("own", "fsdp"))
    one, two = ddp.model.state_dict(), fsdp.model.state_dict()
    assert one.keys() == two.keys()
    for key, value in one.items():
        torch.testing.assert_close(two[key], value, rtol=1e-3, atol=1e-4)
    # The schedule is over when the steps of the processes are, in the first run of a process too.
    steps = 1131 // 2 // TWO.batch
    for run in (ddp, fsdp, read_run(gradients.folder / "mod-frozen")):
        assert run.history[-1]["lr"] == pytest.approx(TWO.lr * rate(TWO, steps - 1, steps))
    assert fsdp.test_accuracy == pytest.approx(ddp.test_accuracy, abs=0.01)
    # What was scored by two processes is what was saved.
    assert evaluate(fsdp.folder, device="cpu", workers=0).top1 == pytest.approx(fsdp.test_accuracy)
    held_out = evaluate(ddp.folder, part="val", device="cpu", workers=0)
    assert held_out.top1 == pytest.approx(ddp.val_accuracy, abs=1e-6)
