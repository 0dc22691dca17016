"""Rows to a CSV file and back."""

from __future__ import annotations

import math

from pliant.measuring.rows import Measurement
from pliant.records import percent, read_records, write_records


def test_shares_are_in_percent_in_a_file_and_come_back_bit_by_bit(tmp_path):
    shares = [0.0, 1.0, 0.57, 1e-7, *(n / 1797 for n in range(1797)), None]
    path = tmp_path / "rows.csv"
    write_records(path, Measurement, [Measurement(model="a", accuracy=share) for share in shares])
    again = read_records(path, Measurement)
    assert [row.accuracy for row in again] == shares
    before = path.read_bytes()
    write_records(path, Measurement, again)
    assert path.read_bytes() == before
    assert b",57," in before
    assert percent(0.57) == 57.0
    assert math.isnan(percent(math.nan))
