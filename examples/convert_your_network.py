"""Give a network of timm 16 depths in one set of weights, check it, and save it without pickle."""

import timm
import torch

import pliant

network = timm.create_model("resnet50").eval()  # or your own, with its weights
adaptive = pliant.convert(network, pliant.AdaptiveDepth())  # a copy

images = torch.randn(2, 3, 224, 224)
with torch.inference_mode():
    print("full depth equals the network:", torch.equal(adaptive(images), network(images)))
for depth in pliant.depths(adaptive)[::5]:
    print(depth)
with pliant.at_depth(adaptive, "TTTT"):  # a letter a stage: T skips its last blocks
    logits = adaptive(images)
pliant.save(adaptive, "resnet50-adaptive")  # config.json and model.safetensors
