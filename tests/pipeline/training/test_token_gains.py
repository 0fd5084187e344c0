"""What a run moved most: by hand, and token by token in a real run."""

import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from prefcache.pipeline.errors import IntegrityError
from prefcache.pipeline.schema import HELD_OUT, TokenSequence
from prefcache.pipeline.stored.scored import open_scored
from prefcache.pipeline.token_text import token_texts
from prefcache.pipeline.training import token_gains
from prefcache.pipeline.training.run_log import RunLog
from tests.helpers.project import invoke, options, write_config, write_pairs


def log_of(folder, before, after):
    """A run of two steps, with these visits of held-out examples; columns by name."""
    log = RunLog(folder)
    for step, columns in ((0, before), (2, after)):
        ids = columns.pop("example_id")
        log.add_visit(step, step / 2, HELD_OUT, ids, {name: np.array(values) for name, values in columns.items()})
        log.flush(step)
    return log


def test_a_gain_is_what_good_answers_rise_and_bad_ones_fall(tmp_path):
    # a: (-4 + 5) - (-7 + 6) = 2; b: (-9 + 8) - (-5 + 6) = -2; c: (-1 + 1) - (-2 + 3) = -1, in another order afterwards
    before = {"example_id": ["a", "b", "c"], "chosen_logp": [-5.0, -8, -1], "rejected_logp": [-6.0, -6, -3]}
    after = {"example_id": ["c", "a", "b"], "chosen_logp": [-1.0, -4, -9], "rejected_logp": [-2.0, -7, -5]}
    found = token_gains.measure_gains(log_of(tmp_path / "pairs", before, after), 2)
    assert list(found.items()) == [("a", 2), ("c", -1), ("b", -2)]
    before = {"example_id": ["good", "bad"], "completion_logp": [-5.0, -5], "label": [True, False]}
    after = {"example_id": ["good", "bad"], "completion_logp": [-4.0, -8], "label": [True, False]}
    assert token_gains.measure_gains(log_of(tmp_path / "labels", before, after), 2) == {"bad": 3, "good": 1}
    # An example without a finite log-prob has none.
    visits = {"example_id": ["a", "b"], "chosen_logp": [-5.0, float("-inf")], "rejected_logp": [-6.0, -6]}
    assert list(token_gains.measure_gains(log_of(tmp_path / "infinite", {**visits}, {**visits}), 2)) == ["a"]


@pytest.mark.parametrize("n", [0, 3, 2 * token_gains.SHOWN, 20])
def test_the_first_and_the_last_are_shown_and_none_twice(n):
    by_gain = {str(i): -float(i) for i in range(n)}
    shown = token_gains.extremes(by_gain)
    assert len(set(shown)) == len(shown) == min(n, 2 * token_gains.SHOWN)
    assert shown[: token_gains.SHOWN] == [str(i) for i in range(min(n, token_gains.SHOWN))]
    assert shown[-1:] == [str(i) for i in range(n)][-1:]


def test_tokens_that_hold_parts_of_a_character_are_one_piece():
    ids = list("né".encode())
    assert token_texts(lambda some: bytes(some).decode("utf-8", "replace"), ids) == ["n", "", "é"]


@pytest.fixture(scope="module")
def once(model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gains")
    write_pairs(folder / "pairs.jsonl", 60)
    for stage in ("prepare", "score", "train"):
        invoke(folder, stage, write_config(folder, model), "--set", "prepare.held_out=0.4")
    return folder


@pytest.fixture
def trained(once, tmp_path) -> Path:
    shutil.copytree(once, tmp_path, dirs_exist_ok=True)
    return tmp_path / "runs/tiny/trained"


def test_tokens_add_up_to_what_the_run_and_the_cache_say_of_each_answer(trained, prefcache):
    rows = pq.read_table(trained / token_gains.FILE).to_pylist()
    query = (
        "select example_id, b.chosen_logp, b.rejected_logp, b.ref_chosen_logp, b.ref_rejected_logp, "
        "(b.chosen_logp - a.chosen_logp) - (b.rejected_logp - a.rejected_logp) as gain, chosen, rejected "
        "from steps a join steps b using (run, example_id, split) join examples using (example_id, split) "
        "where split = 'held_out' and a.step = 0 and b.step = (select max(step) from steps)"
    )
    said = {row["example_id"]: row for row in json.loads(prefcache("sql", "--json", query, "runs/tiny").stdout)}
    for row in rows:
        of = said[row["example_id"]]
        assert sum(row["logps"]) == pytest.approx(of[f"{row['answer']}_logp"], abs=1e-4)
        assert sum(row["ref_logps"]) == pytest.approx(of[f"ref_{row['answer']}_logp"], abs=1e-4)
        assert row["gain"] == pytest.approx(of["gain"], abs=1e-9)
        assert "".join(row["tokens"]).startswith(of[row["answer"]]) and row["tokens"][-2] == "<|im_end|>"
    by_gain = sorted((of["gain"] for of in said.values()), reverse=True)
    assert len(by_gain) > 2 * token_gains.SHOWN
    shown = [row["gain"] for row in rows[::2]]
    assert shown == pytest.approx(by_gain[: token_gains.SHOWN] + by_gain[-token_gains.SHOWN :])


def test_lost_it_is_made_again_from_the_last_checkpoint_to_the_same_bytes(trained, prefcache):
    before = (trained / token_gains.FILE).read_bytes()
    (trained / token_gains.FILE).write_bytes(before[:-1])
    done = prefcache("train", "config.yaml", "--set", "prepare.held_out=0.4")
    assert f"{token_gains.FILE} has {len(before) - 1} bytes" in done.stderr
    assert (trained / token_gains.FILE).read_bytes() == before


def test_a_run_ends_well_where_the_cache_has_no_single_tokens_or_is_read_by_no_loss(prefcache, config, tmp_path):
    prefcache("prepare", config)
    prefcache("score", config, "--set", "score.logps=false")
    for run, loss in (("sums", "sigmoid"), ("free", "simpo")):
        done = prefcache("train", config, *options(f"train.run={run}", f"train.loss={loss}"))
        rows = pq.read_table(tmp_path / f"runs/tiny/{run}/{token_gains.FILE}").to_pylist()
        assert rows and all(row["ref_logps"] is None and row["logps"] for row in rows)
        assert ("has no log-probs of single tokens" in done.stderr) == (run == "sums")


def test_a_cache_that_went_away_along_the_run_is_an_error_of_ours(trained):
    # train catches these: what it has learned must not be lost for a few colours.
    _, cache = open_scored(trained.parent / "scored")
    shutil.rmtree(cache.folder)
    sequence = TokenSequence(np.array([1], np.int32), np.array([2], np.int32))
    with pytest.raises(IntegrityError):
        token_gains.read_reference(cache, {"chosen": [sequence]}, list(cache.numerics()))


def test_labels_and_runs_with_nothing_held_out_have_theirs(prefcache, config, tmp_path):
    labels = options("prepare.examples=labels", "out=runs/labels", "train.loss=kto")
    nothing = options("prepare.held_out=0", "out=runs/nothing")
    write_pairs(tmp_path / "pairs.jsonl", 20)
    for settings in (labels, nothing):
        for stage in ("prepare", "score", "train"):
            prefcache(stage, config, *settings, "--set", "train.epochs=0.5")
    rows = pq.read_table(tmp_path / f"runs/labels/trained/{token_gains.FILE}").to_pylist()
    assert rows and {row["answer"] for row in rows} == {"completion"}
    assert not (tmp_path / f"runs/nothing/trained/{token_gains.FILE}").exists()
