"""Export that cannot be: one clear error, and never a half-written file under a final name."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from torch import nn

import _export
import pliant
from _cli import fails, run
from pliant.deploy import onnx_native, placing
from pliant.deploy.extras import MissingExtraError, require
from pliant.deploy.facts import read_report
from pliant.deploy.loading import open_export, read_facts

TESTS = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("net.tflite", {}, r"net.tflite: the ending must be one of .pt2, .onnx, .xml"),
        ("net", {}, "the ending must be one of"),
        ("net.pt2", {"precision": "int8"}, "precision must be one of float32, float16, bfloat16 for .pt2"),
        (
            "net.onnx",
            {"precision": "bfloat16"},
            "precision must be one of float32, float16, int8 for .onnx",
        ),
        (
            "net.pt2",
            {"calibrate": torch.zeros(2, 3, 16, 16)},
            "calibrate is for precision='int8'; remove it",
        ),
        ("net.xml", {"compiled": True}, "compiled=True is for .pt2 and .onnx files, not for .xml"),
        ("net.pt2", {"batches": ()}, "batches must hold"),
        ("net.pt2", {"batches": (0,)}, "batches must hold"),
        ("net.pt2", {"takes": "jpeg"}, "takes must be one of"),
        ("net.pt2", {"check_images": "nowhere"}, "nowhere is no folder"),
        ("net.pt2", {"example": torch.zeros(3, 16, 16)}, "must be images"),
        ("net.pt2", {"example": torch.zeros(1, 4, 16, 16)}, r"takes no images of shape \(2, 4, 16, 16\)"),
    ],
)
def test_what_cannot_be_is_refused_by_name(tmp_path, name, options, message):
    if name.endswith(".onnx"):
        pytest.importorskip("onnxruntime")
    with pytest.raises(ValueError, match=message):
        pliant.export(_export.plain(), tmp_path / name, **options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("opset", [9, 15, 99, "18"])
def test_an_unsupported_opset(tmp_path, opset):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    with pytest.raises(
        ValueError, match=rf"opset {opset!r} is not supported: with PyTorch .*, 16 to \d\d are"
    ):
        pliant.export(_export.plain(), tmp_path / "n.onnx", opset=opset)
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_switches_its_depth(tmp_path):
    with pytest.raises(ValueError, match=r"export pliant.subnet\(model, skip\)"):
        pliant.export(_export.adaptive(), tmp_path / "net.pt2")


def test_a_network_that_draws_its_channels(tmp_path):
    with pytest.raises(ValueError, match="selection='random'"):
        pliant.export(_export.mod(selection="random"), tmp_path / "net.pt2")


def test_a_network_without_weights_or_size(tmp_path):
    with pytest.raises(ValueError, match="no weights"):
        pliant.export(_export.plain().to("meta"), tmp_path / "net.pt2")
    with pytest.raises(ValueError, match="pass an example"):
        pliant.export(nn.Flatten(), tmp_path / "net.pt2")


def test_a_network_that_cannot_be_traced(tmp_path):
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"torch\.export cannot trace the Branches"):
        pliant.export(Branches(), tmp_path / "net.pt2", torch.zeros(1, 3, 4, 4))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_the_place_of_the_file(tmp_path):
    (tmp_path / "net.pt2").mkdir()
    with pytest.raises(ValueError, match=r"net.pt2 is a folder; name a file in it"):
        pliant.export(_export.plain(), tmp_path / "net.pt2")


def test_a_read_only_folder(tmp_path, monkeypatch):
    def refuse(self, *_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(PermissionError, match=r"net.pt2 could not be written.*Permission denied"):
        pliant.export(_export.plain(), tmp_path / "net.pt2")


def test_a_file_where_a_folder_should_be(tmp_path):
    (tmp_path / "place").write_text("a file")
    with pytest.raises(OSError, match="could not be written, and nothing is left of it"):
        pliant.export(_export.plain(), tmp_path / "place" / "net.pt2")


def full_disk_says(
    folder: Path, *wanted: str, **env: str
) -> dict[str, tuple[str, str, int, dict[str, str]]]:
    """What `_full_disk` said of each ENDING:ROOM: kind, text and number of the error, and what is left."""
    place, limit = folder / "disk", "0"
    place.mkdir()
    command = [sys.executable, str(TESTS / "_full_disk.py"), str(place)]
    mount = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c"]
    disk = f"mount -t tmpfs -o size=2m none '{place}'"
    if shutil.which("unshare") and not subprocess.run([*mount, disk], capture_output=True).returncode:
        command = [*mount, f'{disk} && exec "$@"', "sh", *command]
    else:
        pytest.importorskip("resource", reason="neither a small disk nor a limit of file sizes here")
        limit = "20000"
    paths = os.pathsep.join((str(Path(pliant.__file__).parents[1]), str(TESTS)))
    found = subprocess.run(
        [*command, limit, *wanted],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": paths, **{k: v.format(place) for k, v in env.items()}},
    )
    assert found.returncode == 0, found.stderr[-2000:]
    lines = [json.loads(line[3:]) for line in found.stdout.splitlines() if line.startswith(":: ")]
    return {what: tuple(rest) for what, *rest in lines}


def check_full_disk(said, what, *texts):
    kind, text, number, left = said[what]
    name = f"net{what.split(':')[0].removeprefix('compiled')}"
    assert kind == "NotWrittenError"
    assert number in (errno.ENOSPC, errno.EFBIG)
    assert re.search(rf"{name} could not be written, and nothing is left of it: ", text)
    assert re.search(r"free some space: it takes about 0\.\d MB, and \d+\.\d MB are free", text)
    assert re.search(r"No space left on device|File too large", text)
    assert all(part in text for part in texts)
    assert left == {name: "old"}


def test_a_full_disk(tmp_path):
    """Of which each writer says something else, and PyTorch's would end the process."""
    there = importlib.util.find_spec("onnxruntime") and importlib.util.find_spec("onnxscript")
    wanted = [".pt2:20000", *([".onnx:20000"] if there else [])]
    said = full_disk_says(tmp_path, *wanted)
    assert list(said) == wanted
    for what in wanted:
        check_full_disk(said, what)


