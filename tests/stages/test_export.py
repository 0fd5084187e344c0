"""Rows out: the data as it came, and the reference's log-probs beside it."""

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
from click.testing import CliRunner
from conftest import PREFCACHE, pair, write_config, write_pairs
from transformers import AutoModelForCausalLM, AutoTokenizer

ADDED = ["ref_chosen_logps", "ref_rejected_logps", "n_prompt_tokens", "n_chosen_tokens", "n_rejected_tokens"]


def forward(model: Path, prompt: str, answer: str) -> tuple[int, list[float]]:
    """Tokens of the prompt, and each answer token's log-prob, by Transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    turns = [{"role": "user", "content": prompt}]
    asked = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
    turns.append({"role": "assistant", "content": answer})
    whole = tokenizer.apply_chat_template(turns, return_dict=False)
    assert whole[: len(asked)] == asked
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    with torch.inference_mode():
        logps = loaded(torch.tensor([whole])).logits[0].double().log_softmax(-1)
    return len(asked), [logps[t - 1, whole[t]].item() for t in range(len(asked), len(whole))]


def rows_of(path: Path) -> list[dict]:
    if path.suffix == ".parquet":
        return pq.read_table(path).to_pylist()
    if path.suffix == ".arrow":
        return pa.ipc.open_stream(path).read_all().to_pylist()
    opened = gzip.open(path, "rt") if path.suffix == ".gz" else open(path)
    with opened as file:
        return [json.loads(line) for line in file]


def test_the_rows_come_out_in_order_with_the_log_probs_of_a_plain_forward(prefcache, tmp_path, model):
    write_pairs(tmp_path / "pairs.jsonl", 40)
    done = prefcache(
        "score", "--input", "pairs.jsonl", "--model", model, "--output", "scored.parquet", "--per-token", "--json"
    )
    assert json.loads(done.stdout)["exported"]["scored"] == 40
    rows = rows_of(tmp_path / "scored.parquet")
    assert [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in rows] == [
        pair(i) for i in range(40)
    ]
    assert {row["prefcache_status"] for row in rows} == {"ok"}
    for row in rows[::13]:
        for answer in ("chosen", "rejected"):
            n_prompt, logps = forward(model, row["prompt"], row[answer])
            assert (row["n_prompt_tokens"], row[f"n_{answer}_tokens"]) == (n_prompt, len(logps))
            assert row[f"ref_{answer}_logps"] == pytest.approx(sum(logps), abs=1e-4)
            assert row[f"ref_{answer}_token_logps"] == pytest.approx(logps, abs=1e-4)


def test_a_second_call_scores_nothing_and_changes_no_value(prefcache, tmp_path, model):
    write_pairs(tmp_path / "pairs.jsonl", 20)
    command = ["score", "--input", "pairs.jsonl", "--model", model, "--json", "--output"]
    first, again = (json.loads(prefcache(*command, name).stdout) for name in ("a.jsonl", "b.jsonl"))
    assert (first["scored"]["scored"], again["scored"]["scored"], again["scored"]["tokens"]) == (40, 0, 0)
    assert not again["prepared"]["changed"]
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()


def test_every_kind_of_file_holds_the_same_rows(prefcache, tmp_path, model):
    write_pairs(tmp_path / "pairs.jsonl", 12)
    for name in ("s.parquet", "s.arrow", "s.jsonl", "s.jsonl.gz", "s.jsonl.zst", "s.csv"):
        prefcache("score", "-q", "--input", "pairs.jsonl", "--model", model, "--output", name)
    rows = rows_of(tmp_path / "s.parquet")
    assert rows_of(tmp_path / "s.arrow") == rows_of(tmp_path / "s.jsonl") == rows_of(tmp_path / "s.jsonl.gz") == rows
    with pa.input_stream(str(tmp_path / "s.jsonl.zst"), compression="zstd") as file:
        assert file.read() == (tmp_path / "s.jsonl").read_bytes()
    assert pyarrow.csv.read_csv(tmp_path / "s.csv").to_pylist() == rows


def test_a_table_keeps_its_types_and_its_nulls(prefcache, tmp_path, model):
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
        prefcache("score", "-q", "--input", "in.parquet", "--model", model, "--output", name)
    kept = pq.read_table(tmp_path / "out.parquet").select(table.column_names)
    assert kept.schema.equals(pq.read_table(tmp_path / "in.parquet").schema)
    assert kept.to_pylist() == table.to_pylist()
    assert [row["prompt"] for row in rows_of(tmp_path / "out.jsonl")] == turns


def test_columns_of_json_that_hold_several_types_become_text(prefcache, tmp_path, model):
    extra = [1, "one", {"a": []}, None, {}]
    lines = [json.dumps(pair(i) | ({"extra": extra[i], "n": i + 0.5 * (i == 3)} if i != 3 else {})) for i in range(5)]
    (tmp_path / "in.jsonl").write_text("\n".join(lines))
    for name in ("out.parquet", "out.jsonl"):
        prefcache("score", "-q", "--input", "in.jsonl", "--model", model, "--output", name)
    values = [row["extra"] for row in rows_of(tmp_path / "out.parquet")]
    assert [None if value is None else json.loads(value) for value in values] == extra
    # JSON Lines has them as they were, absent ones included.
    kept = [
        {name: row[name] for name in json.loads(line)}
        for row, line in zip(rows_of(tmp_path / "out.jsonl"), lines, strict=True)
    ]
    assert kept == [json.loads(line) for line in lines]
    assert "extra" not in rows_of(tmp_path / "out.jsonl")[3]


def test_what_cannot_be_used_stays_with_its_reason(prefcache, tmp_path, model):
    lines = [json.dumps(pair(i)) for i in range(30)]
    lines[3], lines[7] = "{broken", json.dumps(pair(7) | {"rejected": pair(7)["chosen"]})
    (tmp_path / "in.jsonl").write_text("\n".join([lines[0], "", *lines[1:]]) + "\n")
    command = ["score", "--input", "in.jsonl", "--model", model, "--set", "prepare.max_quarantine=0.1", "--output"]
    for name in ("out.jsonl", "out.parquet"):
        done = prefcache(*command, name)
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


def test_too_much_that_cannot_be_used_ends_with_3_and_no_output(prefcache, tmp_path, model):
    (tmp_path / "in.jsonl").write_text("{broken\n" + "".join(json.dumps(pair(i)) + "\n" for i in range(5)))
    (tmp_path / "out.jsonl").write_text("old")
    done = prefcache("score", "--input", "in.jsonl", "--model", model, "--output", "out.jsonl", code=3)
    assert "1 of 6 records cannot be used" in done.stderr
    assert (tmp_path / "out.jsonl").read_text() == "old"
    named = next(word for word in done.stderr.split() if word.endswith("quarantine.parquet"))
    assert pq.read_table(tmp_path / named)["raw"].to_pylist() == [b"{broken"]


def test_a_ranking_gives_a_row_for_each_pair_and_says_which(prefcache, tmp_path, model):
    answers = [{"response": f"answer {i}", "overall_score": 5 - i, "fine-grained_score": 5 - i} for i in range(3)]
    record = {"instruction": "why?", "completions": answers, "source": "a"}
    (tmp_path / "in.jsonl").write_text(json.dumps(record) + "\n")
    prefcache(
        *("score", "-q", "--input", "in.jsonl", "--model", model, "--output", "out.jsonl"),
        *("--set", "prepare.pairing=best_rest", "--set", "prepare.format=ultrafeedback"),
    )
    rows = rows_of(tmp_path / "out.jsonl")
    assert [(row["prefcache_pair"], row["prefcache_chosen"], row["prefcache_rejected"]) for row in rows] == [
        (1, "answer 0", "answer 1"),
        (2, "answer 0", "answer 2"),
    ]
    assert rows[0]["completions"] == rows[1]["completions"] == answers
    assert rows[0]["ref_chosen_logps"] == rows[1]["ref_chosen_logps"]
    _, logps = forward(model, "why?", "answer 2")
    assert rows[1]["ref_rejected_logps"] == pytest.approx(sum(logps), abs=1e-4)


def write_labels(path: Path, n: int) -> None:
    records = [{"prompt": pair(i)["prompt"], "completion": pair(i)["chosen"], "label": i % 2 == 0} for i in range(n)]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def test_labelled_answers_have_one_log_prob_and_a_mismatched_one_where_asked(prefcache, tmp_path, model):
    write_labels(tmp_path / "in.jsonl", 8)
    command = ["score", "-q", "--input", "in.jsonl", "--model", model, "--per-token", "--output"]
    prefcache(*command, "plain.parquet")
    prefcache(*command, "kl.parquet", "--set", "prepare.kl_pairs=true")
    plain, kl = rows_of(tmp_path / "plain.parquet"), rows_of(tmp_path / "kl.parquet")
    _, logps = forward(model, plain[2]["prompt"], plain[2]["completion"])
    assert plain[2]["ref_logps"] == pytest.approx(sum(logps), abs=1e-4)
    assert plain[2]["ref_token_logps"] == pytest.approx(logps, abs=1e-4)
    assert not [name for name in plain[0] if "KL" in name]
    assert [row["ref_logps"] for row in kl] == [row["ref_logps"] for row in plain]
    other = AutoTokenizer.from_pretrained(model).decode(kl[2]["KL_completion_ids"]).removesuffix("<|im_end|>\n")
    assert other != kl[2]["completion"] and other in {row["completion"] for row in kl}
    _, logps = forward(model, kl[2]["prompt"], other)
    assert kl[2]["ref_KL_logps"] == pytest.approx(sum(logps), abs=1e-4)
    assert len(kl[2]["ref_KL_token_logps"]) == kl[2]["n_KL_tokens"]


def test_several_inputs_come_out_one_after_the_other(prefcache, tmp_path, model):
    write_pairs(tmp_path / "b.jsonl", 5)
    pq.write_table(pa.Table.from_pylist([pair(i) | {"id": i} for i in range(5, 9)]), tmp_path / "a.parquet")
    command = ["score", "-q", "--input", "b.jsonl", "--input", "a.parquet", "--model", model, "--output", "out.parquet"]
    prefcache(*command, "--per-token")
    rows = rows_of(tmp_path / "out.parquet")
    assert [row["prompt"] for row in rows] == [pair(i)["prompt"] for i in range(9)]
    assert [row["id"] for row in rows] == [None] * 5 + [5, 6, 7, 8]
    for row in rows:
        assert sum(row["ref_rejected_token_logps"]) == pytest.approx(row["ref_rejected_logps"], abs=1e-9)


def test_export_writes_both_splits_in_the_order_of_the_data(prefcache, tmp_path, model, config):
    prefcache("prepare", "-q", config)
    assert "has not been scored" in prefcache("export", config, "--output", "out.jsonl", code=2).stderr
    prefcache("score", "-q", config)
    done = prefcache("export", config, "--output", "out.jsonl", "--per-token")
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


def test_what_weights_and_duplicates_leave_out_is_said(prefcache, tmp_path, model):
    write_pairs(tmp_path / "pairs.jsonl", 6)
    write_pairs(tmp_path / "pairs.jsonl", 2, mode="a")
    command = ["score", "--input", "pairs.jsonl", "--model", model, "--output", "out.jsonl"]
    done = prefcache(*command, "--set", "prepare.duplicates=drop")
    assert "8 rows, 6 with" in done.stdout and "2 left out" in done.stdout
    assert [row["prefcache_status"].startswith("left out") for row in rows_of(tmp_path / "out.jsonl")] == [
        False
    ] * 6 + [True] * 2


def test_changed_data_is_not_exported_under_old_values(prefcache, tmp_path, config):
    prefcache("prepare", "-q", config)
    prefcache("score", "-q", config)
    write_pairs(tmp_path / "pairs.jsonl", 60, start=1)
    assert "Prepare again" in prefcache("export", config, "--output", "out.jsonl", code=5).stderr
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
    assert "make score" in prefcache("export", config, "--output", "o.csv", "--set", f"model={edited}", code=5).stderr
    assert not (tmp_path / "o.csv").exists()


def test_columns_of_the_same_name_are_refused_before_anything_is_scored(prefcache, tmp_path, model):
    (tmp_path / "in.jsonl").write_text(json.dumps(pair(0) | {"ref_chosen_logps": 1}) + "\n")
    done = prefcache("score", "--input", "in.jsonl", "--model", model, "--output", "out.jsonl", code=2)
    assert "ref_chosen_logps. Drop or rename" in done.stderr
    assert not list((tmp_path / "cache").glob("*/*.parquet"))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--input", "p.jsonl", "--model", "m", "--output", "out.xlsx"], "Expected .parquet"),
        (["--input", "p.jsonl", "--model", "m", "--output", "out.parquet.gz"], "Expected .parquet"),
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
        (["c.yaml", "--output", "o.csv"], "--output belongs to --input"),
    ],
)
def test_wrong_arguments_are_refused_before_any_work(prefcache, arguments, said):
    done = prefcache("score", *arguments, code=2)
    assert said in done.stderr


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("pairs.jsonl", "pairs.jsonl is the data itself"),
        ("folder.jsonl", "folder.jsonl is a folder"),
        ("pairs.jsonl/o.csv", "cannot be written"),
        ("/proc/o.csv", "cannot be written"),
    ],
)
def test_an_output_that_cannot_be_is_refused_before_anything_is_scored(prefcache, tmp_path, model, output, said):
    written = write_pairs(tmp_path / "pairs.jsonl", 3).read_bytes()
    (tmp_path / "folder.jsonl").mkdir()
    done = prefcache("score", "--input", "pairs.jsonl", "--model", model, "--output", output, code=2)
    assert said in done.stderr and ".tmp" not in done.stderr
    assert (tmp_path / "pairs.jsonl").read_bytes() == written
    assert not list(tmp_path.glob("cache/*/*.parquet"))


def test_sums_alone_give_no_token_lists(prefcache, tmp_path, model):
    write_pairs(tmp_path / "pairs.jsonl", 3)
    command = ["score", "--input", "pairs.jsonl", "--model", model, "--output", "o.jsonl", "--set", "score.logps=false"]
    prefcache(*command)
    assert "warning" not in prefcache(*command).stderr
    said = prefcache(*command, "--per-token", code=2).stderr
    assert "keeps the sums only" in said and "--set cache=FOLDER" in said
    # Asked for all the same, they are not added, and that is said; as that message says, they come to be.
    command[-1] = "score.logps=true"
    assert "of 6 sequences" in prefcache(*command).stderr
    prefcache(*command, "--per-token", "--set", "cache=other")
    assert all(len(row["ref_chosen_token_logps"]) == row["n_chosen_tokens"] for row in rows_of(tmp_path / "o.jsonl"))


def test_working_folders_that_nobody_used_for_a_week_are_removed(prefcache, tmp_path, model):
    write_pairs(tmp_path / "pairs.jsonl", 3)
    for name, days in (("old", 8), ("young", 6)):
        (tmp_path / "cache" / ".standalone" / name).mkdir(parents=True)
        then = time.time() - days * 24 * 3600
        os.utime(tmp_path / "cache" / ".standalone" / name, (then, then))
    prefcache("score", "-q", "--input", "pairs.jsonl", "--model", model, "--output", "o.jsonl")
    left = {path.name for path in (tmp_path / "cache" / ".standalone").iterdir()}
    assert "young" in left and "old" not in left and len(left) == 2


def test_standard_input_is_scored(tmp_path, model, monkeypatch):
    from stages.cli import main

    text = write_pairs(tmp_path / "pairs.jsonl", 4).read_text()
    monkeypatch.chdir(tmp_path)
    command = ["score", "-q", "--input", "-", "--model", str(model), "--output", "out.jsonl"]
    assert CliRunner().invoke(main, command, input=text).exit_code == 0
    assert [row["prompt"] for row in rows_of(tmp_path / "out.jsonl")] == [pair(i)["prompt"] for i in range(4)]


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
