"""What a run leaves for SQL: metrics, alerts and every pair's log-probs, as Parquet parts.

A part covers the steps up to the flush that wrote it. Every checkpoint flushes first, so going back to a checkpoint
means deleting the parts after it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.schema import EVENTS, METRICS, STEPS, THROUGHPUT
from pipeline.stored import artifact

PROVENANCE = "provenance.json"  # what a run was made from, beside its tables
# Tables whose parts a finished run's manifest vouches for, under these keys.
PARTS = {"steps": "parts", "events": "events", "metrics": "metrics", "throughput": "throughput"}
_TABLES = {"metrics": METRICS, "steps": STEPS, "events": EVENTS, "throughput": THROUGHPUT}


class RunLog:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: dict[str, list[pa.Table]] = {name: [] for name in _TABLES}

    def metrics(self, row: dict[str, Any]) -> None:
        """What METRICS has, and what this run's loss measures beside it."""
        more = [pa.field(name, pa.float64()) for name in row if name not in METRICS.names]
        self._pending["metrics"].append(pa.Table.from_pylist([row], schema=pa.schema([*METRICS, *more])))

    def event(self, row: dict[str, Any]) -> None:
        self._pending["events"].append(pa.Table.from_pylist([row], schema=EVENTS))

    def throughput(self, row: dict[str, Any]) -> None:
        self._pending["throughput"].append(pa.Table.from_pylist([row], schema=THROUGHPUT))

    def visit(self, step: int, epoch: float, split: str, example_ids: list[str], visit: dict[str, Any]) -> None:
        n = len(example_ids)
        columns = {"step": [step] * n, "epoch": [epoch] * n, "split": [split] * n, "example_id": example_ids}
        # Numbers of a float64 table, whatever they count.
        columns |= {
            field.name: pa.array(visit[field.name]).cast(field.type) if field.name in visit else [None] * n
            for field in STEPS
            if field.name not in columns
        }
        self._pending["steps"].append(pa.Table.from_pydict(columns, schema=STEPS))

    def flush(self, step: int) -> None:
        for name, tables in self._pending.items():
            if tables:
                table = pa.concat_tables(tables, promote_options="default")
                artifact.commit_bytes(self._folder / name / f"to-{step:08}.parquet", artifact.parquet(table))
                tables.clear()

    def rows(self, name: str) -> Iterator[dict[str, Any]]:
        """Those on disk of a table, in their order."""
        for part in sorted((self._folder / name).glob("to-*.parquet")):
            yield from pq.read_table(part).to_pylist()

    def visits(self, step: int, split: str) -> pa.Table:
        """Those of one step at whose end the log was flushed."""
        part = self._folder / "steps" / f"to-{step:08}.parquet"
        wanted = (pc.field("step") == step) & (pc.field("split") == split)
        return pq.read_table(part, filters=wanted)

    def go_back(self, step: int) -> None:
        """Forget what came after a step."""
        for name in _TABLES:
            for part in (self._folder / name).glob("to-*.parquet"):
                if int(part.stem.removeprefix("to-")) > step:
                    part.unlink()
