"""Shards hold the rows in their order, are cut where they are full, and appear whole or not at all."""

import pyarrow as pa
import pytest

from prefcache.pipeline.preparing.shard_writer import ShardWriter
from prefcache.pipeline.stored import artifact
from tests.helpers.project import entry_of

SCHEMA = pa.schema([("n", pa.int64()), ("data", pa.large_binary())])


def block(*numbers: int, size: int = 0) -> pa.Table:
    return pa.Table.from_pylist([{"n": n, "data": bytes(size)} for n in numbers], schema=SCHEMA)


def write(folder, *blocks, **limits):
    with ShardWriter(folder, "part-{:03}.arrow".format, SCHEMA, split="x", **limits) as writer:
        for each in blocks:
            writer.write(each)
    for entry in writer.entries:
        assert entry["split"] == "x" and artifact.damage(folder, entry_of(entry)) is None
    tables = [artifact.open_arrow_stream(folder / entry["file"]) for entry in writer.entries]
    assert [len(table) for table in tables] == [entry["rows"] for entry in writer.entries]
    return [table["n"].to_pylist() for table in tables]


def test_shards_are_cut_by_rows_within_a_block(tmp_path):
    assert write(tmp_path, block(1, 2, 3), block(), block(4, 5), most_rows=2) == [[1, 2], [3, 4], [5]]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["part-000.arrow", "part-001.arrow", "part-002.arrow"]


def test_shards_are_cut_by_bytes_after_a_block(tmp_path):
    blocks = [block(n, n + 10, size=600) for n in range(3)]
    assert write(tmp_path, *blocks, most_bytes=1000) == [[0, 10], [1, 11], [2, 12]]
    assert write(tmp_path, *blocks, most_bytes=100_000) == [[0, 10, 1, 11, 2, 12]]


def test_without_rows_there_is_no_shard(tmp_path):
    assert write(tmp_path, block()) == [] and not list(tmp_path.iterdir())


def test_after_an_error_the_open_shard_is_gone(tmp_path):
    with (
        pytest.raises(ZeroDivisionError),
        ShardWriter(tmp_path, "{}.arrow".format, SCHEMA, most_rows=2) as writer,
    ):
        writer.write(block(1, 2, 3))
        raise ZeroDivisionError
    assert [path.name for path in tmp_path.iterdir()] == ["0.arrow"]  # the manifest, which names it, is never written
