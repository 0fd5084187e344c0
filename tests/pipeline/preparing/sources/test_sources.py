"""Whatever holds the records, they come out the same; and every line is a record or says why it is none."""

import csv
import gzip
import io
import json
import os
import pickle
import random
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefcache.pipeline.config import Source
from prefcache.pipeline.errors import DataError, UsageError
from prefcache.pipeline.preparing.sources import (
    CHUNK_BYTES,
    CHUNK_RECORDS,
    DataSource,
    Limits,
    Line,
    jsonl,
    open_source,
    sniff,
)
from prefcache.pipeline.preparing.sources.chunk import parse_json
from prefcache.pipeline.stored import artifact

ROWS = [
    {"prompt": f'{i}: why, "so"?\nAnd ü {"é" * (i % 7)}', "chosen": "one\u2028two\u0085three, four", "rejected": "true"}
    for i in range(50)
]


def opened(path, tmp_path: Path | None = None, **entry) -> DataSource:
    return open_source(Source(path=str(path), **entry), (tmp_path or Path("never")) / "spool")


def lines_of(found: DataSource, limits: Limits | None = None) -> list[Line]:
    chunks = found.chunks(limits) if limits else found.chunks()
    return [line for chunk in chunks for line in chunk.lines()]


def records_of(path, **entry) -> list[dict | None]:
    return [line.record for line in lines_of(opened(path, **entry))]


def read(tmp_path: Path, raw: bytes, name: str = "a.jsonl") -> list[Line]:
    (tmp_path / name).write_bytes(raw)
    return lines_of(opened(tmp_path / name))


# -- containers ------------------------------------------------------------------------------------------------------


def as_lines(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def as_array(rows, **options) -> bytes:
    return json.dumps(rows, **options).encode()


def as_csv(rows, **options) -> bytes:
    out = io.StringIO(newline="")
    writer = csv.DictWriter(out, list(rows[0]), **options)
    writer.writeheader()
    writer.writerows(rows)
    return out.getvalue().encode()


def as_parquet(rows) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=20)
    return sink.getvalue().to_pybytes()


def as_arrow(rows, writer=pa.ipc.new_file) -> bytes:
    table, sink = pa.Table.from_pylist(rows), pa.BufferOutputStream()
    with writer(sink, table.schema) as out:
        out.write_table(table, max_chunksize=30)
    return sink.getvalue().to_pybytes()


def zstd(raw: bytes) -> bytes:
    return pa.compress(raw, codec="zstd", asbytes=True)


CONTAINERS = {
    "a.jsonl": as_lines(ROWS),
    "a.ndjson": as_lines(ROWS),
    "lines.json": as_lines(ROWS),
    "lines.txt": as_lines(ROWS),
    "no_suffix": as_lines(ROWS),
    "windows.jsonl": b"\xef\xbb\xbf" + as_lines(ROWS).replace(b"\n", b"\r\n"),
    "escaped.jsonl": "\n".join(map(json.dumps, ROWS)).encode(),
    "array.json": as_array(ROWS),
    "indented.json": as_array(ROWS, indent=2),
    "array.jsonl": as_array(ROWS, ensure_ascii=False),
    "row_per_line.json": b"[\n" + as_lines(ROWS).rstrip().replace(b"}\n{", b"},\n{") + b"\n]\n",
    "marked.json": b"\xef\xbb\xbf \n" + as_array(ROWS, ensure_ascii=False),
    "a.csv": as_csv(ROWS),
    "unix.csv": as_csv(ROWS, lineterminator="\n", quoting=csv.QUOTE_ALL),
    "excel.csv": b"\xef\xbb\xbf" + as_csv(ROWS, delimiter=";"),
    "header.txt": as_csv(ROWS),
    "a.tsv": as_csv(ROWS, delimiter="\t"),
    "a.parquet": as_parquet(ROWS),
    "file.arrow": as_arrow(ROWS),
    "stream.arrow": as_arrow(ROWS, pa.ipc.new_stream),
    "parquet_without_suffix": as_parquet(ROWS),
    "a.jsonl.gz": gzip.compress(as_lines(ROWS)),
    "two_members.jsonl.gz": gzip.compress(as_lines(ROWS[:20])) + gzip.compress(as_lines(ROWS[20:])),
    "unpacked_on_the_way.jsonl.gz": as_lines(ROWS),
    "array.json.gz": gzip.compress(as_array(ROWS, indent=1)),
    "a.csv.gz": gzip.compress(as_csv(ROWS)),
    "a.jsonl.zst": zstd(as_lines(ROWS)),
    "array.json.zst": zstd(as_array(ROWS)),
    "a.tsv.zst": zstd(as_csv(ROWS, delimiter="\t")),
}


@pytest.mark.parametrize("most", [1, 7, 49, 50, 99])
@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_its_first_records_however_it_is_cut(tmp_path, name, most):
    (tmp_path / name).write_bytes(CONTAINERS[name])
    source = opened(tmp_path / name, max_records=most)
    for limits in (None, Limits(3, 10_000), Limits(100, 400)):
        assert [line.record for line in lines_of(source, limits)] == ROWS[:most]


