"""Selection frequencies by class (figure 4)."""

from __future__ import annotations

import pytest
import timm
import torch

from research.analysis.routing import selection_frequency


def data(n=24, classes=3):
    g = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, 32, 32, generator=g)
    return [(x[i : i + 8], torch.arange(i, i + 8) % classes) for i in range(0, n, 8)]


@pytest.mark.parametrize("selection", ["learned", "random", "fixed"])
def test_counts_are_what_the_selector_picked(selection):
    torch.manual_seed(0)
    model = timm.create_model("resnet20_cifar_mod", selection=selection).train()
    found = selection_frequency(model, data(), ["a", "b", "c"])
    assert model.training
    assert not model.layer3[1].selector._forward_hooks
    assert found.samples.tolist() == [8, 8, 8]
    for path, k in found.k.items():
        assert found.counts[path].sum(1).tolist() == [8 * k] * 3
        torch.testing.assert_close(found.share(path).sum(1), torch.ones(3, dtype=torch.double))
        assert float(found.overall(path).sum()) == pytest.approx(1)


def test_learned_counts_equal_a_recount_by_hand():
    torch.manual_seed(0)
    model = timm.create_model("resnet20_cifar_mod").eval()
    found = selection_frequency(model, data(), ["a", "b", "c"])
    expected = torch.zeros(3, 16, dtype=torch.long)
    with torch.inference_mode():
        for x, y in data():
            features = model.layer1[0](model.act1(model.bn1(model.conv1(x))))
            index = model.layer1[1].selector.logits(features).argmax(1)  # k = 1
            for label, channel in zip(y.tolist(), index.tolist(), strict=True):
                expected[label, channel] += 1
    assert torch.equal(found.counts["layer1.1"], expected)


def test_fixed_selection_is_always_and_the_rest_never():
    model = timm.create_model("resnet20_cifar_mod", selection="fixed")
    found = selection_frequency(model, data(), ["a", "b", "c"])
    index = model.layer3[1].selector.index.sort().values
    assert torch.equal(found.always("layer3.1"), index)
    assert sorted(found.never("layer3.1").tolist() + index.tolist()) == list(range(64))


def test_per_class_limits_the_samples():
    model = timm.create_model("resnet20_cifar_mod")
    found = selection_frequency(model, data(), ["a", "b", "c"], per_class=5)
    assert found.samples.tolist() == [5, 5, 5]


def test_errors_name_the_reason():
    with pytest.raises(ValueError, match="no Mixture-of-Depths block that selects"):
        selection_frequency(timm.create_model("resnet20_cifar"), data(), ["a", "b", "c"])
    with pytest.raises(ValueError, match="2 classes were given"):
        selection_frequency(timm.create_model("resnet20_cifar_mod"), data(), ["a", "b"])
