"""Train a small Mixture-of-Depths network for one epoch on images of digits."""

from dataclasses import replace

import pliant

recipe = replace(pliant.get_recipe("digits.resnet18_mod"), epochs=1, warmup=0)
run = pliant.fit(recipe, "digits-resnet18-mod", progress=False)

print(f"{recipe.model}: {run.val_accuracy:.1%} validation, {run.test_accuracy:.1%} test accuracy")
print(f"{len(run.history)} epoch, {run.seconds:.0f} s; the network is in {run.folder / 'best'}")
network = pliant.load(run.folder / "best")
