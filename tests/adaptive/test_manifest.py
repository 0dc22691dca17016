"""Depths of an adaptive network as files in one folder, with a manifest."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

import _export
import pliant
from _export import images, need
from pliant.adaptive import manifest
from pliant.adaptive.manifest import UNFINISHED, export_depths, read_manifest
from pliant.deploy.loading import open_export


def test_depths_in_a_folder_with_a_manifest(tmp_path):
    model = _export.adaptive()
    skips = [(False, False), (True, True)]
    made = export_depths(model, tmp_path / "net", skips, format="pt2", rounds=3, batches=(1, 2))
    assert read_manifest(tmp_path / "net") == made
    assert [d.file for d in made.depths] == ["depth-FF.pt2", "depth-TT.pt2"]
    known = {d.skip: d for d in pliant.depths(model)}
    for one in made.depths:
        assert (one.macs, one.parameters) == (known[one.skip].macs, known[one.skip].parameters)
        assert one.latency_ms > 0
        assert one.latency_iqr_ms >= 0
        assert one.batch == 1
        x = images(3)
        with torch.no_grad(), pliant.at_depth(model, one.skip):
            expected = model(x)
        torch.testing.assert_close(
            open_export(tmp_path / "net" / one.file)(x), expected, rtol=1e-4, atol=1e-4
        )
    assert made.origin["cpu"]
    assert made.threads == 1  # PyTorch's, here
    with pytest.raises(ValueError, match="not an empty folder"):
        export_depths(model, tmp_path / "net", skips, format="pt2")


@pytest.mark.parametrize("ending", [".pt2", pytest.param(".onnx", marks=pytest.mark.slow)])
def test_depths_are_timed_on_the_threads_that_the_manifest_says(tmp_path, monkeypatch, ending):
    need(ending)
    seen = []
    if ending == ".onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession

        def watched(path, options, **how):
            if Path(path).parent == tmp_path / "net":  # not the check, in a hidden folder
                seen.append(options.intra_op_num_threads)
            return session(path, options, **how)

        monkeypatch.setattr(onnxruntime, "InferenceSession", watched)
    else:
        module = torch.export.ExportedProgram.module

        def hooked(self, *arguments):
            made = module(self, *arguments)
            made.register_forward_pre_hook(lambda *_: seen.append(torch.get_num_threads()))
            return made

        monkeypatch.setattr(torch.export.ExportedProgram, "module", hooked)
    before = torch.get_num_threads()
    options = {"format": ending[1:], "rounds": 1, "batches": (1,), "threads": 2}
    made = export_depths(_export.adaptive(), tmp_path / "net", ["TT", (True, True)], **options)
    assert [d.file for d in made.depths] == [f"depth-TT{ending}"]  # asked for twice, written once
    assert made.threads == read_manifest(tmp_path / "net").threads == 2
    assert set(seen) == {2}
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("there", [False, True])
def test_finished_depths_stay_and_the_same_call_goes_on(tmp_path, monkeypatch, there):
    """After an error, and after an interruption; the rest alone is written then."""
    model, folder = _export.adaptive(), tmp_path / "net"
    if there:
        folder.mkdir()
    written, said, wrong = [], [], ValueError("no third")

    def failing(cut, path, **options):
        if len(written) == 2 and wrong is not None:
            raise wrong
        written.append(path.name)
        return pliant.export(cut, path, **options)

    options = {"format": "pt2", "rounds": 0, "batches": (1,)}
    monkeypatch.setattr(manifest, "export", failing)
    for error in (wrong, KeyboardInterrupt()):
        wrong = error
        with pytest.raises(type(error)):
            export_depths(model, folder, progress=lambda *step: said.append(step), **options)
        assert written == ["depth-FF.pt2", "depth-FT.pt2"]
        assert (folder / UNFINISHED).is_file()
    assert (0, 5, "writing depth-FF.pt2") in said
    with pytest.raises(
        ValueError, match="holds an export that was interrupted, of another network or with"
    ):
        export_depths(_other(model), folder, **options)
    with pytest.raises(ValueError, match="holds an export that was interrupted"):
        export_depths(model, folder, **{**options, "batches": (2,)})
    wrong = None
    (folder / "depth-FT.pt2").write_bytes(b"damaged meanwhile")
    made = export_depths(model, folder, **options)
    assert written[2:] == ["depth-FT.pt2", "depth-TF.pt2", "depth-TT.pt2"]
    assert read_manifest(folder) == made
    assert not (folder / UNFINISHED).exists()
    assert len(made.depths) == 4


def _other(model):
    other = copy.deepcopy(model)
    torch.nn.init.zeros_(other.fc.weight)
    return other


def test_an_export_of_which_no_depth_is_finished_leaves_nothing(tmp_path):
    for folder in (tmp_path / "new", tmp_path / "there"):
        if folder.name == "there":
            folder.mkdir()
        with pytest.raises(ValueError, match="batches must hold"):
            export_depths(_export.adaptive(), folder, ["TT"], format="pt2", batches=())
    assert [p.name for p in tmp_path.rglob("*")] == ["there"]


def test_depths_that_make_no_sense_are_refused(tmp_path):
    model = _export.adaptive()
    for arguments, options, message in [
        ((model, tmp_path, [(True,)]), {}, "has 2"),
        ((model, tmp_path, []), {}, "skips is empty"),
        ((model, tmp_path, None), {"format": "tflite"}, "format is 'tflite'; it must be one of pt2"),
        ((model, tmp_path, None), {"rounds": -1}, "rounds must be"),
        ((model, tmp_path, None), {"threads": 0}, "threads must be a whole number of at least 1, not 0"),
        ((_export.plain(), tmp_path, None), {}, "no adaptive depth"),
    ]:
        with pytest.raises(ValueError, match=message):
            export_depths(*arguments, **options)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="no manifest of export_depths"):
        read_manifest(tmp_path)
