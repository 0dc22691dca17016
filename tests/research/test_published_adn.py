"""Counts of the adaptive depth networks against the paper's tables."""

from __future__ import annotations

import logging
from decimal import Decimal

import pytest
import timm
import torch

from pliant import subnet
from pliant.counting import count_parameters
from research.published import (
    fvcore_macs,
    markdown,
    ptflops_macs,
    published_rows,
    without_attention_macs,
)

# Where the print is not what its convention gives: (what, published, ours). The method's
# page says why.
EXCEPTIONS = {
    ("1", "mobilenetv2_adn", "super"): [
        ("parameters", Decimal("3.72"), Decimal("3.52")),
        ("MACs", Decimal("0.32"), Decimal("0.31")),
    ],
    ("1", "mobilenetv2_adn", "base"): [("parameters", Decimal("3.72"), Decimal("3.52"))],
    ("1", "mobilenetv2", ""): [("MACs", Decimal("0.32"), Decimal("0.31"))],
    ("1", "mobilenetv2_base", ""): [("parameters", Decimal("2.99"), Decimal("3.00"))],
    ("1", "vit_base_patch32_base", ""): [("parameters", Decimal("69.33"), Decimal("59.87"))],
    ("2", "resnet50_adn", "TTFF"): [("MACs", Decimal("3.4"), Decimal("3.5"))],
}

# Parameters, multiply-accumulates, and multiply-accumulates in the paper's convention.
INTEGERS = {
    ("1", "resnet50_adn", "super"): (25_583_144, 4_089_184_256, 4_111_412_224),
    ("1", "resnet50_adn", "base"): (25_583_144, 2_560_622_592, 2_575_926_272),
    ("1", "resnet50", ""): (25_557_032, 4_089_184_256, 4_111_412_224),
    ("1", "resnet50_base", ""): (17_112_360, 2_560_622_592, 2_575_926_272),
    ("1", "mobilenetv2_adn", "super"): (3_521_576, 300_774_272, 314_130_496),
    ("1", "mobilenetv2_adn", "base"): (3_521_576, 241_306_304, 252_991_040),
    ("1", "mobilenetv2", ""): (3_504_872, 300_774_272, 314_130_496),
    ("1", "mobilenetv2_base", ""): (2_997_480, 241_306_304, 252_991_040),
    ("1", "vit_base_patch32_adn", "super"): (88_248_808, 4_409_186_304, 2_947_528_704),
    ("1", "vit_base_patch32_adn", "base"): (88_248_808, 2_978_248_704, 2_003_810_304),
    ("1", "vit_base_patch32", ""): (88_224_232, 4_409_186_304, 2_947_528_704),
    ("1", "vit_base_patch32_base", ""): (59_872_744, 2_978_248_704, 2_003_810_304),
    ("2", "resnet50_adn", "TTFF"): (25_583_144, 3_434_086_400, 3_451_497_472),
    ("2", "resnet50_adn", "base"): (25_583_144, 2_560_622_592, 2_575_926_272),
}


@pytest.fixture(scope="module")
def report(counts_of):
    return counts_of("adn")


@pytest.fixture(scope="module")
def counted(report):
    return {(p.table, p.model, p.variant): row for row in report.rows for p in [row.published]}


def test_every_row_with_counts_is_counted(report, counted):
    assert list(counted) == list(INTEGERS)
    assert {row.convention for row in report.rows} == report.paper.conventions.keys()


def test_integers(counted):
    found = {key: (row.parameters, row.macs, row.convention_macs) for key, row in counted.items()}
    assert found == INTEGERS


def test_counts_are_the_papers_but_for_the_exceptions_that_the_file_names(counted):
    found = {}
    for key, row in counted.items():
        p = row.published
        both = (
            ("parameters", p.params_m, row.parameters_m),
            ("MACs", p.macs, row.printed_macs),
        )
        wrong = [(what, printed, ours) for what, printed, ours in both if printed != ours]
        assert (row.verdict == "match") == (not wrong)
        if wrong:
            found[key] = wrong
    assert found == EXCEPTIONS
    exact = {key for key, row in counted.items() if row.published.counts.startswith("exact")}
    assert exact & found.keys() == {("1", "mobilenetv2", "")}  # the one that the file calls exact


