"""Networks with values that no constructor gives, to save, and what a loaded one must share with them."""

from __future__ import annotations

import timm
import torch
from torch import nn


def make(name="resnet20_cifar_mod", **kwargs):
    model = timm.create_model(name, **kwargs)
    if not hasattr(model, "_model_args"):  # timm before 1.0.31, which records nothing
        vars(model)["_model_args"] = kwargs
    return disturb(model)


def disturb(model):
    """Values that no constructor gives: fresh buffers of BN would hide a loss."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data += torch.rand_like(tensor) * 0.01
        elif tensor.dim() == 0:
            tensor.data += 7
    return model


def assert_same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert list(a) == list(b)
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name], b[name]), name


def outputs(model, size=32):
    torch.manual_seed(3)
    like = next(m for m in model.modules() if isinstance(m, nn.Conv2d)).weight
    x = torch.randn(2, like.shape[1], size, size).to(like.dtype)
    with torch.inference_mode():
        out = model.eval()(x)
    for tensor in out if isinstance(out, (list, tuple)) else [out]:
        assert tensor.isfinite().all()  # or equality would say little
    return out


def assert_same_outputs(a, b, size=32):
    torch.testing.assert_close(outputs(a, size), outputs(b, size), rtol=0, atol=0)
