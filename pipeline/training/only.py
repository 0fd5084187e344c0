"""train.only: the training examples that a file names, in its column example_id; such as `prefcache ask NAME --out FILE` writes.

What the file names decides, not where it is, in which order or in what kind of file: a run is the same run with a copy of it.
"""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.errors import DataError, UsageError
from pipeline.stored import artifact, rowfiles

COLUMN = "example_id"


class Only:
    def __init__(self, path: str) -> None:
        self.path = path
        if not Path(path).is_file():
            raise UsageError(f"train.only: there is no file {path}. Name one with a column {COLUMN} ({_MADE_BY}).")
        self._ids = pc.unique(rowfiles.read_texts(Path(path), COLUMN, f"train.only reads it ({_MADE_BY})"))
        named = np.sort(self._ids.drop_null().to_numpy(zero_copy_only=False))
        self.id = artifact.checksum_bytes("\n".join(named).encode())

    def among(self, table: pa.Table, rows: np.ndarray) -> tuple[np.ndarray, str]:
        """Those of the training split's rows that it names, and how many that are."""
        is_named = pc.is_in(table[COLUMN], self._ids).to_numpy()
        chosen = rows[is_named[rows]]
        if not len(chosen):
            raise DataError(
                f"train.only: {self.path} names {len(self._ids):,} examples, none of which is among the {len(rows):,} that can be "
                "trained on. Make it from this experiment."
            )
        said = f"train: {len(chosen):,} of {len(rows):,} train examples named by train.only"
        elsewhere = len(self._ids) - pc.sum(pc.is_in(self._ids, table[COLUMN].combine_chunks())).as_py()
        return chosen, said + (f"; {elsewhere:,} that it names are none here" if elsewhere else "")


_MADE_BY = f"as `prefcache ask NAME --out FILE` writes, or a query that selects {COLUMN}"
