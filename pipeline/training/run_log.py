"""What a run leaves for SQL: metrics, alerts, throughput and every example's log-probs, as Parquet parts.

A part covers the steps up to the flush that wrote it. Every checkpoint flushes first, so returning to a checkpoint means deleting
the parts after it.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from prefcache.pipeline.errors import IntegrityError
from prefcache.pipeline.schema import EVENTS, METRICS, STEPS, THROUGHPUT
from prefcache.pipeline.stored import artifact

PROVENANCE = "provenance.json"  # what a run was made from, next to its tables
BEFORE = "before.json"  # what the policy did before the first step
# Tables whose parts a finished run's manifest lists, under these keys.
PARTS = {"steps": "parts", "events": "events", "metrics": "metrics", "throughput": "throughput"}


class RunLog:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._pending: dict[str, list[pa.Table]] = {name: [] for name in ("metrics", "steps", "events", "throughput")}
        self._remedy = f"Delete {folder} and train again."

    def add_metrics(self, row: dict[str, Any]) -> None:
        """Add the columns of METRICS and any others that this run's loss logs."""
        others = [pa.field(name, pa.float64()) for name in row if name not in METRICS.names]
        self._pending["metrics"].append(pa.Table.from_pylist([row], schema=pa.schema([*METRICS, *others])))

    def add_event(self, row: dict[str, Any]) -> None:
        self._pending["events"].append(pa.Table.from_pylist([row], schema=EVENTS))

    def add_throughput(self, row: dict[str, Any]) -> None:
        self._pending["throughput"].append(pa.Table.from_pylist([row], schema=THROUGHPUT))

    def add_visit(self, step: int, epoch: float, split: str, example_ids: list[str], visit: dict[str, Any]) -> None:
        n = len(example_ids)
        columns = {"step": [step] * n, "epoch": [epoch] * n, "split": [split] * n, "example_id": example_ids}
        # A visit holds float64 throughout, also for what the schema counts in integers.
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
                artifact.commit_bytes(self._part(name, step), artifact.parquet(table))
                tables.clear()

    def rows(self, name: str) -> Iterator[dict[str, Any]]:
        """Yield a table's rows on disk, in order."""
        for part in self._parts(name):
            yield from self._read(part).to_pylist()

    def newest_row(self, table: str, column: str) -> dict[str, Any] | None:
        """Return the last row of a table in which this column has a value."""
        for part in reversed(self._parts(table)):
            if rows := [row for row in self._read(part).to_pylist() if row.get(column) is not None]:
                return dict(rows[-1])
        return None

    def visits(self, step: int, split: str) -> pa.Table:
        """Return the visits of a step at whose end the log was flushed."""
        part = self._part("steps", step)
        visits = self._read(part, filters=(pc.field("step") == step) & (pc.field("split") == split))
        if not len(visits):
            raise IntegrityError(f"{part} has lost the {split} examples of step {step}. {self._remedy}")
        return visits

    def refuse_damaged(self, needed: Iterable[tuple[str, int]]) -> None:
        """Refuse to resume with unreadable parts, or without the `needed` ones, each a table and a step."""
        for name in self._pending:
            for part in self._parts(name):
                self._read(part, columns=[])
        for name, step in needed:
            if not (part := self._part(name, step)).exists():
                raise IntegrityError(f"{part} is missing. {self._remedy}")

    def discard_after(self, step: int) -> None:
        for name in self._pending:
            for part in self._parts(name):
                number = part.stem.removeprefix("to-")
                if number.isdigit() and int(number) > step:
                    part.unlink()

    def _part(self, name: str, step: int) -> Path:
        return self.folder / name / f"to-{step:08}.parquet"

    def _parts(self, name: str) -> list[Path]:
        return sorted((self.folder / name).glob("to-*.parquet"))

    def _read(self, part: Path, **options: Any) -> pa.Table:
        try:
            return pq.read_table(part.absolute(), **options)
        except (OSError, pa.ArrowException) as error:
            reason = "it is missing" if isinstance(error, FileNotFoundError) else str(error).partition("\n")[0]
            raise IntegrityError(f"{part} cannot be read ({reason}). {self._remedy}") from error
