"""A stream of images with a deadline: when more come, the network runs at a lower depth.

Bursts of 4, 8, 11 and again 4 images come in, and each burst must be answered within the
same time. One network serves them all: it is profiled once, and for each burst the deepest
of its eight depths that is fast enough is chosen. A machine that is busy with other things
is slower than its profile; the server sees that in its own times and takes it into account.

The figure `serve_with_a_deadline.png` shows load, depth and latency over time.
"""

import time

import timm
import torch
from matplotlib.figure import Figure

import pliant

torch.manual_seed(0)
LOAD = [4] * 15 + [8] * 15 + [11] * 15 + [4] * 15  # images in each burst

# One to three blocks in each of three stages. Weights are random here: load yours.
model = timm.create_model("resnet20_cifar_adn", skippable=(2, 2, 2)).eval()
image = torch.randn(1, 3, 32, 32)
profile = pliant.profile_depths(model, image, rounds=5, min_run_time=0.02)
cost = {pliant.skip_of(row): row for row in profile.rows}
whole = cost[False, False, False]
deadline = 1.6 * 4 * whole.median_ms
MARGIN = 0.8  # of the deadline that is planned: single forwards are slower than the median one
fastest = min(cost, key=lambda skip: cost[skip].median_ms)

depths, latencies = [], []
slow = 1.0  # how much slower this machine is than its profile, of late
for images in LOAD:
    try:
        skip = profile.choose(budget_ms=MARGIN * deadline / images / max(slow, 1.0))
    except ValueError:  # nothing is fast enough: as fast as it goes
        skip = fastest
    start = time.perf_counter()
    with torch.inference_mode(), pliant.at_depth(model, skip):
        for _ in range(images):
            model(image)
    latency = 1000 * (time.perf_counter() - start)
    slow = 0.7 * slow + 0.3 * latency / (images * cost[skip].median_ms)
    depths.append(cost[skip].macs / whole.macs)
    latencies.append(latency)

for images in (4, 8, 11):
    of_load = [depth for depth, load in zip(depths, LOAD, strict=True) if load == images]
    share = sum(of_load) / len(of_load)
    print(f"{images} images a burst: {100 * share:.0f} % of the whole network's operations")
kept = sum(latency <= deadline for latency in latencies)
print(f"deadline of {deadline:.1f} ms kept by {kept} of {len(LOAD)} bursts")

figure = Figure(figsize=(7, 6), layout="constrained")
load_axes, depth_axes, time_axes = figure.subplots(3, sharex=True)
load_axes.step(range(len(LOAD)), LOAD, where="mid", color="black")
load_axes.set_ylabel("images a burst")
depth_axes.step(range(len(LOAD)), [100 * d for d in depths], where="mid")
depth_axes.set_ylabel("operations, % of all")
time_axes.plot(latencies, ".-", label="measured")
always = [n * whole.median_ms for n in LOAD]
time_axes.plot(always, ":", color="gray", label="whole network, by its profile")
time_axes.axhline(deadline, color="black", linestyle="--", label="deadline")
time_axes.set(xlabel="burst", ylabel="ms", ylim=(0, 1.6 * max(always)))
time_axes.legend(loc="upper left", frameon=False)
figure.savefig("serve_with_a_deadline.png", dpi=120)
