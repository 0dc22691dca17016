"""Saving and loading: the same bits come back, and what cannot come back is not saved."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from _checkpoint import assert_same_outputs, assert_same_state, disturb, make
from pliant import MixtureOfDepths, convert, load, save
from pliant._config import FORMAT_VERSION
from pliant.checkpoint import read_config
from pliant.method import Method, Site, Survey
from pliant.methods import _OWN
from pliant.surgery import conversions

NARROW = {"channels": (8, 16, 16, 32), "num_classes": 5}
SELECTIONS = ("learned", "random", "fixed", "first", "none")


# --- what comes back -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kwargs"),
    [
        ("resnet18_cifar", NARROW),
        ("resnet18_cifar_mod", {**NARROW, "c": 8, "order": "index", "in_chans": 1}),
        ("resnet18", {"num_classes": 0, "act_layer": "silu", "global_pool": "max"}),
        ("resnet20_cifar", {"features_only": True, "out_indices": (1, 2)}),
        ("resnet20_cifar_mod", {"features_only": True}),
        ("vit_tiny_patch16_224", {"img_size": 32, "depth": 2, "num_classes": 4}),
    ],
)
def test_named_networks_come_back(tmp_path, name, kwargs):
    model = make(name, **kwargs)
    again = load(save(model, tmp_path / "net"))
    assert_same_state(model, again)
    assert_same_outputs(model, again)
    assert getattr(again, "num_classes", None) == getattr(model, "num_classes", None)
    assert conversions(again) == conversions(model)
    assert not again.training
    again = load(save(again, tmp_path / "again"))  # what was loaded can be saved
    assert_same_state(model, again)
    assert read_config(tmp_path / "net") == read_config(tmp_path / "again")


@pytest.mark.parametrize("selection", SELECTIONS)
@pytest.mark.parametrize("named", [True, False])
def test_every_selection_comes_back(tmp_path, selection, named):
    method = MixtureOfDepths(selection=selection, blocks=("layer2.1", "layer3.2"))
    if named:
        model = make(selection=selection, blocks=("layer2.1", "layer3.2"))
    else:
        model = disturb(convert(make("resnet20_cifar"), method))
    save(model, tmp_path / "net")
    assert read_config(tmp_path / "net").methods == (() if named else (method,))
    again = load(tmp_path / "net")
    assert_same_state(model, again)
    assert_same_outputs(model, again)
    assert [c.method for c in conversions(again)] == [method if not named else conversions(model)[0].method]


def test_a_conversion_on_top_of_a_named_one(tmp_path):
    first, second = MixtureOfDepths(stages=(0,), c=4), MixtureOfDepths(stages=(2,), fusion="original")
    model = disturb(convert(make(stages=(1,)), first, second))
    again = load(save(model, tmp_path / "net"))
    assert read_config(tmp_path / "net").methods == (first, second)
    assert [(c.method, c.sites, c.named) for c in conversions(again)] == [
        (c.method, c.sites, c.named) for c in conversions(model)
    ]
    assert_same_state(model, again)
    assert_same_outputs(model, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_comes_back(tmp_path, dtype):
    model = make().to(dtype)
    again = load(save(model, tmp_path / "net"))
    assert {p.dtype for p in again.parameters()} == {dtype}
    assert_same_state(model, again)
    assert_same_outputs(model, again)


def test_mixed_dtypes_come_back(tmp_path):
    model = make("resnet20_cifar")
    model.layer1.double()
    again = load(save(model, tmp_path / "net", verify=False))  # no forward takes the mixture
    assert_same_state(model, again)
    assert again.layer1[0].bn1.running_mean.dtype == torch.float64
    assert again.layer2[0].bn1.running_mean.dtype == torch.float32


@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("grey", [False, True])  # all kernels of a grey MobileNet lie in both ways at once
def test_memory_format_comes_back(tmp_path, channels_last, grey):
    model = make("mobilenetv3_small_050", in_chans=1, num_classes=5) if grey else make()
    if channels_last:
        model.to(memory_format=torch.channels_last)
    again = load(save(model, tmp_path / "net"))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert p.stride() == q.stride()
    assert read_config(tmp_path / "net").channels_last is channels_last
    assert_same_outputs(model, again)


def test_the_new_head_is_what_is_saved(tmp_path):
    model = make(num_classes=10)
    model.reset_classifier(4)
    again = load(save(model, tmp_path / "net"), num_classes=4)
    assert_same_state(model, again)
    model = make("resnet18")
    model.reset_classifier(7, "max")
    vars(model).pop("_model_args")  # as with an older timm
    again = load(save(model, tmp_path / "other", arguments={"global_pool": "max"}), num_classes=7)
    assert_same_outputs(model, again)


def test_classes_and_normalisation(tmp_path):
    model = make(num_classes=2, in_chans=1)
    save(
        model,
        tmp_path / "net",
        classes=["a", "b"],
        mean=[0.5],
        std=torch.tensor([0.25]),
        input_size=(1, 24, 24),
    )
    config = read_config(tmp_path / "net")
    assert config.classes == ("a", "b")
    assert (config.mean, config.std, config.input_size) == ((0.5,), (0.25,), (1, 24, 24))
    assert config.versions.keys() == {"pliant", "torch", "timm"}
    again = load(tmp_path / "net")
    data = timm.data.resolve_model_data_config(again)
    assert (data["mean"], data["std"], data["input_size"]) == ((0.5,), (0.25,), (1, 24, 24))
    assert again.pretrained_cfg["label_names"] == ("a", "b")
    save(again, tmp_path / "again")
    assert read_config(tmp_path / "again") == config
    again.reset_classifier(3)
    save(again, tmp_path / "again")
    assert read_config(tmp_path / "again").classes is None


def test_normalisation_is_timms_by_default(tmp_path):
    model = make("resnet18.tv_in1k", num_classes=0)
    config = read_config(save(model, tmp_path / "net"))
    for name in ("mean", "std", "interpolation", "crop_pct", "crop_mode", "input_size"):
        assert getattr(config, name) == model.pretrained_cfg[name]
    assert load(tmp_path / "net").pretrained_cfg["interpolation"] == "bilinear"
    grey = make("resnet20_cifar", in_chans=2)
    assert read_config(save(grey, tmp_path / "grey")).mean is None  # timm's three do not fit


def test_all_that_timm_says_of_a_network_is_kept(tmp_path):
    """Of its tag, not of the tag that its name has by default."""
    model = timm.create_model("resnet18.tv_in1k")
    assert model.pretrained_cfg["tag"] == "tv_in1k"
    assert timm.create_model("resnet18").pretrained_cfg["tag"] != "tv_in1k"
    before = {k: v for k, v in model.pretrained_cfg.items() if v is not None}
    again = load(save(model, tmp_path / "net", verify=False))
    assert {k: v for k, v in again.pretrained_cfg.items() if v is not None} == before
    # Of other images or classes the rest holds no more.
    model = timm.create_model("resnet18.a1_in1k", num_classes=2)
    assert model.pretrained_cfg["test_input_size"] == (3, 288, 288)
    place = save(model, tmp_path / "net", input_size=(3, 64, 96), classes=("a", "b"), verify=False)
    config = load(place).pretrained_cfg
    assert config.keys() & {"test_input_size", "test_crop_pct", "label_descriptions"} == set()
    assert (config["input_size"], config["pool_size"], config["tag"]) == ((3, 64, 96), None, "a1_in1k")


def test_shared_tensors(tmp_path):
    model = make("resnet20_cifar")
    model.layer2[1].bn1.weight = model.layer2[2].bn1.weight
    with pytest.raises(ValueError, match=r"shared: layer2.1.bn1.weight=layer2.2.bn1.weight"):
        save(model, tmp_path / "net")
    again = load(save(model, tmp_path / "net", verify=False))
    assert_same_state(model, again)


def test_compiled_model_is_unwrapped(tmp_path):
    model = make()
    again = load(save(torch.compile(model), tmp_path / "net"))
    assert_same_state(model, again)


def test_saving_and_loading_leave_no_trace(tmp_path):
    model = make(selection="random").train()
    model.layer1.eval()
    modes = [m.training for m in model.modules()]
    before = torch.get_rng_state()
    load(save(model, tmp_path / "net"))
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before)


class Gate(nn.Module):
    """Stands for a layer with a setting beside its tensors, as a depth that is switched."""

    def __init__(self, inner, on=True):
        super().__init__()
        self.inner, self.on = inner, on

    def forward(self, x):
        return self.inner(x) if self.on else x

    def get_extra_state(self):
        return {"on": self.on}

    def set_extra_state(self, state):
        self.on = state["on"]


@dataclass(frozen=True, kw_only=True)
class Gated(Method):
    paths: tuple[str, ...] = ("layer1.1",)

    def survey(self, model):
        return Survey(tuple(Site(path) for path in self.paths))

    def replace(self, module, site):
        return Gate(module)


def test_a_new_method_needs_no_change_here(tmp_path, monkeypatch):
    model = disturb(convert(make("resnet20_cifar"), Gated(paths=("layer1.1", "layer2.1"))))
    model.layer2[1].on = False
    with pytest.raises(ValueError, match=r"Gated is not in pliant.methods.METHODS"):
        save(model, tmp_path / "net")
    monkeypatch.setitem(_OWN, "Gated", Gated)
    again = load(save(model, tmp_path / "net"))
    assert (again.layer1[1].on, again.layer2[1].on) == (True, False)
    assert_same_outputs(model, again)


def test_golden_keys_of_resnet20_cifar_mod(saved):
    """Renaming a key orphans every checkpoint out there: raise FORMAT_VERSION if you must."""
    assert FORMAT_VERSION == 2
    keys = set(load_file(saved[0] / "model.safetensors"))
    norm = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert {k for k in keys if k.startswith("layer1.1.")} == {
        "layer1.1.selector.fc1.weight",
        "layer1.1.selector.fc2.weight",
        "layer1.1.core.conv1.weight",
        *(f"layer1.1.core.bn1.{n}" for n in norm),
        "layer1.1.core.conv2.weight",
        *(f"layer1.1.core.bn2.{n}" for n in norm),
    }
    assert {k for k in keys if "." not in k or not k.startswith("layer")} == {
        "conv1.weight", *(f"bn1.{n}" for n in norm), "fc.weight", "fc.bias"
    }  # fmt: skip
    blocks = {k.rsplit(".", 2)[0] if "core" not in k and "selector" not in k else "" for k in keys}
    assert {b for b in blocks if b.startswith("layer")} == {
        f"layer{n}.{i}" for n in (1, 2, 3) for i in (0, 2)
    }


def test_no_pickle_is_called(saved, monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("pickle was called")

    for name in ("load", "loads", "Unpickler"):
        monkeypatch.setattr(f"pickle.{name}", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    assert_same_state(load(saved[0]), saved[1])
    assert {p.name for p in saved[0].iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.gpu
def test_a_network_on_a_gpu(tmp_path):
    model = make().cuda()
    again = load(save(model, tmp_path / "net"), device="cuda")
    assert all(p.is_cuda for p in (*again.parameters(), *again.buffers()))
    assert_same_state(model, again)
    assert_same_state(model, load(tmp_path / "net").cuda())


# --- what save refuses -----------------------------------------------------------------


def refuse_save(tmp_path, model, match, **kwargs):
    with pytest.raises(ValueError, match=match):
        save(model, tmp_path / "net", **kwargs)
    assert list(tmp_path.iterdir()) == []


def test_networks_that_cannot_be_rebuilt(tmp_path):
    refuse_save(tmp_path, nn.Conv2d(3, 4, 1), r"Conv2d does not come from timm\.create_model")
    model = make("resnet20_cifar")
    model.fc = nn.Linear(64, 9)
    refuse_save(tmp_path, model, r"fc.bias is float \[9\] instead of float \[10\]; pass .* arguments=")
    model = make("resnet20_cifar")
    model.layer1[0].act1 = nn.SiLU()  # no key and no shape tells
    refuse_save(tmp_path, model, r"computes something else; pass the keyword arguments")
    model = make("resnet18_cifar", **NARROW)
    vars(model).pop("_model_args")  # as with an older timm
    refuse_save(tmp_path, model, "arguments=")
    assert_same_state(load(save(model, tmp_path / "net", arguments=NARROW)), model)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"arguments": {"act_layer": nn.SiLU}}, r"act_layer=.*SiLU.* is code.*act_layer=\"silu\""),
        ({"arguments": {"drop_rate": float("nan")}}, "drop_rate=nan is neither"),
        ({"arguments": {"pretrained": True}}, "'pretrained' does not belong"),
        ({"arguments": {"checkpoint_path": "x.pth"}}, "'checkpoint_path' does not belong"),
        ({"arguments": {"no_such": 1}}, "cannot be built again.*no_such"),
        ({"classes": ["a"]}, r"classes must be 10 names.*\('a',\)"),
        ({"classes": "abcdefghij"}, "classes must be a sequence, not 'abcdefghij'"),
        ({"mean": [0.5, 0.5]}, r"mean must be one number for each of 3 channels, not \(0.5, 0.5\)"),
        ({"mean": 0.5}, "mean must be a sequence, not 0.5"),
        ({"std": [0.0]}, r"std\.0 must be greater than 0, not 0\.0"),
        ({"input_size": (32, 32)}, r"input_size must be channels, height and width, not \(32, 32\)"),
        ({"input_size": (1, 32, 32), "mean": [0.5], "std": [0.5]}, r"fails on an image of \(1, 32, 32\)"),
    ],
)
def test_bad_arguments_of_save(tmp_path, kwargs, match):
    refuse_save(tmp_path, make("resnet20_cifar"), match, **kwargs)


def test_callables_are_refused_and_can_be_named(tmp_path):
    model = make("resnet20_cifar", act_layer=nn.SiLU)
    refuse_save(tmp_path, model, "is code")
    assert_same_outputs(load(save(model, tmp_path / "net", arguments={"act_layer": "silu"})), model)


def test_weightless_model_is_refused(tmp_path):
    with torch.device("meta"):
        model = timm.create_model("resnet20_cifar")
    refuse_save(tmp_path, model, "meta device")