@pytest.mark.slow
def test_a_disk_that_is_full_before_the_second_file(tmp_path):
    """OpenVINO's .bin after the ONNX file in between, ONNX Runtime's graph after the one it optimises."""
    for package in ("onnx", "onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package)
    wanted = [".xml:20000", ".xml:110000"]
    try:
        onnx_native.machine()
        wanted += ["compiled.onnx:20000", "compiled.onnx:110000"]
    except ValueError:
        pass  # no compiler, or no such layout on this processor
    said = full_disk_says(tmp_path, *wanted)
    for what in wanted:
        check_full_disk(said, what)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["target", "compiler"])
def test_a_disk_that_is_full_for_machine_code(tmp_path, where):
    env = {"TORCHINDUCTOR_CACHE_DIR": "{}/cache"} if where == "compiler" else {}
    said = full_disk_says(tmp_path, "compiled.pt2:20000", **env)
    if "needs a C++ compiler" in said["compiled.pt2:20000"][1]:
        pytest.skip("no C++ compiler")
    texts = ("the compiler's files do not fit", "TORCHINDUCTOR_CACHE_DIR") if env else ()
    check_full_disk(said, "compiled.pt2:20000", *texts)


def test_another_error_on_a_disk_with_room_stays_what_it_is(tmp_path):
    def begin_and_fail():
        with placing.workshop(tmp_path / "net.pt2", 1000) as folder:
            (folder / "net.pt2").write_text("half of")
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match=r"^broken$"):
        begin_and_fail()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("at", [0, 1, 2, 3, 4])
