"""Keys of ids from outside, against the key of each sequence by itself."""

import numpy as np
import pyarrow as pa
import pytest

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.schema import sequence_key
from prefcache.pipeline.stored.id_lists import read_sequences, sequence_keys


def test_keys_are_those_of_single_sequences_across_blocks_chunks_and_slices():
    dice = np.random.default_rng(0)
    prompts, completions = ([dice.integers(0, 2**31, dice.integers(1, 4)) for _ in range(70_000)] for _ in range(2))
    expected = [sequence_key(*pair) for pair in zip(prompts, completions, strict=True)]
    whole = pa.array([[1], *prompts], pa.list_(pa.int32()))[1:]
    chunks = pa.chunked_array([whole[:3], whole[3:50_000], whole[50_000:]])
    assert sequence_keys(read_sequences(chunks, completions)).to_pylist() == expected
    assert sequence_keys(read_sequences(prompts, pa.array(completions))).to_pylist() == expected


def test_int32_columns_are_not_copied():
    column = pa.array([[1, 2], [3]], pa.list_(pa.int32()))
    assert (
        read_sequences(column, [[1], [2]])["prompt_ids"].chunk(0).values.buffers()[1].address
        == column.values.buffers()[1].address
    )


@pytest.mark.parametrize("ids", [[[2**31]], [["a"]], [None], [[1.5]], [[1, -100]], 5, "ab"])
def test_what_is_no_list_of_ids_is_refused(ids):
    with pytest.raises(UsageError, match="prompt_ids"):
        read_sequences(ids, [[1]])
