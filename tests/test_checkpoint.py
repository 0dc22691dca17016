"""Saving and loading: the same bits come back, or an error says what is wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass, replace

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import pliant
from pliant import MixtureOfDepths, checkpoint, convert, load, save
from pliant._config import FORMAT_VERSION
from pliant.checkpoint import CheckpointError, read_config
from pliant.methods import METHODS
from pliant.surgery import Method, Site, Survey, conversions

NARROW = {"channels": (8, 16, 16, 32), "num_classes": 5}
SELECTIONS = ("learned", "random", "fixed", "first", "none")


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


def same_state(a, b):
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


def same_outputs(a, b, size=32):
    torch.testing.assert_close(outputs(a, size), outputs(b, size), rtol=0, atol=0)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    torch.manual_seed(0)
    model = make(num_classes=3)
    return save(model, tmp_path_factory.mktemp("saved") / "net", classes=("cat", "dog", "eel")), model


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to damage."""
    copy = tmp_path / "net"
    copy.mkdir()
    for name in ("config.json", "model.safetensors"):
        (copy / name).write_bytes((saved[0] / name).read_bytes())
    return copy


def edit(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


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
    same_state(model, again)
    same_outputs(model, again)
    assert getattr(again, "num_classes", None) == getattr(model, "num_classes", None)
    assert conversions(again) == conversions(model)
    assert not again.training
    again = load(save(again, tmp_path / "again"))  # what was loaded can be saved
    same_state(model, again)
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
    same_state(model, again)
    same_outputs(model, again)
    assert [c.method for c in conversions(again)] == [method if not named else conversions(model)[0].method]


def test_a_conversion_on_top_of_a_named_one(tmp_path):
    first, second = MixtureOfDepths(stages=(0,), c=4), MixtureOfDepths(stages=(2,), fusion="original")
    model = disturb(convert(make(stages=(1,)), first, second))
    again = load(save(model, tmp_path / "net"))
    assert read_config(tmp_path / "net").methods == (first, second)
    assert [(c.method, c.sites, c.named) for c in conversions(again)] == [
        (c.method, c.sites, c.named) for c in conversions(model)
    ]
    same_state(model, again)
    same_outputs(model, again)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtype_comes_back(tmp_path, dtype):
    model = make().to(dtype)
    again = load(save(model, tmp_path / "net"))
    assert {p.dtype for p in again.parameters()} == {dtype}
    same_state(model, again)
    same_outputs(model, again)


def test_mixed_dtypes_come_back(tmp_path):
    model = make("resnet20_cifar")
    model.layer1.double()
    again = load(save(model, tmp_path / "net", verify=False))  # no forward takes the mixture
    same_state(model, again)
    assert again.layer1[0].bn1.running_mean.dtype == torch.float64
    assert again.layer2[0].bn1.running_mean.dtype == torch.float32


@pytest.mark.parametrize("channels_last", [True, False])
def test_memory_format_comes_back(tmp_path, channels_last):
    model = make()
    if channels_last:
        model.to(memory_format=torch.channels_last)
    again = load(save(model, tmp_path / "net"))
    for p, q in zip(model.parameters(), again.parameters(), strict=True):
        assert p.stride() == q.stride()
    assert read_config(tmp_path / "net").channels_last is channels_last
    same_outputs(model, again)


def test_the_new_head_is_what_is_saved(tmp_path):
    model = make(num_classes=10)
    model.reset_classifier(4)
    again = load(save(model, tmp_path / "net"), num_classes=4)
    same_state(model, again)
    model = make("resnet18")
    model.reset_classifier(7, "max")
    vars(model).pop("_model_args")  # as with an older timm
    again = load(save(model, tmp_path / "other", arguments={"global_pool": "max"}), num_classes=7)
    same_outputs(model, again)


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


def test_shared_tensors(tmp_path):
    model = make("resnet20_cifar")
    model.layer2[1].bn1.weight = model.layer2[2].bn1.weight
    with pytest.raises(ValueError, match=r"shared: layer2.1.bn1.weight=layer2.2.bn1.weight"):
        save(model, tmp_path / "net")
    again = load(save(model, tmp_path / "net", verify=False))
    same_state(model, again)


def test_compiled_model_is_unwrapped(tmp_path):
    model = make()
    again = load(save(torch.compile(model), tmp_path / "net"))
    same_state(model, again)


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
    monkeypatch.setitem(METHODS, "Gated", Gated)
    again = load(save(model, tmp_path / "net"))
    assert (again.layer1[1].on, again.layer2[1].on) == (True, False)
    same_outputs(model, again)


def test_golden_keys_of_resnet20_cifar_mod(saved):
    """Renaming a key orphans every checkpoint out there: raise FORMAT_VERSION if you must."""
    assert FORMAT_VERSION == 1
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
    same_state(load(saved[0]), saved[1])
    assert {p.name for p in saved[0].iterdir()} == {"config.json", "model.safetensors"}


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
    same_state(load(save(model, tmp_path / "net", arguments=NARROW)), model)


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
        ({"std": [0.0]}, r"std must be positive numbers, not \(0.0,\)"),
        ({"input_size": (32, 32)}, r"input_size must be channels, height and width, not \(32, 32\)"),
        ({"input_size": (1, 32, 32), "mean": [0.5], "std": [0.5]}, r"fails on an image of \(1, 32, 32\)"),
    ],
)
def test_bad_arguments_of_save(tmp_path, kwargs, match):
    refuse_save(tmp_path, make("resnet20_cifar"), match, **kwargs)


