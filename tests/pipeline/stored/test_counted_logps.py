"""An answer that counts in part has the sum of the tokens that count; any other has the cached sum, bit for bit."""

import numpy as np
import pytest

from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.stored import cache_maintenance
from prefcache.pipeline.stored.cache import Cache
from prefcache.pipeline.stored.counted_logps import CountedLogps, counted_sums, find_counted_sums
from prefcache.pipeline.stored.prepared import CountedTokens
from prefcache.pipeline.stored.token_logps import token_logps
from tests.helpers.examples import MINE, OTHER, cache_for, cache_of, floats, label, masked, pair, scored, table

NAMES = ("chosen", "rejected")
# The reference gives token n of an answer minus its id times n, in eighths.
ROWS = [
    masked(pair(0, [1], [2, 3, 4, 5], [5]), chosen=[1, 2, 3, 4]),
    pair(1, [1, 1], [6], [7, 8]),
    masked(
        pair(2, [1], [2, 3, 4, 5], [9, 9, 9]), rejected=[0, 2]
    ),  # its chosen answer is pair 0's, and all of it counts
    masked(pair(3, [2], [4, 4], [6, 6]), chosen=[], rejected=[1, 2]),
]


def read(cache, rows=ROWS, accepted=(MINE,), names=NAMES, find=counted_sums):
    examples = table(rows, "labels" if "label" in rows[0] else "pairs")
    keys, counted = [examples[f"{name}_key"] for name in names], [CountedTokens(examples, name) for name in names]
    return find(cache, keys, counted, cache.logps(keys, list(accepted)), list(accepted))


def sums(*arguments, **named):
    return [each.tolist() for each in read(*arguments, **named)]


def test_sums_are_of_the_tokens_that_count_by_hand(tmp_path):
    chosen, rejected = sums(cache_for(tmp_path, ROWS))
    # -(3*2 + 5*4)/8; -6/8; all of -(2 + 6 + 12 + 20)/8; nothing
    assert chosen == [-3.25, -0.75, -5.0, 0.0]
    # -5/8; -(7 + 16)/8; -(9 + 18)/8; -12/8
    assert rejected == [-0.625, -2.875, -3.375, -1.5]


def test_without_a_mask_the_cached_sums_are_served_and_no_list_is_read(tmp_path, monkeypatch):
    rows = [pair(i, [i + 1], [2] * (i + 1), [3, i + 2]) for i in range(5)]
    cache, asked = cache_for(tmp_path, rows), []
    real = Cache.read
    monkeypatch.setattr(
        Cache, "read", lambda self, record, columns=None: asked.append(columns) or real(self, record, columns)
    )
    keys = [table(rows, "pairs")[f"{name}_key"] for name in NAMES]
    whole = [each.tolist() for each in cache.logps(keys, [MINE])]
    assert sums(cache, rows) == whole and asked == []
    # With one mask, lists are read, and every other sum stays to the bit.
    one = [masked(rows[0], chosen=[0, 1]), masked(rows[1], rejected=[1, 2]), *rows[2:]]
    found = sums(cache, one)
    assert asked and [found[0][2:], found[1][2:]] == [whole[0][2:], whole[1][2:]]


