"""What a file holds, told from how it begins. The name decides only what the content cannot."""

import json
import re
from pathlib import Path
from typing import Literal

from pipeline.errors import DataError, UsageError
from pipeline.preparing.sources.text import BOM, opened

Kind = Literal["lines", "array", "csv", "tsv", "semicolons", "parquet", "arrow"]

JSON = (".jsonl", ".ndjson", ".json")
SEPARATED = (".csv", ".tsv")
TABLES = (".parquet", ".arrow")
COMPRESSED = (".gz", ".zst")
KNOWN = (*JSON, *SEPARATED, *TABLES)
_HEAD = 1 << 16

# A header without a single sign that text or JSON would have.
_HEADER = re.compile(rb'"?[\w .-]+"?([,;\t]"?[\w .-]+"?)+\r?')
_WRAPPED = re.compile(rb'\s*\{\s*"(data|rows|records|examples|instances|items|train)"\s*:\s*\[\s*\{')


def suffix(file: Path) -> str:
    """`.jsonl` of pairs.jsonl.gz."""
    name = file.name.lower()
    for ending in COMPRESSED:
        name = name.removesuffix(ending)
    return Path(name).suffix


def known(file: Path) -> bool:
    return suffix(file) in KNOWN


def kind_of(file: Path, shown: str) -> Kind:
    """How the file is read, or the error that says why it cannot be."""
    head, inner = _head(file)
    if not head:
        raise DataError(f"{shown} is empty; expected records.")
    if head.startswith(b"version https://git-lfs"):
        raise DataError(f"{shown} is a Git LFS pointer, not the data. Run `git lfs pull` where it came from.")
    if inner or suffix(file) in TABLES:
        table: Kind = "parquet" if inner == "parquet" or suffix(file) == ".parquet" else "arrow"
        _refuse_compressed(file, shown, head)
        return table
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise UsageError(f"{shown} is UTF-16; expected UTF-8. `iconv -f UTF-16 -t UTF-8` converts it.")
    if not known(file) and b"\0" in head:
        raise UsageError(f"{shown} is neither text nor a table known here. {expected()}")
    return _kind_of_text(file, shown, head.removeprefix(BOM))


def expected() -> str:
    return f"Expected one of {', '.join(KNOWN)}; the text ones also with {' or '.join(COMPRESSED)}."


def _head(file: Path) -> tuple[bytes, str]:
    with opened(file) as stream:
        head = stream.read(_HEAD)
    return head, "parquet" if head.startswith(b"PAR1") else "arrow" if head.startswith((b"ARROW1", b"\xff" * 4)) else ""


def _refuse_compressed(file: Path, shown: str, head: bytes) -> None:
    with open(file, "rb") as plain:
        if plain.read(len(head)) != head:
            raise UsageError(f"{shown} is a compressed table. Decompress it first; Parquet is compressed within.")


def _kind_of_text(file: Path, shown: str, head: bytes) -> Kind:
    start = head.lstrip()
    first, _, rest = start.partition(b"\n")
    if suffix(file) in SEPARATED:
        return _separator(first, "tsv" if suffix(file) == ".tsv" else "csv")
    if start.startswith(b"["):
        # One record that is a list is a bad record; a list over many lines, or a file that is one list, is an array.
        return "lines" if rest.strip() and _is_json(first) else "array"
    if start.startswith(b"{"):
        _refuse_one_object(shown, start, first, rest.lstrip())
        return "lines"
    if suffix(file) in JSON or not start:
        return "lines"
    if _HEADER.fullmatch(first):
        return _separator(first, "csv")
    raise UsageError(f"{shown} is text, but neither JSON nor a table with a header. {expected()}")


def _separator(header: bytes, named: Kind) -> Kind:
    if named == "csv" and b"," not in header:
        return "tsv" if b"\t" in header else "semicolons" if b";" in header else "csv"
    return named


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def _refuse_one_object(shown: str, start: bytes, first: bytes, rest: bytes) -> None:
    """An object over many lines, or one that wraps all the records."""
    wrapped = _WRAPPED.match(start)
    # A line of JSON Lines that was cut is followed by another object, a line of an indented object by what is in it.
    indented = rest[:1] in (b'"', b"}", b"]", b"[") and not _is_json(first)
    if wrapped and (indented or not rest):
        key = wrapped[1].decode()
        raise UsageError(
            f"{shown} is one object with the records under {key!r}; expected JSON Lines or one array of objects. "
            f"`jq -c '.{key}[]' FILE` prints JSON Lines."
        )
    if indented:
        raise UsageError(
            f"{shown} holds an object over many lines; expected JSON Lines, an object per line, or one array of "
            "objects. `jq -c . FILE` prints JSON Lines."
        )