def test_callables_are_refused_and_can_be_named(tmp_path):
    model = make("resnet20_cifar", act_layer=nn.SiLU)
    refuse_save(tmp_path, model, "is code")
    same_outputs(load(save(model, tmp_path / "net", arguments={"act_layer": "silu"})), model)


def test_weightless_model_is_refused(tmp_path):
    with torch.device("meta"):
        model = timm.create_model("resnet20_cifar")
    refuse_save(tmp_path, model, "meta device")


def test_other_folders_are_not_replaced(folder):
    model = make()
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"holds config.json, model.safetensors, notes.txt"):
        save(model, folder)
    other = folder.parent / "other"
    other.mkdir()
    (other / "config.json").write_text('{"architecture": "resnet18"}')
    with pytest.raises(ValueError, match=r"other exists and holds config.json"):
        save(model, other)
    with pytest.raises(ValueError, match=r"notes.txt exists and is no folder"):
        save(model, folder / "notes.txt")
    (other / "config.json").unlink()
    assert save(model, other) == other  # an empty folder has nothing to lose
    assert sorted(p.name for p in folder.parent.iterdir()) == ["net", "other"]


# --- atomicity -------------------------------------------------------------------------


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_an_older_checkpoint_is_replaced(folder):
    model = make(num_classes=6)
    save(model, folder)
    same_state(load(folder, num_classes=6), model)
    assert [p.name for p in folder.parent.iterdir()] == ["net"]


def test_a_link_stays_a_link(folder):
    link = folder.parent / "best"
    link.symlink_to("net")
    save(make(num_classes=6), link)
    assert link.is_symlink()
    assert load(folder).num_classes == 6


