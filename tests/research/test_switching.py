"""Rows of what switching a depth costs."""

from __future__ import annotations

from pliant.records import read_records
from research.bench.switching import SwitchCost, run_switch_bench


def test_each_way_to_switch_has_a_row(tmp_path):
    rows = read_records(run_switch_bench(tmp_path, quick=True), SwitchCost)
    assert [row.call for row in rows] == ["set_depth", "get_depth", "at_depth"]
    assert all(row.median_us for row in rows)
    assert all(row.cpu and row.torch for row in rows)
