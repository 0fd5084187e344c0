"""The tensors of safetensors files, without loading any: name, dtype, shape and a hash of the bytes.

A header is not trusted: every size and offset is checked before anything is read.
"""

import hashlib
import itertools
import json
import math
from collections.abc import Iterator, MutableMapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.progress import Counter, counting

_LARGEST_HEADER = 100_000_000  # as the safetensors library has it
_MOST_DIMENSIONS = 64
_BLOCK = 1 << 20
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E5M2", "F8_E4M3", "F8_E8M0"), 8),
}


class Tensor(NamedTuple):
    """What identifies a tensor."""

    dtype: str
    shape: tuple[int, ...]
    sha256: str  # of its bytes


class _Span(NamedTuple):
    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


@dataclass
class Digests:
    """Hashes by each file's stamp. Those that are missing are computed from the file and added."""

    tensors: MutableMapping[str, dict[str, Tensor]] = field(default_factory=dict)
    files: MutableMapping[str, str] = field(default_factory=dict)  # sha256 of whole files, for ids of earlier versions

    def read(self, file: Path) -> dict[str, Tensor]:
        """The tensors of a file, by name."""
        stamp = stamp_file(file)
        if stamp not in self.tensors:
            _forget(self.tensors, file)
            self.tensors[stamp] = hash_tensors(file)
        return self.tensors[stamp]

    def hash_whole(self, file: Path) -> str:
        stamp = stamp_file(file)
        if stamp not in self.files:
            _forget(self.files, file)
            self.files[stamp] = hash_file(file)
        return self.files[stamp]


def hash_file(file: Path) -> str:
    """Return the sha256 of a whole file."""
    digest, buffer = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with open(file, "rb", buffering=0) as opened, _counting_bytes(file) as counter:
        while n := opened.readinto(buffer):
            digest.update(buffer[:n])
            counter.add(n)
    return digest.hexdigest()


def _counting_bytes(file: Path) -> AbstractContextManager[Counter]:
    return counting(f"hash {file.name}", file.stat().st_size, "bytes")


def stamp_file(file: Path) -> str:
    """A text that changes whenever the file does."""
    stat = file.stat()
    # The change time cannot be set: it shows weights that were edited in place and had their modification time put back.
    return f"{file.resolve()}|{stat.st_size}|{stat.st_mtime_ns}|{stat.st_ctime_ns}|{stat.st_ino}"


def _forget(known: MutableMapping[str, Any], file: Path) -> None:
    """Drop the hashes of earlier contents of the file."""
    for stamp in [each for each in known if each.rsplit("|", 4)[0] == str(file.resolve())]:
        del known[stamp]


def hash_tensors(file: Path) -> dict[str, Tensor]:
    """Hash all tensors in one pass over the file."""
    tensors, buffer = {}, memoryview(bytearray(_BLOCK))
    with open(file, "rb", buffering=0) as opened, _counting_bytes(file) as counter:
        for span in _spans(file, opened):
            digest, left = hashlib.sha256(), span.end - span.start
            opened.seek(span.start)
            while left:
                n = opened.readinto(buffer[: min(left, _BLOCK)])
                if not n:
                    raise _unreadable(file, f"it ends within tensor {span.name}")
                digest.update(buffer[:n])
                counter.add(n)
                left -= n
            tensors[span.name] = Tensor(span.dtype, span.shape, digest.hexdigest())
    return tensors


def tensor_names(file: Path) -> list[str]:
    """Read the names from the header alone."""
    with open(file, "rb", buffering=0) as opened:
        return [span.name for span in _spans(file, opened)]


def tensor_dtypes(file: Path) -> set[str]:
    """Read the dtypes of the tensors from the header alone, under the format's names."""
    with open(file, "rb", buffering=0) as opened:
        return {span.dtype for span in _spans(file, opened)}


def _spans(file: Path, opened: Any) -> list[_Span]:
    """The tensors that a header announces, in file order; they must fill the file without gap or overlap."""
    size = file.stat().st_size
    n_header = int.from_bytes(opened.read(8), "little")
    if not 2 <= n_header <= min(_LARGEST_HEADER, size - 8):
        raise _unreadable(file, f"its header would have {n_header:,} bytes, of {size:,}")
    header = b""
    while len(header) < n_header and (part := opened.read(n_header - len(header))):
        header += part
    try:
        entries = json.loads(header, object_pairs_hook=_refuse_repeats)
    except (ValueError, RecursionError) as error:
        raise _unreadable(file, f"its header is not valid JSON: {str(error)[:100]}") from None
    if not isinstance(entries, dict):
        raise _unreadable(file, f"its header holds {type(entries).__name__}, expected an object")
    entries.pop("__metadata__", None)
    begin = 8 + n_header
    spans = sorted((_span(file, name, entry, begin) for name, entry in entries.items()), key=lambda span: span[3:])
    ends = [begin, *(span.end for span in spans)]
    if any(span.start != end for span, end in zip(spans, ends, strict=False)) or ends[-1] != size:
        raise _unreadable(file, "its tensors overlap, or do not fill the file")
    return spans


def _refuse_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError("a name occurs twice")
    return entries


def _span(file: Path, name: str, entry: Any, begin: int) -> _Span:
    try:
        dtype, shape, (start, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    except (KeyError, TypeError, ValueError):
        raise _unreadable(file, f"tensor {name[:100]} lacks dtype, shape or data_offsets") from None
    numbers = [*shape, start, end] if isinstance(shape, list) and len(shape) <= _MOST_DIMENSIONS else [None]
    if not isinstance(dtype, str) or any(type(each) is not int or not 0 <= each < 1 << 60 for each in numbers):
        raise _unreadable(file, f"tensor {name[:100]} has an impossible dtype, shape or place")
    bits = _BITS.get(dtype)
    if bits is not None and math.prod(shape) * bits != 8 * (end - start):
        raise _unreadable(file, f"tensor {name[:100]} of shape {shape} has {end - start:,} bytes")
    return _Span(name, dtype, tuple(shape), begin + start, begin + end)


def _unreadable(file: Path, reason: str) -> UsageError:
    return UsageError(f"{file} is not a whole safetensors file: {reason}. Save or fetch it again.")


def shorten_list(names: Iterator[str] | set[str] | list[str], most: int = 5) -> str:
    """List the first few names, and how many more there are."""
    ordered = sorted(names)
    shown = ", ".join(itertools.islice(ordered, most))
    return f"{shown} and {len(ordered) - most:,} more" if len(ordered) > most else shown
