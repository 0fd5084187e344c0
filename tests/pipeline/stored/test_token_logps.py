"""The reference's single tokens are those of the very rows whose sums are served."""

import numpy as np
import pyarrow as pa
import pytest

from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.stored import cache_maintenance
from prefcache.pipeline.stored.token_logps import token_logps
from tests.helpers.examples import (
    MINE,
    OTHER,
    cache_for,
    cache_of,
    failed,
    floats,
    label,
    logps_of,
    pair,
    scored,
    table,
)

ROWS = [pair(0, [1], [2, 3, 4], [5]), pair(1, [1, 1], [6], [7, 8]), pair(2, [1], [5], [9, 9, 9, 9])]
PAIRS = table(ROWS, "pairs")


def served(cache, examples=PAIRS, accepted=(MINE,), names=("chosen", "rejected")):
    keys = [examples[f"{name}_key"] for name in names]
    found = token_logps(cache, keys, cache.logps(keys, list(accepted)), list(accepted))
    return {
        name: [floats(lists[row]) for row in range(len(examples))] for name, lists in zip(names, found, strict=True)
    }


def expected(name):
    return [logps_of(row["prompt_ids"], row[f"{name}_ids"]) for row in ROWS]


def test_every_answer_has_its_tokens_in_the_order_of_the_examples(tmp_path):
    found = served(cache_for(tmp_path, ROWS))
    # Pair 0: -2/8, -6/8, -12/8. Its rejected answer is pair 2's chosen one: one row of the cache, served to both.
    assert found["chosen"][0] == [-0.25, -0.75, -1.5]
    assert found == {"chosen": expected("chosen"), "rejected": expected("rejected")}


def test_tokens_come_from_as_many_shards_as_there_are(tmp_path):
    chunks = [[scored(row["prompt_ids"], row[f"{name}_ids"])] for row in ROWS[1:] for name in ("chosen", "rejected")]
    cache = cache_of(tmp_path, [scored([1], [2, 3, 4]), scored([3], [4])], *chunks)  # one that nobody asks for
    assert len(cache.records) == 5
    assert served(cache) == {"chosen": expected("chosen"), "rejected": expected("rejected")}


def test_a_sequence_without_a_value_has_no_tokens(tmp_path):
    cache = cache_for(tmp_path, ROWS, without=(ROWS[1]["chosen_key"],))
    assert served(cache)["chosen"] == [expected("chosen")[0], [], expected("chosen")[2]]
    # Nor has one that was never scored.
    assert served(cache_of(tmp_path / "other", [scored([1], [5])]))["chosen"] == [[], [], [-0.625]]


def test_of_two_numerics_the_tokens_are_those_of_the_sum_that_is_served(tmp_path):
    theirs = scored([1], [2, 3], numerics_id=OTHER, logps=[-0.5, -0.75], logp_sum=-1.25)
    cache = cache_of(tmp_path, [theirs], [scored([1], [2, 3])])
    examples = table([pair(0, [1], [2, 3], [2, 3])], "pairs")
    ours = [-0.25, -0.75]
    for accepted, tokens in (([MINE], ours), ([OTHER], [-0.5, -0.75]), ([MINE, OTHER], ours)):
        assert served(cache, examples, accepted)["chosen"] == [tokens]
    assert served(cache, examples, [OTHER, MINE])["rejected"] == [[-0.5, -0.75]]


@pytest.mark.parametrize("first", [MINE, OTHER])
def test_where_sums_agree_and_tokens_do_not_the_numerics_named_first_win(tmp_path, first):
    # Both sum to -1.
    rows = {MINE: scored([1], [2, 3], logps=[-0.25, -0.75], logp_sum=-1.0)}
    rows[OTHER] = scored([1], [2, 3], numerics_id=OTHER, logps=[-0.5, -0.5], logp_sum=-1.0)
    examples = table([pair(0, [1], [2, 3], [2, 3])], "pairs")
    second = OTHER if first == MINE else MINE
    assert served(cache_of(tmp_path, *([row] for row in rows.values())), examples, [first, second])["chosen"] == [
        rows[first]["logps"]
    ]


def test_a_failure_under_the_first_numerics_is_served_from_the_second(tmp_path):
    theirs = scored([1], [2], numerics_id=OTHER, logps=[-3.0], logp_sum=-3.0)
    cache = cache_of(tmp_path, [failed([1], [2])], [theirs])
    assert served(cache, table([pair(0, [1], [2], [2])], "pairs"), [MINE, OTHER])["chosen"] == [[-3]]


def test_a_row_that_is_there_twice_under_one_numerics_is_served_once_as_the_smaller(tmp_path):
    twice = [scored([1], [2], logps=[value], logp_sum=value) for value in (-0.25, -0.2500001)]
    # Two scorers whose chunks overlapped: each row with another beside it.
    cache = cache_of(tmp_path, [twice[0], scored([1], [3])], [twice[1], scored([1], [4])])
    assert served(cache, table([pair(0, [1], [2], [3])], "pairs")) == {
        "chosen": [[float(np.float32(-0.2500001))]],
        "rejected": [[-0.375]],
    }


