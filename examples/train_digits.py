"""Train a small Mixture-of-Depths network for one epoch on images of digits."""

import pliant
from pliant.recipes import get_recipe
from pliant.train import fit, override

recipe = override(get_recipe("digits.resnet18_mod"), ["epochs=1", "warmup=0"])
run = fit(recipe, "digits-resnet18-mod", progress=False)

print(f"{recipe.model}: {run.val_accuracy:.1%} validation, {run.test_accuracy:.1%} test accuracy")
print(f"{len(run.history)} epoch, {run.seconds:.0f} s; the network is in {run.folder / 'best'}")
network = pliant.load(run.folder / "best")
