"""Rows out: the data as it came, with the reference's log-probs next to it."""

import functools
import gzip
import json
import os
import shutil
import subprocess
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from prefcache.pipeline.preparing.record_outcomes import Batch, common_types
from prefcache.pipeline.preparing.sources import Line
from tests.helpers.examples import mask
from tests.helpers.project import PREFCACHE, invoke, pair, write_config, write_pairs
from tests.helpers.scored import write_labels

ADDED = ["ref_chosen_logps", "ref_rejected_logps", "n_prompt_tokens", "n_chosen_tokens", "n_rejected_tokens"]


@functools.cache
def load(model: Path):
    return AutoTokenizer.from_pretrained(model), AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)


def forward(model: Path, prompt: str, answer: str) -> tuple[int, list[float]]:
    """Tokens of the prompt, and each answer token's log-prob, by Transformers alone."""
    tokenizer, loaded = load(model)
    turns = [{"role": "user", "content": prompt}]
    prompt_ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    turns.append({"role": "assistant", "content": answer})
    ids = tokenizer.apply_chat_template(turns, return_dict=False)
    assert ids[: len(prompt_ids)] == prompt_ids
    with torch.inference_mode():
        logps = loaded(torch.tensor([ids])).logits[0].double().log_softmax(-1)
    return len(prompt_ids), [logps[t - 1, ids[t]].item() for t in range(len(prompt_ids), len(ids))]


