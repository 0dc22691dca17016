"""The survey of timm's networks, and the page that is written from its rows."""

from __future__ import annotations

import timm
import torch
from torch import nn

from _repository import ROOT
from _surgery import small
from pliant import AdaptiveDepth, CondConv
from pliant.method import Method, Site, Survey
from pliant.records import read_records
from research.coverage import CoverageRow, _cell, _outcome, cover, coverage_page, default_names, survey

ROWS = ROOT / "results" / "coverage.csv"


def test_the_page_is_written_from_the_rows():
    rows = read_records(ROWS, CoverageRow)
    assert (ROOT / "docs" / "coverage.md").read_text() == coverage_page(rows)
    assert {row.outcome for row in rows} <= {"converted", "refused"}, "none fails"
    assert all(row.reason for row in rows if row.outcome == "refused"), "none is refused silently"
    assert all(row.replaced for row in rows if row.outcome == "converted"), "nor converted in nothing"


def test_every_module_has_rows_of_two_networks():
    rows = read_records(ROWS, CoverageRow)
    if {row.timm for row in rows} == {timm.__version__}:
        assert default_names(rows) == list(dict.fromkeys(row.network for row in rows))


def test_a_network_is_surveyed_once(tmp_path):
    told = []
    path = tmp_path / "rows.csv"
    first = cover(["resnet18", "swin_tiny_patch4_window7_224"], path, told.append)
    assert told == [
        "resnet18: MixtureOfDepths converted, CondConv converted, AdaptiveDepth converted",
        "swin_tiny_patch4_window7_224: MixtureOfDepths refused, CondConv refused, AdaptiveDepth refused",
    ]
    assert cover(["resnet18"], path, told.append) == first
    assert len(told) == 2
    assert first[-1].reason == "timm's swin_transformer.SwinTransformerBlock is no block of a known family"
    assert default_names(first)[:2] == ["resnet18", "swin_tiny_patch4_window7_224"]
    assert set(timm.list_models(module="vgg")[:2]) < set(default_names(first))


def test_a_converted_network_that_does_not_run_fails():
    class Widen(Method):
        def survey(self, model: nn.Module) -> Survey:
            return Survey((Site("layer1.1"),))

        def replace(self, module: nn.Module, site: Site) -> nn.Module:
            return nn.Conv2d(16, 17, 1)

    outcome, sites, reason = _outcome(small(), Widen(), "")
    assert (outcome, sites) == ("fails", ("layer1.1",))
    assert reason.startswith("its forward fails: RuntimeError: ")
    assert _outcome(small(), CondConv(begin=99), "")[0] == "refused"
    assert _outcome(small(), AdaptiveDepth(), "")[::2] == ("converted", "")


def test_a_cell_says_how_many_and_how_much():
    def row(outcome: str, replaced: int) -> CoverageRow:
        about = {"module": "m", "network": "n", "method": "CondConv"}
        return CoverageRow(**about, outcome=outcome, replaced=replaced, known=8, blocks=8)

    assert _cell([row("refused", 0)]) == "no"
    assert (
        _cell([row("converted", 4), row("refused", 0), row("converted", 6)])
        == "2 of 3, 50 to 75 % of blocks"
    )


def test_networks_that_need_weights_are_run_with_them(monkeypatch):
    """A forward that looks at values cannot run without any."""

    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small()
            self.pretrained_cfg = {"input_size": (3, 32, 32), "architecture": "resnet18"}

        def forward(self, x):
            if bool((x == 0).all()):
                return self.net(x)
            raise ValueError

    def build(name: str, device: str = "meta") -> nn.Module:
        return Looking().to(device).eval()

    monkeypatch.setattr("research.coverage.build", build)
    assert [row.outcome for row in survey("resnet18")] == ["converted"] * 3
    assert torch.is_grad_enabled()