def test_first_records_are_counted_over_the_files_of_a_source_without_blank_lines(tmp_path):
    for name, rows in (("a.jsonl", ROWS[:4]), ("b.jsonl", ROWS[4:])):
        (tmp_path / name).write_bytes(b"\n \n" + as_lines(rows).replace(b"\n", b"\n\n"))
    source = opened(tmp_path, max_records=6)
    assert [line.record for line in lines_of(source)] == ROWS[:6]
    assert [line.record for line in lines_of(source, Limits(2, 10_000))] == ROWS[:6]
    # A line that is not a record counts as one: it goes to quarantine.
    (tmp_path / "a.jsonl").write_bytes(b"{\n" + as_lines(ROWS[:4]))
    assert [line.record for line in lines_of(source)] == [None, *ROWS[:4], ROWS[4]]


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_same_records_however_it_is_cut(tmp_path, name):
    (tmp_path / name).write_bytes(CONTAINERS[name])
    source = opened(tmp_path / name)
    lines = lines_of(source)
    assert [line.record for line in lines] == ROWS
    assert {line.source for line in lines} == {str(tmp_path / name)}
    # The quarantine would keep the record, whatever its container.
    assert [json.loads(line.raw) for line in lines] == ROWS
    # Small chunks, which can be sent to other processes, give the same as large ones.
    for limits in (Limits(7, 600), Limits(3, 10_000), Limits(100, 400), Limits(100, 1)):
        chunks = [pickle.loads(pickle.dumps(chunk)) for chunk in source.chunks(limits)]
        assert len(chunks) > 7
        assert [line for chunk in chunks for line in chunk.lines()] == lines
        for chunk in chunks:
            n_records = len(list(chunk.lines()))
            assert n_records <= limits.records and (chunk.n_bytes <= limits.n_bytes or n_records <= 1)


MESSAGES = [
    {
        "prompt": [{"role": "user", "content": "hi"}],
        "chosen": [{"role": "assistant", "content": "yo", "tool_calls": [{"id": "1"}]}],
        "label": i % 2 == 0,
        "chosen_score": 1.5,
    }
    for i in range(5)
]


def test_messages_and_labels_come_through_tables_and_csv(tmp_path):
    (tmp_path / "a.csv").write_bytes(
        as_csv([{k: json.dumps(v) if k != "label" else v for k, v in row.items()} for row in MESSAGES])
    )
    (tmp_path / "a.parquet").write_bytes(as_parquet(MESSAGES))
    assert records_of(tmp_path / "a.csv") == records_of(tmp_path / "a.parquet") == MESSAGES


def test_keys_that_a_message_never_had_do_not_appear_in_it_but_null_columns_stay(tmp_path):
    rows = [
        {"chosen": [{"role": "user", "content": "a"}], "system": None, "meta": {"a": 1, "b": None}},
        {"chosen": [{"role": "tool", "content": "b", "name": "f"}], "system": "s", "meta": None},
    ]
    (tmp_path / "a.parquet").write_bytes(as_parquet(rows))
    assert records_of(tmp_path / "a.parquet") == [rows[0] | {"meta": {"a": 1}}, rows[1]]


def test_views_of_text_are_not_sent_whole_with_every_slice(tmp_path):
    values = [f"{i} {'x' * 100}" for i in range(1000)]
    nested = pa.array([[value] for value in values], pa.list_(pa.string_view()))
    table = pa.table({"a": pa.array(values, pa.string_view()), "n": nested})
    with pa.ipc.new_file(tmp_path / "a.arrow", table.schema) as out:
        out.write_table(table)
    chunks = list(opened(tmp_path / "a.arrow").chunks(Limits(100, CHUNK_BYTES)))
    assert [line.record for chunk in chunks for line in chunk.lines()] == [{"a": v, "n": [v]} for v in values]
    # 100 rows of twice 104 bytes and some offsets; the whole is 208 kB
    assert all(len(chunk.payload) < 30_000 for chunk in chunks)


