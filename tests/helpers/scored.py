"""Rows that score, export and import read or wrote."""

import hashlib
import json
from pathlib import Path

import pyarrow.parquet as pq

from tests.helpers.project import pair


def rows_of(root: Path) -> dict[bytes, dict]:
    shards = sorted(cache_folder(root).glob("*.parquet"))
    rows = [row for shard in shards for row in pq.read_table(shard, page_checksum_verification=True).to_pylist()]
    assert len({row["key"] for row in rows}) == len(rows), "a sequence was stored twice"
    return {row["key"]: row for row in rows}


def fingerprint(root: Path) -> dict[str, str]:
    """What a cache holds, byte for byte."""
    files = [path for path in cache_folder(root).iterdir() if not path.name.startswith(".")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def write_labels(path: Path, n: int) -> None:
    records = [{"prompt": pair(i)["prompt"], "completion": pair(i)["chosen"], "label": i % 2 == 0} for i in range(n)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def cache_folder(root: Path) -> Path:
    (folder,) = (path for path in (root / "cache").iterdir() if path.is_dir())
    return folder
