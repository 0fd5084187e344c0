"""The user's records once more, in their order, beside what became of each.

For stages that put values next to records or take them from there. The sources must be as they were when they were
prepared. A table keeps its Arrow types; what JSON or CSV holds gets types that hold all of its values.
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

from pipeline.config import Config, Source
from pipeline.errors import IdentityError
from pipeline.preparing.sources import STDIN, Chunk, Line, Opened, open_source, tables
from pipeline.stored.prepared import QUARANTINE_FILE, Prepared

# The column for what is no record.
RAW = "prefcache_raw"
# A column whose values have no Arrow type in common is written as JSON text.
Types = dict[str, pa.DataType | None]
_MIXED = (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError, OverflowError, TypeError, ValueError)


@dataclasses.dataclass(frozen=True)
class Batch:
    """Some records of one source."""

    lines: list[Line]
    table: pa.Table | None  # the same rows as they lie in the file, where that is a table

    @cached_property
    def dicts(self) -> list[dict[str, Any]]:
        """The records; of what cannot be read, the text as it stands."""
        if self.table is not None:
            try:
                rows: list[dict[str, Any]] = self.table.to_pylist()
                return rows
            except (ValueError, OverflowError):
                pass  # one of them has an unreadable value: they were read one by one
        return [_readable(line) if line.record is None else line.record for line in self.lines]

    @property
    def names(self) -> list[str]:
        """The columns, in the order of appearance."""
        if self.table is not None:
            return list(self.table.column_names)
        return list(dict.fromkeys(name for record in self.dicts for name in record))

    def as_table(self, types: Types) -> pa.Table:
        """The records under the types of all batches."""
        columns = {}
        for name, kind in types.items():
            if self.table is not None and name in self.table.column_names and kind is not None:
                columns[name] = _cast(self.table[name], kind)
            else:
                values = [row.get(name) for row in self.dicts]
                columns[name] = pa.array(map(_text, values), pa.string()) if kind is None else pa.array(values, kind)
        return pa.table(columns)


def _readable(line: Line) -> dict[str, Any]:
    return {RAW: line.raw.decode("utf-8", "backslashreplace")}


def _cast(column: pa.ChunkedArray, kind: pa.DataType) -> Any:
    try:
        return column.cast(kind)
    except _MIXED:
        return pa.array(column.to_pylist(), kind)


def _text(value: Any) -> str | None:
    return None if value is None else json.dumps(value, ensure_ascii=False, default=str)


# -- reading again ---------------------------------------------------------------------------------------------------


def reopen(config: Config, prepared: Prepared) -> list[Opened]:
    """The sources of a preparation; IdentityError where they hold something else by now."""
    opened = [_reopened(entry, Path(config.out)) for entry in config.prepare.sources]
    if [source.identity() for source in opened] != prepared.manifest["inputs"]["data"]:
        names = ", ".join(source.name for source in opened)
        raise IdentityError(
            f"{names}: not the data that {prepared.folder} was made from. Prepare again (make prepare), or set "
            "prepare.data back."
        )
    return opened


def _reopened(entry: Source, out: Path) -> Opened:
    spooled = out / "stdin" / "records"
    if entry.path != STDIN or not spooled.exists():
        return open_source(entry, out)
    # Standard input can be read once only; prepare has kept it.
    found = open_source(entry.model_copy(update={"path": str(spooled)}), out)
    return dataclasses.replace(found, name=STDIN, entry=entry)


def batches(opened: Iterable[Opened]) -> Iterator[Batch]:
    for source in opened:
        for chunk in source.chunks():
            yield Batch(list(chunk.lines()), _table(chunk))


def _table(chunk: Chunk) -> pa.Table | None:
    if chunk.parse is not tables.read_rows:
        return None
    return pa.ipc.open_stream(chunk.payload).read_all()


def types_of(found: Iterable[Batch]) -> Types:
    """A type for each column that holds what every batch has in it, in the order of appearance."""
    types: Types = {}
    for batch in found:
        if batch.table is not None:
            here: Types = {field.name: _writable(field.type) for field in batch.table.schema}
        else:
            here = {name: _inferred([record.get(name) for record in batch.dicts]) for name in batch.names}
        for name, kind in here.items():
            types[name] = _common(types[name], kind) if name in types else kind
    return types


def _inferred(values: list[Any]) -> pa.DataType | None:
    try:
        return _writable(pa.array(values).type)
    except _MIXED:
        return None


def _common(a: pa.DataType | None, b: pa.DataType | None) -> pa.DataType | None:
    if a is None or b is None or a == b:
        return a if a == b else None
    try:
        both = [pa.schema([("column", kind)]) for kind in (a, b)]
        return pa.unify_schemas(both, promote_options="permissive").field(0).type
    except _MIXED:
        return None


def _writable(kind: pa.DataType) -> pa.DataType | None:
    """Parquet knows no struct without fields."""
    if pa.types.is_struct(kind):
        inner = [field.type for field in kind]
        return kind if inner and all(_writable(each) is not None for each in inner) else None
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return kind if _writable(kind.value_type) is not None else None
    return kind


# -- what became of them ---------------------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What became of one record."""

    examples: list[int]  # rows of the table of examples
    reasons: list[str]  # why something of it could not be used


class Outcomes:
    """For every record of a preparation its examples, and what went to quarantine. Copies of an example count once."""

    def __init__(self, prepared: Prepared, examples: pa.Table) -> None:
        quarantine = pq.read_table(prepared.folder / QUARANTINE_FILE, columns=["source", "line", "reason", "detail"])
        self._ids = examples["example_id"]
        self._quarantine = quarantine
        self._examples_of, self._reasons_of = _by_source(examples), _by_source(quarantine)

    def of(self, lines: list[Line]) -> list[Outcome]:
        if not lines:
            return []
        examples, reasons = self._examples_of(lines), self._reasons_of(lines)
        return [
            Outcome(self._without_copies(rows), [self._reason(row) for row in bad])
            for rows, bad in zip(examples, reasons, strict=True)
        ]

    def _without_copies(self, rows: list[int]) -> list[int]:
        if len(rows) < 2:
            return rows
        # Copies have names of their own: the second of ID is ID-2.
        first: dict[str, int] = {}
        for row in rows:
            first.setdefault(self._ids[row].as_py().partition("-")[0], row)
        return list(first.values())

    def _reason(self, row: int) -> str:
        reason, detail = (self._quarantine[name][row].as_py() for name in ("reason", "detail"))
        return f"{reason}: {detail}" if detail else str(reason)


def codes_of(column: pa.ChunkedArray) -> tuple[np.ndarray, list[str]]:
    """The distinct values of a column of text, and which of them each row has."""
    encoded = column.dictionary_encode().combine_chunks()
    codes: np.ndarray = encoded.indices.to_numpy()
    return codes, encoded.dictionary.to_pylist()


def _by_source(table: pa.Table) -> Callable[[list[Line]], list[list[int]]]:
    """For lines of one source, the rows of each."""
    codes, sources = codes_of(table["source"])
    numbers = table["line"].to_numpy()
    order = np.lexsort((numbers, codes))
    codes, numbers = codes[order], numbers[order]

    def rows_of(lines: list[Line]) -> list[list[int]]:
        code = sources.index(lines[0].source) if lines[0].source in sources else len(sources)
        begin, end = (int(np.searchsorted(codes, code, side)) for side in ("left", "right"))
        wanted = np.array([line.number for line in lines])
        first, last = (begin + np.searchsorted(numbers[begin:end], wanted, side) for side in ("left", "right"))
        return [order[a:b].tolist() for a, b in zip(first, last, strict=True)]

    return rows_of
