"""Read the user's records again, in their order, with what became of each.

For stages that write values next to records (export) or read values from them (import). The sources must not have
changed since they were prepared. A table keeps its Arrow types; JSON or CSV gets types that hold all of its values.
"""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from prefcache.pipeline.config import Config, Source
from prefcache.pipeline.errors import IdentityError
from prefcache.pipeline.preparing.sources import STDIN, DataSource, Line, arrow_tables, open_source
from prefcache.pipeline.progress import counting
from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.images import explain_changed_files
from prefcache.pipeline.stored.prepared import Prepared

# The column for a line that is not a record.
RAW = "prefcache_raw"
# A column whose values have no Arrow type in common is written as JSON text.
Types = dict[str, pa.DataType | None]
_MIXED = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError, TypeError, ValueError)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Some records of one source."""

    lines: list[Line]
    table: pa.Table | None  # the same rows as they are in the file, if that is a table

    @cached_property
    def dicts(self) -> list[dict[str, Any]]:
        """The records; the raw text for a line that is not one."""
        if self.table is not None:
            try:
                rows: list[dict[str, Any]] = self.table.to_pylist()
                return rows
            except (ValueError, OverflowError):
                pass  # one of them has an unreadable value: use the rows that were read one by one
        return [
            {RAW: line.raw.decode("utf-8", "backslashreplace")} if line.record is None else line.record
            for line in self.lines
        ]

    @property
    def names(self) -> list[str]:
        """The columns, in the order of appearance."""
        if self.table is not None:
            return list(self.table.column_names)
        return list(dict.fromkeys(name for record in self.dicts for name in record))

    def as_table(self, types: Types) -> pa.Table:
        """Return the records under the types of all batches."""
        columns = {}
        for name, kind in types.items():
            if self.table is not None and name in self.table.column_names and kind is not None:
                columns[name] = _cast(self.table[name], kind)
                continue
            values = [row.get(name) for row in self.dicts]
            if kind is None:
                kind = pa.string()
                values = [
                    None if value is None else json.dumps(value, ensure_ascii=False, default=str) for value in values
                ]
            columns[name] = pa.array(values, kind)
        return pa.table(columns)


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> Any:
    try:
        return column.cast(kind)
    except _MIXED:
        return pa.array(column.to_pylist(), kind)


# -- reading again ---------------------------------------------------------------------------------------------------


def reopen_sources(config: Config, prepared: Prepared) -> list[DataSource]:
    """Open the sources of a preparation again; raise IdentityError if they have changed."""
    sources = [reopen_source(entry, Path(config.out)) for entry in config.prepare.sources]
    if [source.identity() for source in sources] != prepared.manifest.inputs.data:
        names = ", ".join(source.name for source in sources)
        raise IdentityError(
            f"{names}: not the data that {prepared.folder} was prepared from. Prepare again (prefcache prepare CONFIG), or set "
            "prepare.data back."
        )
    prepared_at = (prepared.folder / artifact.MANIFEST).stat().st_mtime_ns
    if reason := explain_changed_files(prepared.folder, prepared.manifest.image_files, prepared_at):
        raise IdentityError(
            f"{reason} since {prepared.folder} was prepared. Prepare again (prefcache prepare CONFIG), or put it back."
        )
    return sources


def reopen_source(entry: Source, out: Path) -> DataSource:
    if entry.path != STDIN:
        return open_source(entry, out)
    # Standard input can be read only once; prepare has kept it.
    spooled = out / "stdin" / "records"
    if not spooled.exists():
        raise IdentityError(
            f"{spooled} is gone, where prepare keeps what it read from standard input. Pipe the data into prepare again."
        )
    source = open_source(entry.model_copy(update={"path": str(spooled)}), out)
    return dataclasses.replace(source, name=STDIN, entry=entry)


def read_batches(sources: Iterable[DataSource]) -> Iterator[Batch]:
    for source in sources:
        for chunk in source.chunks():
            is_table = chunk.parse is arrow_tables.read_rows
            yield Batch(list(chunk.lines()), pa.ipc.open_stream(chunk.payload).read_all() if is_table else None)


def count_records(batches: Iterable[Batch], what: str, total: int) -> Iterator[Batch]:
    """Yield the batches, and show how many of their records have been read."""
    with counting(what, total, "records") as counter:
        for batch in batches:
            yield batch
            counter.add(len(batch.lines))


def common_types(batches: Iterable[Batch]) -> Types:
    """Return for each column a type that holds what every batch has in it, in the order of appearance."""
    types: Types = {}
    for batch in batches:
        if batch.table is not None:
            batch_types: Types = {field.name: _writable_type(field.type) for field in batch.table.schema}
        else:
            batch_types = {name: _infer_type([record.get(name) for record in batch.dicts]) for name in batch.names}
        for name, kind in batch_types.items():
            types[name] = _unify_types(types[name], kind) if name in types else kind
    return types


def _infer_type(values: list[Any]) -> pa.DataType | None:
    try:
        return _writable_type(pa.array(values).type)
    except _MIXED:
        return None


def _unify_types(a: pa.DataType | None, b: pa.DataType | None) -> pa.DataType | None:
    if a is None or b is None or a == b:
        return a if a == b else None
    try:
        schemas = [pa.schema([("column", kind)]) for kind in (a, b)]
        return pa.unify_schemas(schemas, promote_options="permissive").field(0).type
    except _MIXED:
        return None


def _writable_type(kind: pa.DataType) -> pa.DataType | None:
    """Return the type, or None if it holds a struct without fields, which Parquet cannot store."""
    if pa.types.is_struct(kind):
        inner = [field.type for field in kind]
        return kind if inner and all(_writable_type(each) is not None for each in inner) else None
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return kind if _writable_type(kind.value_type) is not None else None
    return kind


# -- what became of them ---------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What became of one record."""

    examples: list[int]  # rows of the table of examples
    reasons: list[str]  # why something of it could not be used


