"""Which depth of an adaptive network answers within 20 ms on this machine?"""

import timm
import torch

import pliant

network = timm.create_model("resnet18_adn").eval()  # or pliant.load("your-network")
image = torch.randn(1, 3, 160, 160)  # of the shape that the network serves

profile = pliant.profile_depths(network, image, threads=1)  # all 16 depths, timed in turn
for row in profile.front:
    print(f"{row.variant}: {row.median_ms:.1f} ms, {row.macs / 1e9:.2f} G MACs")

skip = profile.choose(budget_ms=20)
pliant.set_depth(network, skip)  # from now on, in all threads
print("chosen:", skip)
