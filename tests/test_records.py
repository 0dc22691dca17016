"""Rows to a CSV file and back; processes that append to one file lose nothing."""

from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import dataclass

import pytest

from pliant.measuring.rows import Measurement, read_rows
from pliant.records import Origin, columns, percent, read_records, write_records
from pliant.records import cells as cells_of

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
