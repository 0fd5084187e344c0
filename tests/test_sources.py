"""Every line of a file is a record or says why it is none."""

import json
import os

import pytest

from pipeline import sources
from pipeline.errors import DataError, UsageError


def read(tmp_path, raw: bytes) -> list[sources.Line]:
    (tmp_path / "a.jsonl").write_bytes(raw)
    return list(sources.read(tmp_path / "a.jsonl"))


def test_lines_are_records_with_their_number_and_raw_bytes(tmp_path):
    first, second = read(tmp_path, b'{"a": 1}\n{"a": "\xc3\xbc"}\n')
    assert first == (str(tmp_path / "a.jsonl"), 1, b'{"a": 1}', {"a": 1}, "", "")
    assert (second.number, second.raw, second.record) == (2, b'{"a": "\xc3\xbc"}', {"a": "ü"})


def test_blank_lines_are_passed_over_but_counted(tmp_path):
    assert [(line.number, line.record) for line in read(tmp_path, b'\n{"a": 1}\n  \n\t\n{"a": 2}')] == [
        (2, {"a": 1}),
        (5, {"a": 2}),
    ]


def test_windows_line_ends_and_a_byte_order_mark_do_not_matter(tmp_path):
    lines = read(tmp_path, b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
    assert [(line.record, line.raw) for line in lines] == [({"a": 1}, b'{"a": 1}'), ({"a": 2}, b'{"a": 2}')]


def test_line_separators_of_unicode_do_not_end_a_line(tmp_path):
    record = {"a": "one\u2028two\u0085three\x0cfour"}
    (line,) = read(tmp_path, json.dumps(record, ensure_ascii=False).encode())
    assert line.record == record


@pytest.mark.parametrize(
    ("raw", "reason", "detail"),
    [
        (b'{"a": 1', "malformed JSON", "char 7"),
        (b"{'a': 1}", "malformed JSON", "char 1"),
        (b'{"a": 1} {"a": 2}', "malformed JSON", "Extra data"),
        (b'{"a": 1}\x00', "malformed JSON", "char 8"),
        (b"[" * 100_000, "malformed JSON", ""),
        (b'{"a": ' + b"1" * 5000 + b"}", "malformed JSON", "4300"),
        (b'{"a": "\xff"}', "invalid UTF-8", "at byte 7"),
        ('{"a": 1}'.encode("utf-16"), "invalid UTF-8", "at byte 0"),
        (b"[1, 2]", "not an object", "found list"),
        (b"null", "not an object", "found NoneType"),
        (b'"text"', "not an object", "found str"),
    ],
    ids=["cut", "quotes", "two", "null byte", "deep", "huge", "latin-1", "utf-16", "list", "null", "string"],
)
def test_a_line_that_is_no_record_says_why_and_does_not_stop_the_rest(tmp_path, raw, reason, detail):
    lines = read(tmp_path, b'{"a": 1}\n' + raw.replace(b"\n", b"") + b'\n{"a": 2}\n')
    assert [line.record for line in lines] == [{"a": 1}, None, {"a": 2}]
    bad = lines[1]
    assert (bad.number, bad.raw, bad.reason) == (2, raw.replace(b"\n", b""), reason)
    assert detail in bad.detail


def test_a_lone_surrogate_in_json_is_left_for_the_format_to_refuse(tmp_path):
    (line,) = read(tmp_path, b'{"a": "\\ud800"}')
    assert line.record == {"a": "\ud800"}


def test_files_are_checked_before_any_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "empty.jsonl").write_text("")
    good = str(tmp_path / "a.jsonl")
    assert sources.check([good]) == [tmp_path / "a.jsonl"]
    with pytest.raises(UsageError, match=r"No data at .*nowhere\.jsonl; prepare\.data names it"):
        sources.check([good, str(tmp_path / "nowhere.jsonl")])
    with pytest.raises(UsageError, match=r"is a folder; prepare\.data expects JSON Lines files"):
        sources.check([good, str(tmp_path)])
    with pytest.raises(DataError, match=r"empty\.jsonl is empty"):
        sources.check([good, str(tmp_path / "empty.jsonl")])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read every file")
def test_a_file_that_may_not_be_read_is_the_users_mistake(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "a.jsonl").chmod(0)
    with pytest.raises(UsageError, match="cannot be read"):
        sources.check([str(tmp_path / "a.jsonl")])