def test_files_appear_together_or_not_at_all(tmp_path, monkeypatch, at):
    """Whichever rename fails, what stood there stands."""
    for name in ("net.xml", "net.bin"):
        (tmp_path / name).write_text(f"old {name}")
    calls, replace = [], Path.replace

    def failing(self, target):
        calls.append(self.name)
        if len(calls) == at + 1:
            raise OSError(errno.EIO, "broken")
        return replace(self, target)

    outcome = pytest.raises(OSError, match="broken") if at < 4 else contextlib.nullcontext()
    with outcome, placing.workshop(tmp_path / "net.xml") as f:
        for name in ("net.xml", "net.bin"):
            (f / name).write_text(f"new {name}")
        monkeypatch.setattr(Path, "replace", failing)
        placing.put_in_place([f / "net.xml", f / "net.bin"], tmp_path)
    age = "old" if at < 4 else "new"
    assert {p.name: p.read_text() for p in tmp_path.iterdir()} == {
        name: f"{age} {name}" for name in ("net.xml", "net.bin")
    }
    if at == 4:
        assert calls[-2:] == ["net.bin", "net.xml"]


@pytest.mark.parametrize(
    ("package", "ending", "extra", "precision"),
    [
        ("onnxruntime", ".onnx", "onnx", "float32"),
        ("onnxscript", ".onnx", "onnx", "float32"),
        ("openvino", ".xml", "openvino", "float32"),
        ("nncf", ".xml", "openvino", "int8"),
    ],
)
def test_a_missing_extra_is_named_with_its_install_line(
    tmp_path, monkeypatch, package, ending, extra, precision
):
    for name in ("onnx", "onnxscript", "onnxruntime", "openvino", "nncf"):
        if name != package:
            monkeypatch.setitem(sys.modules, name, sys)  # is there, whatever it is
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(
        MissingExtraError, match=rf'needs {package}.*pip install "\.\[{extra}\]" in a checkout'
    ):
        pliant.export(_export.plain(), tmp_path / f"net{ending}", precision=precision)
    assert list(tmp_path.iterdir()) == []


def test_an_extra_that_is_broken_says_how(monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: object())
    with pytest.raises(MissingExtraError, match="onnx cannot be imported"):
        require("onnx")


