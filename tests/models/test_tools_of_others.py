"""Tools of others take a named network as they take timm's: averages, files, the Hub's folders, tracing."""

from __future__ import annotations

import inspect
import io

import pytest
import safetensors.torch
import timm
import torch
from timm.utils import ModelEmaV3

from pliant import Subnet, convert, get_depth, set_depth

SMALL = {"channels": (8, 8, 16), "num_classes": 5}
OPTIONS = {
    "resnet20_cifar": {},
    "resnet20_cifar_mod": {"reduction": 2},
    "cc_resnet20_cifar": {"experts": 2},
    "resnet20_cifar_adn": {"skippable": (1, 0, 0)},
    "resnet20_cifar_mod_adn": {"skippable": (1, 0, 0)},
}


@pytest.fixture(params=OPTIONS)
def network(request):
    return timm.create_model(request.param, **SMALL, **OPTIONS[request.param]).eval()


def images():
    return torch.randn(2, 3, 16, 16)


def changed(model):
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data += torch.rand_like(tensor)
    return model


@pytest.mark.parametrize("foreach", [True, False])
def test_timms_average(network, foreach):
    average = ModelEmaV3(network, decay=0.5, foreach=foreach)
    before = {k: v.clone() for k, v in network.state_dict().items()}
    average.update(changed(network))
    for key, value in average.module.state_dict().items():
        now = network.state_dict()[key]
        expected = (before[key] + now) / 2 if value.is_floating_point() else now
        torch.testing.assert_close(value, expected)
    average.set(network)
    x = images()
    assert torch.equal(average(x), network(x))


@pytest.mark.parametrize("file", ["safetensors", "torch"])
def test_a_file_of_the_state_dict(network, tmp_path, file):
    network, x = changed(network), images()
    fresh = timm.create_model(
        network.pretrained_cfg["architecture"], **SMALL, **OPTIONS[network.pretrained_cfg["architecture"]]
    ).eval()
    if file == "torch":
        torch.save(network.state_dict(), tmp_path / "f")
        state = torch.load(tmp_path / "f", weights_only=True)
    else:
        safetensors.torch.save_file(network.state_dict(), tmp_path / "f")
        state = safetensors.torch.load_file(tmp_path / "f")
    fresh.load_state_dict(state)
    assert torch.equal(fresh(x), network(x))


def test_the_hubs_way_to_split_a_state_dict(network, tmp_path):
    hub = pytest.importorskip("huggingface_hub")
    hub.save_torch_state_dict(network.state_dict(), tmp_path)
    assert safetensors.torch.load_file(tmp_path / "model.safetensors").keys() == network.state_dict().keys()


@pytest.mark.parametrize("safe", [True, False])
def test_timms_folder_for_the_hub(network, tmp_path, safe):
    from timm.models import _hub, save_for_hf

    if safe and "torch.load(" in inspect.getsource(_hub.load_state_dict_from_path):
        pytest.skip(f"timm {timm.__version__} reads safetensors in a folder as if they were pickled")
    network, x = changed(network), images()
    # The network is of arguments that timm passes on, which are none of its own.
    name = network.pretrained_cfg["architecture"]
    again = timm.create_model(name, pretrained_cfg_overlay={"tag": "mine"}, **SMALL, **OPTIONS[name])
    again.load_state_dict(network.state_dict())
    assert not any(key.startswith(("pretrained", "cache")) for key in again._model_args)
    save_for_hf(again, tmp_path, model_args={**SMALL, **OPTIONS[name]}, safe_serialization=safe)
    found = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(found(x), network(x))
    assert found.pretrained_cfg["tag"] == "mine"


def test_transformers_folder(network, tmp_path):
    transformers = pytest.importorskip("transformers")
    name, x = network.pretrained_cfg["architecture"], images()
    options = {"channels": SMALL["channels"], **OPTIONS[name]}
    config = transformers.TimmWrapperConfig(architecture=name, model_args=options, num_labels=5)
    model = changed(transformers.TimmWrapperForImageClassification(config)).eval()
    if name.endswith("_adn"):
        set_depth(model, "T")
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForImageClassification.from_pretrained(tmp_path).eval()
    assert torch.equal(again(x).logits, model(x).logits)
    assert not name.endswith("_adn") or get_depth(again) == (True,)


def test_tracing(network):
    x = images()
    traced = torch.jit.trace(network, x)
    torch.testing.assert_close(traced(x), network(x))
    assert traced.state_dict().keys() <= network.state_dict().keys()


@pytest.mark.parametrize("name", ["resnet20_cifar", "resnet20_cifar_adn"])
def test_torchs_older_exporter_takes_what_it_takes_of_plain_networks(name):
    pytest.importorskip("onnx")
    model = timm.create_model(name, **SMALL, **OPTIONS[name]).eval()
    file = io.BytesIO()
    torch.onnx.export(model, (images(),), file, dynamo=False)
    assert file.getvalue()


def test_counts_of_others(network):
    fvcore = pytest.importorskip("fvcore.nn")
    assert fvcore.parameter_count(network)[""] == sum(p.numel() for p in network.parameters())


def test_a_depth_goes_with_the_state_whatever_its_type():
    options = {**SMALL, **OPTIONS["resnet20_cifar_adn"]}
    model, other = (timm.create_model("resnet20_cifar_adn", **options) for _ in range(2))
    set_depth(model, "T")
    state = model.state_dict()
    for form in (state, {k: v.half() for k, v in state.items()}):
        other.load_state_dict(form)
        assert get_depth(other) == (True,)
        set_depth(other, "F")
    (key,) = (k for k in state if k.endswith("_extra_state"))
    other.load_state_dict({**state, key: [True]})  # as it was before it was a tensor
    assert get_depth(other) == (True,)
    cut = convert(model, Subnet(skip=(True,)))
    assert all(isinstance(v, torch.Tensor) and "_extra_state" not in k for k, v in cut.state_dict().items())
