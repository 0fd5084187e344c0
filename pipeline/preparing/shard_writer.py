"""Writes rows into Arrow files, each committed as it fills, so that memory does not grow with the rows."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from prefcache.pipeline.stored import artifact


class ShardWriter:
    """Writes the shards of one table; no file without rows.

    `name` gives the file of a shard by its number. A shard ends with `most_rows` rows, or after the block with which it has
    `most_bytes`. `facts` go into each entry.
    """

    def __init__(
        self,
        folder: Path,
        name: Callable[[int], str],
        schema: pa.Schema,
        *,
        most_rows: int | None = None,
        most_bytes: int | None = None,
        durable: bool = True,
        **facts: Any,
    ) -> None:
        self._folder, self._name, self._schema, self._facts = folder, name, schema, facts
        self._most_rows, self._most_bytes, self._durable = most_rows, most_bytes, durable
        self._open: contextlib.ExitStack | None = None
        self._path: Path
        self._stream: artifact.Stream
        self._writer: Any = None
        self._n_rows = 0
        self.entries: list[dict[str, Any]] = []

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        if error is None:
            self._close()
        elif self._open:
            self._open.__exit__(kind, error, trace)

    def write(self, block: pa.Table) -> None:
        while len(block):
            if self._open is None:
                self._open = contextlib.ExitStack()
                self._path = self._folder / self._name(len(self.entries))
                stream = artifact.commit_stream(self._path, durable=self._durable)
                self._stream = self._open.enter_context(stream)
                file = pa.PythonFile(self._stream, "w")
                self._writer = self._open.enter_context(pa.ipc.new_stream(file, self._schema))
            room = len(block) if self._most_rows is None else self._most_rows - self._n_rows
            self._writer.write_table(block.slice(0, room).combine_chunks())
            self._n_rows += min(room, len(block))
            block = block.slice(room)
            is_full = self._most_bytes is not None and self._stream.n_bytes >= self._most_bytes
            if is_full or self._n_rows == self._most_rows:
                self._close()

    def _close(self) -> None:
        if self._open is not None:
            self._open.close()
            self.entries.append(self._stream.entry(self._path, rows=self._n_rows, **self._facts))
            self._open, self._n_rows = None, 0