def test_opening_what_is_no_exported_file(tmp_path):
    (tmp_path / "x.pt2").write_text("no archive")
    (tmp_path / "x.xml").write_text("<net/>")
    (tmp_path / "y.xml").write_text("no xml")
    for name, message in [
        ("x.pt2", "no PyTorch program that pliant exported"),
        ("x.xml", "no file that pliant exported"),
        ("y.xml", "no OpenVINO file"),
        ("z.xml", "there is no file"),
        ("x.txt", "the ending must be one of"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_facts(tmp_path / name)


def test_no_onnx_file(tmp_path):
    pytest.importorskip("onnx")
    (tmp_path / "x.onnx").write_text("no protobuf")
    with pytest.raises(ValueError, match=r"is no ONNX file|no file that pliant exported"):
        read_facts(tmp_path / "x.onnx")


def test_an_input_of_the_wrong_shape(tmp_path):
    net = open_export(pliant.export(_export.plain().eval(), tmp_path / "net.pt2", batches=(1,)))
    for images in (torch.zeros(1, 3, 15, 16), torch.zeros(3, 16, 16), torch.zeros(0, 3, 16, 16)):
        with pytest.raises(ValueError, match=r"net.pt2 takes torch.float32 images of \[any, 3, 16, 16\]"):
            net(images)


# --- the command ---------------------------------------------------------------------------------


def test_the_command_writes_a_file(tmp_path, caplog):
    pliant.save(timm.create_model("resnet20_cifar_mod"), tmp_path / "m")
    printed = run(
        "export", tmp_path / "m", tmp_path / "net.pt2", "--takes", "uint8", "--resize-from", "40x48"
    )
    assert "largest error" in printed
    assert "random weights" not in caplog.text
    facts = read_report(tmp_path / "net.pt2").facts
    assert (facts.takes, facts.input_size, facts.network) == ("uint8", (3, 40, 48), "resnet20_cifar_mod")


@pytest.mark.slow
def test_the_command_writes_depths(tmp_path):
    name = "resnet20_cifar_adn"
    options = ("--format", "pt2", "--pixels", 16, "--threads", 2)
    printed = run("export", name, tmp_path / "d", "--depths", "TTT", *options)
    assert "depth-TTT.pt2" in printed
    assert "1 depths, timed on 2 threads, and manifest.json" in printed
    run("export", name, tmp_path / "one.pt2", "--depth", "TFT", "--batch", 1, "--pixels", 16)
    assert read_facts(tmp_path / "one.pt2").batch == 1


def test_the_command_fails_in_one_sentence(monkeypatch, capsys, caplog, tmp_path):
    path = tmp_path / "n.pt2"
    for arguments, message in [
        (("resnet_none", path), "no network 'resnet_none'"),
        (("resnet20_cifar", tmp_path / "n.tf"), "the ending must be"),
        (("resnet20_cifar_adn", path), "switches the network's depth"),
        (("resnet20_cifar_adn", path, "--depth", "TX"), "skip is 'TX'"),
        (("resnet20_cifar_adn", path, "--depth", "T", "--depths", "all"), "exclude each other"),
        (("resnet20_cifar", path, "--resize-from", "40"), "write HEIGHTxWIDTH"),
        (("resnet20_cifar", path, "--threads", 2), "--threads 2 is for the latencies of --depths"),
    ]:
        assert message in fails(monkeypatch, capsys, "export", *arguments)
    assert list(tmp_path.iterdir()) == []
    told = (
        "resnet20_cifar is the name of a network, so the file will hold random weights; to export trained"
    )
    assert told in caplog.text


# --- what a network gives --------------------------------------------------------------------------


class Gives(nn.Module):
    """A network whose outputs are made of scores by `make`."""

    def __init__(self, make):
        super().__init__()
        self.make, self.fc = make, nn.Linear(3, 4)

    def forward(self, x):
        return self.make(self.fc(x.mean((2, 3))))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda y: {"logits": y, "aux": y},
            r"the Gives gives a dict with 'logits', 'aux'; .* model\(x\)\['log",
        ),
        (lambda y: (y, [y]), r"output 1 of the Gives is a list; a file gives a tensor"),
        (lambda y: (y, None), r"output 1 of the Gives is a NoneType"),
        (
            lambda y: y.argmax(1),
            r"output 0 of the Gives is torch.int64: a decision .*; export a module that",
        ),
        (lambda y: (y, y > 0), r"output 1 of the Gives is torch.bool: a decision"),
        (lambda y: y.sum(), r"output 0 of the Gives has shape \(\) for 2 images"),
        (lambda y: y.t(), r"output 0 of the Gives has shape \(4, 2\) for 2 images"),
    ],
)
def test_outputs_that_no_file_can_have_are_named(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        pliant.export(Gives(make), tmp_path / "net.pt2", torch.zeros(1, 3, 8, 8))
    assert list(tmp_path.iterdir()) == []


def test_an_output_of_one_number_an_image(tmp_path):
    network = Gives(lambda y: y[:, 0])
    path = pliant.export(network, tmp_path / "net.pt2", torch.zeros(1, 3, 8, 8))
    x = torch.randn(3, 3, 8, 8)
    torch.testing.assert_close(open_export(path)(x), network(x).detach())


def test_an_image_to_check_with_that_is_damaged_is_named(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "bad.png").write_bytes(b"no image")
    with pytest.raises(
        ValueError, match=r"bad\.png, an image to check with, cannot be read: .*; remove it"
    ):
        pliant.export(_export.plain(), tmp_path / "net.pt2", check_images=tmp_path / "images")


def test_an_export_says_what_it_does(tmp_path):
    said = []
    pliant.export(_export.plain().eval(), tmp_path / "net.pt2", progress=lambda *step: said.append(step))
    assert said[0] == (0, 7, "writing net.pt2")
    assert said[1] == (1, 7, "checking net.pt2 on 1 images")
    assert said[-1] == (7, 7, "done")
    assert [step[0] for step in said] == list(range(8))