def test_what_is_left_out_is_said_with_a_reason(report):
    left = {}
    for p, why in report.left_out:
        left.setdefault(why, []).append(p.table)
    assert len(report.rows) + len(report.left_out) == len(published_rows("adn"))
    assert left == {
        "the paper prints no count": ["3"] * 8,
        "pliant has no detection networks yet": ["4"] * 4,
        "another paper's network": ["1"] * 4 + ["2"] * 6,
    }


def test_tables_show_published_beside_ours(report):
    text = markdown(report).splitlines()
    assert "| 1 | resnet50_adn, base | 25.58 | 25.58 | 2.58 G | 2.58 G | 2.561 G | match |" in text
    assert "| 2 | resnet50_adn, TTFF | 25.6 | 25.6 | 3.4 G | 3.5 G | 3.434 G | differs |" in text
    assert "- mobilenetv2, imagenet (Table 1): MACs differ; the data file says: exact" in text
    # A row that matches, and of which the file says nothing, needs no note.
    assert not [line for line in text if line.startswith("- resnet50_adn, base")]
    assert (
        "- left out, pliant has no detection networks yet: fasterrcnn_resnet50_adn (Table 4), "
        "maskrcnn_resnet50_adn (Table 4)"
    ) in text


def test_reasons_of_the_page_for_prints_that_are_not_met():
    with torch.device("meta"):
        mobilenet, vit = timm.create_model("mobilenetv2_100"), timm.create_model("vit_base_patch32_224")
    assert count_parameters(timm.create_model("mobilenetv2_adn")) == count_parameters(mobilenet) + 16_704
    skipped = sum(count_parameters(block.mlp) for block in vit.blocks[:4])
    assert f"{(count_parameters(vit) - skipped) / 1e6:.2f}" == "69.33"
    pytest.importorskip("ptflops")
    counts = fvcore_macs(mobilenet, (3, 224, 224)), ptflops_macs(mobilenet, (3, 224, 224))
    assert [f"{macs / 1e9:.3f}" for macs in counts] == ["0.314", "0.308"]


@pytest.mark.parametrize("skip", [(False, True), (True, True)])
def test_the_convention_is_fvcores(skip):
    fvcore = pytest.importorskip("fvcore.nn")
    logging.getLogger("fvcore").setLevel(logging.ERROR)
    model = timm.create_model("resnet18_adn", skippable=(0, 1, 0, 1), num_classes=10)
    cut = subnet(model, skip).eval()
    theirs = fvcore.FlopCountAnalysis(cut, torch.zeros(1, 3, 64, 64))
    pool = theirs.by_operator()["adaptive_avg_pool2d"]  # newer than the paper's fvcore
    assert pool == 512 * 2 * 2
    assert fvcore_macs(cut, (3, 64, 64)) == theirs.total() - pool


def test_a_transformer_is_counted_without_attention():
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_adn", img_size=32)
        cut = subnet(model, (True,) * 4)
    tokens, width = 5, 192
    patches, mlp, head = 4 * 3 * 16 * 16 * width, tokens * 8 * width * width, width * 1000
    assert without_attention_macs(model, (3, 32, 32)) == patches + 12 * mlp + head
    assert without_attention_macs(cut, (3, 32, 32)) == patches + 8 * mlp + head


def test_cut_networks_have_their_parameters():
    with torch.device("meta"):
        found = {
            name: count_parameters(timm.create_model(f"{name}_adn"))
            for name in ("resnet18", "resnet34", "resnet101", "resnet20_cifar", "vit_tiny_patch16")
        }
    # The plain networks' and twice the channels of each norm of a block that stays.
    assert found == {
        "resnet18": 11_689_512 + 2 * 2 * (64 + 128 + 256 + 512),
        "resnet34": 21_797_672 + 2 * 2 * (2 * 64 + 2 * 128 + 3 * 256 + 2 * 512),
        "resnet101": 44_549_160 + 2 * 6 * (2 * 64 + 2 * 128 + 12 * 256 + 2 * 512),
        "resnet20_cifar": 269_722 + 2 * 2 * 2 * (16 + 32 + 64),
        "vit_tiny_patch16": 5_717_416 + 8 * 2 * 2 * 192,
    }