def test_a_value_that_python_cannot_hold_is_its_rows_fault_alone(tmp_path):
    broken = pa.array([b"ok", b"\xff\xfe", b"ok"]).view(pa.string())
    years = pa.array([0, 0, 0, 2**60], pa.timestamp("us"))
    pq.write_table(pa.table({"a": broken, "b": ["x", "y", "z"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"t": years, "b": ["x", "y", "z", "far"]}), tmp_path / "t.parquet")
    lines = lines_of(opened(tmp_path / "a.parquet"))
    assert [line.record for line in lines] == [{"a": "ok", "b": "x"}, None, {"a": "ok", "b": "z"}]
    assert (lines[1].number, lines[1].reason, lines[1].detail) == (2, "invalid UTF-8", "byte 0xff at byte 0")
    assert json.loads(lines[1].raw) == {"a": "(unreadable)", "b": "y"}
    late = lines_of(opened(tmp_path / "t.parquet"))
    assert [line.reason for line in late] == ["", "", "", "unreadable value"]


# -- JSON Lines ------------------------------------------------------------------------------------------------------


def test_lines_are_records_with_their_number_and_raw_bytes(tmp_path):
    first, second = read(tmp_path, b'{"a": 1}\n{"a": "\xc3\xbc"}\n')
    assert first == (str(tmp_path / "a.jsonl"), 1, b'{"a": 1}', {"a": 1}, "", "")
    assert (second.number, second.raw, second.record) == (2, b'{"a": "\xc3\xbc"}', {"a": "ü"})
    # Without the line end of Windows and the byte order mark.
    lines = read(tmp_path, b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
    assert [line.raw for line in lines] == [b'{"a": 1}', b'{"a": 2}']


@pytest.mark.parametrize("limits", [Limits(), Limits(1, 1000), Limits(2, 1000), Limits(1000, 9), Limits(1000, 1)])
def test_blank_lines_are_passed_over_but_counted_across_chunks(tmp_path, limits):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"a": 1}\n  \n\t\r\n{"a": 2}\n\n\n{"a": 3}')
    lines = lines_of(opened(tmp_path / "a.jsonl"), limits)
    assert [(line.number, line.record) for line in lines] == [(2, {"a": 1}), (5, {"a": 2}), (8, {"a": 3})]


BAD = {
    "cut": (b'{"a": 1', "malformed JSON", "char 7"),
    "quotes": (b"{'a': 1}", "malformed JSON", "char 1"),
    "two": (b'{"a": 1} {"a": 2}', "malformed JSON", "Extra data"),
    "null byte": (b'{"a": 1}\x00', "malformed JSON", "char 8"),
    "deep": (b"[" * 100_000, "malformed JSON", ""),
    "huge": (b'{"a": ' + b"1" * 5000 + b"}", "malformed JSON", "4300"),
    "latin-1": (b'{"a": "\xff"}', "invalid UTF-8", "byte 0xff at byte 7"),
    "utf-16": ('{"a": 1}'.encode("utf-16"), "invalid UTF-8", "at byte 0"),
    "list": (b"[1, 2]", "not an object", "found list"),
    "null": (b"null", "not an object", "found NoneType"),
    "string": (b'"text"', "not an object", "found str"),
    "surrogate": (b'{"b": 1, "a": {"c": ["\\uD800 x"]}}', "lone surrogate", "in 'a'"),
    "swapped": (b'{"a": "\\udc00\\ud800"}', "lone surrogate", "in 'a'"),
    "key": (b'{"\\ud800": 1}', "lone surrogate", r"in '\ud800'"),
}


@pytest.mark.parametrize(("raw", "reason", "detail"), BAD.values(), ids=BAD)
def test_a_line_that_is_no_record_says_why_and_does_not_stop_the_rest(tmp_path, raw, reason, detail):
    lines = read(tmp_path, b'{"a": 1}\n' + raw.replace(b"\n", b"") + b'\n{"a": 2}\n')
    assert [line.record for line in lines] == [{"a": 1}, None, {"a": 2}]
    bad = lines[1]
    assert (bad.number, bad.raw, bad.reason) == (2, raw.replace(b"\n", b""), reason)
    assert detail in bad.detail


@pytest.mark.parametrize("first", [b'{"a": 1', b"[1, 2]", b"oops", b'{"a": [', b"null"])
def test_a_bad_first_line_does_not_hide_the_rest(tmp_path, first):
    lines = read(tmp_path, first + b'\n{"a": 2}\n')
    assert [line.record for line in lines] == [None, {"a": 2}]


def test_what_python_reads_is_read(tmp_path):
    deep = b'{"a": ' + b"[" * 300 + b"]" * 300 + b"}"
    lines = read(
        tmp_path, b'{"a": 1, "a": 2}\n{"a": "\\ud83d\\ude00\\u0000"}\n{"a": 123456789012345678901234}\n' + deep
    )
    assert [line.record for line in lines[:3]] == [{"a": 2}, {"a": "😀\0"}, {"a": 123456789012345678901234}]
    assert lines[3].record


# -- one JSON array --------------------------------------------------------------------------------------------------


def test_an_element_that_is_no_record_says_why_and_does_not_stop_the_rest(tmp_path):
    raw = b'[{"a": 1}, 12, null, [3], "x,]", {"a": "\xff"}, {"a": "tab\there"}, {"a": "\\ud800"}, {"a": %s}, {"a": 2}]'
    lines = read(tmp_path, raw % (b"1" * 5000), "a.json")
    assert [(line.number, line.reason) for line in lines] == [
        (1, ""),
        (2, "not an object"),
        (3, "not an object"),
        (4, "not an object"),
        (5, "not an object"),
        (6, "invalid UTF-8"),
        (7, "malformed JSON"),
        (8, "lone surrogate"),
        (9, "malformed JSON"),
        (10, ""),
    ]
    assert lines[1].raw == b"12"


@pytest.mark.parametrize(
    ("raw", "where"),
    [
        (b'[\n{"a": 1},\n{"\xc3\xbc": 2} {"a": 3}]', "line 3, column 10: Expecting ',' or ']'"),
        (b'[\n{"a": 1},\n  {"\xc3\xbc": tru}]', "line 3, column 9: Expecting value"),
        (b'[{"a": 1},]', "line 1, column 11: Expecting value"),
        (b'[{"a": 1}', "line 1, column 10: Expecting ',' or ']'"),
        (b'[{"a": "never closed', "line 1, column 8: Unterminated string"),
        (b'[\n{"a": 1}]\n[{"a": 2}', "line 3, column 1: Something follows"),
        (b'[{"a": 1},\n{"a": 1}]\n{"a": 2}', "line 3, column 1: Something follows"),
        (b'[{"a": 1},\n' + b"[" * 100_000, "line 2, column 1: Nested too deeply"),
        (b"[", "line 1, column 2: Expecting value"),
    ],
    ids=["comma", "value", "last comma", "end", "string", "two", "more", "deep", "bracket"],
)
def test_a_broken_array_names_line_and_column(tmp_path, raw, where):
    with pytest.raises(DataError, match=r"is a JSON array that breaks at") as caught:
        read(tmp_path, raw, "a.json")
    assert where in str(caught.value)


@pytest.mark.parametrize("block", [2, 3, 7, 64])
def test_where_the_window_on_an_array_ends_does_not_matter(tmp_path, monkeypatch, block):
    rows = [*ROWS[:5], {"a": -12.5e3, "b": True, "c": "😀", "d": None}]
    numbers = b"-1.5e+10, -Infinity, 12345"
    for raw in (as_array(rows), as_array(rows, indent=2, ensure_ascii=False)):
        (tmp_path / "a.json").write_bytes(raw)
        found = opened(tmp_path / "a.json")
        monkeypatch.setattr(jsonl, "BLOCK", block)
        assert [line.record for line in lines_of(found)] == rows
        monkeypatch.undo()
        (tmp_path / "a.json").write_bytes(raw[:-1] + b", " + numbers + b"]")
        monkeypatch.setattr(jsonl, "BLOCK", block)
        assert [line.raw for line in lines_of(found)][-3:] == numbers.split(b", ")
        (tmp_path / "a.json").write_bytes(raw[:-1] + b", x]")
        last = raw.count(b"\n") + 1
        with pytest.raises(DataError, match=f"line {last}, .*Expecting value"):
            lines_of(found)
        monkeypatch.undo()


# -- CSV -------------------------------------------------------------------------------------------------------------


def test_rows_of_csv_are_numbered_by_their_first_line(tmp_path):
    lines = read(tmp_path, b'a,b\n1,2\n"x\n\ny",3\n\n5,6\n', "a.csv")
    assert [(line.number, line.record) for line in lines] == [
        (2, {"a": "1", "b": "2"}),
        (3, {"a": "x\n\ny", "b": "3"}),
        (7, {"a": "5", "b": "6"}),
    ]
    assert json.loads(lines[0].raw) == lines[0].record


def test_cells_are_what_they_say_only_where_that_is_safe(tmp_path):
    raw = b'chosen,label,score,thumbs,\n"[1, {""a"": null}]",True,-1.5e1,FALSE,0\n[sic],,7,x,1\ntrue,yes,high,true,2\n'
    (tmp_path / "a.csv").write_bytes(raw)
    assert records_of(tmp_path / "a.csv", columns={"label": "thumbs"}) == [
        {"chosen": [1, {"a": None}], "label": True, "score": -15.0, "thumbs": False},
        {"chosen": "[sic]", "label": None, "score": 7, "thumbs": "x"},
        {"chosen": "true", "label": "yes", "score": "high", "thumbs": True},
    ]


def test_numbers_are_not_made_of_text_in_columns_of_text(tmp_path):
    raw = b"chosen,advantage,is_safe,better_id,field,scores\n42,1,true,0,1,123456789012345678901\n"
    (tmp_path / "a.csv").write_bytes(raw)
    (record,) = records_of(tmp_path / "a.csv", format_args={"field_label": "field", "beta": 1})
    numbers = {"better_id": 0, "field": 1, "scores": 1.2345678901234568e20}
    assert record == {"chosen": "42", "advantage": "1", "is_safe": True} | numbers


def test_a_row_of_csv_that_is_no_record_says_why(tmp_path):
    lines = read(tmp_path, b'a,b\n1\n1,2,3\n"\xff\n",2\n[""\\ud800""],2\n"[""\\ud800""]",2\n5" pipe,6\n', "a.csv")
    assert [(line.number, line.reason, line.detail) for line in lines[:3]] == [
        (2, "wrong number of cells", "found 1, the header has 2"),
        (3, "wrong number of cells", "found 3, the header has 2"),
        (4, "invalid UTF-8", "byte 0xff at byte 1"),
    ]
    assert lines[0].raw == b"1\n"
    assert (lines[4].reason, lines[4].detail) == ("lone surrogate", "in 'a'")
    assert lines[5].record == {"a": '5" pipe', "b": "6"}


def test_a_cell_may_be_longer_than_the_csv_module_allows(tmp_path):
    assert read(tmp_path, b"a,b\n" + b"x" * 200_000 + b",2\n", "a.csv")[0].record == {"a": "x" * 200_000, "b": "2"}


@pytest.mark.parametrize(
    ("raw", "kind", "message"),
    [
        (b'a,b\n1,2\n3,"4\n5,6\n', DataError, "row that begins at line 3: a quote in it is never closed"),
        (b"a,b\n1\r2,3\n", DataError, "row that begins at line 2: new-line character"),
        (b"a,b,a\n1,2,3\n", UsageError, "two columns named 'a'"),
        (b'"[1]",b\n1,2\n', UsageError, "no header"),
        (b"\n\n", UsageError, "no header"),
        (b"\xff,b\n", UsageError, "no header"),
    ],
)
def test_a_broken_table_in_text_says_what_to_do(tmp_path, raw, kind, message):
    with pytest.raises(kind, match=message):
        read(tmp_path, raw, "a.csv")


# -- chunks ----------------------------------------------------------------------------------------------------------


def cuts(path: Path, limits: Limits) -> list[tuple[int, int, bytes]]:
    return [(chunk.number, chunk.n_bytes, chunk.payload) for chunk in opened(path).chunks(limits)]


def greedy(raw: bytes, limits: Limits) -> list[tuple[int, bytes]]:
    """The rule, line by line."""
    chunks: list[list] = []
    for number, line in enumerate(io.BytesIO(raw), start=1):
        last = chunks[-1][1] if chunks else []
        if not last or len(last) == limits.records or sum(map(len, last)) + len(line) > limits.n_bytes:
            chunks.append([number, last := []])
        last.append(line)
    return [(number, b"".join(lines)) for number, lines in chunks]


def test_chunks_are_cut_by_the_rule_however_the_file_is_read(tmp_path, monkeypatch):
    rng = random.Random(0)
    for _ in range(500):
        raw = b"\n".join(b"x" * rng.choice([0, 0, 1, 3, 20, 60]) for _ in range(rng.randrange(12)))
        (tmp_path / "a.jsonl").write_bytes(raw)
        limits = Limits(rng.randrange(1, 5), rng.randrange(1, 100))
        monkeypatch.setattr(jsonl, "BLOCK", rng.choice([2, 5, 33, 1 << 20]))
        monkeypatch.setattr(jsonl, "_PIECE", rng.choice([1, 7, 1 << 16]))
        chunks = jsonl.line_chunks(tmp_path / "a.jsonl", "a", limits)
        assert [(chunk.number, chunk.payload) for chunk in chunks] == greedy(raw, limits)


def test_chunks_hold_as_many_whole_lines_as_both_limits_allow(tmp_path):
    # lines of 2, 3, 4, 12, 2 and 1 bytes, with their ends; the fourth is longer than a chunk may be
    (tmp_path / "a.jsonl").write_bytes(b"1\n22\n333\n" + b"4" * 11 + b"\n5\n6")
    for limits, expected in [
        (Limits(9, 9), [(1, 9), (4, 12), (5, 3)]),
        (Limits(9, 8), [(1, 5), (3, 4), (4, 12), (5, 3)]),
        (Limits(2, 9), [(1, 5), (3, 4), (4, 12), (5, 3)]),
        (Limits(1, 99), [(1, 2), (2, 3), (3, 4), (4, 12), (5, 2), (6, 1)]),
        (Limits(6, 99), [(1, 24)]),
    ]:
        assert [(number, n) for number, n, _ in cuts(tmp_path / "a.jsonl", limits)] == expected


@pytest.mark.parametrize("compress", [gzip.compress, zstd], ids=["gzip", "zstd"])
@pytest.mark.parametrize("limits", [Limits(), Limits(100, 10_000), Limits(7, 1 << 20), Limits(10_000, 5_000)])
def test_a_compressed_file_is_cut_like_the_plain_one(tmp_path, monkeypatch, compress, limits):
    raw = b"\n".join(json.dumps({"i": i, "text": "x" * (i * 37 % 300)}).encode() for i in range(20_000))
    (tmp_path / "a.jsonl").write_bytes(raw)
    (tmp_path / "b.jsonl.x").write_bytes(compress(raw))
    plain = cuts(tmp_path / "a.jsonl", limits)
    assert cuts(tmp_path / "b.jsonl.x", limits) == plain
    assert b"".join(payload for _, _, payload in plain) == raw
    monkeypatch.setattr(jsonl, "BLOCK", 1000)  # how much is read at once changes nothing either
    assert cuts(tmp_path / "a.jsonl", limits) == plain


def test_a_chunk_never_spans_two_files(tmp_path):
    for name in "abc":
        (tmp_path / f"{name}.jsonl").write_text('{"a": 1}\n' * 3)
    chunks = list(opened(tmp_path).chunks())
    assert [(Path(chunk.source).name, chunk.number) for chunk in chunks] == [
        ("a.jsonl", 1),
        ("b.jsonl", 1),
        ("c.jsonl", 1),
    ]


def test_the_limits_are_what_they_are_said_to_be():
    assert Limits() == (CHUNK_RECORDS, CHUNK_BYTES) == (2048, 4 * 2**20)


def test_a_chunk_is_read_in_a_process_that_has_seen_nothing(tmp_path):
    (tmp_path / "a.csv").write_bytes(as_csv(ROWS))
    (tmp_path / "a.parquet").write_bytes(as_parquet(ROWS))
    chunks = [next(opened(tmp_path / name).chunks()) for name in ("a.csv", "a.parquet")]
    script = "import pickle, sys; print([len(list(c.lines())) for c in pickle.load(sys.stdin.buffer)])"
    done = subprocess.run([sys.executable, "-c", script], input=pickle.dumps(chunks), capture_output=True, check=True)
    assert done.stdout == b"[50, 50]\n"


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.jsonl.gz"])
def test_memory_does_not_grow_with_the_file(tmp_path, name):
    row = {"prompt": "p" * 1000, "chosen": "c" * 1000}
    raw = {"a.json": as_array([row] * 12_000), "a.csv": as_csv([row] * 12_000)}.get(name, as_lines([row] * 12_000))
    (tmp_path / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    size = len(raw)  # 24 MB
    del raw
    found = opened(tmp_path / name)
    tracemalloc.start()
    try:
        n = sum(chunk.n_bytes for chunk in found.chunks(Limits(8192, 1 << 20)))
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert n > 0.95 * size
    assert peak < 8 << 20


# -- files, folders, patterns ----------------------------------------------------------------------------------------


def fill(folder: Path) -> None:
    for name in ("b.jsonl", "a.json", "sub/c.jsonl.gz", ".hidden/x.jsonl", "sub/.y.jsonl"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        raw = json.dumps({"file": name}).encode()
        (folder / name).write_bytes(gzip.compress(raw) if name.endswith("gz") else raw)
    for name in ("README.md", "notes.txt", "dataset_info.json", "sub/state.json", "dataset_infos.json"):
        (folder / name).write_text("not a record")


def test_a_folder_is_all_known_files_below_it_in_order(tmp_path):
    fill(tmp_path)
    found = opened(tmp_path)
    assert [line.record["file"] for line in lines_of(found)] == ["a.json", "b.jsonl", "sub/c.jsonl.gz"]
    assert found.files == [tmp_path / "a.json", tmp_path / "b.jsonl", tmp_path / "sub/c.jsonl.gz"]
    assert found.name == str(tmp_path)


def test_a_pattern_is_its_files_in_order(tmp_path, monkeypatch):
    fill(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert [str(file) for file in opened("*.json*").files] == ["a.json", "b.jsonl"]
    assert [str(file) for file in opened("**/*.json*").files] == ["a.json", "b.jsonl", "sub/c.jsonl.gz"]
    assert opened(tmp_path / "[b-z].jsonl").files == [tmp_path / "b.jsonl"]
    Path("what[1].jsonl").write_text('{"a": 1}')
    assert records_of("what[1].jsonl") == [{"a": 1}]


def test_identity_follows_the_bytes_of_each_file(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"a": 1}')
    before = opened(tmp_path / "a.jsonl").identity()
    assert before == [{"file": str(tmp_path / "a.jsonl"), "xxh3_128": artifact.checksum_bytes(b'{"a": 1}')}]
    (tmp_path / "a.jsonl").write_text('{"a": 2}')
    assert opened(tmp_path / "a.jsonl").identity() != before


REFUSED = {
    "empty.jsonl": (b"", DataError, "is empty; expected records"),
    "empty.jsonl.gz": (gzip.compress(b""), DataError, "is empty"),
    "cut.jsonl.gz": (gzip.compress(as_lines(ROWS))[:-9], DataError, "cut short or damaged.*whole gzip file"),
    "cut.jsonl.zst": (zstd(as_lines(ROWS))[:-9], DataError, "cut short or damaged.*whole zstd file"),
    "bad.parquet": (as_parquet(ROWS)[:-50], DataError, "cut short or damaged.*whole Parquet file"),
    "text.parquet": (b"no such thing at all", DataError, "cut short or damaged.*whole Parquet file"),
    "bad.arrow": (as_arrow(ROWS)[:-50], DataError, "cut short or damaged.*whole Arrow file"),
    "bad_stream.arrow": (as_arrow(ROWS, pa.ipc.new_stream)[:-500], DataError, "cut short or damaged"),
    "text.arrow": (b"no such thing at all", DataError, "cut short or damaged.*whole Arrow file"),
    "packed.parquet.gz": (gzip.compress(as_parquet(ROWS)), UsageError, "compressed table. Decompress it first"),
    "a.bin": (b"\x7fELF\x00\x01", UsageError, "neither text nor a table known here.*jsonl.*parquet.*zst"),
    "a.md": (b"# A heading\n", UsageError, "neither JSON nor a table with a header.*jsonl"),
    "utf16.jsonl": ('{"a": 1}'.encode("utf-16"), UsageError, "UTF-16; expected UTF-8. `iconv"),
    "a.json": (b'{"data": [{"a": 1}, {"a": 2}]}', UsageError, r"records under 'data'.*jq -c '.data\[\]' FILE"),
    "b.json": (as_array({"data": ROWS}, indent=2), UsageError, r"records under 'data'.*jq -c '.data\[\]' FILE"),
    "c.json": (as_array(ROWS[0], indent=2), UsageError, "an object over many lines.*jq -c . FILE"),
    "lfs.parquet": (b"version https://git-lfs.github.com/spec/v1\noid", DataError, "Git LFS pointer.*git lfs pull"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_says_what_to_do(tmp_path, name):
    raw, kind, message = REFUSED[name]
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(kind, match=message) as caught:
        lines_of(opened(tmp_path / name))
    assert name in str(caught.value)


def test_a_table_damaged_in_its_middle_is_reported(tmp_path):
    raw = bytearray(as_parquet(ROWS))
    raw[10:400] = b"\xff" * 390
    (tmp_path / "a.parquet").write_bytes(raw)
    found = opened(tmp_path / "a.parquet")  # its footer is whole
    with pytest.raises(DataError, match=r"a\.parquet is cut short or damaged"):
        lines_of(found)


def test_what_is_not_there_is_the_users_mistake(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for path in (
        "nowhere.jsonl",
        "./pairs",
        "data/pairs",
        "data/pairs.jsonl",
        "some/pairs.jsonl",
        "a/b/c",
        str(tmp_path / "x"),
    ):
        with pytest.raises(UsageError, match=r"^No data at .*; prepare\.data names it"):
            opened(path)
    with pytest.raises(UsageError, match=r"No file matches data/\*\.jsonl"):
        opened("data/*.jsonl")
    with pytest.raises(UsageError, match=r"data holds no file of records\. Expected one of \.jsonl"):
        opened("data")
    with pytest.raises(UsageError, match=r"is an address.*Download it first"):
        opened("https://example.org/a.jsonl")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UsageError, match=r"not a regular file. Pipe it in"):
        opened("pipe")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_the_users_mistake(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "a.jsonl").chmod(0)
    with pytest.raises(UsageError, match="cannot be read"):
        opened(tmp_path / "a.jsonl")


def test_names_that_are_known():
    assert [name for name in ("a.JSONL", "a.json.gz", "b.csv.zst", "c.txt", "d.gz") if sniff.is_known(Path(name))] == [
        "a.JSONL",
        "a.json.gz",
        "b.csv.zst",
    ]


# -- standard input --------------------------------------------------------------------------------------------------


def pipe(monkeypatch, raw: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw)))


@pytest.mark.parametrize(
    "raw", [as_lines(ROWS), as_array(ROWS), gzip.compress(as_lines(ROWS)), as_csv(ROWS), as_parquet(ROWS)]
)
def test_standard_input_is_kept_so_that_it_can_be_read_twice(tmp_path, monkeypatch, raw):
    pipe(monkeypatch, raw)
    found = opened("-", tmp_path)
    for _ in range(2):
        lines = lines_of(found)
        assert [line.record for line in lines] == ROWS
        assert {line.source for line in lines} == {"-"}
    assert found.name == "-"
    # Where it was kept is not part of what it is.
    assert found.identity() == [{"file": "-", "xxh3_128": artifact.checksum_bytes(raw)}]
    assert [file.read_bytes() for file in found.files] == [raw]


@pytest.mark.parametrize("raw", [as_lines(ROWS), as_array(ROWS), gzip.compress(as_lines(ROWS)), as_csv(ROWS)])
def test_of_standard_input_the_first_records_are_kept_and_of_lines_nothing_else_is_read(tmp_path, monkeypatch, raw):
    pipe(monkeypatch, raw)
    found = opened("-", tmp_path, max_records=3)
    assert [line.record for line in lines_of(found)] == ROWS[:3]
    if raw == as_lines(ROWS):
        assert found.files[0].read_bytes() == as_lines(ROWS[:3]) and sys.stdin.buffer.read() == as_lines(ROWS[3:])


def test_a_terminal_or_nothing_on_standard_input_is_reported(tmp_path, monkeypatch):
    pipe(monkeypatch, b"")
    with pytest.raises(DataError, match="Standard input is empty"):
        opened("-", tmp_path)
    assert not (tmp_path / "spool" / "stdin").exists()
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr(sys, "stdin", type("Terminal", (), {"closed": False, "isatty": lambda self: True})())
    with pytest.raises(UsageError, match=r"is a terminal or closed. Pipe records in"):
        opened("-", tmp_path)


# -- datasets --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    import datasets

    folder = tmp_path_factory.mktemp("saved")
    one, other = datasets.Dataset.from_list(ROWS[:30]), datasets.Dataset.from_list(ROWS[30:])
    one.save_to_disk(folder / "one")
    datasets.DatasetDict({"train": one, "test": other}).save_to_disk(folder / "both")
    datasets.Dataset.from_dict({"a": []}).save_to_disk(folder / "empty")
    return folder


def test_a_folder_of_save_to_disk_is_loaded(saved):
    found = opened(saved / "one", split="whatever")
    lines = lines_of(found, Limits(7, CHUNK_BYTES))
    assert [line.record for line in lines] == ROWS[:30]
    assert [line.number for line in lines] == list(range(1, 31))
    assert {line.source for line in lines} == {str(saved / "one")}
    assert {file.name for file in found.files} == {"data-00000-of-00001.arrow", "state.json"}
    assert [set(entry) for entry in found.identity()] == [{"file", "xxh3_128"}] * 2


def test_of_several_saved_splits_the_one_named_is_read(saved):
    assert records_of(saved / "both") == ROWS[:30]
    assert records_of(saved / "both", split="test") == ROWS[30:]
    with pytest.raises(UsageError, match=r"no split 'validation'. Set this source's split to one of: train, test"):
        opened(saved / "both", split="validation")


def test_a_saved_folder_that_is_empty_or_damaged_is_reported(saved, tmp_path):
    with pytest.raises(DataError, match="is empty or damaged"):
        opened(saved / "empty")
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "state.json").write_text("{")
    with pytest.raises(DataError, match="looks like a folder of save_to_disk, but is empty or damaged"):
        opened(tmp_path)


@pytest.fixture
def hub(tmp_path_factory, monkeypatch) -> Path:
    """A data set as the hub has it, but local; with a cache of its own."""
    import datasets

    folder = tmp_path_factory.mktemp("hub")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
    data = folder / "pairs"
    data.mkdir()
    (data / "train.jsonl").write_bytes(as_lines(ROWS[:30]))
    (data / "test.jsonl").write_bytes(as_lines(ROWS[30:]))
    return data


def from_hub(hub, **entry) -> DataSource:
    return open_source(Source(hub=str(hub), **entry), Path("never"))


def test_a_data_set_of_the_hub_is_loaded(hub):
    found = from_hub(hub, split="test")
    lines = lines_of(found)
    assert [line.record for line in lines] == ROWS[30:]
    assert {line.source for line in lines} == {str(hub)}
    assert found.files == []
    (identity,) = found.identity()
    assert (identity["hub"], identity["split"], identity["revision"]) == (str(hub), "test", None)
    assert identity["fingerprint"] and found.identity() == from_hub(hub, split="test").identity()
    assert from_hub(hub).identity() != [identity]


def test_the_first_records_of_a_hub_data_set_are_fetched_without_the_rest(hub):
    # What follows cannot be read, and is not. (The library reads blocks of 10 MB, one ahead.)
    (hub / "train.jsonl").write_bytes(as_lines(ROWS[:30]) * 15_000 + b"{" * (1 << 20))
    first = from_hub(hub, max_records=7)
    assert [line.record for line in lines_of(first)] == ROWS[:7]
    assert first.identity() == from_hub(hub, max_records=7).identity() != from_hub(hub, max_records=6).identity()
    with pytest.raises(UsageError, match="cannot be loaded"):
        from_hub(hub)


def test_where_the_hub_cannot_be_reached_the_first_records_are_those_of_the_local_cache(hub, monkeypatch):
    import datasets

    load = datasets.load_dataset

    def unreachable(*arguments, streaming=False, **named):
        if streaming:
            raise ConnectionError("offline")
        return load(*arguments, **named)

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    assert [line.record for line in lines_of(from_hub(hub, max_records=7))] == ROWS[:7]


def test_a_hub_data_set_that_cannot_be_loaded_says_why(hub):
    with pytest.raises(UsageError, match=r"Unknown split .validation.*Set this source's name \(the subset\) or split"):
        from_hub(hub, split="validation")
    with pytest.raises(UsageError, match="BuilderConfig 'easy' not found"):
        from_hub(hub, name="easy")
    with pytest.raises(UsageError, match=r"data set org/name: it is not in the local cache.*Connect to the network"):
        from_hub("org/name")


def test_a_saved_folder_named_as_hub_is_pointed_to_its_key(saved, hub):
    with pytest.raises(UsageError, match=r"a folder of save_to_disk\. Name it as this source's path"):
        from_hub(saved / "one")


def test_code_of_a_data_set_is_never_run(hub):
    ran = hub / "ran"
    (hub / "pairs.py").write_text(f"open({str(ran)!r}, 'w').write('')")
    with pytest.raises(UsageError, match=r"needs code of its own to load, which is never run.*refs/convert/parquet"):
        from_hub(hub)
    assert not ran.exists()


def test_a_path_that_is_no_path_here_is_taken_for_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UsageError, match="data set org/name: it is not in the local cache"):
        opened("org/name")


def test_the_commit_of_a_hub_data_set_is_part_of_its_identity(hub, monkeypatch):
    import datasets

    sha = "0123456789abcdef0123456789abcdef01234567"
    fetched = datasets.Dataset.from_list(ROWS)
    fetched.info.download_checksums = {f"hf://datasets/org/name@{sha}/train.parquet": {}}
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: fetched)
    assert from_hub("org/name", revision="main").identity()[0]["revision"] == sha
    with pytest.raises(UsageError, match=f"revision {'f' * 40} was asked for, the local cache has {sha}"):
        from_hub("org/name", revision="f" * 40)


def test_a_name_that_is_not_utf_8_is_refused_in_a_sentence(prefcache, config, model, tmp_path):
    name = os.fsdecode(b"p\xff.jsonl")
    (tmp_path / "pairs.jsonl").rename(tmp_path / name)
    for command in (
        ["prepare", config, "--set", "prepare.data=p*.jsonl"],
        ["score", "--input", name, "--model", model, "--output", "scored.parquet"],
    ):
        done = prefcache(*command, code=2)
        assert "p\\xff.jsonl: this name is not valid UTF-8. Rename it." in done.stderr


@pytest.mark.parametrize(
    "raw",
    [
        b'{"a": 1}', b' {"a": 1}', b'{"a": 1} \t', b'\xef\xbb\xbf{"a": 1}', b'{"a": 1}x', b'{"a": 1} {"a": 2}', b'{"a": 1, "a": 2}',
        b'{"a": NaN, "b": -Infinity, "c": 1e999}', b'{"a": ' + b"9" * 400 + b"}", b'{"a": ' + b"9" * 5000 + b"}", b"{", b"{}", b"1", b"",
        b'{"a": 0.1, "b": 1E2, "c": -0.0}', b'{"a": "\\ud83d\\ude00 \\u0000 \\/"}', b'{"a": "\x01"}', b'{"a": [' * 2000, b'{"a" :1 , "b": []}\n',
    ],
)  # fmt: skip
def test_a_line_is_read_as_json_loads_reads_it(raw):
    record, reason, detail = parse_json(raw)
    try:
        expected = json.loads(raw.decode())
    except (ValueError, RecursionError) as error:
        assert (record, reason, detail) == (None, "malformed JSON", str(error))
    else:
        assert repr(record) == repr(expected if isinstance(expected, dict) else None)


def test_the_size_of_the_data_is_estimated(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"{}\n" * 1000)
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(random.Random(0).randbytes(5000)))
    sizes = [(tmp_path / name).stat().st_size for name in ("a.jsonl", "b.jsonl.gz")]

    def estimate(name: str, **entry: Any) -> int:
        return open_source(Source(path=str(tmp_path / name), **entry), tmp_path).estimate_bytes()

    # Compressed text is three times as long; a record has about 2 KiB.
    assert [estimate("a.jsonl"), estimate("b.jsonl.gz")] == [sizes[0], 3 * sizes[1]]
    assert [estimate("b.jsonl.gz", max_records=n) for n in (2, 100)] == [4096, 3 * sizes[1]]
