"""Give a trained network experts: it computes what it did, and has room to learn more."""

import timm
import torch

import pliant

trained = timm.create_model("resnet20_cifar").eval()  # load your own weights here
method = pliant.CondConv(experts=4)
print(pliant.plan(trained, method))

network = pliant.convert(trained, method)
images = torch.randn(8, 3, 32, 32)
with torch.inference_mode():
    print("largest difference:", float((network(images) - trained(images)).abs().max()))
pliant.save(network, "resnet20-experts")
