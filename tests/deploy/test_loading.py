"""Opening exported files: damaged and foreign ones, many threads, images that are none."""

from __future__ import annotations

import io
import json
import logging
import pickle
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import _export
import pliant
from _export import ENDINGS, images, need
from pliant.deploy import onnx_file, onnx_native
from pliant.deploy.facts import digest_of, read_report, report_path
from pliant.deploy.loading import FileNetwork, is_export, open_export, read_facts


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Files of each format, written once, with the network that they are of."""
    folder, known = tmp_path_factory.mktemp("made"), {}

    def make(ending: str, **options):
        need(ending)
        key = f"{ending} {options}"
        if key not in known:
            network = _export.mod()
            path = folder / f"net{len(known)}{ending}"
            known[key] = pliant.export(network, path, batches=(2,), **options), network
        return known[key]

    return make


def copied(path: Path, folder: Path) -> Path:
    """A copy of an exported file and all that belongs to it."""
    for name in (*read_report(path).sha256, report_path(path).name):
        (folder / name).write_bytes((path.parent / name).read_bytes())
    return folder / path.name


# --- many threads -------------------------------------------------------------------------------------


def serve(run, callers: int, seconds: float) -> tuple[int, int]:
    """Answers, and wrong ones, that so many threads get from one opened file; each asks for its own."""
    asked = [images(1 + n % 3) + n for n in range(callers)]
    expected = [run(x) for x in asked]
    answers, wrong, failures = [0] * callers, [0] * callers, []
    end = time.monotonic() + seconds

    def call(n: int) -> None:
        try:
            while time.monotonic() < end or answers[n] < 5:
                found = run(asked[n])
                answers[n] += 1
                wrong[n] += not torch.allclose(found, expected[n], rtol=1e-4, atol=1e-4)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=call, args=(n,)) for n in range(callers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    return sum(answers), sum(wrong)


@pytest.mark.parametrize("threads", [None, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("ending", ENDINGS)
def test_eight_callers_get_their_own_answers(made, ending, threads):
    path, _ = made(ending)
    before = torch.get_num_threads()
    answers, wrong = serve(open_export(path, threads=threads), 8, 0.5)
    assert answers >= 40
    assert wrong == 0
    assert torch.get_num_threads() == before


@pytest.mark.slow  # a minute of each
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("ending", ENDINGS)
def test_eight_callers_get_their_own_answers_for_a_minute(made, ending, compiled):
    if compiled and ending == ".xml":
        pytest.skip("there is no compiled .xml")
    try:
        path, _ = made(ending, **({"compiled": True} if compiled else {}))
    except ValueError as error:
        pytest.skip(str(error))
    answers, wrong = serve(open_export(path, threads=1), 8, 60)
    assert answers >= 1000
    assert wrong == 0


def test_an_engine_of_openvino_answers_each_caller(made):
    """`pliant.measure`'s runner too, which has one shape."""
    need(".xml")
    from pliant.deploy.engines import ENGINES

    run = ENGINES["openvino"].load(made(".onnx")[0], images(2), threads=1)
    asked = [images(2) + n for n in range(8)]
    expected = [run(x) for x in asked]
    wrong = []

    def call(n: int) -> None:
        wrong.extend(n for _ in range(20) if not torch.allclose(run(asked[n]), expected[n]))

    threads = [threading.Thread(target=call, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- damaged, foreign and incomplete files ------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_a_damaged_file_is_refused_by_its_report(made, tmp_path, ending):
    """A bit anywhere, in any of its files; the last byte; a byte more."""
    path = copied(made(ending)[0], tmp_path)
    for name in read_report(path).sha256:
        file = tmp_path / name
        whole = file.read_bytes()
        places = [0, len(whole) // 3, len(whole) // 2, len(whole) - 1]
        damaged = [whole[:n] + bytes([whole[n] ^ 1]) + whole[n + 1 :] for n in places]
        for content in (*damaged, whole[:-1], whole + b"\0", b""):
            file.write_bytes(content)
            with pytest.raises(ValueError, match=f"{name} is not the file that was checked"):
                open_export(path)
        file.write_bytes(whole)
    open_export(path)


def test_a_file_without_its_report_is_opened_with_a_warning(made, tmp_path, caplog):
    path = copied(made(".pt2")[0], tmp_path)
    report_path(path).unlink()
    with caplog.at_level(logging.WARNING):
        open_export(path)
    assert "has no report net0.pt2.json beside it, so nothing tells whether it is damaged" in caplog.text


def test_a_report_of_another_file_is_refused(made, tmp_path):
    path = copied(made(".pt2")[0], tmp_path)
    other = path.rename(tmp_path / "other.pt2")
    report_path(path).rename(report_path(other))
    with pytest.raises(ValueError, match=r"is the report of net0\.pt2, not of other\.pt2: keep the name"):
        open_export(other)
    report_path(other).write_text('{"facts": {}, "parity": {}, "sha256": []}')
    with pytest.raises(ValueError, match="is no report of an exported file"):
        open_export(other)


def test_a_library_beside_a_portable_file_is_not_loaded(made, tmp_path, monkeypatch):
    need(".onnx")
    path = copied(made(".onnx")[0], tmp_path)
    onnx_file.library_path(path).write_bytes(b"code of somebody else")
    import onnxruntime

    loaded = []
    options = onnxruntime.SessionOptions
    monkeypatch.setattr(
        options, "register_custom_ops_library", lambda _, library: loaded.append(library), raising=True
    )
    assert open_export(path)(images(1)).shape == (1, 5)
    assert loaded == []


def test_a_library_is_loaded_only_where_its_hash_fits(tmp_path):
    facts = replace(_facts(), compiled=True, library_sha256="0" * 64)
    path = tmp_path / "net.onnx"
    with pytest.raises(ValueError, match=r"its library net\.onnx\.so is not beside it"):
        onnx_native.check_here(path, facts)
    library = onnx_file.library_path(path)
    library.write_bytes(b"code")
    with pytest.raises(
        ValueError, match=r"net\.onnx\.so is not the library that net\.onnx was compiled with"
    ):
        onnx_native.check_here(path, facts)
    pytest.importorskip("onnxruntime")
    with pytest.raises(ValueError, match=r"was compiled by and for onnxruntime 0\.1"):
        onnx_native.check_here(path, replace(facts, library_sha256=digest_of(library)))


def _facts():
    from pliant.deploy.facts import Facts

    size = (3, 16, 16)
    return Facts(
        "onnx", "Net", (), "normalised", size, None, size, None, None, None, ("output",), "float32", 18,
        False, "", {"onnxruntime": "0.1"},
    )  # fmt: skip


def test_machine_code_without_its_report_is_not_opened(tmp_path, monkeypatch):
    from pliant.deploy import loading

    path = tmp_path / "net.pt2"
    path.write_bytes(b"machine code")
    monkeypatch.setattr(loading.program, "facts_of", lambda _: replace(_facts(), compiled=True))
    with pytest.raises(ValueError, match=r"machine code, and its report net\.pt2\.json is not beside it"):
        open_export(path)


class Runs:
    """A pickle that runs code where it is loaded."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def forged(path: Path, to: Path, change) -> Path:
    """A program with other members; `change` gets them by name, and its report goes."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    change(members, next(iter(members)).partition("/")[0])
    with zipfile.ZipFile(to, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return to


def test_a_program_that_holds_code_is_not_opened(made, tmp_path):
    path, _ = made(".pt2")
    mark = tmp_path / "ran"
    bad = pickle.dumps(Runs(mark))
    saved = io.BytesIO()
    torch.save(Runs(mark), saved)

    def sample(members, root):
        members[f"{root}/data/sample_inputs/model.pt"] = saved.getvalue()

    def weight(members, root):
        config = f"{root}/data/weights/model_weights_config.json"
        content = json.loads(members[config])
        one = next(iter(content["config"].values()))
        one["use_pickle"] = True
        members[config] = json.dumps(content).encode()
        members[f"{root}/data/weights/{one['path_name']}"] = saved.getvalue()

    def opaque(members, root):
        members[f"{root}/data/constants/opaque_obj_0"] = bad

    def machine_code(members, root):
        members[f"{root}/data/aotinductor/model/model.so"] = b"\x7fELF"

    def beside(members, _root):
        members["version"] = b"8.1"
        members["serialized_state_dict.pt"] = saved.getvalue()

    for change in (sample, weight, opaque, machine_code, beside):
        file = forged(path, tmp_path / f"{change.__name__}.pt2", change)
        with pytest.raises(ValueError, match=r"which no program of tensors has|holds more than tensors"):
            open_export(file)
        assert not mark.exists(), change.__name__
    same = forged(path, tmp_path / "same.pt2", lambda *_: None)
    assert open_export(same)(images(1)).shape == (1, 5)


# --- images -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ENDINGS)
def test_what_is_no_tensor_is_refused_in_one_sentence(made, ending):
    run = open_export(made(ending)[0])
    for given in (np.zeros((1, 3, 16, 16), np.float32), [[0.0]], None):
        with pytest.raises(
            ValueError, match=r"takes a tensor, .* \[any, 3, 16, 16\], not a .*torch.as_tensor"
        ):
            run(given)
    x = images(2)
    strided = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    torch.testing.assert_close(run(strided), run(x))


@pytest.mark.parametrize("ending", ENDINGS)
def test_images_that_are_not_finite_are_refused_where_that_is_asked(made, ending):
    path, _ = made(ending)
    run, checked = open_export(path), open_export(path, finite=True)
    x = images(2)
    torch.testing.assert_close(checked(x), run(x))
    for value in (float("nan"), float("inf")):
        x[1, 0, 3, 3] = value
        run(x)  # as it comes: OpenVINO makes numbers of NaN
        with pytest.raises(ValueError, match="hold NaN or infinity"):
            checked(x)


def test_a_file_stands_in_the_place_of_a_network(made, tmp_path):
    path, network = made(".pt2")
    assert is_export(path)
    assert not is_export(tmp_path)
    x = images(3)
    with torch.no_grad():
        torch.testing.assert_close(FileNetwork(open_export(path))(x), network(x), rtol=1e-4, atol=1e-4)


def test_a_file_of_a_fixed_batch_takes_any_number_as_a_network(tmp_path):
    network = _export.plain().eval()
    options = {"example": torch.zeros(2, 3, 16, 16), "dynamic_batch": False, "takes": "uint8"}
    file = FileNetwork(open_export(pliant.export(network, tmp_path / "net.pt2", **options)))
    assert file.pretrained_cfg["mean"] == (0.0,) * 3
    pixels = torch.randint(0, 256, (5, 3, 16, 16))
    mean, std = torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.25, 0.3])
    with torch.no_grad():
        expected = network((pixels / 255 - mean[:, None, None]) / std[:, None, None])
    torch.testing.assert_close(file(pixels / 255), expected, rtol=1e-4, atol=1e-4)
    assert read_facts(file.opened.path).batch == 2
