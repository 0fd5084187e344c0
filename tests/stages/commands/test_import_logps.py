"""Log-probs that were made elsewhere, taken into the cache and used."""

import json
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.stored.memos import WeightsMemo
from prefcache.pipeline.stored.object_store import ObjectStore
from tests.helpers.project import pair, write_config
from tests.helpers.scored import write_labels

N = 24


@pytest.fixture(scope="module")
def elsewhere(model: Path) -> list[dict]:
    """Pairs with the sums of a plain forward in float32, as another trainer would store them."""
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(model)
    return [pair(i) | _values(loaded, tokenizer, pair(i)) for i in range(N)]


def _values(loaded, tokenizer, row: dict) -> dict:
    values = {}
    for answer in ("chosen", "rejected"):
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[answer]}]
        n = len(tokenizer.apply_chat_template(turns[:1], add_generation_prompt=True, return_dict=False))
        ids = torch.tensor([tokenizer.apply_chat_template(turns, return_dict=False)])
        with torch.inference_mode():
            logps = loaded(ids).logits[0, n - 1 : -1].log_softmax(-1)
        logps = logps.gather(1, ids[0, n:, None])[:, 0]
        values |= {f"ref_{answer}_logps": logps.sum().item(), f"ref_{answer}_token_logps": logps.tolist()}
    return values


def write(folder: Path, model: Path, rows: list[dict], *, tokens: bool = False, names: str = "ref_{}_logps") -> Path:
    renamed = {f"ref_{answer}_logps": names.format(answer) for answer in ("chosen", "rejected")}
    kept = [
        {renamed.get(name, name): value for name, value in row.items() if tokens or "token" not in name} for row in rows
    ]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in kept))
    return write_config(folder, model)


def imported(prefcache, config: Path, *arguments, code: int = 0) -> dict:
    prefcache("prepare", "-q", config)
    return json.loads(prefcache("import", "-q", config, "--json", *arguments, code=code).stdout)


def test_imported_sums_are_used_by_score_and_train_where_they_are_accepted(prefcache, tmp_path, model, elsewhere):
    config = write(tmp_path, model, elsewhere)
    result = imported(prefcache, config)
    assert (result["imported"], result["left"], result["refused"]) == (2 * N, 0, {})
    assert result["numerics"]["engine"] == "imported" and result["numerics"]["from"] == "pairs.jsonl"
    assert 0 < result["parity"]["max"] < 1e-5
    assert WeightsMemo.path(tmp_path / "cache").exists()  # the next command does not hash the weights again

    assert result["numerics_id"] in prefcache("score", "-q", config, code=5).stderr
    scored = json.loads(prefcache("score", "-q", config, "--json", *result["use"].split()).stdout)
    assert (scored["scored"], scored["cached_before"]) == (0, 2 * N)
    prefcache("train", "-q", config)
    query = "select line, ref_chosen_logp from steps join examples using (example_id) where step = 1 order by line"
    for row in json.loads(prefcache("sql", query, "runs/tiny", "--json").stdout):
        assert row["ref_chosen_logp"] == elsewhere[row["line"] - 1]["ref_chosen_logps"]


def test_without_lists_only_sums_are_stored_and_with_them_every_token(prefcache, tmp_path, model, elsewhere):
    config = write(tmp_path, model, elsewhere)
    assert imported(prefcache, config)["with_tokens"] == 0
    table = pq.read_table(list(tmp_path.glob("cache/*/*.parquet")))
    assert table["logps"].null_count == len(table) == 2 * N
    assert sorted(table["logp_sum"].to_pylist()) == sorted(
        row[f"ref_{answer}_logps"] for row in elsewhere for answer in ("chosen", "rejected")
    )

    write(tmp_path, model, elsewhere, tokens=True)
    result = imported(prefcache, config, "--set", "cache=other", "--set", "score.tokens_per_shard=200")
    assert result["with_tokens"] == 2 * N
    tables = [pq.read_table(shard) for shard in tmp_path.glob("other/*/*.parquet")]
    assert len(tables) > 1
    lists = {tuple(logps) for table in tables for logps in table["logps"].to_pylist()}
    assert tuple(elsewhere[0]["ref_chosen_token_logps"]) in lists


