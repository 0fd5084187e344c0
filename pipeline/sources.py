"""Files of records, read one line at a time. A line that is no record is yielded too, with the reason."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.errors import DataError, UsageError


class Line(NamedTuple):
    source: str
    number: int  # from 1
    raw: bytes
    record: dict[str, Any] | None
    reason: str  # why there is no record
    detail: str


def check(paths: Sequence[str]) -> list[Path]:
    """The files of `prepare.data`, each readable and not empty."""
    files = [Path(path) for path in paths]
    for file in files:
        if not file.exists():
            raise UsageError(f"No data at {file}; prepare.data names it. Expected a JSON Lines file.")
        if file.is_dir():
            raise UsageError(f"{file} is a folder; prepare.data expects JSON Lines files. Name the files in it.")
        try:
            with open(file, "rb") as opened:
                empty = not opened.read(1)
        except OSError as error:
            raise UsageError(f"{file} cannot be read ({error.strerror}).") from None
        if _is_json_array(file):
            raise UsageError(
                f"{file} is one JSON array; expected JSON Lines, an object per line. `jq -c '.[]' {file}` prints that."
            )
        if empty:
            raise DataError(f"{file} is empty; expected one JSON object per line.")
    return files


def _is_json_array(file: Path) -> bool:
    with open(file, "rb") as opened:
        first = opened.readline().removeprefix(b"\xef\xbb\xbf").strip()
        more = bool(opened.readline().strip())
    if not first.startswith(b"["):
        return False
    # One record that is a list is a bad record; a list over many lines, or a file that is one list, is another format.
    return not more or not first.endswith(b"]")


def read(file: Path) -> Iterator[Line]:
    """The records of a JSON Lines file. Blank lines are no records; they are passed over."""
    with open(file, "rb") as opened:
        for number, raw in enumerate(opened, start=1):
            raw = raw.rstrip(b"\r\n")
            if number == 1:
                raw = raw.removeprefix(b"\xef\xbb\xbf")
            if raw.strip():
                yield Line(str(file), number, raw, *_parse(raw))


def _parse(raw: bytes) -> tuple[dict[str, Any] | None, str, str]:
    try:
        record = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        return None, "invalid UTF-8", f"at byte {error.start}"
    except (ValueError, RecursionError) as error:
        return None, "malformed JSON", str(error)
    if not isinstance(record, dict):
        return None, "not an object", f"found {type(record).__name__}"
    return record, "", ""
