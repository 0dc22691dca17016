"""A network copied in all the ways that Python and PyTorch have."""

from __future__ import annotations

import copy
import io
import pickle

import torch
from torch import nn


def copies_of(model: nn.Module) -> dict[str, nn.Module]:
    """Copies by how they were made."""
    stored = io.BytesIO()
    torch.save(model, stored)
    stored.seek(0)
    return {
        "deepcopy": copy.deepcopy(model),
        "pickle": pickle.loads(pickle.dumps(model)),
        "torch.save": torch.load(stored, weights_only=False),
    }
