"""`evaluate_depths`: every depth scored in one call; its table, rows, figure and command."""

from __future__ import annotations

import csv
from dataclasses import replace

import pytest
import timm
import torch

import pliant
from _cli import fails, run
from pliant.adaptive.scores import (
    DepthScore,
    depth_markdown,
    depth_table,
    evaluate_depths,
    plot_depths,
    write_depth_scores,
)
from pliant.checkpoint import save
from pliant.train import evaluate

ROW = DepthScore(
    network="net", depth="FT", parameters=1234, macs=5_600_000, top1=0.81234, top5=None, loss=0.5,
    images=90, unreadable=0, data="digits", part="val", pixels=8,
)  # fmt: skip
DEPTHS = ["FFF", "FFT", "FTF", "FTT", "TFF", "TFT", "TTF", "TTT"]


def adaptive():
    """Depths that differ: other second norms, statistics of some images."""
    torch.manual_seed(1)
    model = timm.create_model("resnet20_cifar_adn", in_chans=1, num_classes=10)
    for p in model.parameters():
        if p.dim() == 1:
            p.data += 0.3 * torch.randn_like(p)
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("net") / "net"
    return save(
        adaptive(), place, classes=tuple("0123456789"), input_size=(1, 8, 8), mean=(0.3,), std=(0.4,)
    )


@pytest.fixture(scope="module")
def scores(folder):
    return evaluate_depths(folder, "digits", part="val", device="cpu", batch=50)


def test_every_depth_scores_as_it_does_alone(folder, scores):
    assert [s.depth for s in scores] == DEPTHS
    model = pliant.load(folder)
    found = []
    for score, info in zip(scores, pliant.depths(model, (1, 8, 8)), strict=True):
        assert score.skip == info.skip
        assert (score.parameters, score.macs) == (info.parameters, info.macs)
        with pliant.at_depth(model, info.skip):
            alone = evaluate(_like(folder, model), "digits", part="val", device="cpu")
        assert score.top1 == pytest.approx(alone.top1)
        assert score.top5 == pytest.approx(alone.top5)
        assert score.loss == pytest.approx(alone.loss, rel=1e-5)
        assert (score.images, score.unreadable) == (alone.images, 0)
        found.append(score.loss)
    assert len(set(found)) == len(DEPTHS)  # a switch that changed nothing would show here
    assert [s.role for s in scores] == ["super", *[""] * 6, "base"]
    assert {(s.network, s.data, s.part, s.pixels) for s in scores} == {
        ("resnet20_cifar_adn", "digits", "val", 8)
    }
    assert scores[0].torch == torch.__version__
    assert scores[0].date


def _like(folder, model):
    """The network in memory, whose images are prepared as the folder says."""
    vars(model)["pretrained_cfg"] = {
        "input_size": (1, 8, 8),
        "mean": (0.3,),
        "std": (0.4,),
        "crop_pct": 1.0,
    }
    return model


def test_some_depths_of_a_network_in_memory_which_stays_as_it_was():
    model = adaptive().train()
    pliant.set_depth(model, (False, True, False))
    rows = evaluate_depths(
        model, "digits", part="val", pixels=8, device="cpu", skips=[(True, True, True), [False] * 3]
    )
    assert [r.depth for r in rows] == ["TTT", "FFF"]
    assert model.training
    assert pliant.get_depth(model) == (False, True, False)


def test_wrong_networks_and_depths_are_refused(folder):
    with pytest.raises(ValueError, match="convert it by AdaptiveDepth"):
        evaluate_depths(timm.create_model("resnet20_cifar", in_chans=1), "digits", pixels=8, device="cpu")
    with pytest.raises(ValueError, match=r"skip has 2 flags, \(True, False\); this network has 3"):
        evaluate_depths(folder, "digits", device="cpu", skips=[(True, False)])
    with pytest.raises(ValueError, match="7 outputs and the data 10 classes"):
        evaluate_depths(
            timm.create_model("resnet20_cifar_adn", in_chans=1, num_classes=7),
            "digits",
            pixels=8,
            device="cpu",
        )


def test_tables(scores):
    lines = depth_markdown(scores).splitlines()
    assert lines[0] == "resnet20_cifar_adn, digits val, 126 images of 8 px"
    assert lines[2] == "| depth | top-1, % | top-5, % | loss | MACs, M | parameters |"
    assert lines[3] == "|---|---:|---:|---:|---:|---:|"
    assert lines[4].startswith(f"| FFF (super) | {100 * scores[0].top1:.2f} | {100 * scores[0].top5:.2f} |")
    assert lines[-1].startswith("| TTT (base) |")
    assert len(lines) == 4 + len(DEPTHS)
    table = depth_table(scores)
    assert table.row_count == len(DEPTHS)
    without = depth_markdown([replace(ROW, unreadable=2)])
    assert "top-5" not in without
    assert "| FT | 81.23 | 0.5000 | 5.60 | 1,234 |" in without
    assert "90 images of 8 px, 2 unreadable" in without
    with pytest.raises(ValueError, match="of 2 networks or sets of images; give those of one"):
        depth_markdown([ROW, replace(ROW, network="other")])


def test_rows_are_kept_with_their_origin(scores, tmp_path):
    path = tmp_path / "rows" / "depths.csv"
    write_depth_scores(path, scores[:2])
    write_depth_scores(path, scores, append=True)  # the first two are there already
    with path.open() as file:
        rows = list(csv.DictReader(file))
    assert [r["depth"] for r in rows] == DEPTHS
    assert float(rows[3]["top1"]) == pytest.approx(100 * scores[3].top1, abs=1e-4)
    assert rows[0]["torch"] == torch.__version__
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"other\.csv has the columns \['a', 'b'\].*scores of depths"):
        write_depth_scores(tmp_path / "other.csv", scores, append=True)
    assert (tmp_path / "other.csv").read_text() == "a,b\n1,2\n"


def test_the_figure_names_every_depth(scores, tmp_path):
    path = plot_depths(scores, tmp_path / "a.svg")
    text = path.read_text()
    for name in (*DEPTHS, "multiply-accumulates of an image, M"):
        assert f">{name}<" in text
    assert plot_depths(scores[:1], tmp_path / "b.png").stat().st_size > 1000
    with pytest.raises(ValueError, match="no scores to draw"):
        plot_depths([], tmp_path / "c.svg")
    with pytest.raises(ValueError, match="suffix"):
        plot_depths(scores, tmp_path / "c.txt")
    assert not (tmp_path / "c.svg").exists()


def test_the_command_scores_all_depths(folder, tmp_path):
    command = ["evaluate", folder, "--data", "digits", "--part", "val", "--device", "cpu"]
    files = ["--rows", tmp_path / "rows.csv", "--plot", tmp_path / "depths.svg"]
    assert "| TTT (base) |" in run(*command, "--depths", "--markdown", *files)
    assert (tmp_path / "depths.svg").is_file()
    assert len((tmp_path / "rows.csv").read_text().splitlines()) == 1 + len(DEPTHS)
    assert "FFF (super)" in run(*command, "--depths")


def test_the_command_refuses_files_that_cannot_be_written_before_scoring(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("pliant.adaptive.scores.evaluate_depths", lambda *_, **__: pytest.fail("scored"))
    (tmp_path / "other.csv").write_text("a,b\n")
    for options, message in [
        (["--markdown"], "are for depths; add --depths"),
        (["--depths", "--rows", tmp_path / "other.csv"], "columns"),
        (["--depths", "--plot", tmp_path / "a.txt"], "suffix"),
    ]:
        assert message in fails(monkeypatch, capsys, "evaluate", tmp_path, *options)