@pytest.mark.parametrize("names", ["reference_{}_logps", "mine_{}"])
def test_other_names_are_known_or_named(prefcache, tmp_path, model, elsewhere, names):
    config = write(tmp_path, model, elsewhere, names=names)
    prefcache("prepare", "-q", config)
    if names == "mine_{}":
        done = prefcache("import", "-q", config, code=2)
        assert "It has: prompt, chosen, rejected, mine_chosen, mine_rejected" in done.stderr
        assert "--chosen COLUMN" in done.stderr
    options = ["--chosen", "mine_chosen", "--rejected", "mine_rejected"] if names == "mine_{}" else []
    assert imported(prefcache, config, *options)["imported"] == 2 * N


BAD_VALUES = [
    ("ref_chosen_logps", float("nan"), "with a value that is not finite"),
    ("ref_chosen_logps", float("-inf"), "with a value that is not finite"),
    ("ref_chosen_logps", 0.5, "with a positive value"),
    ("ref_rejected_logps", None, "without a value"),
    ("ref_rejected_logps", "lots", "with a value that is not a number"),
    ("ref_rejected_logps", True, "with a value that is not a number"),
    ("ref_chosen_token_logps", [-1.0], "with another number of token values than the answer has tokens"),
    ("ref_chosen_logps", -1.0, "with token values that do not add up to the sum"),
]


def test_a_bad_value_is_refused_alone_and_counted(prefcache, tmp_path, model, elsewhere):
    bad = [row | {column: value} for row, (column, value, _) in zip(elsewhere, BAD_VALUES, strict=False)]
    config = write(tmp_path, model, [*bad, *elsewhere[len(bad) :]], tokens=True)
    result = imported(prefcache, config)
    assert (result["imported"], result["left"]) == (2 * N - len(bad), len(bad))
    assert result["refused"] == Counter(reason for _, _, reason in BAD_VALUES)
    # The rest is scored next to them.
    scored = json.loads(prefcache("score", "-q", config, "--json", *result["use"].split()).stdout)
    assert scored["scored"] == len(bad)


def test_values_of_other_weights_are_refused_and_nothing_is_stored(prefcache, tmp_path, other_model, elsewhere):
    config = write(tmp_path, other_model, elsewhere)
    prefcache("prepare", "-q", config)
    done = prefcache("import", "-q", config, code=4)
    assert "in float32:" in done.stderr and "--dtype bfloat16" in done.stderr
    assert not list(tmp_path.glob("cache/*/*.parquet"))
    # Whoever asks for no comparison gets none.
    assert imported(prefcache, config, "--set", "score.parity_sample=0")["parity"] is None


def test_a_store_that_may_only_be_read_is_refused_before_a_model_is_loaded(
    prefcache, tmp_path, model, elsewhere, s3, monkeypatch
):
    def refuse_access(self, name, data):
        raise UsageError("access was refused")

    config = write(tmp_path, model, elsewhere)
    prefcache("prepare", config)
    monkeypatch.setattr(ObjectStore, "create", refuse_access)
    message = prefcache("import", config, "--set", f"cache={s3.url}", code=2).stderr
    assert f"{s3.url}/" in message and "cannot be written" in message and "computing" not in message


def test_rounding_is_allowed_to_the_dtype_that_is_named(prefcache, tmp_path, model, elsewhere):
    # 0.05 nats a token are far from float32 and usual in bfloat16
    rows = [dict(row) for row in elsewhere]
    for row in rows:
        for answer in ("chosen", "rejected"):
            row[f"ref_{answer}_logps"] -= 0.05 * len(row[f"ref_{answer}_token_logps"])
    config = write(tmp_path, model, rows)
    prefcache("prepare", "-q", config)
    prefcache("import", "-q", config, code=4)
    result = imported(prefcache, config, "--dtype", "bfloat16")
    assert result["numerics"]["dtype"] == "bfloat16"
    assert result["parity"]["max"] == pytest.approx(0.05, abs=1e-4)


def test_a_list_that_is_off_in_one_token_is_refused(prefcache, tmp_path, model, elsewhere):
    rows = [dict(row) for row in elsewhere]
    for row in rows:
        tokens = list(row["ref_chosen_token_logps"])
        tokens[0], tokens[1] = tokens[0] - 0.1, tokens[1] + 0.1  # the sum stays
        row["ref_chosen_token_logps"] = tokens
    config = write(tmp_path, model, rows, tokens=True)
    prefcache("prepare", "-q", config)
    assert "0.1 nats off on a token" in prefcache("import", "-q", config, code=4).stderr