class Outcomes:
    """For every record of a preparation its examples, and what went to quarantine."""

    def __init__(self, prepared: Prepared, examples: pa.Table, *, copies: bool = False) -> None:
        """`copies`: name an example as often as the weight of its source repeats it, instead of once."""
        self._copies = copies
        self._quarantine = pq.read_table(
            prepared.quarantine().absolute(), columns=["source", "line", "reason", "detail"]
        )
        self._ids = examples["example_id"]
        self._find_examples, self._find_quarantined = _line_index(examples), _line_index(self._quarantine)

    def find(self, lines: list[Line]) -> list[Outcome]:
        """Return the outcomes of lines of one source."""
        if not lines:
            return []
        outcomes = []
        for rows, quarantined in zip(self._find_examples(lines), self._find_quarantined(lines), strict=True):
            bad = self._quarantine.take(quarantined).to_pylist() if quarantined else []
            reasons = [f"{row['reason']}: {row['detail']}" if row["detail"] else row["reason"] for row in bad]
            outcomes.append(Outcome(self._drop_copies(rows), reasons))
        return outcomes

    def _drop_copies(self, rows: list[int]) -> list[int]:
        if len(rows) < 2 or self._copies:
            return rows
        # Copies have ids of their own: the second of ID is ID-2.
        first: dict[str, int] = {}
        for row in rows:
            first.setdefault(self._ids[row].as_py().partition("-")[0], row)
        return list(first.values())


def dictionary_codes(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """Return for each row of a column of text the number of its value, and the distinct values."""
    encoded = column.dictionary_encode().combine_chunks()
    codes: np.ndarray = encoded.indices.to_numpy()
    return codes, encoded.dictionary.to_pylist()


def _line_index(table: pa.Table) -> Callable[[list[Line]], list[list[int]]]:
    """Return a function that finds the table's rows of each of the lines of one source."""
    codes, sources = dictionary_codes(table["source"])
    numbers = table["line"].to_numpy()
    order = np.lexsort((numbers, codes))
    codes, numbers = codes[order], numbers[order]

    def find_rows(lines: list[Line]) -> list[list[int]]:
        code = sources.index(lines[0].source) if lines[0].source in sources else len(sources)
        begin, end = (int(np.searchsorted(codes, code, side)) for side in ("left", "right"))
        wanted = np.array([line.number for line in lines])
        first, last = (begin + np.searchsorted(numbers[begin:end], wanted, side) for side in ("left", "right"))
        return [order[a:b].tolist() for a, b in zip(first, last, strict=True)]

    return find_rows