@pytest.mark.parametrize("where", ["save_file", "_check_outputs", "_put", "rename"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_one(folder, monkeypatch, where, error):
    before = contents(folder.parent)

    def fail(*args, **kwargs):
        if where == "save_file":
            args[1].write_bytes(b"half")
        raise error

    if where == "rename":
        path, real = type(folder), type(folder).rename
        monkeypatch.setattr(
            path, "rename", lambda p, new: fail() if p.suffix == ".tmp" and new == folder else real(p, new)
        )
    else:
        monkeypatch.setattr(checkpoint, where, fail)
    with pytest.raises(type(error)):
        save(make(num_classes=6), folder)
    assert contents(folder.parent) == before


def test_a_killed_write_leaves_the_old_one(folder):
    before = contents(folder)
    program = f"""
        import os, signal, timm, pliant
        from pliant import checkpoint
        def half(tensors, path, **_):
            path.write_bytes(b"half")
            os.kill(os.getpid(), signal.SIGKILL)
        checkpoint.save_file = half
        pliant.save(timm.create_model("resnet20_cifar"), {str(folder)!r})
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert contents(folder) == before
    assert load(folder).num_classes == 3


def test_a_kill_between_two_renames_is_explained(folder):
    aside = folder.parent / ".net.0123abcd.old"
    folder.rename(aside)
    with pytest.raises(
        CheckpointError, match=r"net is no folder; an interrupted save left .*\.net\.0123abcd\.old"
    ):
        load(folder)
    assert load(aside).num_classes == 3


# --- what load refuses -----------------------------------------------------------------


def refuse_load(folder, match, **kwargs):
    with pytest.raises(CheckpointError, match=match):
        load(folder, **kwargs)
    assert issubclass(CheckpointError, ValueError)


def test_missing(folder, tmp_path):
    refuse_load(tmp_path / "nowhere", "nowhere is no folder$")
    (folder / "model.safetensors").unlink()
    refuse_load(folder, r"has no model\.safetensors")
    (folder / "config.json").unlink()
    refuse_load(folder, r"is no checkpoint: it has no config\.json")


@pytest.mark.parametrize("text", [b"{", b"", b"\xff\xfe{}", b"[" * 100_000, b"\0" * 64])
def test_damaged_json(folder, text):
    (folder / "config.json").write_bytes(text)
    refuse_load(folder, r"config\.json is damaged")


@pytest.mark.parametrize(
    "text", ["{}", "[]", "3", "null", '{"architecture": "resnet18", "num_classes": 3}']
)
def test_foreign_json(folder, text):
    (folder / "config.json").write_text(text)
    refuse_load(folder, "not written by pliant")


def test_foreign_weights(folder):
    torch.save({"a": torch.zeros(3)}, folder / "model.safetensors")
    refuse_load(folder, r"model\.safetensors is no safetensors file")


@pytest.mark.parametrize("share", [0.0, 0.0001, 0.05, 0.5, 0.9999])
def test_truncated_weights(folder, share):
    path = folder / "model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    refuse_load(folder, r"model\.safetensors is truncated or damaged \(\d+ bytes\)")


def test_tensors_that_do_not_fit(folder):
    path = folder / "model.safetensors"
    good = load_file(path)
    save_file({k: v for k, v in good.items() if k != "layer1.1.core.conv1.weight"}, path)
    refuse_load(folder, r"missing layer1\.1\.core\.conv1\.weight$")
    save_file({**good, "extra": torch.zeros(1)}, path)
    refuse_load(folder, "unexpected extra$")
    save_file({**good, "fc.bias": torch.zeros(4)}, path)
    refuse_load(folder, r"fc\.bias is float \[4\] instead of float \[3\]")
    save_file({**good, "fc.bias": torch.zeros(3, dtype=torch.int32)}, path)
    refuse_load(folder, r"fc\.bias is int \[3\] instead of float \[3\]")
    save_file({**good, "fc.bias": good["fc.bias"] + 1}, path)
    refuse_load(folder, "was changed after it was saved")
    save_file(good, path, metadata={"format": "pt"})
    assert load(folder).num_classes == 3


def test_wrong_class_count(folder):
    refuse_load(folder, r"has 3 classes, not 10; load it without .*reset_classifier\(10\)", num_classes=10)
    assert load(folder, num_classes=3).num_classes == 3
    edit(folder, num_classes=4, classes=None)
    refuse_load(folder, "num_classes is 4, unlike the network's")


def test_newer_format(folder):
    edit(folder, format_version=2)
    refuse_load(folder, r"format version is 2, .* knows versions up to 1; upgrade pliant")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format_version": "1"}, "format_version must be a whole number from 1, not '1'"),
        ({"format_version": 0}, "format_version must be a whole number from 1, not 0"),
        ({"network": "resnet_of_tomorrow"}, "unknown network 'resnet_of_tomorrow'"),
        ({"network": None}, "unknown network None"),
        ({"methods": [{"name": "Tomorrow", "options": {}}]}, "unknown method 'Tomorrow' .*a newer pliant"),
        ({"methods": [{"name": ["x"], "options": {}}]}, "unknown method"),
        (
            {"methods": [{"name": "MixtureOfDepths", "options": {"tomorrow": 1}}]},
            "unknown option tomorrow of MixtureOfDepths .*a newer pliant",
        ),
        ({"methods": [{"name": "MixtureOfDepths", "options": {"c": "x"}}]}, "MixtureOfDepths: c must be"),
        ({"methods": [{"name": "MixtureOfDepths", "options": {"stages": 3}}]}, "MixtureOfDepths: "),
        ({"methods": [{"name": "MixtureOfDepths", "options": {}}]}, "cannot be built: .*matches nothing"),
        ({"methods": {}}, "methods must be a list"),
        ({"methods": ["x"]}, "a method must have a name and options, not 'x'"),
        ({"arguments": []}, "arguments must be an object"),
        ({"arguments": {"no_such": 1}}, "cannot be built: .*no_such"),
        ({"arguments": {"num_classes": 1e999}}, "num_classes=inf is neither"),
        ({"classes": ["a"]}, "classes must be 3 names"),
        ({"classes": [1, 2, 3]}, "classes must be 3 names"),
        ({"num_classes": -1}, "num_classes must be a whole number, not -1"),
        ({"mean": ["a"]}, "mean must be numbers"),
        ({"mean": 1}, "mean must be a list"),
        ({"crop_pct": "a"}, "crop_pct must be a positive number"),
        ({"interpolation": 3}, "interpolation must be a string"),
        ({"channels_last": 1}, "channels_last must be true or false"),
        ({"sha256": None}, "was changed after"),
        ({"state": {"layer1.0._extra_state": {}}}, "unexpected layer1.0._extra_state"),
    ],
)
def test_config_that_makes_no_sense(folder, changes, match):
    edit(folder, **changes)
    refuse_load(folder, match)


def test_a_field_that_is_missing(folder):
    content = json.loads((folder / "config.json").read_text())
    del content["methods"], content["sha256"]
    (folder / "config.json").write_text(json.dumps(content))
    refuse_load(folder, "it lacks methods, sha256")


ATTACK = "__import__('os').mkdir({!r})"


@pytest.mark.parametrize(
    "changes",
    [
        {"network": "hf-hub:owner/resnet18"},
        {"network": "hf_hub:resnet18"},
        {"network": "local-dir:{place}"},
        {"network": "../resnet18"},
        {"network": "resnet18.a1_in1k"},
        {"network": "{attack}"},
        *({"arguments": {name: value}} for name, value in (
            ("pretrained", True),
            ("pretrained_cfg", {"file": "{place}/x.pth"}),
            ("pretrained_cfg_overlay", {"url": "file://{place}/x.pth"}),
            ("checkpoint_path", "{place}/x.pth"),
            ("cache_dir", "{place}"),
            ("scriptable", True),
            ("model_cfg", "{attack}"),
            ("__class__", "x"),
            ("act_layer", "{attack}"),
            ("norm_layer", "{attack}"),
            ("block", "{attack}"),
            ("layers", "{attack}"),
            ("{attack}", 1),
        )),
        {"methods": [{"name": "{attack}", "options": {}}]},
        {"methods": [{"name": "MixtureOfDepths", "options": {"blocks": ["{attack}"]}}]},
        {"methods": [{"name": "MixtureOfDepths", "options": {"{attack}": 1}}]},
        {"state": {"{attack}": "{attack}"}},
    ],
)  # fmt: skip
def test_nothing_in_the_folder_is_executed(folder, tmp_path, changes, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    place = tmp_path / "owned"
    # What local-dir or checkpoint_path would find, if anything looked.
    (tmp_path / "x.pth").write_bytes(b"cos\nmkdir\n(S'" + str(place).encode() + b"'\ntR.")
    reached = []
    monkeypatch.setattr(torch, "load", lambda *a, **k: reached.append(a))
    monkeypatch.setattr("timm.models._factory.load_checkpoint", lambda *a, **k: reached.append(a))
    monkeypatch.setattr("timm.models._factory.load_model_config_from_hf", lambda *a, **k: reached.append(a))
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *a, **k: reached.append(a))
    text = (
        json.dumps(changes).replace("{attack}", ATTACK.format(str(place))).replace("{place}", str(tmp_path))
    )
    edit(folder, **json.loads(text))
    refuse_load(folder, ".")
    assert not reached
    assert not place.exists()


@given(data=st.data())
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_damage_is_noticed_or_harmless(saved, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("damaged")
    for name in ("config.json", "model.safetensors"):
        (folder / name).write_bytes((saved[0] / name).read_bytes())
    path = folder / data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    content = bytearray(path.read_bytes())
    # The header is where a flip is dangerous, and it is a small part of the file.
    end = data.draw(st.sampled_from([16, min(4096, len(content)), len(content)]))
    at = data.draw(st.integers(0, end - 1))
    if data.draw(st.booleans()):
        content[at] ^= data.draw(st.integers(1, 255))
    else:
        del content[at:]
    path.write_bytes(content)
    try:
        model = load(folder)
    except CheckpointError:
        return
    same_state(model, saved[1])
    same_outputs(model, saved[1])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(data=st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_value_in_the_config_is_refused_or_harmless(saved, tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("strange")
    (folder / "model.safetensors").symlink_to(saved[0] / "model.safetensors")
    content = json.loads((saved[0] / "config.json").read_text())
    content[data.draw(st.sampled_from(sorted(content)))] = data.draw(JSON)
    (folder / "config.json").write_text(json.dumps(content))
    try:
        model = load(folder)
    except CheckpointError:
        return
    same_state(model, saved[1])
    # Another memory format is another kernel, with other roundings.
    torch.testing.assert_close(outputs(model), outputs(saved[1]))


def test_config_is_checked_when_made_by_hand(saved):
    config = read_config(saved[0])
    with pytest.raises(ValueError, match="unknown network 'x'"):
        replace(config, network="x")
    assert pliant.checkpoint.Config.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.gpu
def test_a_network_on_a_gpu(tmp_path):
    model = make().cuda()
    again = load(save(model, tmp_path / "net"), device="cuda")
    assert all(p.is_cuda for p in (*again.parameters(), *again.buffers()))
    same_state(model, again)
    same_state(model, load(tmp_path / "net").cuda())
