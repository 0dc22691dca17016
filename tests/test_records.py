"""Rows to a CSV file and back."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest

from pliant.measuring.rows import Measurement
from pliant.records import Origin, columns, percent, read_records, write_records
from pliant.records import cells as cells_of


@dataclass(frozen=True, kw_only=True)
class Row(Origin):
    """A row of a kind that has no late columns of its own."""

    network: str


def test_rows_are_appended_to_a_file_of_before_a_column(tmp_path):
    path, row = tmp_path / "rows.csv", Row(network="a", cpu="c", instructions="avx2", load=1.5)
    for lacking in range(1, len(Origin.LATE) + 1):
        header, cells = columns(Row)[:-lacking], cells_of(row)[:-lacking]
        path.write_text(f"{','.join(header)}\n{','.join(cells)}\n")
        (old,) = read_records(path, Row)
        assert old.network == "a"
        assert getattr(old, Origin.LATE[-1]) is None
        write_records(path, Row, [old, row], append=True)  # a run that is repeated gives its row again
        assert read_records(path, Row) == [old, row]
    path.write_text("network,date\na,b\n")
    with pytest.raises(ValueError, match="which are not those of a Row; name another file"):
        write_records(path, Row, [row], append=True)


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