def test_two_values_for_one_sequence_are_both_refused(prefcache, tmp_path, model, elsewhere):
    twice = dict(elsewhere[0]) | {"ref_chosen_logps": elsewhere[0]["ref_chosen_logps"] - 1}
    config = write(tmp_path, model, [*elsewhere, twice])
    result = imported(prefcache, config)
    assert result["imported"] == 2 * N - 1
    assert result["refused"] == {"with another value for the same sequence": 2}


def test_importing_again_adds_nothing(prefcache, tmp_path, model, elsewhere):
    config = write(tmp_path, model, elsewhere)
    first = imported(prefcache, config)
    shards = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/*/*")}
    assert imported(prefcache, config) == first
    assert {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/*/*")} == shards


def test_an_imported_cache_whose_sums_were_added_in_float32_is_whole(prefcache, tmp_path, model, elsewhere):
    # `elsewhere` adds in float32, as trainers do: in float64 the same lists have other sums.
    exact = sum(np.array(row["ref_chosen_token_logps"], np.float32).sum(dtype=np.float64) for row in elsewhere)
    assert exact != sum(row["ref_chosen_logps"] for row in elsewhere)
    result = imported(prefcache, write(tmp_path, model, elsewhere, tokens=True))
    assert (result["imported"], result["with_tokens"]) == (2 * N, 2 * N)
    assert json.loads(prefcache("verify", "-q", "--json").stdout)["damaged"] == 0


def test_what_score_wrote_comes_back_exactly(prefcache, tmp_path, model, elsewhere):
    write(tmp_path, model, [pair(i) for i in range(N)])
    prefcache(
        *("score", "-q", "--input", "pairs.jsonl", "--model", model, "--output", "scored.csv", "--per-token"),
    )
    config = write_config(tmp_path, model)
    prefcache("prepare", "-q", config, "--set", "prepare.data=scored.csv")
    arguments = ["--set", "prepare.data=scored.csv", "--set", "cache=other"]
    result = json.loads(prefcache("import", "-q", config, "--json", *arguments).stdout)
    assert (result["imported"], result["with_tokens"], result["refused"]) == (2 * N, 2 * N, {})
    tables = [
        pq.read_table(list(tmp_path.glob(f"{folder}/*/*.parquet"))).drop_columns("numerics_id").sort_by("key")
        for folder in ("cache", "other")
    ]
    assert tables[0].equals(tables[1])


def test_rows_are_said_to_be_in_the_store_and_not_in_its_mirror(prefcache, tmp_path, model, elsewhere, s3):
    config = write(tmp_path, model, elsewhere)
    prefcache("prepare", "-q", config)
    done = prefcache("import", "-q", config, "--set", f"cache={s3.url}")
    assert done.stdout.startswith(f"{s3.url}/") and "/.cache/" not in done.stdout


def test_labelled_answers_are_imported_and_mismatched_ones_left_to_score(prefcache, tmp_path, model):
    write_labels(tmp_path / "labels.jsonl", 8)
    prefcache("score", "-q", "--input", "labels.jsonl", "--model", model, "--output", "pairs.jsonl")
    config = write_config(tmp_path, model)
    result = imported(prefcache, config, "--set", "cache=other")
    assert (result["imported"], result["left"]) == (8, 8)
    assert "--chosen does not fit" in prefcache("import", config, "--chosen", "x", code=2).stderr


def test_changed_data_is_not_imported_under_old_tokens(prefcache, tmp_path, model, elsewhere):
    config = write(tmp_path, model, elsewhere)
    prefcache("prepare", "-q", config)
    write(tmp_path, model, elsewhere[1:])
    assert "Prepare again" in prefcache("import", config, code=5).stderr


def test_values_that_cannot_be_compared_are_refused(prefcache, tmp_path, model, elsewhere):
    broken = shutil.copytree(model, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    config = write(tmp_path, broken, elsewhere)
    prefcache("prepare", "-q", config)
    assert "nan nats off" in prefcache("import", "-q", config, code=4).stderr
