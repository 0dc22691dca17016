"""Convolutions that a processor gets wrong are named before a training; plain strides of one channel."""

from __future__ import annotations

import logging

import pytest
import torch
from torch import nn

from pliant.recipes import get_recipe
from pliant.train import fit, override
from pliant.train.batches import shifted
from pliant.train.processors import warn_of_narrow_convolutions


def narrow() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(4, 8, 1, stride=2),
        nn.Conv2d(8, 8, 1, stride=2),
        nn.Conv2d(4, 8, 1),
        nn.Conv2d(4, 8, 3, stride=2),
    )


@pytest.mark.parametrize(("capability", "named"), [("AVX2", True), ("AVX512", False)])
def test_a_narrow_strided_convolution_is_named_where_its_gradient_crashes(
    monkeypatch, caplog, capability, named
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    warn_of_narrow_convolutions(narrow())
    assert [r.message.partition(":")[0] for r in caplog.records] == (["0"] if named else [])


@pytest.mark.parametrize("channels_last", [True, False])
def test_fit_warns_where_it_trains_in_channels_last(monkeypatch, caplog, tmp_path, channels_last):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr("pliant.train.processors.NARROWEST", 9)  # so that nothing crashes here
    changes = ["epochs=1", "pixels=8", "batch=512", f"channels_last={channels_last}"]
    recipe = override(get_recipe("digits.resnet18"), [*changes, "model_args.channels=(8, 8, 8, 8)"])
    with caplog.at_level(logging.WARNING, logger="pliant"):
        fit(recipe, tmp_path / "run", progress=False)
    told = [r.message for r in caplog.records if r.name == "pliant.train.processors"]
    assert len(told) == channels_last
    assert all("layer2.0.downsample.0" in message for message in told)


@pytest.mark.parametrize("channels", [1, 3])
def test_shifted_images_have_plain_strides(channels):
    zeros = torch.zeros(2, dtype=torch.int64)
    moved = shifted(torch.rand(2, channels, 4, 5), zeros, zeros, zeros.bool())
    assert moved.stride() == (channels * 20, 20, 5, 1)
