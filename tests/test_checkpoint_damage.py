"""Checkpoints that are replaced, cut short, damaged or hostile: an error says what is wrong."""

from __future__ import annotations

import itertools
import json
import os
import resource
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import pliant
from _checkpoint import assert_same_outputs, assert_same_state, make, outputs
from pliant import _files, checkpoint, load, save
from pliant._config import checksum
from pliant.checkpoint import CheckpointError, read_config
from pliant.methods import METHODS


@pytest.fixture
def folder(saved, tmp_path):
    """A copy to damage."""
    copy = tmp_path / "net"
    copy.mkdir()
    for name in ("config.json", "model.safetensors"):
        (copy / name).write_bytes((saved[0] / name).read_bytes())
    return copy


def edit(folder, **changes):
    """Change the config as somebody does who also makes its checksum fit."""
    path = folder / "config.json"
    content = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({**content, "config_sha256": checksum(content)}))


# --- atomicity -------------------------------------------------------------------------


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


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


def test_an_older_checkpoint_is_replaced(folder):
    model = make(num_classes=6)
    save(model, folder)
    assert_same_state(load(folder, num_classes=6), model)
    assert [p.name for p in folder.parent.iterdir()] == ["net"]


def test_a_link_stays_a_link(folder):
    link = folder.parent / "best"
    link.symlink_to("net")
    save(make(num_classes=6), link)
    assert link.is_symlink()
    assert load(folder).num_classes == 6


@pytest.mark.parametrize("where", ["save_file", "_check_outputs", "replace_folder", "rename"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_leaves_the_old_one(folder, monkeypatch, where, error):
    before = contents(folder.parent)

    def fail(*args, **kwargs):
        if where == "save_file":
            args[1].write_bytes(b"half")
        raise error

    if where == "rename":
        path, real = type(folder), type(folder).rename
        monkeypatch.setattr(_files, "_exchanged", lambda *_: False)
        monkeypatch.setattr(
            path, "rename", lambda p, new: fail() if p.suffix == ".tmp" and new == folder else real(p, new)
        )
    else:
        monkeypatch.setattr(checkpoint, where, fail)
    with pytest.raises(type(error)):
        save(make(num_classes=6), folder)
    assert contents(folder.parent) == before


def killed_save(folder):
    """Save in a process that is killed while it writes."""

    def half(tensors, path, **_):
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    network = timm.create_model("resnet20_cifar")
    child = os.fork()
    if not child:
        try:
            torch.set_num_threads(1)  # this process's threads are not there
            checkpoint.save_file = half
            save(network, folder)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def test_a_killed_write_leaves_the_old_one(folder):
    before = contents(folder)
    killed_save(folder)
    assert contents(folder) == before
    assert load(folder).num_classes == 3


def test_what_killed_saves_left_goes_with_the_next_and_what_others_write_stays(folder):
    killed_save(folder)
    older = folder.parent / ".net.0123abcd.old"
    older.mkdir()
    (older / "config.json").write_text("{}")
    with _files.scratch_folder(folder) as living:
        (living / "model.safetensors").write_bytes(b"half")
        assert len(_files.leftovers(folder)) == 3
        save(make(num_classes=6), folder)
        assert _files.leftovers(folder) == [living]
    assert _files.leftovers(folder) == []
    assert load(folder).num_classes == 6


@pytest.mark.parametrize("at_once", [True, False])
def test_who_loads_while_others_save_gets_one_whole_version(tmp_path, monkeypatch, at_once):
    if not at_once:  # as on systems that cannot exchange two folders
        monkeypatch.setattr(_files, "_exchanged", lambda *_: False)
    versions = [make("resnet20_cifar", num_classes=n, layers=(1, 1, 1)) for n in (3, 4)]
    place = save(versions[0], tmp_path / "net", verify=False)
    stop = threading.Event()

    def write():
        for model in itertools.cycle(reversed(versions)):
            if stop.is_set():
                return
            save(model, place, verify=False)

    with ThreadPoolExecutor(1) as pool:
        writing = pool.submit(write)
        try:
            for _ in range(15):
                again = load(place)
                assert_same_state(again, versions[again.num_classes - 3])
        finally:
            stop.set()
        writing.result()
    assert [path.name for path in tmp_path.iterdir()] == ["net"]


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
    edit(folder, format_version=3)
    refuse_load(folder, r"format version is 3, .* knows versions up to 2; upgrade pliant")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"format_version": "1"}, "format_version must be a whole number from 1, not '1'"),
        ({"format_version": 0}, "format_version must be a whole number from 1, not 0"),
        ({"network": "resnet_of_tomorrow"}, "unknown network 'resnet_of_tomorrow'"),
        ({"network": None}, "network must be a valid string, not None"),
        ({"methods": [{"name": "Tomorrow", "options": {}}]}, "unknown method 'Tomorrow' .*a newer pliant"),
        ({"methods": [{"name": ["x"], "options": {}}]}, "unknown method"),
        (
            {"methods": [{"name": "MixtureOfDepths", "options": {"tomorrow": 1}}]},
            "unknown option tomorrow of MixtureOfDepths .*a newer pliant",
        ),
        ({"methods": [{"name": "MixtureOfDepths", "options": {"c": "x"}}]}, "MixtureOfDepths: c: give"),
        ({"methods": [{"name": "MixtureOfDepths", "options": {"stages": 3}}]}, "MixtureOfDepths: "),
        ({"methods": [{"name": "MixtureOfDepths", "options": {}}]}, "cannot be built: .*matches nothing"),
        ({"methods": {}}, "methods must be a list"),
        ({"methods": ["x"]}, "a method must have a name and options, not 'x'"),
        ({"arguments": []}, "arguments must be a valid dictionary"),
        ({"arguments": {"no_such": 1}}, "cannot be built: .*no_such"),
        ({"arguments": {"num_classes": 1e999}}, "num_classes=inf is neither"),
        ({"classes": ["a"]}, "classes must be 3 names"),
        ({"classes": [1, 2, 3]}, "classes.0 must be a valid string, not 1"),
        ({"num_classes": -1}, "num_classes must be greater than or equal to 0, or none, not -1"),
        ({"mean": ["a"]}, "mean.0 must be a valid number, not 'a'"),
        ({"mean": 1}, "mean must be a list, or none, not 1"),
        ({"crop_pct": "a"}, "crop_pct must be a valid number, or none, not 'a'"),
        ({"interpolation": 3}, "interpolation must be a valid string, or none, not 3"),
        ({"channels_last": 1}, "channels_last must be a valid boolean, not 1"),
        ({"sha256": None}, "sha256 must be a valid string, not None"),
        ({"state": {"layer1.0._extra_state": {}}}, "unexpected layer1.0._extra_state"),
    ],
)
def test_config_that_makes_no_sense(folder, changes, match):
    edit(folder, **changes)
    refuse_load(folder, match)


