"""Only some tokens of each answer count: what a run stores, what SQL shows and what costs nothing, through the commands."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest

from prefcache.pipeline.stored.prepared import Prepared
from tests.helpers.examples import mask
from tests.helpers.project import options
from tests.helpers.runs import table
from tests.helpers.scored import fingerprint, rows_of

SOON = options("train.epochs=0.5", "train.samples=1")


def first_and_last_half(n: int) -> list[int]:
    """All but a stretch in the middle."""
    return [0, 2, n // 2 + 1, n] if n > 4 else [0, n]


@pytest.fixture
def masked(scored, prefcache, tmp_path):
    """The config of scored data of which some tokens count; nothing is scored for that."""
    before = fingerprint(tmp_path)
    mask(tmp_path / "runs/tiny/prepared", first_and_last_half)
    result = json.loads(prefcache("score", scored, "--json").stdout)
    assert (result["tokens"], result["scored"]) == (0, 0) and fingerprint(tmp_path) == before
    return scored


def by_hand(tmp_path) -> dict[tuple[str, str], tuple[int, float]]:
    """(example, answer) -> how many tokens count, and the sum of the cached log-probs of these."""
    cached, found = rows_of(tmp_path), {}
    for row in Prepared(tmp_path / "runs/tiny/prepared").table().to_pylist():
        for name in ("chosen", "rejected"):
            logps, spans = cached[row[f"{name}_key"]]["logps"], row[f"{name}_spans"]
            counted = [logp for begin, end in zip(spans[::2], spans[1::2], strict=True) for logp in logps[begin:end]]
            assert 0 < len(counted) < len(logps)
            found[row["example_id"], name] = len(counted), float(np.sum(counted, dtype=np.float64))
    return found


def test_a_run_stores_and_sql_shows_the_sums_that_the_loss_read(prefcache, masked, tmp_path):
    result = json.loads(prefcache("train", masked, *SOON, "--json").stdout)
    # The policy is the reference, mask or no mask.
    assert abs(result["start"]["rewards/margins"]) < 1e-3 and result["start"]["loss"] == pytest.approx(
        np.log(2), abs=1e-3
    )
    expected = by_hand(tmp_path)
    visits = table(tmp_path / "runs/tiny/trained", "steps")
    for row in visits:
        for name in ("chosen", "rejected"):
            n, total = expected[row["example_id"], name]
            assert row[f"n_{name}_counted"] == n and row[f"ref_{name}_logp"] == pytest.approx(total, abs=1e-9)
            if row["step"] == 0:
                assert row[f"{name}_logp"] == pytest.approx(total, abs=1e-3)
    query = "select example_id, ref_chosen_logp as chosen, ref_rejected_logp as rejected, n_chosen - n_chosen_counted as masked from pairs"
    for row in json.loads(prefcache("sql", query, "runs/tiny", "--json").stdout):
        assert [row[name] for name in ("chosen", "rejected")] == pytest.approx(
            [expected[row["example_id"], name][1] for name in ("chosen", "rejected")], abs=1e-9
        )
        assert row["masked"] > 0


def test_the_table_of_tokens_shows_whole_answers_with_values_where_they_count(prefcache, masked, tmp_path):
    prefcache("train", masked, *SOON)
    rows = pq.read_table(tmp_path / "runs/tiny/trained/tokens.parquet").to_pylist()
    cached = rows_of(tmp_path)
    prepared = {row["example_id"]: row for row in Prepared(tmp_path / "runs/tiny/prepared").table().to_pylist()}
    for row in rows:
        example, name = prepared[row["example_id"]], row["answer"]
        n, spans = example[f"n_{name}"], example[f"{name}_spans"]
        counts = [any(begin <= t < end for begin, end in zip(spans[::2], spans[1::2], strict=True)) for t in range(n)]
        assert [logp is not None for logp in row["logps"]] == [logp is not None for logp in row["ref_logps"]] == counts
        logps = cached[example[f"{name}_key"]]["logps"]
        assert [logp for logp in row["ref_logps"] if logp is not None] == [
            logp for logp, is_counted in zip(logps, counts, strict=True) if is_counted
        ]
    report = json.loads(prefcache("report", "runs/tiny", "--json").stdout)["report"]
    assert "tokens that do not count have none" in (tmp_path / report).read_text()


def test_a_selection_chooses_what_sql_shows(prefcache, masked, tmp_path):
    where = "ref_chosen_logp - ref_chosen_logp_all > 20 and margin_per_token > -1 and n_rejected_counted < n_rejected"
    query = f"select example_id from pairs where split = 'train' and {where}"
    expected = {row["example_id"] for row in json.loads(prefcache("sql", query, "runs/tiny", "--json").stdout)}
    assert 0 < len(expected) < 50
    prefcache("train", masked, *SOON, *options(f"train.where={where}", "train.epochs=1"))
    visits = table(tmp_path / "runs/tiny/trained", "steps")
    assert {row["example_id"] for row in visits if row["split"] == "train"} == expected


def test_a_reference_that_moves_is_of_the_tokens_that_count(prefcache, masked, tmp_path):
    moving = options("train.moving_reference={alpha: 1, every: 1}", "train.epochs=1", "train.tokens={decay: 0.9}")
    prefcache("train", masked, *moving, "--set", "train.learning_rate=0.003")
    # The policy is its own reference at each step's beginning: only then is every margin 0.
    rows = [row for row in table(tmp_path / "runs/tiny/trained", "metrics") if row["step"]]
    assert len(rows) > 3 and max(abs(row["rewards/margins"]) for row in rows) < 1e-4


def test_over_sums_alone_a_mask_is_refused_before_a_model_is_loaded_and_whole_answers_train(
    prefcache, config, tmp_path
):
    prefcache("prepare", config)
    prefcache("score", config, "--set", "score.logps=false")
    prefcache("train", config, *SOON)
    mask(tmp_path / "runs/tiny/prepared", first_and_last_half)
    warned = prefcache("score", config, "--set", "score.logps=false").stderr
    assert "score.logps is false, and 120 answers have tokens that do not count" in warned
    second = [*SOON, "--set", "train.run=second"]
    error = prefcache("train", config, *second, code=2).stderr
    assert "120 answers have tokens that do not count (prepare.train_on), and " in error
    assert "Set prepare.train_on to all, which counts every token and needs sums only, and prepare again" in error
    assert not (tmp_path / "runs/tiny/second").exists()
    # What reads no reference, or whose answers count as a whole, needs no single tokens.
    prefcache("train", config, *second, "--set", "train.loss=simpo")
    mask(tmp_path / "runs/tiny/prepared", lambda n: [0, n])
    prefcache("score", config, "--set", "score.logps=false")
    prefcache("train", config, *SOON, "--set", "train.run=third")