def test_rows_scored_without_tokens_are_refused_with_what_to_do(tmp_path):
    cache = cache_of(tmp_path, [scored([1], [2], logps=None), scored([1], [3])])
    shard = cache.records[0].file
    with pytest.raises(UsageError) as caught:
        served(cache, table([pair(0, [1], [2], [3])], "pairs"))
    assert f"{shard} has no values of single tokens" in str(caught.value)
    assert "score.logps: false" in str(caught.value)
    assert "single ones are asked for (train.tokens, or show). Leave that out, or score again" in str(caught.value)
    # Who does not ask for that row is served.
    assert served(cache, table([pair(0, [1], [3], [3])], "pairs"))["chosen"] == [[-0.375]]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_tokens_that_another_row_of_the_same_sum_has_are_found(tmp_path, order):
    # As imported sums and then scored ones: the first accepted row has none, the second has.
    rows = [[scored([1], [2], logps=None)], [scored([1], [2], numerics_id=OTHER)]]
    cache = cache_of(tmp_path, *(rows[i] for i in order))
    assert served(cache, table([pair(0, [1], [2], [2])], "pairs"), [MINE, OTHER])["chosen"] == [[-0.25]]


def test_a_list_of_another_length_than_its_answer_is_refused_and_its_shard_named(tmp_path):
    # One token short, its sum and checksums in order: no scorer writes that.
    short = {**scored([1], [2, 3], logps=[-1.0], logp_sum=-1.0), "n_completion": 2}
    cache = cache_of(tmp_path, [short], [scored([1], [4])])
    (file,) = (record.file for record in cache.records if _has(cache, record, short["key"]))
    with pytest.raises(
        IntegrityError, match=rf"{file} has a row with another number of log-probs.*Remove .*score again"
    ):
        served(cache, table([pair(0, [1], [2, 3], [4])], "pairs"))


def _has(cache, record, key):
    return key in cache.read(record)["key"].to_pylist()


def test_a_label_without_a_mismatched_answer_has_no_tokens_of_one(tmp_path):
    rows = [label(0, [1], [2, 3], True, kl=[4]), label(1, [1], [5], False), label(2, [1], [6], True, kl=[7, 8])]
    found = served(cache_for(tmp_path, rows), table(rows, "labels"), names=("completion", "kl"))
    assert [len(tokens) for tokens in found["completion"]] == [2, 1, 1]
    assert found["kl"][0] == [-0.5] and found["kl"][2] == [-0.875, -2.0]


def test_what_stands_for_a_missing_key_takes_no_value_from_the_row_whose_key_it_is(tmp_path):
    """Arrow says nothing about the bytes behind a null; here they are those of another row's key."""
    cache = cache_of(tmp_path, [scored([1], [2])])
    key = scored([1], [2])["key"]
    present = pa.chunked_array([pa.array([key], pa.binary(16))])
    behind = pa.FixedSizeBinaryArray.from_buffers(pa.binary(16), 1, [pa.py_buffer(b"\0"), pa.py_buffer(key)])
    columns = [present, pa.chunked_array([behind])]
    assert columns[1].null_count == 1
    sums = cache.logps(columns, [MINE])
    assert (sums[0].tolist(), sums[1].tolist()) == ([-0.25], [None])
    assert floats(token_logps(cache, columns, sums, [MINE])[0][0]) == [-0.25]


def test_an_empty_split_and_an_empty_cache_have_nothing(tmp_path):
    nothing = table([], "pairs")
    assert served(cache_for(tmp_path, ROWS), nothing) == {"chosen": [], "rejected": []}
    keys, cache = [PAIRS["chosen_key"], nothing["chosen_key"]], cache_for(tmp_path / "more", ROWS)
    full, empty = token_logps(cache, keys, cache.logps(keys, [MINE]), [MINE])
    assert [floats(full[row]) for row in range(3)] == expected("chosen")
    with pytest.raises(IndexError):
        empty[0]


def test_shards_that_are_merged_under_its_eyes_are_read_where_they_went(tmp_path):
    chunks = [[scored(row["prompt_ids"], row[f"{name}_ids"])] for row in ROWS for name in ("chosen", "rejected")]
    cache = cache_of(tmp_path, *chunks)
    keys = [PAIRS["chosen_key"], PAIRS["rejected_key"]]
    sums = cache.logps(keys, [MINE])
    cache_maintenance.gc(cache.folder, 1 << 20)
    assert not any((cache.folder / record.file).exists() for record in cache.records)
    found = token_logps(cache, keys, sums, [MINE])
    assert [floats(found[0][row]) for row in range(3)] == expected("chosen")


def test_rows_that_went_away_are_an_integrity_error(tmp_path):
    cache = cache_of(tmp_path, [scored([1], [2])])
    keys = [table([pair(0, [1], [3], [3])], "pairs")["chosen_key"]]
    with pytest.raises(IntegrityError, match=r"has lost rows.*prefcache score"):
        token_logps(cache, keys, [np.ma.array([-1.0])], [MINE])
