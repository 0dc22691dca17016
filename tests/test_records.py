"""Rows to a CSV file and back; processes that append to one file lose nothing."""

from __future__ import annotations

import math
import subprocess
import sys

import pytest

from pliant.measuring.rows import Measurement, read_rows
from pliant.records import Origin, percent, read_records, write_records

SCRIPTS = {
    "records": """
import sys
from pliant.records import Origin, write_records
for n in range(25):
    write_records(sys.argv[1], Origin, [Origin(cpu=sys.argv[2], cores=n)], append=True)
""",
    "measurements": """
import sys
from pliant.measuring.rows import Measurement, write_rows
for n in range(25):
    write_rows(sys.argv[1], [Measurement(model=sys.argv[2], batch=n)], append=True)
""",
}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_four_processes_append_to_one_file_and_no_row_is_lost(kind, tmp_path):
    path = tmp_path / "new" / "rows.csv"
    command = [sys.executable, "-c", SCRIPTS[kind], str(path)]
    running = [subprocess.Popen([*command, f"process {k}"]) for k in range(4)]
    assert [process.wait(120) for process in running] == [0] * 4
    if kind == "records":
        found = [(row.cpu, row.cores) for row in read_records(path, Origin)]
    else:
        found = [(row.model, row.batch) for row in read_rows(path)]
    assert sorted(found) == [(f"process {k}", n) for k in range(4) for n in range(25)]
    assert [p.name for p in path.parent.iterdir()] == ["rows.csv"]


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
