"""Convert a network of timm, see what was covered, save it without pickle, load it."""

import timm

import pliant

network = timm.create_model("resnet50", num_classes=10)
method = pliant.MixtureOfDepths(c=64)
print(pliant.plan(network, method))

converted = pliant.convert(network, method)
folder = pliant.save(converted, "resnet50-mod")
again = pliant.load(folder)
print(f"{sum(p.numel() for p in again.parameters()):,} parameters in {folder}")
