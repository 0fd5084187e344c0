"""Log-probs looked up by token ids, against Transformers' own forward of each sequence."""

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import AutoModelForCausalLM

import prefcache
from prefcache.pipeline.stored import verified_shards
from prefcache.pipeline.stored.cache import Cache
from tests.helpers.caches import rot
from tests.helpers.project import build_model

SEQUENCES = [([5, 6, 7], [8, 9]), ([5, 6, 7], [8, 10, 11]), ([12], [13])]
PROMPTS, COMPLETIONS = ([pair[i] for pair in SEQUENCES] for i in (0, 1))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return build_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module")
def expected(model):
    """The log-prob of each completion token, by a plain forward of one sequence at a time."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def logps(prompt, completion):
        with torch.no_grad():
            logits = loaded(torch.tensor([prompt + completion])).logits[0].log_softmax(-1)
        return [logits[len(prompt) + i - 1, token].item() for i, token in enumerate(completion)]

    return [logps(*pair) for pair in SEQUENCES]


def open_cache(tmp_path, model, **options):
    return prefcache.open_cache(tmp_path / "cache", model=str(model), **({"quiet": True} | options))


def test_a_lookup_says_which_sequences_are_missing_and_writes_nothing(tmp_path, model):
    found = open_cache(tmp_path, model).logps(PROMPTS, COMPLETIONS)
    assert found.missing.all() and not found.failed.any() and np.isnan(found.sums).all() and len(found) == 3
    assert list(tmp_path.iterdir()) == []


def test_what_is_scored_is_found_in_any_order_with_the_values_of_the_plain_forward(tmp_path, model, expected):
    cache = open_cache(tmp_path, model)
    result = cache.score(PROMPTS, COMPLETIONS)
    # The prompt of two sequences, and 3 + 2, 3 + 3 and 1 + 1 tokens.
    assert (result.sequences, result.scored, result.tokens, result.failed) == (3, 3, 13, 0)
    assert result.parity.max < 1e-5 and len(cache) == 3

    found = open_cache(tmp_path, model).logps(PROMPTS[::-1], COMPLETIONS[::-1], per_token=True)
    assert not found.missing.any()
    np.testing.assert_allclose(found.sums, [sum(each) for each in expected[::-1]], atol=1e-5)
    for tokens, plain in zip(found.tokens.to_pylist(), expected[::-1], strict=True):
        np.testing.assert_allclose(tokens, plain, atol=1e-5)


def test_only_what_is_missing_is_scored(tmp_path, model, expected):
    with open_cache(tmp_path, model) as cache:
        assert cache.score(PROMPTS[:1], COMPLETIONS[:1]).tokens == 5
        loaded = cache._scorer
        again = cache.score(PROMPTS, COMPLETIONS)
        assert (again.cached_before, again.scored, again.tokens) == (1, 2, 8)
        assert cache._scorer is loaded is not None  # the model was loaded once
    assert cache._scorer is None
    assert cache.score(PROMPTS, COMPLETIONS).changed is False
    np.testing.assert_allclose(cache.logps(PROMPTS, COMPLETIONS).sums, [sum(each) for each in expected], atol=1e-5)


def test_a_damaged_shard_is_scored_again_also_if_only_reading_it_tells(tmp_path, model, expected, monkeypatch, capsys):
    monkeypatch.setattr(verified_shards, "SETTLED_SECONDS", -1.0)
    scored = open_cache(tmp_path, model)
    scored.score(PROMPTS, COMPLETIONS)
    opened = Cache(scored.folder, scored.model_id)
    (record,) = opened.records
    rot(opened, record, "key")
    cache = open_cache(tmp_path, model, quiet=False)
    assert cache.score(PROMPTS, COMPLETIONS).scored == 3
    assert f"{record.file} " in capsys.readouterr().err
    np.testing.assert_allclose(cache.logps(PROMPTS, COMPLETIONS).sums, [sum(each) for each in expected], atol=1e-5)


def test_nothing_is_asked_for_and_nothing_is_found(tmp_path, model):
    cache = open_cache(tmp_path, model)
    assert len(cache.logps([], [])) == 0 and cache.score([], []).scored == 0


def test_missing_rows_among_found_ones_are_null(tmp_path, model):
    cache = open_cache(tmp_path, model)
    cache.score(PROMPTS[1:], COMPLETIONS[1:])
    found = cache.logps(PROMPTS, COMPLETIONS, per_token=True)
    assert found.missing.tolist() == [True, False, False]
    assert [each and len(each) for each in found.tokens.to_pylist()] == [None, 3, 1]


@pytest.mark.parametrize(
    "as_given",
    [
        list,
        lambda lists: [np.array(each) for each in lists],
        lambda lists: pa.array(lists, pa.list_(pa.int32())),
        lambda lists: pa.chunked_array(
            [pa.array(lists[:1], pa.large_list(pa.int64())), pa.array(lists[1:], pa.large_list(pa.int64()))]
        ),
        lambda lists: pa.array([[-1, None], *lists], pa.list_(pa.int32()))[1:],
    ],
    ids=["lists", "arrays", "arrow", "chunks", "slice"],
)
def test_ids_are_taken_as_they_come(tmp_path, model, as_given):
    cache = open_cache(tmp_path, model)
    cache.score(PROMPTS, COMPLETIONS)
    found = cache.logps(as_given(PROMPTS), as_given(COMPLETIONS))
    assert not found.missing.any() and len(set(found.sums)) == 3


def test_prepared_keys_are_looked_up(tmp_path, model):
    from prefcache.pipeline.schema import KEY, sequence_key

    cache = open_cache(tmp_path, model)
    cache.score(PROMPTS, COMPLETIONS)
    keys = pa.array([sequence_key(*SEQUENCES[2]), bytes(16)], KEY)
    assert cache.logps_of_keys(keys).missing.tolist() == [False, True]
    with pytest.raises(prefcache.UsageError, match="expected fixed_size_binary"):
        cache.logps_of_keys(pa.array(["ab"]))


@pytest.mark.parametrize(
    ("prompts", "completions", "message"),
    [
        ([[1], []], [[2], [3]], "prompt_ids of row 1 is empty. Without a prompt, the first token has no log-prob"),
        ([[1]], [[]], "completion_ids of row 0 is empty"),
        ([[1]], [[2], [3]], "There are 1 prompts and 2 completions"),
        ([1, 2], [3], "prompt_ids has the type int64; expected a list of token ids for each row"),
        (["ab"], [[1]], "prompt_ids has the type string"),
        (None, [[1]], "prompt_ids must have a list of token ids"),
        ([[1], 2], [[1], [2]], "prompt_ids must have a list of token ids"),
        (pa.array([[1.5]]), [[1]], "prompt_ids has the type list<item: double>"),
        ([[1, None]], [[1]], "prompt_ids has null in place of an id"),
        ([[1]], [[-100, 2]], "completion_ids has the id -100, which is not a token"),
        ([[2**40]], [[1]], "prompt_ids must have a list of token ids for each row"),
    ],
)
def test_what_is_no_sequence_is_refused(tmp_path, model, prompts, completions, message):
    with pytest.raises(prefcache.UsageError, match=message.replace("(", r"\(")):
        open_cache(tmp_path, model).logps(prompts, completions)


def test_ids_outside_the_vocabulary_are_refused_before_the_model_loads(tmp_path, model):
    with pytest.raises(prefcache.IdentityError, match="Token id 100000 is not in the vocabulary"):
        open_cache(tmp_path, model).score([[1]], [[100_000]])


def test_sequences_beyond_the_models_length_are_refused_in_words_for_every_caller(tmp_path, model):
    with pytest.raises(
        prefcache.UsageError, match=r"takes 512\. .*in TRL, DPOConfig\(max_length=512\); or cut the ids"
    ):
        open_cache(tmp_path, model).score([[5] * 600], [[6]])


def test_places_are_paths_or_text_and_settings_a_dict(tmp_path, model):
    assert len(prefcache.open_cache(str(tmp_path / "cache"), model=model, quiet=True)) == 0
    with pytest.raises(prefcache.UsageError, match="cache is None; expected a folder"):
        prefcache.open_cache(None, model=model)
    with pytest.raises(prefcache.UsageError, match=r"config\.json'\)?; expected a folder"):
        prefcache.open_cache(model / "config.json", model=model)
    with pytest.raises(prefcache.UsageError, match="score: found 'float32', expected a mapping of engine"):
        prefcache.open_cache(tmp_path, model=model, score="float32")


def test_ids_before_a_slice_are_not_read(tmp_path, model):
    rows = pa.array([[100_000], *PROMPTS], pa.list_(pa.int32()))[1:]
    assert open_cache(tmp_path, model).score(rows, COMPLETIONS).scored == 3


def test_rows_of_another_dtype_are_served_alone_but_not_mixed(tmp_path, model):
    open_cache(tmp_path, model, score={"dtype": "bfloat16"}).score(PROMPTS[:1], COMPLETIONS[:1])
    cache = open_cache(tmp_path, model)
    assert cache.logps(PROMPTS, COMPLETIONS).missing.tolist() == [False, True, True]
    with pytest.raises(prefcache.IdentityError, match=r"score\.accept_numerics"):
        cache.score(PROMPTS, COMPLETIONS)
    assert open_cache(tmp_path, model, score={"dtype": "bfloat16"}).score(PROMPTS, COMPLETIONS).scored == 2


def test_a_cache_that_prepare_and_score_have_filled_is_the_same_cache(tmp_path, model, monkeypatch):
    from tests.helpers.project import write_config, write_pairs

    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "pairs.jsonl", 6)
    config = write_config(tmp_path, model)
    prefcache.prepare(config, quiet=True)
    scored = prefcache.score(config, quiet=True)
    examples = prefcache.sql("select * from pairs", "runs/tiny")
    assert len(examples) == 6
    from prefcache.pipeline.stored.prepared import Prepared

    table = Prepared(tmp_path / "runs/tiny/prepared").table()
    cache = open_cache(tmp_path, model)
    found = cache.logps(table["prompt_ids"], table["chosen_ids"])
    assert not found.missing.any() and len(cache) == scored.sequences
    assert sorted(found.sums) == pytest.approx(sorted(examples.arrow()["ref_chosen_logp_all"].to_pylist()), abs=1e-12)
    assert cache.score(table["prompt_ids"], table["rejected_ids"]).scored == 0
