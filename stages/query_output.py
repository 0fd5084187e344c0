"""Write the answer to a query, to stdout or into a file, as CSV, JSON, Parquet or Markdown. Rows are streamed."""

import csv
import json
import sys
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from prefcache.commands.query import AnsweredQuestion
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.stored import overwrite_guard, row_writers
from prefcache.pipeline.views.query_worker import Answer
from prefcache.pipeline.visible_text import visible, visible_json

_ROWS_PER_WRITE = 4096


def check_output(path: Path, inputs: overwrite_guard.Inputs, force: bool) -> None:
    """Refuse a file that cannot or must not be written, before the query runs."""
    row_writers.file_kind(path)
    overwrite_guard.refuse_overwrite(path, inputs, force=force)


def save(answer: Answer, path: Path) -> int:
    """Write the rows in the format of the file's name, all or nothing; return their number."""
    if row_writers.file_kind(path) in row_writers.BY_COLUMNS:
        reader = answer.arrow()
        with row_writers.open_columns(path, reader.schema) as file:
            for batch in answer.batches(reader):
                file.write_table(pa.Table.from_batches([batch]))
    else:
        with row_writers.open_rows(path, answer.columns) as out:
            records = _records(answer)
            while rows := list(islice(records, _ROWS_PER_WRITE)):
                out.write(rows)
    return answer.n_rows


def print_answer(answer: Answer, form: str) -> None:
    _FORMS[form](answer)


def print_question(answered: AnsweredQuestion) -> None:
    """Print a ready question as one JSON object: its name and parameters, the rows, and the verdict."""
    print(f'{{"question": {_to_json(answered.question.name)}, "parameters": {_to_json(answered.parameters)}, "rows":')
    _print_json(answered.answer)
    verdict = answered.verdict()
    print(f', "verdict": {_to_json({"sentence": verdict.sentence, "numbers": verdict.numbers})}}}')


def _print_json(answer: Answer) -> None:
    lead = "[\n "
    for record in _records(answer):
        print(lead, _to_json(record), sep="", end="")
        lead = ",\n "
    print("[]" if lead == "[\n " else "\n]")


def _to_json(value: Any) -> str:
    text = json.dumps(
        value, ensure_ascii=False, default=lambda each: each.hex() if isinstance(each, bytes) else str(each)
    )
    return visible_json(text)


def _records(answer: Answer) -> Iterator[dict[str, Any]]:
    for row in answer.rows():
        yield dict(zip(answer.columns, row, strict=True))


def _print_csv(answer: Answer) -> None:
    out, is_terminal = csv.writer(sys.stdout, lineterminator="\n"), sys.stdout.isatty()
    out.writerow(map(visible, answer.columns) if is_terminal else answer.columns)
    for row in answer.rows():
        # A file gets the data as it is; a terminal gets nothing that could control it.
        out.writerow([visible(value) if is_terminal and isinstance(value, str) else value for value in row])


def _print_markdown(answer: Answer) -> None:
    print(f"| {' | '.join(map(_markdown_cell, answer.columns))} |\n|{' --- |' * len(answer.columns)}")
    for row in answer.rows():
        print(f"| {' | '.join(map(_markdown_cell, row))} |")


def _markdown_cell(value: Any) -> str:
    text = f"{value:.6g}" if isinstance(value, float) else "" if value is None else visible(str(value))
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("\n", "<br>")


def _print_parquet(answer: Answer) -> None:
    if sys.stdout.isatty():
        raise UsageError("Parquet is binary and cannot be printed. Name a file (--out answer.parquet), or redirect it.")
    reader = answer.arrow()
    with pq.ParquetWriter(pa.PythonFile(sys.stdout.buffer, "w"), reader.schema, compression="zstd") as file:
        for batch in answer.batches(reader):
            file.write_batch(batch)
    sys.stdout.buffer.flush()


_FORMS: dict[str, Callable[[Answer], None]] = {
    "csv": _print_csv,
    "json": _print_json,
    "markdown": _print_markdown,
    "parquet": _print_parquet,
}