def rows_of(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".arrow":
        return pa.ipc.open_stream(path).read_all().to_pylist()
    with gzip.open(path, "rt") if path.suffix == ".gz" else open(path) as file:
        return [json.loads(line) for line in file]


@pytest.fixture
def score(prefcache, model):
    """`score --input DATA --output OUTPUT`."""

    def run(data: str, output: str, *options: str, code: int = 0):
        arguments = ("score", "-q", "--input", data, "--model", model, "--output", output, *options)
        return prefcache(*arguments, code=code)

    return run


KINDS = ("parquet", "arrow", "jsonl", "jsonl.gz", "jsonl.zst", "csv")


@pytest.fixture(scope="module")
def exported(tmp_path_factory, model) -> Path:
    """40 pairs, scored once and written to files of every kind, by one call each."""
    folder = tmp_path_factory.mktemp("exported")
    write_pairs(folder / "pairs.jsonl", 40)
    for kind in KINDS:
        arguments = ("score", "--input", "pairs.jsonl", "--model", model, "--output", f"s.{kind}", "--json")
        (folder / f"result.{kind}").write_text(invoke(folder, *arguments).stdout)
    arguments = ("score", "--input", "pairs.jsonl", "--model", model, "--output", "tokens.parquet", "--per-token")
    invoke(folder, *arguments)
    return folder


def test_the_rows_come_out_in_order_with_the_log_probs_of_a_plain_forward(exported, model):
    rows = rows_of(exported / "tokens.parquet")
    assert [{name: row[name] for name in pair(0)} for row in rows] == [pair(i) for i in range(40)]
    assert {row["prefcache_status"] for row in rows} == {"ok"}
    for row in rows[::13]:
        for answer in ("chosen", "rejected"):
            n_prompt, logps = forward(model, row["prompt"], row[answer])
            assert (row["n_prompt_tokens"], row[f"n_{answer}_tokens"]) == (n_prompt, len(logps))
            assert row[f"ref_{answer}_logps"] == pytest.approx(sum(logps), abs=1e-4)
            assert row[f"ref_{answer}_token_logps"] == pytest.approx(logps, abs=1e-4)


def test_a_second_call_scores_nothing_and_changes_no_value(exported):
    first, *others = (json.loads((exported / f"result.{kind}").read_text()) for kind in KINDS)
    assert (first["scored"]["scored"], first["exported"]["scored"]) == (80, 40)
    for again in others:
        assert (again["scored"]["scored"], again["scored"]["tokens"], again["prepared"]["changed"]) == (0, 0, False)


def test_under_a_mask_whole_sums_keep_their_names_and_counted_ones_stand_next_to_them(
    prefcache, config, model, tmp_path
):
    prefcache("prepare", config)
    prefcache("score", config)
    prefcache("export", config, "--output", "whole.jsonl")
    assert set(ADDED) < set(rows_of(tmp_path / "whole.jsonl")[0]) and "counted" not in str(
        rows_of(tmp_path / "whole.jsonl")[0].keys()
    )
    # All tokens but the first two count, of answers that have three.
    mask(tmp_path / "runs/tiny/prepared", lambda n: [2, n] if n > 2 else [0, n])
    assert json.loads(prefcache("score", config, "--json").stdout)["tokens"] == 0
    said = prefcache("export", config, "--output", "masked.jsonl", "--per-token").stderr
    assert (
        "have tokens that do not count (prepare.train_on). ref_chosen_logps, ref_rejected_logps are of whole answers"
        in said
    )
    whole, rows = (rows_of(tmp_path / f"{name}.jsonl") for name in ("whole", "masked"))
    assert [{name: row[name] for name in whole[0]} for row in rows] == whole
    for row in rows[::9]:
        for answer in ("chosen", "rejected"):
            _, logps = forward(model, row["prompt"], row[answer])
            assert row[f"n_{answer}_counted_tokens"] == len(logps) - 2
            assert row[f"ref_{answer}_counted_logps"] == pytest.approx(sum(logps[2:]), abs=1e-4)
            assert row[f"ref_{answer}_token_logps"] == pytest.approx(logps, abs=1e-4)


def test_every_kind_of_file_holds_the_same_rows(exported):
    rows = rows_of(exported / "s.parquet")
    assert rows_of(exported / "s.arrow") == rows_of(exported / "s.jsonl") == rows_of(exported / "s.jsonl.gz") == rows
    with pa.input_stream(str(exported / "s.jsonl.zst"), compression="zstd") as file:
        assert file.read() == (exported / "s.jsonl").read_bytes()
    assert pyarrow.csv.read_csv(exported / "s.csv").to_pylist() == rows


def test_a_table_keeps_its_types_and_its_nulls(score, tmp_path):
    messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.large_string()), ("name", pa.string())]))
    turns = [
        [{"role": "user", "content": "why red?", "name": None}],
        [{"role": "user", "content": "a cat", "name": None}],
    ]
    answers = [
        [[{"role": "assistant", "content": f"{word} {i}", "name": None}] for i in range(2)] for word in ("yes", "no")
    ]
    table = pa.table(
        {
            "prompt": pa.array(turns, messages),
            "chosen": pa.array(answers[0], messages),
            "rejected": pa.array(answers[1], messages),
            "day": pa.array([19000, None], pa.date32()),
            "vector": pa.array([[1.5, 2.5], None], pa.list_(pa.float16())),
            "kind": pa.array(["x", "y"]).dictionary_encode(),
        }
    )
    pq.write_table(table, tmp_path / "in.parquet")
    for name in ("out.parquet", "out.jsonl"):
        score("in.parquet", name)
    kept = pq.read_table(tmp_path / "out.parquet").select(table.column_names)
    assert kept.schema.equals(pq.read_table(tmp_path / "in.parquet").schema)
    assert kept.to_pylist() == table.to_pylist()
    assert [row["prompt"] for row in rows_of(tmp_path / "out.jsonl")] == turns


