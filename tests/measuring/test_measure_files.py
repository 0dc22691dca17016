"""Exported files are timed in their own engines, beside networks."""

from __future__ import annotations

import pytest
import torch

import _export
import pliant
from _cli import run
from _export import need
from pliant.deploy.loading import ExportedNetwork
from pliant.measuring.latency import measure


@pytest.fixture
def path(tmp_path):
    return str(pliant.export(_export.plain().eval(), tmp_path / "net.pt2", batches=(1,), takes="uint8"))


def test_a_file_is_timed_beside_a_network(path):
    often = {"rounds": 2, "min_run_time": 0, "threads": 1}
    file, network = measure({"file": path, "net": _export.plain()}, against="net", **often)
    assert (file.engine, file.dtype, file.input_size, file.error) == ("eager", "float32", (3, 16, 16), "")
    assert file.rounds == network.rounds == 2
    assert file.time_ratio > 0
    assert file.macs is None
    assert network.macs


@pytest.mark.parametrize("ending", [".onnx", ".xml"])
def test_the_row_names_the_engine_of_the_file(tmp_path, ending):
    need(ending)
    made = str(pliant.export(_export.plain().eval(), tmp_path / f"net{ending}", batches=(1,)))
    (row,) = measure(made, rounds=1, min_run_time=0, batch=3, threads=1)
    engine = {".onnx": "onnxruntime", ".xml": "openvino"}[ending]
    assert row.engine == engine
    assert row.runtime.startswith(f"{engine} ")
    assert row.median_ms


def test_the_images_are_those_that_the_file_takes(path, monkeypatch):
    call, seen = ExportedNetwork.__call__, []

    def watched(self, images):
        seen.append((images.dtype, tuple(images.shape)))
        return call(self, images)

    monkeypatch.setattr(ExportedNetwork, "__call__", watched)
    measure(path, rounds=1, min_run_time=0, batch=2)
    assert set(seen) == {(torch.uint8, (2, 3, 16, 16))}


def test_what_a_file_cannot_do_is_told(path, tmp_path):
    with pytest.raises(
        ValueError, match="is an exported file, which has its own engine; leave out engines"
    ):
        measure(path, engines="all")
    one = {"example": torch.zeros(1, 3, 16, 16), "dynamic_batch": False}
    fixed = pliant.export(_export.plain().eval(), tmp_path / "one.pt2", **one)
    (row,) = measure(str(fixed), batch=2, rounds=1, min_run_time=0)
    assert "takes torch.float32 images of [1, 3, 16, 16], not torch.float32 of [2, 3, 16, 16]" in row.error
    with pytest.raises(ValueError, match="timm has no network"):
        measure(str(tmp_path / "missing.onnx"))


def test_the_command_times_a_file(path):
    assert "net.pt2" in run("measure", path, "--rounds", 1, "--threads", 1)
