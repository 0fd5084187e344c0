"""train.only: what a file may be, and what a run is known by."""

import numpy as np
import pyarrow as pa
import pytest

from prefcache.pipeline.errors import DataError, UsageError
from prefcache.pipeline.stored import row_writers
from prefcache.pipeline.training.example_filter import ExampleFilter

EXAMPLES = pa.table({"example_id": ["a", "b", "c", "d"]})


def write(path, ids: list[str]) -> str:
    rows = [{"example_id": each, "gap": i} for i, each in enumerate(ids)]
    if row_writers.file_kind(path) in row_writers.BY_ROWS:
        with row_writers.open_rows(path, ["example_id", "gap"]) as out:
            out.write(rows)
    else:
        table = pa.Table.from_pylist(rows)
        with row_writers.open_columns(path, table.schema) as out:
            out.write_table(table)
    return str(path)


@pytest.mark.parametrize("name", ["o.parquet", "o.arrow", "o.jsonl", "o.jsonl.zst", "o.csv", "o.csv.gz"])
def test_every_kind_of_file_that_is_written_is_read(tmp_path, name):
    only = ExampleFilter(write(tmp_path / name, ["d", "b", "x", "b"]))
    # Of the rows 1, 2 and 3, which can be trained on.
    rows, said = only.apply(EXAMPLES, np.array([1, 2, 3]))
    assert rows.tolist() == [1, 3]
    assert said == "train: 2 of 3 train examples named by train.only; 1 that it names are not in this data"


def test_a_run_is_known_by_what_the_file_names(tmp_path):
    one, same = (
        ExampleFilter(write(tmp_path / "a.csv", ["a", "b"])),
        ExampleFilter(write(tmp_path / "b.parquet", ["b", "a", "a"])),
    )
    assert one.id == same.id != ExampleFilter(write(tmp_path / "c.csv", ["a"])).id


def test_ids_of_digits_stay_texts(tmp_path):
    table = pa.table({"example_id": ["0012", "7"]})
    rows, _ = ExampleFilter(write(tmp_path / "o.csv", ["0012"])).apply(table, np.arange(2))
    assert rows.tolist() == [0]


def test_a_file_that_is_no_such_file_is_refused_in_words(tmp_path):
    with pytest.raises(UsageError, match=r"there is no file gone\.parquet"):
        ExampleFilter("gone.parquet")
    (tmp_path / "o.csv").write_text("id\na\n")
    (tmp_path / "o.parquet").write_text("no Parquet")
    (tmp_path / "o.jsonl").write_text("{")
    for name in ("o.csv", "o.parquet", "o.jsonl"):
        with pytest.raises(UsageError, match=r"with a column example_id; train\.only"):
            ExampleFilter(str(tmp_path / name))
    with pytest.raises(DataError, match="names 1 examples, none of which is among the 4"):
        ExampleFilter(write(tmp_path / "x.csv", ["x"])).apply(EXAMPLES, np.arange(4))
