"""Published caches as others may make them: every checksum right, whatever the values are."""

from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from prefcache.pipeline.schema import CACHE
from prefcache.pipeline.stored import artifact, shards
from prefcache.pipeline.stored.key_index import read_keys
from prefcache.pipeline.stored.records import ShardRecord


def write_shard(record: Path, rows: pa.Table, **facts: object) -> None:
    """Write rows in the place of a shard, with a record that vouches for them."""
    before = ShardRecord.read(record)
    data = artifact.parquet(rows, float_lists=["logps"])
    shard = record.with_name(f"{record.stem}-{artifact.checksum_bytes(data)[:8]}.parquet")
    (record.parent / before.file).unlink()
    entry = artifact.commit_file(shard, data, rows=len(rows))
    checksum = shards.checksum_values(read_keys([rows["key"]]), shards.usable_sums(rows))
    ShardRecord.make(
        **{**before.facts(), **entry, "values_xxh3_128": checksum, "blocks": shards.describe_blocks(data), **facts}
    ).commit(record)


def rewrite(folder: Path, change: Callable[[list[dict]], None]) -> None:
    """Change the rows of each shard, as plain data, and vouch for the result."""
    for record in shards.list_records(folder):
        rows = pq.read_table(folder / ShardRecord.read(record).file).cast(CACHE).to_pylist()
        change(rows)
        write_shard(record, pa.Table.from_pylist(rows, schema=CACHE))
