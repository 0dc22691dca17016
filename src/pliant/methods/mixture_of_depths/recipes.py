"""How *CNN Mixture-of-Depths* (arXiv 2409.17016) trains its networks, and what it is compared with.

The recipes are for plain baselines too: they are the form ``paper`` of every network whose own method
brings no other.
"""

from __future__ import annotations

from typing import Any

REMOVED = "blocks removed"  # label of the control without blocks
# The forms that do not learn what to select: label -> options.
CONTROLS: dict[str, dict[str, Any]] = {
    "MoD, score order": {},
    "MoD, index order": {"order": "index"},
    "random channels, fresh": {"selection": "random"},
    "random channels, fixed": {"selection": "fixed"},
    "first k channels": {"selection": "first"},
    REMOVED: {"selection": "none"},
}

IMAGENET = (
    "arXiv 2409.17016, section 4.1 and appendix A.1: 100 epochs, batch 256 in all, SGD 0.1 times 0.1 "
    "every 30 epochs, momentum 0.9, weight decay 1e-4, 3 seeds (0 to 2), after PyTorch's reference "
    "(random resized crops and flips at 224 px, centre crop of 256). The official validation set gives "
    "the figure, as everyone's; the best epoch on it is chosen, which favours every network alike"
)
CIFAR = (
    "arXiv 2409.17016, appendix D: 90/10 split for training and validation, the best epoch on "
    "validation tested once, 5 seeds (0 to 4). Not given there, and ours: 200 epochs, batch 128, "
    "SGD 0.1 with momentum 0.9, weight decay 5e-4, cosine schedule, shifts and flips"
)


def imagenet(_network: str) -> dict[str, Any]:
    """Settings of appendix A.1; run them with seeds 0 to 2."""
    return {
        "note": IMAGENET,
        "epochs": 100,
        "batch": 256,
        "lr": 0.1,
        "weight_decay": 1e-4,
        "schedule": "step",
        "step_size": 30,
        "gamma": 0.1,
    }


def cifar(_network: str) -> dict[str, Any]:
    """The protocol of appendix D; the note says what it leaves open and we chose.

    Run it with seeds 0 to 4, and give mean and standard deviation of the test accuracy.
    """
    return {
        "note": CIFAR,
        "val_fraction": 0.1,
        "epochs": 200,
        "batch": 128,
        "lr": 0.1,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "schedule": "cosine",
        "augmentation": "flip_crop",
    }