def test_columns_of_json_that_hold_several_types_become_text(score, tmp_path):
    extra = [1, "one", {"a": []}, None, {}]
    lines = [json.dumps(pair(i) | ({"extra": extra[i], "n": i + 0.5 * (i == 3)} if i != 3 else {})) for i in range(5)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    for name in ("out.parquet", "out.jsonl"):
        score("in.jsonl", name)
    values = [row["extra"] for row in rows_of(tmp_path / "out.parquet")]
    assert [None if value is None else json.loads(value) for value in values] == extra
    # JSON Lines has them as they were, absent ones included.
    kept = [
        {name: row[name] for name in json.loads(line)}
        for row, line in zip(rows_of(tmp_path / "out.jsonl"), lines, strict=True)
    ]
    assert kept == [json.loads(line) for line in lines]
    assert "extra" not in rows_of(tmp_path / "out.jsonl")[3]


def test_a_column_has_one_type_for_all_that_any_batch_of_json_holds():
    """A file of many records is read in batches, each of which knows its own values only."""

    def batch(*rows: dict) -> Batch:
        return Batch([Line("a", n, b"", row, "", "") for n, row in enumerate(rows, 1)], None)

    batches = [
        batch({"n": 1, "late": None, "of": {"a": 1}, "any": 1, "mixed": 1}, {"n": 2}),
        batch({"n": 0.5, "late": "x", "of": {"b": "y"}, "any": ["z"]}),
        batch({"n": 3, "more": True, "any": 2, "mixed": 2}, {"n": 4, "mixed": "x"}),
    ]
    assert common_types(batches) == {
        "n": pa.float64(),
        "late": pa.string(),
        "of": pa.struct({"a": pa.int64(), "b": pa.string()}),
        "any": None,  # none in common: as JSON text
        "mixed": None,
        "more": pa.bool_(),
    }
    whole = [batch.as_table(common_types(batches)).to_pylist() for batch in batches]
    assert [row["n"] for rows in whole for row in rows] == [1.0, 2.0, 0.5, 3.0, 4.0]
    assert [row["any"] for rows in whole for row in rows] == ["1", None, '["z"]', "2", None]


def test_what_cannot_be_used_stays_with_its_reason(score, tmp_path):
    lines = [json.dumps(pair(i)) for i in range(30)]
    lines[3], lines[7] = "{broken", json.dumps(pair(7) | {"rejected": pair(7)["chosen"]})
    (tmp_path / "in.jsonl").write_text("\n".join([lines[0], "", *lines[1:]]) + "\n")
    for name in ("out.jsonl", "out.parquet"):
        done = score("in.jsonl", name, "--set", "prepare.max_quarantine=0.1")
        assert "30 rows, 28 with all log-probs" in done.stdout and "1 malformed JSON" in done.stdout
        rows = rows_of(tmp_path / name)
        assert len(rows) == 30
        assert [i for i, row in enumerate(rows) if row["prefcache_status"] != "ok"] == [3, 7]
        assert rows[3]["prefcache_raw"] == "{broken" and rows[3]["prefcache_status"].startswith("malformed JSON")
        assert rows[7]["prompt"] == pair(7)["prompt"] and rows[7]["prefcache_status"].startswith(
            "chosen equals rejected"
        )
        assert [rows[i][name] for i in (3, 7) for name in ADDED] == [None] * 10
        assert rows[8]["prompt"] == pair(8)["prompt"] and rows[8]["ref_chosen_logps"] < 0


def test_too_much_that_cannot_be_used_ends_with_3_and_no_output(score, tmp_path):
    (tmp_path / "in.jsonl").write_text("{broken\n" + "".join(json.dumps(pair(i)) + "\n" for i in range(5)))
    (tmp_path / "out.jsonl").write_text("old")
    done = score("in.jsonl", "out.jsonl", "--force", code=3)
    assert "1 of 6 records cannot be used" in done.stderr
    assert (tmp_path / "out.jsonl").read_text() == "old"
    named = next(word for word in done.stderr.split() if word.endswith("quarantine.parquet"))
    assert pq.read_table(tmp_path / named)["raw"].to_pylist() == [b"{broken"]


def test_a_ranking_gives_a_row_for_each_pair_and_says_which(score, tmp_path, model):
    answers = [{"response": f"answer {i}", "overall_score": 5 - i, "fine-grained_score": 5 - i} for i in range(3)]
    record = {"instruction": "why?", "completions": answers, "source": "a"}
    (tmp_path / "in.jsonl").write_text(json.dumps(record) + "\n")
    score("in.jsonl", "out.jsonl", "--set", "prepare.pairing=best_rest", "--set", "prepare.format=ultrafeedback")
    rows = rows_of(tmp_path / "out.jsonl")
    assert [(row["prefcache_pair"], row["prefcache_chosen"], row["prefcache_rejected"]) for row in rows] == [
        (1, "answer 0", "answer 1"),
        (2, "answer 0", "answer 2"),
    ]
    assert rows[0]["completions"] == rows[1]["completions"] == answers
    assert rows[0]["ref_chosen_logps"] == rows[1]["ref_chosen_logps"]
    _, logps = forward(model, "why?", "answer 2")
    assert rows[1]["ref_rejected_logps"] == pytest.approx(sum(logps), abs=1e-4)


def test_labelled_answers_have_one_log_prob_and_a_mismatched_one_where_asked(score, tmp_path, model):
    write_labels(tmp_path / "in.jsonl", 8)
    score("in.jsonl", "plain.parquet", "--per-token")
    score("in.jsonl", "kl.parquet", "--per-token", "--set", "prepare.kl_pairs=true")
    plain, kl = rows_of(tmp_path / "plain.parquet"), rows_of(tmp_path / "kl.parquet")
    _, logps = forward(model, plain[2]["prompt"], plain[2]["completion"])
    assert plain[2]["ref_logps"] == pytest.approx(sum(logps), abs=1e-4)
    assert plain[2]["ref_token_logps"] == pytest.approx(logps, abs=1e-4)
    assert not [name for name in plain[0] if "KL" in name]
    assert [row["ref_logps"] for row in kl] == [row["ref_logps"] for row in plain]
    other = load(model)[0].decode(kl[2]["KL_completion_ids"]).removesuffix("<|im_end|>\n")
    assert other != kl[2]["completion"] and other in {row["completion"] for row in kl}
    _, logps = forward(model, kl[2]["prompt"], other)
    assert kl[2]["ref_KL_logps"] == pytest.approx(sum(logps), abs=1e-4)
    assert len(kl[2]["ref_KL_token_logps"]) == kl[2]["n_KL_tokens"]


def test_several_inputs_come_out_one_after_the_other(score, tmp_path):
    write_pairs(tmp_path / "b.jsonl", 5)
    pq.write_table(pa.Table.from_pylist([pair(i) | {"id": i} for i in range(5, 9)]), tmp_path / "a.parquet")
    score("b.jsonl", "out.parquet", "--input", "a.parquet", "--per-token")
    rows = rows_of(tmp_path / "out.parquet")
    assert [row["prompt"] for row in rows] == [pair(i)["prompt"] for i in range(9)]
    assert [row["id"] for row in rows] == [None] * 5 + [5, 6, 7, 8]
    for row in rows:
        assert sum(row["ref_rejected_token_logps"]) == pytest.approx(row["ref_rejected_logps"], abs=1e-9)


def test_export_writes_both_splits_in_the_order_of_the_data(prefcache, tmp_path, model, prepared):
    assert "has not been scored" in prefcache("export", prepared, "--output", "out.jsonl", code=2).stderr
    prefcache("score", "-q", prepared)
    done = prefcache("export", prepared, "--output", "out.jsonl", "--per-token")
    assert "60 rows, 60 with all log-probs" in done.stdout
    rows = rows_of(tmp_path / "out.jsonl")
    assert [row["prompt"] for row in rows] == [pair(i)["prompt"] for i in range(60)]
    values = json.loads(
        prefcache(
            *("sql", "--json", "select line, logp_sum from examples join reference on key = chosen_key order by line"),
            "runs/tiny",
        ).stdout
    )
    assert [row["ref_chosen_logps"] for row in rows] == [value["logp_sum"] for value in values]


def test_what_weights_and_duplicates_leave_out_is_said(score, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 6)
    write_pairs(tmp_path / "pairs.jsonl", 2, mode="a")
    done = score("pairs.jsonl", "out.jsonl", "--set", "prepare.duplicates=drop")
    assert "8 rows, 6 with" in done.stdout and "2 left out" in done.stdout
    statuses = [row["prefcache_status"].partition(":")[0] for row in rows_of(tmp_path / "out.jsonl")]
    assert statuses == ["ok"] * 6 + ["left out"] * 2


def test_changed_data_is_not_exported_under_old_values(prefcache, tmp_path, scored):
    write_pairs(tmp_path / "pairs.jsonl", 60, start=1)
    assert "Prepare again" in prefcache("export", scored, "--output", "out.jsonl", code=5).stderr
    assert not (tmp_path / "out.jsonl").exists()


def test_values_of_one_reference_are_not_exported_as_anothers(prefcache, tmp_path, config, model, other_model):
    edited = shutil.copytree(model, tmp_path / "edited")
    prefcache("prepare", "-q", config)
    prefcache("score", "-q", config, "--set", f"model={edited}")
    said = prefcache("export", config, "--output", "o.csv", "--set", f"model={other_model}", code=5).stderr
    assert "was scored by" in said and str(other_model) in said
    # The same weights under another name are the same reference.
    prefcache("export", config, "--output", "same.csv")
    shutil.copy(other_model / "model.safetensors", edited / "model.safetensors")
    assert (
        "prefcache score" in prefcache("export", config, "--output", "o.csv", "--set", f"model={edited}", code=5).stderr
    )
    assert not (tmp_path / "o.csv").exists()


def test_columns_of_the_same_name_are_refused_before_anything_is_scored(score, tmp_path):
    (tmp_path / "in.jsonl").write_text(json.dumps(pair(0) | {"ref_chosen_logps": 1}) + "\n")
    done = score("in.jsonl", "out.jsonl", code=2)
    assert "ref_chosen_logps. Drop or rename" in done.stderr
    assert not list((tmp_path / "cache").glob("*/*.parquet"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--input", "p.jsonl", "--model", "m", "--output", "out.xlsx"], "use .parquet, .arrow, .jsonl or .csv"),
        (["--input", "p.jsonl", "--model", "m", "--output", "out.parquet.gz"], "use .parquet, .arrow, .jsonl or .csv"),
        (["--input", "p.jsonl", "--model", "m"], "needs --output"),
        (["--input", "p.jsonl", "--output", "o.csv"], "--input needs --model MODEL"),
        (
            ["--input", "p.jsonl", "--output", "o.csv", "--model", "m", "--set", "model=n"],
            "Both --model and --set model",
        ),
        (
            ["--input", "p.jsonl", "--output", "o.csv", "--model", "m", "--set", "prepare.data=q.jsonl"],
            "Both --input and --set prepare.data",
        ),
        (["c.yaml", "--input", "p.jsonl", "--output", "o.csv"], "Leave one of them out"),
        (
            ["c.yaml", "--output", "o.csv"],
            "--output needs --input. To write a config's rows use `prefcache export c.yaml --output FILE`.",
        ),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(prefcache, arguments, said):
    done = prefcache("score", *arguments, code=2)
    assert said in done.stderr


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("pairs.jsonl", "pairs.jsonl is data that this command reads"),
        ("folder.jsonl", "folder.jsonl is a folder"),
        ("pairs.jsonl/o.csv", "cannot be written"),
        ("/proc/o.csv", "cannot be written"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_anything_is_scored(score, tmp_path, output, said):
    written = write_pairs(tmp_path / "pairs.jsonl", 3).read_bytes()
    (tmp_path / "folder.jsonl").mkdir()
    done = score("pairs.jsonl", output, code=2)
    assert said in done.stderr and ".tmp" not in done.stderr
    assert (tmp_path / "pairs.jsonl").read_bytes() == written
    assert not list(tmp_path.glob("cache/*/*.parquet"))


def test_sums_alone_give_no_token_lists(score, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 3)
    sums, tokens = (("--force", "--set", f"score.logps={keep}") for keep in ("false", "true"))
    score("pairs.jsonl", "o.jsonl", *sums)
    assert "warning" not in score("pairs.jsonl", "o.jsonl", *sums).stderr
    error = score("pairs.jsonl", "o.jsonl", *sums, "--per-token", code=2).stderr
    assert "keeps only the sums of 6 sequences" in error and "--set cache=FOLDER" in error
    # Asking for lists does not add them to these rows, which is said; another cache has them, as that message says.
    assert "keeps only the sums of 6 sequences" in score("pairs.jsonl", "o.jsonl", *tokens).stderr
    score("pairs.jsonl", "o.jsonl", *tokens, "--per-token", "--set", "cache=other")
    assert all(len(row["ref_chosen_token_logps"]) == row["n_chosen_tokens"] for row in rows_of(tmp_path / "o.jsonl"))


def test_working_folders_that_nobody_used_for_a_week_are_removed(score, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 3)
    old, young = "0" * 16, "1" * 16
    for name, days in ((old, 8), (young, 6), ("mine", 8)):
        (tmp_path / "cache" / ".standalone" / name).mkdir(parents=True)
        then = time.time() - days * 24 * 3600
        os.utime(tmp_path / "cache" / ".standalone" / name, (then, then))
    score("pairs.jsonl", "o.jsonl")
    left = {path.name for path in (tmp_path / "cache" / ".standalone").iterdir()}
    assert {young, "mine"} < left and old not in left and len(left) == 3


def test_a_dry_run_over_an_input_needs_no_output(prefcache, tmp_path, model):
    write_pairs(tmp_path / "pairs.jsonl", 3)
    done = prefcache("score", "--input", "pairs.jsonl", "--set", f"model={model}", "--dry-run", "--json")
    assert json.loads(done.stdout)["to_score"] == 6


def test_two_commands_at_once_over_standard_input_each_write_their_own_rows(tmp_path, model):
    lines = write_pairs(tmp_path / "pairs.jsonl", 40).read_text().splitlines(keepends=True)
    given = {"a.jsonl": lines[:30], "b.jsonl": lines[30:]}
    commands = {}
    for name, mine in given.items():
        command = [PREFCACHE, "score", "--input", "-", "--model", model, "--output", name]
        commands[name] = subprocess.Popen(
            command, cwd=tmp_path, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        commands[name].stdin.write("".join(mine))
        commands[name].stdin.close()
    said = {name: process.stderr.read() for name, process in commands.items()}
    assert [process.wait() for process in commands.values()] == [0, 0], said
    for name, mine in given.items():
        assert [row["prompt"] for row in rows_of(tmp_path / name)] == [json.loads(line)["prompt"] for line in mine]
    assert sum("waits for another command" in each for each in said.values()) == 1
    assert not list((tmp_path / "cache/.standalone").glob(".*"))


def test_a_config_is_exported_whose_answers_are_cut(prefcache, tmp_path, model):
    write_pairs(tmp_path / "pairs.jsonl", 10)
    config = write_config(tmp_path, model)
    cut = ["--set", "prepare.max_length=26", "--set", "prepare.too_long=keep_start"]
    prefcache("prepare", "-q", config, *cut)
    prefcache("score", "-q", config, *cut)
    prefcache("export", "-q", config, *cut, "--output", "o.jsonl")
    rows = [row for row in rows_of(tmp_path / "o.jsonl") if row["prefcache_status"] == "ok"]
    assert rows and all(row["n_prompt_tokens"] + row["n_chosen_tokens"] <= 26 for row in rows)
