"""The table of a part: examples in, Arrow columns out, a batch at a time.

Each column is built for all rows of a batch at once. Ids stay bytes all the way: as Python numbers they would take ten
times the memory.
"""

import unicodedata
from array import array
from collections.abc import Sequence
from hashlib import blake2b
from itertools import accumulate
from typing import Any, NamedTuple

import pyarrow as pa

from prefcache.pipeline.preparing.example import Label, plain_text
from prefcache.pipeline.preparing.sources import Line
from prefcache.pipeline.preparing.token_ids import Ids, to_ids
from prefcache.pipeline.preparing.truncation import TruncatedExample
from prefcache.pipeline.schema import ANSWERS, HELD_OUT, IDS, LABELS, PAIRS, TRAIN, data_columns, key_of_bytes
from prefcache.pipeline.spans import count_common, count_tokens

# Columns of parts alone, by which shares and mismatched answers are chosen. whole_id is what example_id would be if no
# answer were cut: the same examples are chosen whatever the length, so that scores at another length can be reused.
_WHOLE = pa.field("whole_id", pa.uint64())
_HASHES = ("prompt_hash", "text_hash", "ids_hash")
_KL = ("kl_of", "kl_ids", "kl_cut_ids", "kl_key", "n_kl", "n_kl_counted", "kl_spans")
SCHEMAS = {
    "pairs": PAIRS.append(_WHOLE),
    "labels": pa.schema(
        [field for field in LABELS if field.name not in _KL]
        + [_WHOLE, *(pa.field(name, pa.uint64()) for name in _HASHES)]
    ),
}
_ANSWERS = {"pairs": ANSWERS["pairs"], "labels": ANSWERS["labels"][:1]}
Columns = dict[str, list[Any]]


def build_batch(
    lines: Sequence[Line],
    rows: Sequence[TruncatedExample],
    images: Sequence[tuple[bytes, ...]],
    kind: str,
    held_out: float,
    split: str | None,
) -> pa.RecordBatch:
    """Return a row for each example. Without a `split` of their own, a hash of the prompt decides which are held out.

    `images` are the ids of each row's pictures.
    """
    columns = _shared_columns(lines, rows, kind) | {"images": list(images)}
    columns["split"] = [split or (HELD_OUT if split_fraction(each) < held_out else TRAIN) for each in columns["prompt"]]
    prompts = [_Prompt(ids.tobytes(), each) for ids, each in zip(columns["prompt_ids"], images, strict=True)]
    for number, name in enumerate(_ANSWERS[kind]):
        columns |= _answer_columns(name, number, rows, prompts)
    columns |= _id_columns(columns, kind, rows)
    if kind == "pairs":
        columns["n_common"] = [count_common(*row.tokens.answers) for row in rows]
    else:
        columns["label"] = [isinstance(row.example, Label) and row.example.label for row in rows]
        columns["prompt_hash"] = [_hash_number(prompt.ids + b"".join(prompt.images)) for prompt in prompts]
        columns["text_hash"] = [_hash_number(text.encode()) for text in columns["completion"]]
        columns["ids_hash"] = [_hash_number(ids.tobytes()) for ids in columns["completion_ids"]]
    schema = SCHEMAS[kind]
    return pa.RecordBatch.from_arrays([_to_arrow(columns[field.name], field.type) for field in schema], schema=schema)


class _Prompt(NamedTuple):
    ids: bytes
    images: tuple[bytes, ...]


def _shared_columns(lines: Sequence[Line], rows: Sequence[TruncatedExample], kind: str) -> Columns:
    columns: Columns = {
        "source": [line.source for line in lines],
        "line": [line.number for line in lines],
        "prompt": [plain_text(row.example.prompt, row.example.images) for row in rows],
        "prompt_ids": [row.tokens.prompt for row in rows],
        "n_prompt": [len(row.tokens.prompt) for row in rows],
        "boundary": ["exact" if row.tokens.exact else "split" for row in rows],
        "cut_prompt": [row.cut_prompt for row in rows],
    }
    return columns | {name: [row.example.columns.get(name) for row in rows] for name in data_columns(kind)}


def _answer_columns(name: str, number: int, rows: Sequence[TruncatedExample], prompts: list[_Prompt]) -> Columns:
    """Return the columns of one answer, and under `NAME_whole_key` what its key would be if it were not cut."""
    ids, cut = [row.tokens.answers[number] for row in rows], [row.cut_answers[number] for row in rows]
    spans = [row.tokens.spans[number] for row in rows]
    keys = [key_of_bytes(prompt.ids, each.tobytes(), prompt.images) for prompt, each in zip(prompts, ids, strict=True)]
    return {
        name: [plain_text(row.example.answers[number]) for row in rows],
        f"{name}_ids": ids,
        f"n_{name}": list(map(len, ids)),
        f"{name}_cut_ids": cut,
        f"cut_{name}": list(map(len, cut)),
        f"{name}_spans": list(map(to_ids, spans)),
        f"n_{name}_counted": list(map(count_tokens, spans)),
        f"{name}_key": keys,
        f"{name}_whole_key": [
            key_of_bytes(prompt.ids, (kept + rest).tobytes(), prompt.images) if rest else key
            for prompt, kept, rest, key in zip(prompts, ids, cut, keys, strict=True)
        ],
    }


def _id_columns(columns: Columns, kind: str, rows: Sequence[TruncatedExample]) -> Columns:
    """Hash the keys of an example's answers; a label too, so that an answer may be both good and bad."""
    labels = [bytes([row.example.label]) if isinstance(row.example, Label) else b"" for row in rows]
    keys, whole_keys = (
        map(b"".join, zip(*(columns[f"{name}_{key}"] for name in _ANSWERS[kind]), labels, strict=True))
        for key in ("key", "whole_key")
    )
    return {"example_id": [_hash(each).hex() for each in keys], "whole_id": list(map(_hash_number, whole_keys))}


def _to_arrow(values: list[Any], type: pa.DataType) -> pa.Array:
    return _list_array(values) if type == IDS else pa.array(values, type)


def _list_array(rows: list[Ids]) -> pa.ListArray:
    offsets = array("i", accumulate(map(len, rows), initial=0))
    values = pa.Array.from_buffers(pa.int32(), offsets[-1], [None, pa.py_buffer(b"".join(rows))])
    return pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), values)


# -- hashes ----------------------------------------------------------------------------------------------------------


def split_fraction(prompt: str) -> float:
    """Map a prompt to [0, 1) by its text alone, so that it never changes sides when data is added.

    Spaces and composed characters do not count: prompts that differ only in them may be one to the model.
    """
    return prompt_number(prompt) / 2**64


def prompt_number(prompt: str) -> int:
    """Return a number for a prompt's text, equal for texts that differ in spaces and composed characters alone."""
    return _hash_number(" ".join(unicodedata.normalize("NFC", prompt).split()).encode())


def _hash(data: bytes) -> bytes:
    return blake2b(data, digest_size=8).digest()


def _hash_number(data: bytes) -> int:
    return int.from_bytes(_hash(data), "big")
