"""Counts of Mixture-of-Depths against its paper's tables, and the table that shows them."""

from __future__ import annotations

import io
from decimal import Decimal

import pytest
from rich.console import Console

from research.published import (
    INSTALL_COUNTS,
    markdown,
    mod,
    ptflops_macs,
    published_rows,
    render,
    reproduce_counts,
)

# Where the paper's print is not what its own convention gives: (what, published, ours).
EXCEPTIONS = {
    ("7", "resnet18_mod", "imagenet"): ("MACs", Decimal("0.89"), Decimal("0.90")),
    ("11", "resnet34", "cifar10"): ("MACs", Decimal("1016"), Decimal("1160")),
    ("11", "resnet50_mod", "cifar100"): ("parameters", Decimal("16.26"), Decimal("16.25")),
}

# Exact integers: parameters, and multiply-accumulates of convolutions and products.
INTEGERS = {
    ("1", "resnet50_mod", "imagenet"): (18_105_949, 2_561_987_008),
    ("1", "resnet50_mod_random", "imagenet"): (17_114_717, 2_560_995_776),
    ("1", "resnet50", "imagenet"): (25_557_032, 4_089_184_256),
    ("7", "resnet18", "imagenet"): (11_181_642, 1_813_566_464),
    ("11", "resnet18_mod", "cifar10"): (4_948_352, 253_550_080),
}


@pytest.fixture(scope="module")
def report(counts_of):
    pytest.importorskip("ptflops")
    return counts_of("mod")


def _key(row):
    return row.published.table, row.published.model, row.published.task


def test_every_resnet_row_is_counted(report):
    printed = {
        (p.table, p.model, p.task)
        for p in published_rows("mod", ["1", "7", "8", "11"])
        if p.model.startswith("resnet") and p.counts != "not ours"
    }
    assert {_key(row) for row in report.rows} == printed
    assert len(report.rows) == 29


def test_counts_are_the_papers_at_printed_precision(report):
    for row in report.rows:
        wrong = EXCEPTIONS.get(_key(row), ("", None, None))[0]
        if wrong != "parameters":
            assert row.parameters_m == row.published.params_m, _key(row)
        if wrong != "MACs":
            assert row.printed_macs == row.published.macs, (_key(row), row.convention_macs)
        assert (row.verdict == "match") == (wrong == "")


def test_rows_whose_print_is_wrong_are_wrong_as_the_file_says(report):
    found = {}
    for row in report.rows:
        p = row.published
        if not row.parameters_agree:
            found[_key(row)] = ("parameters", p.params_m, row.parameters_m)
        elif not row.macs_agree:
            found[_key(row)] = ("MACs", p.macs, row.printed_macs)
        if row.verdict != "match":
            assert p.counts != "exact", "the data file names no exception for this row"
    assert found == EXCEPTIONS


def test_integers(report):
    ours = {_key(row): (row.parameters, row.macs) for row in report.rows}
    assert {key: ours[key] for key in INTEGERS} == INTEGERS


def test_each_row_uses_its_convention(report):
    used = {_key(row): row.convention for row in report.rows}
    assert used["1", "resnet101", "imagenet"] == "conv and linear"
    assert used["1", "resnet101_mod", "imagenet"] == "ptflops"
    assert used["11", "resnet50_mod", "cifar10"] == "ptflops, functional"
    # Only ResNet-101's row is counted so, and no other way gives what is printed.
    assert list(used.values()).count("conv and linear") == 1


def test_what_is_left_out_is_said_with_a_reason():
    left = reproduce_counts("mod", ["2", "9"]).left_out
    assert {p.model: why for p, why in left if p.table == "2"} == {
        "mobilenetv2": "pliant does not have it yet",
        "mobilenetv2_mod_l": "pliant does not have it yet",
        "mobilenetv2_mod": "pliant does not have it yet",
    }
    assert {why for p, why in left if p.table == "9"} == {"the paper prints no count"}
    assert len(left) == 3 + 12


def test_tables_show_published_beside_ours(report):
    text = markdown(report)
    assert "| 1 | resnet50_mod | 18.11 | 18.11 | 2.60 G | 2.60 G | 2.562 G | match |" in text
    assert "| 11 | resnet34/cifar10 | 21.28 | 21.28 | 1016 M | 1160 M | 1159 M | differs |" in text
    assert text.count("\n| ") == len(report.rows)
    assert (
        "- resnet34, cifar10 (Table 11): MACs differ; the data file says: params exact; macs should" in text
    )
    console = Console(file=io.StringIO(), width=80)
    console.print(render(report))
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    assert "11 resnet34/cifar10 21.28 21.28 1016 M 1160 M 1159 M differs" in lines


def test_without_ptflops_the_rest_is_still_there(monkeypatch):
    monkeypatch.setattr(mod, "has_ptflops", lambda: False)
    report = reproduce_counts("mod", ["8"])
    row = report.rows[-1]
    assert (row.parameters, row.macs) == (18_105_949, 2_561_987_008)
    assert (row.convention_macs, row.macs_agree, row.verdict) == (None, None, "parameters match")
    assert "not counted" in markdown(report)
    assert any(INSTALL_COUNTS in note for note in report.notes)


def test_ptflops_missing_is_named(monkeypatch):
    import sys

    from torch import nn

    monkeypatch.setitem(sys.modules, "ptflops", None)
    with pytest.raises(ImportError, match=r"pip install 'ptflops==0\.7\.5'"):
        ptflops_macs(nn.Linear(1, 1), (3, 1, 1))


def test_progress_sees_each_row(monkeypatch):
    monkeypatch.setattr(mod, "has_ptflops", lambda: False)
    seen = []
    report = reproduce_counts("mod", ["8"], progress=seen.append)
    assert tuple(seen) == report.rows


@pytest.mark.parametrize(("method", "rows"), [("mod", 67), ("condconv", 46), ("adn", 36)])
def test_every_paper_ships_its_rows(method, rows):
    found = published_rows(method)
    assert len(found) == rows
    assert all(row.macs_unit in ("M", "G", "T") for row in found if row.macs is not None)
    assert all(row.accuracy is not None for row in found)


def test_unknown_method_and_table():
    with pytest.raises(
        ValueError, match="no published rows for 'mdo'; there are rows for mod, condconv, adn"
    ):
        published_rows("mdo")
    with pytest.raises(ValueError, match=r"mod.csv holds no table '12'; it holds 1, 2, 3, 4, 7, 8, 9, 11"):
        reproduce_counts("mod", ["12"])
