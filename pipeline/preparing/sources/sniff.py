"""What a file holds, told from how it begins. The name decides only what the content cannot."""

import json
import re
from pathlib import Path
from typing import Literal

from prefcache.pipeline.errors import DataError, UsageError
from prefcache.pipeline.preparing.sources.jsonl import BOM, open_bytes

Kind = Literal["lines", "array", "csv", "tsv", "semicolons", "parquet", "arrow"]

JSON = (".jsonl", ".ndjson", ".json")
SEPARATED = (".csv", ".tsv")
TABLES = (".parquet", ".arrow")
COMPRESSED = (".gz", ".zst")
KNOWN = (*JSON, *SEPARATED, *TABLES)
EXPECTED = f"Expected one of {', '.join(KNOWN)}; the text ones also with {' or '.join(COMPRESSED)}."
_HEAD = 1 << 16

# A header without a single sign that text or JSON would have.
_HEADER = re.compile(rb'"?[\w .-]+"?([,;\t]"?[\w .-]+"?)+\r?')
_WRAPPER = re.compile(rb'\s*\{\s*"(data|rows|records|examples|instances|items|train)"\s*:\s*\[\s*\{')


def suffix(file: Path) -> str:
    """Return the suffix without compression: `.jsonl` of pairs.jsonl.gz."""
    name = file.name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return Path(name).suffix


def is_known(file: Path) -> bool:
    return suffix(file) in KNOWN


def detect_kind(file: Path, shown: str) -> Kind:
    """Return how to read a file, or raise the error that says why it cannot be read. `shown` is its name in errors."""
    with open_bytes(file) as stream:
        head = stream.read(_HEAD)
    if not head:
        raise DataError(f"{shown} is empty; expected records.")
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{shown} is a Git LFS pointer, not the data. Run `git lfs pull` where it came from.")
    if head.startswith((b"PAR1", b"ARROW1", b"\xff" * 4)) or suffix(file) in TABLES:
        with open(file, "rb") as plain:
            if plain.read(len(head)) != head:
                raise UsageError(f"{shown} is a compressed table. Decompress it first; Parquet is compressed within.")
        return "parquet" if head.startswith(b"PAR1") or suffix(file) == ".parquet" else "arrow"
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UsageError(f"{shown} is UTF-16; expected UTF-8. `iconv -f UTF-16 -t UTF-8` converts it.")
    if not is_known(file) and b"\0" in head:
        raise UsageError(f"{shown} is neither text nor a table known here. {EXPECTED}")
    return _detect_text(file, shown, head.removeprefix(BOM))


def _detect_text(file: Path, shown: str, head: bytes) -> Kind:
    start = head.lstrip()
    first, _, rest = start.partition(b"\n")
    if suffix(file) in SEPARATED:
        return "tsv" if suffix(file) == ".tsv" else _detect_separator(first)
    if start.startswith(b"["):
        # A first line that is a whole list is a bad record; a list over many lines, or a file of one list, is an array.
        return "lines" if rest.strip() and _is_json(first) else "array"
    if start.startswith(b"{"):
        _refuse_one_object(shown, start, first, rest.lstrip())
        return "lines"
    if suffix(file) in JSON or not start:
        return "lines"
    if _HEADER.fullmatch(first):
        return _detect_separator(first)
    raise UsageError(f"{shown} is text, but neither JSON nor a table with a header. {EXPECTED}")


def _detect_separator(header: bytes) -> Kind:
    if b"," in header:
        return "csv"
    return "tsv" if b"\t" in header else "semicolons" if b";" in header else "csv"


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_one_object(shown: str, start: bytes, first: bytes, rest: bytes) -> None:
    """Refuse an object over many lines, or one that wraps all the records."""
    wrapper = _WRAPPER.match(start)
    # A cut line of JSON Lines is followed by another object, a line of an indented object by its content.
    is_indented = rest[:1] in (b'"', b"}", b"]", b"[") and not _is_json(first)
    if wrapper and (is_indented or not rest):
        key = wrapper[1].decode()
        raise UsageError(
            f"{shown} is one object with the records under {key!r}; expected JSON Lines or one array of objects. "
            f"`jq -c '.{key}[]' FILE` prints JSON Lines."
        )
    if is_indented:
        raise UsageError(
            f"{shown} holds an object over many lines; expected JSON Lines, an object per line, or one array of "
            "objects. `jq -c . FILE` prints JSON Lines."
        )
