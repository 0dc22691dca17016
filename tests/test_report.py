"""The page that needs nothing beside itself, and the figures that go into it."""

from __future__ import annotations

import re

import pytest
import timm
import torch

from pliant.report import FigureBlock, TableBlock, write_report
from research.analysis.routing import selection_frequency
from research.analysis.training_plots import plot_curves, plot_selection_frequency

HISTORY = [
    {"epoch": e, "train_loss": 2.0 - e, "val_loss": 2.1 - e, "train_accuracy": 0.5, "val_accuracy": 0.4}
    for e in range(2)
]


def frequency():
    model = timm.create_model("resnet20_cifar_mod")
    data = [(torch.randn(6, 3, 16, 16), torch.arange(6) % 2)]
    return selection_frequency(model, data, ["cat", "dog"])


def test_page_is_self_contained_and_escapes(tmp_path):
    first = plot_curves({"a<b": HISTORY}, tmp_path / "curves.svg")
    second = plot_selection_frequency(frequency(), "layer2.1", tmp_path / "selection.svg")
    page = write_report(
        tmp_path / "deep" / "report.html",
        "Title & <b>",
        findings=["1 < 2"],
        tables=[TableBlock("T", "note", ("network", "x"), [("plain", "<1>")])],
        figures=[FigureBlock("F1", "c1", first), FigureBlock("F2", "c2", second)],
        provenance={"commit": "abc"},
    )
    text = page.read_text()
    assert "Title &amp; &lt;b&gt;" in text
    assert "<td>&lt;1&gt;</td>" in text
    assert text.count("<svg") == 2
    assert "<script" not in text
    assert not re.findall(r'(?:src|href)="(?!#)', text)  # nothing is fetched
    ids = re.findall(r'\bid="([^"]+)"', text)
    assert len(ids) == len(set(ids))
    for target in re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', text):
        assert (target[0] or target[1]) in ids


def test_a_figure_that_is_no_svg_is_refused(tmp_path):
    (tmp_path / "x.svg").write_text("no")
    with pytest.raises(ValueError, match=r"x\.svg is no SVG"):
        write_report(
            tmp_path / "r.html",
            "t",
            findings=[],
            tables=[],
            figures=[FigureBlock("F", "c", tmp_path / "x.svg")],
            provenance={},
        )
    assert not (tmp_path / "r.html").exists()


def test_curves_name_every_network_and_refuse_nothing_to_draw(tmp_path):
    text = plot_curves({"plain": HISTORY, "MoD": HISTORY}, tmp_path / "c.svg").read_text()
    assert "plain" in text
    assert "MoD" in text
    with pytest.raises(ValueError, match="no epoch to draw for MoD"):
        plot_curves({"plain": HISTORY, "MoD": []}, tmp_path / "d.svg")
    with pytest.raises(ValueError, match="no epoch to draw"):
        plot_curves({}, tmp_path / "d.svg")
    with pytest.raises(ValueError, match=r"c\.gif: the suffix must be"):
        plot_curves({"plain": HISTORY}, tmp_path / "c.gif")


def test_selection_figure_has_a_row_for_each_class_and_refuses_unknown_blocks(tmp_path):
    found = frequency()
    text = plot_selection_frequency(found, "layer3.1", tmp_path / "s.svg").read_text()
    for label in ("all", "cat", "dog", "4 of 64 selected"):
        assert label in text
    with pytest.raises(ValueError, match=r"no block 'layer1\.0'; there are layer1\.1"):
        plot_selection_frequency(found, "layer1.0", tmp_path / "t.svg")


def test_figures_are_the_same_file_twice(tmp_path):
    one = plot_curves({"plain": HISTORY}, tmp_path / "1.svg").read_bytes()
    assert one == plot_curves({"plain": HISTORY}, tmp_path / "2.svg").read_bytes()
