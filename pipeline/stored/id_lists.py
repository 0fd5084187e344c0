"""Token ids from outside, as the sequences that the cache knows: Arrow lists, Python lists or arrays in, keys out."""

import itertools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.schema import IDS, KEY, key_of_bytes

_ROWS_AT_ONCE = 1 << 16


def read_sequences(prompt_ids: Any, completion_ids: Any) -> pa.Table:
    """Read one list of ids for each prompt and each completion into a table with those columns.

    Arrow columns are taken without a copy if their ids are int32.
    """
    columns = {"prompt_ids": _read_column("prompt_ids", prompt_ids)}
    columns["completion_ids"] = _read_column("completion_ids", completion_ids)
    n_prompts, n_completions = map(len, columns.values())
    if n_prompts != n_completions:
        raise UsageError(f"There are {n_prompts:,} prompts and {n_completions:,} completions; expected one for each.")
    for name, column in columns.items():
        _refuse_empty(name, column)
        ids = pc.list_flatten(column)
        if ids.null_count:
            raise UsageError(f"{name} has null in place of an id ({ids.null_count:,} times); expected token ids alone.")
        if (smallest := pc.min(ids).as_py() or 0) < 0:
            raise UsageError(
                f"{name} has the id {smallest}, which is not a token. Leave padding and ignored labels out."
            )
    return pa.table(columns)


def sequence_keys(sequences: pa.Table) -> pa.ChunkedArray:
    """Hash each sequence of a table that `read_sequences` has made."""
    return pa.chunked_array([pa.array(list(keys), KEY) for keys in _keys_by_batch(sequences)], KEY)


def _read_column(name: str, lists: Any) -> pa.ChunkedArray:
    if isinstance(lists, pa.Array):
        lists = pa.chunked_array([lists])
    try:
        if not isinstance(lists, pa.ChunkedArray):
            # The type is found first: asked for integers, Arrow would cut 1.5 to 1.
            lists = pa.chunked_array([pa.array(lists.tolist() if hasattr(lists, "tolist") else list(lists))])
        if not len(lists):
            return pa.chunked_array([], IDS)
        is_list = pa.types.is_list(lists.type) or pa.types.is_large_list(lists.type)
        if not is_list or not (pa.types.is_integer(lists.type.value_type) or pa.types.is_null(lists.type.value_type)):
            raise UsageError(f"{name} has the type {lists.type}; expected a list of token ids for each row.")
        return lists if lists.type.value_type == pa.int32() else lists.cast(IDS)
    except (pa.ArrowException, TypeError, OverflowError) as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(f"{name} must have a list of token ids for each row ({reason}).") from None


def _refuse_empty(name: str, column: pa.ChunkedArray) -> None:
    is_empty = pc.fill_null(pc.equal(pc.list_value_length(column), 0), True)
    if not pc.any(is_empty).as_py():
        return
    row = pc.index(is_empty, True).as_py()
    reason = (
        "Without a prompt, the first token has no log-prob: pass the first id, such as BOS, as the prompt"
        if name == "prompt_ids"
        else "A completion needs at least one token"
    )
    raise UsageError(f"{name} of row {row:,} is empty. {reason}.")


def _keys_by_batch(sequences: pa.Table) -> Iterator[Iterator[bytes]]:
    for batch in sequences.to_batches(max_chunksize=_ROWS_AT_ONCE):
        yield map(key_of_bytes, *(_slices(batch.column(name)) for name in ("prompt_ids", "completion_ids")))


def _slices(lists: pa.Array) -> Iterator[memoryview]:
    """Yield the bytes of each list, without copying them."""
    starts = lists.offsets.to_numpy().astype(np.int64) * 4
    data = np.ascontiguousarray(lists.flatten().to_numpy(), "<i4").data.cast("B")
    return (data[start:end] for start, end in itertools.pairwise((starts - starts[0]).tolist()))