def test_a_field_that_is_missing(folder):
    content = json.loads((folder / "config.json").read_text())
    del content["methods"], content["sha256"], content["config_sha256"]
    (folder / "config.json").write_text(json.dumps(content))
    refuse_load(folder, "it lacks methods, sha256, config_sha256")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"0.485", b"0.486"),
        (b"bilinear", b"bilinfar"),
        (b'"cat"', b'"cut"'),
        (b'"crop_mode": "center"', b'"crop_mode": "border"'),
        (b'"first_conv": "conv1"', b'"first_conv": "conv2"'),
        (b'"format_version": 2', b'"format_version": 1'),
    ],
)
def test_a_changed_byte_of_the_config_is_noticed(folder, old, new):
    path = folder / "config.json"
    assert old in path.read_bytes()
    path.write_bytes(path.read_bytes().replace(old, new, 1))
    refuse_load(folder, r"config\.json: it was changed after it was saved: its SHA-256 is .*; restore")


def test_another_layout_of_the_config_is_no_change(folder):
    path = folder / "config.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(dict(reversed(content.items()))))
    assert load(folder).num_classes == 3


@pytest.mark.parametrize("inside", [False, True])
def test_a_key_that_stands_twice_is_refused(folder, inside):
    path = folder / "config.json"
    text = path.read_text()
    key = '"arguments": {' if inside else "{"
    path.write_text(text.replace(key, f'{key}"num_classes": 3, "num_classes": 3,', 1))
    refuse_load(folder, r"config\.json is damaged: .*the key 'num_classes' stands twice")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"num_classes": 10**7}, r"num_classes has 10000000, and the file has \d+ values in all"),
        ({"channels": [16, 10**9, 64]}, r"channels has 1000000000, and the file has"),
        ({"num_classes": 10**6}, r"fc\.bias is float \[3\] instead of float \[1000000\]"),
        ({"layers": [10**6, 1, 1]}, r"cannot be built: it has far more layers than the file has tensors"),
        ({"layers": [10**12, 1, 1]}, r"layers has 1000000000000, and the file has"),
    ],
)
def test_a_small_file_that_asks_for_much_gets_nothing(folder, arguments, match):
    before = json.loads((folder / "config.json").read_text())["arguments"]
    edit(
        folder, arguments={**before, **arguments}, num_classes=arguments.get("num_classes", 3), classes=None
    )
    started, peak = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refuse_load(folder, match)
    assert time.monotonic() - started < 60  # a second, on a machine with nothing else to do
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 200_000  # KiB


@pytest.mark.parametrize("number", ["9" * 400, "-" + "9" * 20])
def test_a_number_beyond_64_bits_is_refused(folder, number):
    path = folder / "config.json"
    path.write_text(path.read_text().replace('"num_classes": 3', f'"num_classes": {number}', 1))
    refuse_load(folder, r"config\.json is damaged: .*more than 64 bits hold")


def test_no_weights_are_fetched_from_where_the_config_says(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *a, **k: pytest.fail("fetched"))
    edit(folder, pretrained_cfg={"file": str(tmp_path / "x.pth"), "url": "file:///x", "custom_load": True})
    assert load(folder).num_classes == 3


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
    assert_same_state(model, saved[1])
    assert_same_outputs(model, saved[1])


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
    (folder / "config.json").write_text(json.dumps(content))
    edit(folder, **{data.draw(st.sampled_from(sorted(content))): data.draw(JSON)})
    try:
        model = load(folder)
    except CheckpointError:
        return
    assert_same_state(model, saved[1])
    # Another memory format is another kernel, with other roundings.
    torch.testing.assert_close(outputs(model), outputs(saved[1]))


def test_config_is_checked_when_made_by_hand(saved):
    config = read_config(saved[0])
    with pytest.raises(ValueError, match="unknown network 'x'"):
        replace(config, network="x")
    assert pliant.checkpoint.Config.from_json(json.loads(json.dumps(config.to_json())), METHODS) == config
