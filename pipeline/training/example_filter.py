"""train.only: train on the examples that a file names in its column example_id, such as one from `prefcache ask NAME --out FILE`.

A run is identified by the ids, not by the file's path, order or format: with a copy of the file it is the same run.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefcache.pipeline.errors import DataError, UsageError
from prefcache.pipeline.stored import artifact, row_writers

COLUMN = "example_id"
_ORIGIN = f"as `prefcache ask NAME --out FILE` writes, or a query that selects {COLUMN}"


class ExampleFilter:
    def __init__(self, path: str) -> None:
        self.path = path
        if not Path(path).is_file():
            raise UsageError(f"train.only: there is no file {path}. Name one with a column {COLUMN} ({_ORIGIN}).")
        self._ids = pc.unique(row_writers.read_texts(Path(path), COLUMN, f"train.only reads it ({_ORIGIN})"))
        sorted_ids = np.sort(self._ids.drop_null().to_numpy(zero_copy_only=False))
        self.id = artifact.checksum_bytes("\n".join(sorted_ids).encode())

    def apply(self, table: pa.Table, rows: np.ndarray) -> tuple[np.ndarray, str]:
        """Return those of the training split's rows that the file names, and a note that counts them."""
        chosen = rows[pc.is_in(table[COLUMN], self._ids).to_numpy()[rows]]
        if not len(chosen):
            raise DataError(
                f"train.only: {self.path} names {len(self._ids):,} examples, none of which is among the {len(rows):,} that can be "
                "trained on. Make it from this experiment."
            )
        n_absent = len(self._ids) - pc.sum(pc.is_in(self._ids, table[COLUMN].combine_chunks())).as_py()
        absent = f"; {n_absent:,} that it names are not in this data" if n_absent else ""
        return chosen, f"train: {len(chosen):,} of {len(rows):,} train examples named by train.only{absent}"
