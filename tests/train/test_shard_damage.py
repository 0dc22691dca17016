"""Shards that are not what they seem: ends that are none, numbers that ask for memory."""

from __future__ import annotations

from dataclasses import replace

import pytest

from _images import folder_recipe, make_folder
from _shards import layout, put
from pliant.train.data import load_data
from pliant.train.shard_writing import write_shards
from pliant.train.shards import DamagedShardError, index_shards


@pytest.mark.parametrize("index", [True, False], ids=["index", "no index"])
def test_an_end_that_is_none_is_refused_wherever_zeros_stand(index, tmp_path):
    """Zeros from any block to the end, and one header of zeros: `tarfile` takes both for the end."""
    make_folder(tmp_path / "images", 20, size=(48, 48))
    (path,) = write_shards(tmp_path / "images", tmp_path / "shards")
    if not index:
        (tmp_path / "shards" / "_info.json").unlink()
    whole = path.read_bytes()
    members = layout(path)
    end = members[-1][3]
    for _, header, begin, _ in members[2::12]:
        path.write_bytes(whole[:header] + bytes(begin - header) + whole[begin:])
        with pytest.raises(DamagedShardError, match=r"images-00000-of-00001\.tar is damaged or cut off"):
            index_shards([path])
        path.write_bytes(whole[:header] + bytes(len(whole) - header))
        # Without an index, what is lost within the last record cannot be told from what fills it up.
        if index or header + 1024 <= len(whole) - 10240:
            with pytest.raises(
                DamagedShardError, match=r"images-00000-of-00001\.tar (is damaged|has \d+ im)"
            ):
                index_shards([path])
    for more in (bytes(512), b"x" * 512, whole):
        path.write_bytes(whole + more)
        with pytest.raises(DamagedShardError, match="no end of archive follows"):
            index_shards([path])
    path.write_bytes(whole[: -(-end // 512) * 512] + bytes(1024))  # as writers end that fill nothing up
    assert len(index_shards([path])[1]) == 60


def test_a_class_of_a_great_number_asks_for_no_memory(tmp_path):
    put(tmp_path / "s.tar", [("a.png", b"x"), ("a.cls", b"100000000")])
    recipe = replace(folder_recipe(f"{tmp_path}/s.tar"), data="shards")
    with pytest.raises(ValueError, match=r"have class 100000000; without classes\.txt .* at most 100000"):
        load_data(recipe)
