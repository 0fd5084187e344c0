"""What a source is cut into: chunks of records, each of which a worker process parses by itself.

Where a chunk begins and ends depends on the input alone, never on timing or the number of workers. Nothing is lost: a
line without a record is yielded too, with the reason.
"""

import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, NamedTuple, TypeVar

# Small enough that many cores share a small file, large enough that one part file per chunk costs little.
CHUNK_RECORDS = 2048
CHUNK_BYTES = 4 << 20
Record = dict[str, Any]
Numbered = tuple[int, bytes]
Item = TypeVar("Item")

_DECODER = json.JSONDecoder()
# Only an escape can bring half of a surrogate pair into JSON; raw UTF-8 cannot hold one.
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class Line(NamedTuple):
    source: str
    number: int  # from 1
    raw: bytes
    record: Record | None
    reason: str  # why there is no record
    detail: str


class Limits(NamedTuple):
    """The limits of one chunk. A record that is longer than `n_bytes` is a chunk of its own."""

    records: int = CHUNK_RECORDS
    n_bytes: int = CHUNK_BYTES


DEFAULT = Limits()


@dataclass(frozen=True)
class Chunk:
    """Records as they are in the file, and the function that parses them. It can be pickled."""

    source: str
    number: int  # of its first line or row
    n_bytes: int
    payload: Any
    parse: Callable[["Chunk"], Iterator[Line]]
    most: int | None = None  # records to read; None: all

    def lines(self) -> Iterator[Line]:
        return islice(self.parse(self), self.most)


def take_records(chunks: Iterable[Chunk], n: int) -> Iterator[Chunk]:
    """Yield the chunks of the first `n` records, and read nothing beyond them."""
    for chunk in chunks:
        # Parsed once more by a worker: which lines are blank, and where a quoted cell ends, only the parser knows.
        n_found = sum(1 for _ in islice(chunk.lines(), n))
        yield replace(chunk, most=n)
        n -= n_found
        if not n:
            return


def group_by_size(
    items: Iterable[Item], limits: Limits, count_bytes: Callable[[Item], int]
) -> Iterator[tuple[int, list[Item]]]:
    """Yield runs of items with their size in bytes, each as long as the limits allow."""
    group: list[Item] = []
    size = 0
    for item in items:
        n_bytes = count_bytes(item)
        if group and (len(group) == limits.records or size + n_bytes > limits.n_bytes):
            yield size, group
            group, size = [], 0
        group.append(item)
        size += n_bytes
    if group:
        yield size, group


def count_raw(row: Numbered) -> int:
    return len(row[1])


def parse_json(raw: bytes) -> tuple[Record | None, str, str]:
    """Parse a line or an array's element: the record, or None with the reason and the detail."""
    try:
        record = _decode(raw.decode("utf-8"))
        if not isinstance(record, dict):
            return None, "not an object", f"found {type(record).__name__}"
        surrogate = find_surrogate(raw, record)
    except UnicodeDecodeError as error:
        return (None, *explain_utf8(error))
    except (ValueError, RecursionError) as error:
        return None, "malformed JSON", str(error)
    return (None, "lone surrogate", surrogate) if surrogate else (record, "", "")


def _decode(text: str) -> Any:
    """Return what json.loads does. It looks for spaces around an object, of which a line has none."""
    try:
        value, end = _DECODER.raw_decode(text)
    except ValueError:
        end = -1
    return value if end == len(text) else json.loads(text)


def explain_utf8(error: UnicodeDecodeError) -> tuple[str, str]:
    return "invalid UTF-8", f"byte 0x{error.object[error.start]:02x} at byte {error.start}"


def find_surrogate(raw: bytes, record: Record) -> str:
    """Name the column that holds half of a surrogate pair, which cannot be written anywhere; return "" without one."""
    if not _SURROGATE.search(raw):
        return ""
    for column, value in record.items():
        try:
            json.dumps([column, value], ensure_ascii=False).encode()
        except UnicodeEncodeError:
            return f"in {column!a}"
    return ""