def test_many_answers_from_many_shards_have_the_sums_that_python_adds_up(tmp_path):
    dice, rows = np.random.default_rng(0), []
    for i in range(60):
        ids = {name: dice.integers(2, 50, dice.integers(1, 30)).tolist() for name in NAMES}
        spans = {}
        for name, each in ids.items():
            edges = sorted({int(edge) for edge in dice.integers(0, len(each) + 1, 2 * dice.integers(1, 4))})
            spans[name] = edges[: len(edges) // 2 * 2]
        rows.append(masked(pair(i, [i % 7 + 1], ids["chosen"], ids["rejected"]), **spans))
    once = {row[f"{name}_key"]: scored(row["prompt_ids"], row[f"{name}_ids"]) for row in rows for name in NAMES}
    chunks = [list(once.values())[i::5] for i in range(5)]
    found = sums(cache_of(tmp_path, *chunks), rows)
    for name, values in zip(NAMES, found, strict=True):
        for row, value in zip(rows, values, strict=True):
            logps, spans = once[row[f"{name}_key"]]["logps"], row[f"{name}_spans"]
            expected = sum(sum(logps[begin:end]) for begin, end in zip(spans[::2], spans[1::2], strict=True))
            assert value == pytest.approx(expected, abs=1e-9)


def test_long_sums_do_not_drift(tmp_path):
    # In float32, 30,000 tokens of -0.1 are off by more than a thousandth.
    answer, logps = [3] * 30_001, np.full(30_001, -0.1, np.float32)
    row = scored([1], answer, logps=logps.tolist(), logp_sum=float(logps.sum(dtype=np.float64)))
    rows = [masked(pair(0, [1], answer, answer), chosen=[0, 30_000])]
    assert sums(cache_of(tmp_path, [row]), rows)[0][0] == pytest.approx(30_000 * float(np.float32(-0.1)), abs=1e-9)


def test_an_answer_that_failed_or_is_missing_stays_without_a_sum(tmp_path):
    rows = [
        masked(label(0, [1], [2, 3], True, kl=[4, 5]), completion=[1, 2], kl=[0, 1]),
        label(1, [1], [5], False),
        masked(label(2, [1], [6, 7], True, kl=[7, 8]), completion=[0, 1]),
    ]
    cache = cache_for(tmp_path, rows, without=(rows[2]["completion_key"],))
    assert sums(cache, rows, names=("completion", "kl")) == [[-0.75, -0.625, None], [-0.5, None, -2.875]]


def test_of_two_numerics_the_list_is_that_of_the_sum_that_is_served(tmp_path):
    theirs = scored([1], [2, 3], numerics_id=OTHER, logps=[-0.5, -0.75], logp_sum=-1.25)
    cache = cache_of(tmp_path, [theirs], [scored([1], [2, 3])])
    rows = [masked(pair(0, [1], [2, 3], [2, 3]), chosen=[0, 1])]
    assert [sums(cache, rows, accepted)[0] for accepted in ([MINE, OTHER], [OTHER, MINE])] == [[-0.25], [-0.5]]


def test_lists_are_of_the_tokens_that_count(tmp_path):
    examples, cache = table(ROWS, "pairs"), cache_for(tmp_path, ROWS)
    keys = [examples["chosen_key"]]
    (lists,) = token_logps(cache, keys, cache.logps(keys, [MINE]), [MINE])
    counted = CountedLogps(lists, CountedTokens(examples, "chosen"))
    assert [floats(counted[row]) for row in range(4)] == [[-0.75, -2.5], [-0.75], [-0.25, -0.75, -1.5, -2.5], []]


# -- sums only -------------------------------------------------------------------------------------------------------


def sums_only(tmp_path):
    return cache_of(tmp_path, [scored(*each, logps=None) for each in (([1], [2, 3]), ([1], [4]))])


def test_a_mask_over_sums_alone_is_refused_with_what_to_do(tmp_path):
    rows = [masked(pair(0, [1], [2, 3], [4]), chosen=[0, 1])]
    with pytest.raises(UsageError) as caught:
        read(sums_only(tmp_path), rows)
    said = str(caught.value)
    assert said.startswith("1 answers have tokens that do not count (prepare.train_on), and ")
    assert "no log-probs of single tokens: it was scored with score.logps: false, or imported as sums" in said
    assert "Set prepare.train_on to all" in said and "--set score.logps=true" in said


def test_whole_answers_need_sums_only(tmp_path):
    assert sums(sums_only(tmp_path), [pair(0, [1], [2, 3], [4])]) == [[-1.0], [-0.5]]


def test_who_only_looks_finds_nothing_for_a_mask_over_sums_alone(tmp_path):
    rows = [masked(pair(0, [1], [2, 3], [4]), chosen=[0, 1]), pair(1, [1], [4], [2, 3])]
    found, error = read(sums_only(tmp_path), rows, find=find_counted_sums)
    assert [each.tolist() for each in found] == [[None, -0.5], [-0.5, -1.0]] and error is not None


# -- what changes or is damaged --------------------------------------------------------------------------------------


def test_shards_that_are_merged_under_its_eyes_are_read_where_they_went(tmp_path):
    once = {row[f"{name}_key"]: scored(row["prompt_ids"], row[f"{name}_ids"]) for row in ROWS for name in NAMES}
    cache, examples = cache_of(tmp_path, *([row] for row in once.values())), table(ROWS, "pairs")
    keys, counted = [examples[f"{name}_key"] for name in NAMES], [CountedTokens(examples, name) for name in NAMES]
    whole = cache.logps(keys, [MINE])
    cache_maintenance.gc(cache.folder, 1 << 20)
    assert not any((cache.folder / record.file).exists() for record in cache.records)
    assert counted_sums(cache, keys, counted, whole, [MINE])[0].tolist() == [-3.25, -0.75, -5.0, 0.0]


def test_a_list_of_another_length_than_the_answer_is_refused(tmp_path):
    short = {**scored([1], [2, 3], logps=[-1.0], logp_sum=-1.0), "n_completion": 1}
    rows = [masked(pair(0, [1], [2, 3], [4]), chosen=[0, 1])]
    with pytest.raises(IntegrityError, match="another number of log-probs for an answer than the answer has tokens"):
        read(cache_of(tmp_path, [short, scored([1], [4])]), rows)
