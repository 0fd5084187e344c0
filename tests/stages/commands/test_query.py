"""SQL over a small real experiment: two references, two runs, one of them unfinished, and damaged files."""

import contextlib
import csv
import gzip
import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.visible_text import visible
from prefcache.terminal_output import answer_rows
from tests.helpers.project import PREFCACHE, Done, invoke, write_config, write_pairs

N = 40
LAST = 10  # the last step, with a checkpoint; others are at 4 and 8, of which two are kept


@pytest.fixture(scope="module")
def experiment(tmp_path_factory, model, other_model) -> Path:
    """40 pairs and an unusable record, scored by two references; a run of each of two betas."""
    folder = tmp_path_factory.mktemp("experiment")
    write_pairs(folder / "pairs.jsonl", N)
    with open(folder / "pairs.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "why?", "chosen": "so", "rejected": "so"}) + "\n")
    config = write_config(folder, model, epochs=2, samples=0, checkpoint_every=4)
    invoke(folder, "prepare", config)
    invoke(folder, "score", config, "--set", f"model={other_model}")
    invoke(folder, "score", config)
    invoke(folder, "train", config)
    strong = ("train.run=strong", "train.beta=0.5", "train.loss={sigmoid: 1, sft: 1}")
    invoke(folder, "train", config, *(word for setting in strong for word in ("--set", setting)))
    return folder


@pytest.fixture
def sql(experiment) -> Callable[..., Done]:
    """`prefcache sql` in the experiment's folder."""
    return lambda *arguments, code=0: invoke(experiment, "sql", *arguments, code=code)


@pytest.fixture
def rows(sql) -> Callable[[str], list[dict]]:
    return lambda query: json.loads(sql(query, "runs/tiny", "--json").stdout)


@pytest.fixture
def folder(experiment, tmp_path) -> Path:
    """A copy of the experiment, in the temporary folder, that a test may damage."""
    shutil.copytree(experiment, tmp_path, dirs_exist_ok=True)
    return tmp_path / "runs/tiny"


# -- side by side ----------------------------------------------------------------------------------------------------


def logps(pairs: list[dict], model: Path) -> dict[str, dict[str, float]]:
    """Summed log-probs of every answer by Transformers' own forward."""
    import torch
    from transformers import AutoModelForCausalLM

    plain = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def summed(prompt: list[int], answer: list[int]) -> float:
        ids = torch.tensor([prompt + answer])
        with torch.no_grad():
            logps = plain(input_ids=ids).logits.double().log_softmax(-1)[0]
        return sum(logps[at - 1, ids[0, at]].item() for at in range(len(prompt), ids.shape[1]))

    return {
        row["example_id"]: {side: summed(row["prompt_ids"], row[f"{side}_ids"]) for side in ("chosen", "rejected")}
        for row in pairs
    }


def test_two_references_stand_side_by_side_with_what_each_model_gives(rows, experiment, model, other_model):
    prepared = Prepared(experiment / "runs/tiny/prepared").table().to_pylist()
    found = rows("select example_id, reference, used, ref_chosen_logp, ref_rejected_logp, margin from pairs")
    assert len(found) == 2 * N
    for name, used in ((model, True), (other_model, False)):
        expected = logps(prepared[:6], name)
        mine = {row["example_id"]: row for row in found if row["reference"] == str(name)}
        assert len(mine) == N and all(row["used"] is used for row in mine.values())
        for example_id, sums in expected.items():
            row = mine[example_id]
            assert row["ref_chosen_logp"] == pytest.approx(sums["chosen"], abs=1e-4)
            assert row["margin"] == pytest.approx(sums["chosen"] - sums["rejected"], abs=2e-4)
    # The view of the cache says the same, sequence by sequence.
    joined = rows(
        "select max(abs(c.logp_sum - ref_chosen_logp)) as apart, count(*) as n from pairs "
        "join reference c on c.key = chosen_key and c.model_id = pairs.model_id"
    )
    assert joined == [{"apart": 0.0, "n": 2 * N}]


def test_two_runs_stand_side_by_side(rows):
    both = rows(
        "select a.example_id, a.chosen_reward as weak, b.chosen_reward as strong, sa.chosen_logp as logp, sb.chosen_logp as logp_b, "
        "sa.ref_chosen_logp as ref from rewards a join rewards b using (example_id) "
        "join steps sa on sa.run = a.run and sa.example_id = a.example_id and sa.step = a.step "
        "join steps sb on sb.run = b.run and sb.example_id = b.example_id and sb.step = b.step "
        "where a.run = 'trained' and b.run = 'strong'"
    )
    assert len(both) == N
    for row in both:
        assert row["weak"] == pytest.approx(0.1 * (row["logp"] - row["ref"]))
        assert row["strong"] == pytest.approx(0.5 * (row["logp_b"] - row["ref"]))


def test_runs_say_how_they_were_made(rows, model):
    found = rows("select * from runs order by run")
    assert [(row["run"], row["finished"], row["beta"], row["batch_size"], row["steps"]) for row in found] == [
        ("strong", True, 0.5, 8, LAST),
        ("trained", True, 0.1, 8, LAST),
    ]
    assert found[1]["policy"] == str(model) and found[1]["examples"] + found[1]["held_out"] == N
    # What is no column of its own is in the settings.
    assert rows("select (settings->>'warmup_ratio')::double as warmup from runs")[0] == {"warmup": 0.1}


def test_metrics_of_runs_whose_losses_measure_different_things(rows):
    found = rows(
        'select run, step, loss, "loss/sft" as sft, "eval_rewards/margins" as held_out from metrics order by 1, 2'
    )
    assert [row["step"] for row in found if row["run"] == "strong"] == list(range(LAST + 1))
    assert all((row["sft"] is not None) == (row["run"] == "strong") for row in found if row["step"])
    assert {row["step"] for row in found if row["held_out"] is not None} == {0, LAST}


def test_a_part_of_a_query_may_have_the_name_of_a_view(rows):
    assert rows("with pairs as (select * from pairs where used) select count(*) as n from pairs") == [{"n": N}]
    assert rows("select (with runs as (select 5) select count(*) from runs) as one, count(*) as two from runs") == [
        {"one": 1, "two": 2}
    ]


def test_views_describe_the_columns_of_an_experiment(sql):
    assert "loss/sft double" in sql("--views", "runs/tiny").stdout
    assert "loss/sft double" not in sql("--views").stdout


def test_quarantine_and_checkpoints_by_hand(rows, experiment):
    (row,) = rows("select line, reason, raw from quarantine")
    assert (row["line"], json.loads(row["raw"])["chosen"]) == (N + 1, "so")
    found = rows("select run, step, bytes, folder from checkpoints order by run, step")
    assert [(row["run"], row["step"]) for row in found] == [
        ("strong", 8),
        ("strong", LAST),
        ("trained", 8),
        ("trained", LAST),
    ]
    files = (experiment / found[0]["folder"]).iterdir()
    assert found[0]["bytes"] == sum(file.stat().st_size for file in files if file.name != "manifest.json")


# -- how answers are given -------------------------------------------------------------------------------------------

QUERY = "select 'a|b' as x, 1.5 as y, null as z union all select 'c', 2, 'd\"' order by 1"


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("csv", 'x,y,z\na|b,1.5,\nc,2.0,"d"""\n'),
        ("markdown", '| x | y | z |\n| --- | --- | --- |\n| a\\|b | 1.5 |  |\n| c | 2 | d" |\n'),
    ],
)
def test_answers_for_machines(sql, form, expected):
    query = QUERY.replace("1.5", "1.5::double")
    assert sql(query, "runs/tiny", "--format", form).stdout == expected


def test_what_stands_in_the_data_does_not_drive_a_terminal(sql, experiment):
    query = "select 'a' || chr(27) || '[31m' || chr(155) || 'b' as x"
    assert sql(query, "runs/tiny", "--format", "csv").stdout == "x\na\x1b[31m\x9bb\n"
    for form in ("table", "csv", "json", "markdown"):
        shown = on_a_terminal(PREFCACHE, "sql", query, experiment / "runs/tiny", "--format", form)
        shown = shown.replace("\x1b[0m", "").replace("\x1b[1m", "").replace("\r\n", "\n")
        assert visible(shown) == shown and "[31m" in shown


def test_json_hides_nothing_and_means_the_same_wherever_it_is_read(sql):
    query = "select 'a' || chr(127) || chr(155) || chr(8238) || 'é' || chr(8203) as \"x\u202e\""
    shown = sql(query, "runs/tiny", "--json").stdout
    assert shown == '[\n {"x\\u202e": "a\\u007f\\u009b\\u202eé\\u200b"}\n]\n'
    assert json.loads(shown) == [{"x\u202e": "a\x7f\x9b\u202eé\u200b"}]


@pytest.mark.parametrize("form", ["table", "csv", "json", "markdown"])
@pytest.mark.parametrize(
    ("query", "code"),
    [
        ("select '\x1b[31m\u202e'::int", 2),
        ('select "\x1b[31m\u202e" from rewards', 2),
        ("select 1 as \"\x1b[31m\u202e\" from rewards where run = '\x1b[31m\u202e'", 0),
        ('from "\x1b[31m\u202e"', 2),
        ("select error('\x1b[31m\u202e')", 2),
    ],
)
def test_messages_about_a_query_do_not_drive_a_terminal(sql, form, query, code):
    said = sql(query, "runs/tiny", "--format", form, code=code).stderr
    assert "\u241b[31m<U+202E>" in said and visible(said) == said


def test_names_of_files_and_options_do_not_drive_a_terminal(prefcache, folder):  # in a copy, for it writes a file
    acting = "\x1b[31m\u202e.csv"
    said = prefcache("sql", "select 1", "runs/tiny", "--out", acting).stdout
    assert said == "\u241b[31m<U+202E>.csv: 1 row\n"
    for arguments in (
        ("sql", f"--{acting}"),
        (acting,),
        ("sql", "select 1", "--limit", acting),
        ("sql", "select 1", acting),
    ):
        said = prefcache(*arguments, code=2).stderr
        assert visible(said) == said and "31m" in said


CELLS = ["=1+1", "+1", "-1", "@x", "\t=1", "-1.5e-3", "plain"]


def test_texts_that_begin_a_formula_stay_as_they_are_in_csv(sql, prefcache, tmp_path):
    values = ", ".join(f"('{cell}', {n})" for n, cell in enumerate(CELLS, -3))
    query = f"select * from (values {values}) t(cell, n)"
    expected = [{"cell": cell, "n": str(n)} for n, cell in enumerate(CELLS, -3)]
    shown = sql(query, "runs/tiny", "--format", "csv").stdout
    sql(query, "runs/tiny", "--out", tmp_path / "cells.csv")
    for text in (shown, (tmp_path / "cells.csv").read_text()):
        assert list(csv.DictReader(io.StringIO(text))) == expected
    # The help says so wherever a CSV can be written.
    for command in ("sql", "ask", "export", "score"):
        assert "takes for formulas" in " ".join(prefcache(command, "--help").stdout.split())


def on_a_terminal(*command: Any) -> str:
    """Return what a command prints there, without the progress that a slow machine has time to show."""
    ours, its = os.openpty()
    with subprocess.Popen([str(each) for each in command], stdin=its, stdout=its, stderr=subprocess.DEVNULL):
        os.close(its)
        written = b""
        # The end of a terminal is an error to Linux.
        with contextlib.suppress(OSError):
            while block := os.read(ours, 4096):
                written += block
    os.close(ours)
    return written.decode()


def test_a_table_that_does_not_fit_is_printed_row_by_row_with_nothing_cut(sql):
    # 8 columns of at least 35 characters do not fit in a pipe's 100.
    names = [f"margin_per_token_of_those_that_are_{letter}" for letter in "abcdefgh"]
    query = f"select {', '.join(f'i * 1000000 + 123456 as {name}' for name in names)} from range(2) t(i)"
    lines = sql(query, "runs/tiny").stdout.splitlines()
    expected = []
    for i in range(2):
        expected += [f"-- row {i + 1}", *(f"{name}  {i * 1000000 + 123456}" for name in names)]
    assert lines == [*expected, "2 rows"]
    # Without rows the names are there all the same, in a table or not.
    assert sql(f"{query} where i > 5", "runs/tiny").stdout.splitlines() == [*names, "0 rows"]
    said = sql("select 1 as one, 2 as two where false", "runs/tiny").stdout
    assert said.split()[:2] == ["one", "two"] and said.endswith("\n0 rows\n")


def test_a_table_fits_to_the_last_character(capsys):
    # A pipe has 100: two blanks between the columns and one on either side leave 56 next to a value of 40.
    answer_rows.print_rows(["a", "b"], iter([("x" * 40, "y" * 56)]), 5)
    table = capsys.readouterr().out.splitlines()
    assert f" {'x' * 40}  {'y' * 56}" in table and max(map(len, table)) <= 100
    answer_rows.print_rows(["a", "b"], iter([("x" * 40, "y" * 57)]), 5)
    assert capsys.readouterr().out == f"-- row 1\na  {'x' * 40}\nb  {'y' * 57}\n1 row\n"


def test_long_texts_are_never_in_a_table(capsys):
    for value, is_table in (("y" * 80, True), ("y" * 81, False), ("y\ny", False)):
        answer_rows.print_rows(["b"], iter([(value,)]), 5)
        assert ("-- row 1" not in capsys.readouterr().out) == is_table
    answer_rows.print_rows(["a", "long_name"], iter([("x\ny", "z" * 100)]), 5)
    assert capsys.readouterr().out == f"-- row 1\na          x\n           y\nlong_name  {'z' * 100}\n1 row\n"


def test_answers_as_parquet_on_stdout_and_in_files(sql, experiment, tmp_path):
    query = "select example_id, margin, n_chosen from pairs where used order by example_id"
    expected = json.loads(sql(query, "config.yaml", "--format", "json").stdout)
    command = [PREFCACHE, "sql", query, "runs/tiny", "--format", "parquet"]
    shown = subprocess.run(command, cwd=experiment, capture_output=True, check=True).stdout
    assert pq.read_table(io.BytesIO(shown)).to_pylist() == expected
    for name in ("a.parquet", "a.jsonl.gz"):
        assert f"{name}: {N} rows" in sql(query, "runs/tiny", "--out", tmp_path / name).stdout
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == expected
    assert [json.loads(line) for line in gzip.open(tmp_path / "a.jsonl.gz")] == expected
    # What fails leaves nothing behind, and what was there as it was.
    failing = "select if(line > 3, error('boom'), line::varchar) as line from examples"
    assert "boom" in sql(failing, "runs/tiny", "--out", tmp_path / "a.parquet", "--force", code=2).stderr
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == expected and not list(tmp_path.glob(".a.*"))
    assert (
        "unsupported extension .txt; use .parquet, .arrow, .jsonl or .csv"
        in sql(query, "runs/tiny", "--out", tmp_path / "a.txt", code=2).stderr
    )


def test_an_empty_answer_says_why_and_a_long_one_is_ended(sql):
    done = sql("select * from rewards where run = 'other'", "runs/tiny")
    assert "0 left after (run = 'other')" in done.stderr and "0 rows" in done.stdout
    endless = "with recursive t as (select 1 i union all select i + 1 from t) select max(i) from t"
    assert "more than 0.5 s" in sql(endless, "runs/tiny", "--timeout", "0.5", code=6).stderr


# -- what is damaged -------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("pattern", "view"),
    [
        ("prepared/*.arrow", "examples"),
        ("prepared/quarantine.parquet", "quarantine"),
        ("trained/steps/*.parquet", "rewards"),
        ("trained/metrics/*.parquet", "metrics"),
        ("trained/throughput/*.parquet", "throughput"),
        ("trained/provenance.json", "runs"),
        ("trained/checkpoints/*/manifest.json", "checkpoints"),
        ("../../cache/tiny-*/*.parquet", "pairs"),
        ("../../cache/other-*/*.parquet", "pairs"),
        ("../../cache/other-*/*.parquet", "reference"),
    ],
)
def test_what_is_damaged_is_named_and_not_read(prefcache, folder, pattern, view):
    damaged = sorted(folder.glob(pattern))[0]
    flip(damaged)
    name = damaged.name if damaged.name != "provenance.json" else "trained"
    assert name in prefcache("sql", f"select count(*) from {view}", "runs/tiny", code=4).stderr
    # What reads something else is answered.
    other = "alerts" if view != "alerts" else "quarantine"
    if view not in ("runs",):
        prefcache("sql", f"select count(*) from {other}", "runs/tiny")


def test_a_run_that_still_goes_on_shows_its_finished_parts(prefcache, folder):
    run = folder / "trained"
    (run / "manifest.json").unlink()
    for part in run.glob("*/to-00000010.parquet"):
        part.unlink()
    (run / "steps/.to-00000010.parquet.host-1.tmp").write_bytes(b"half of a part")
    rows = lambda query: json.loads(prefcache("sql", query, "runs/tiny", "--json").stdout)  # noqa: E731
    assert rows("select finished, seconds from runs where run = 'trained'") == [{"finished": False, "seconds": None}]
    assert rows("select max(step) as step from steps where run = 'trained'") == [{"step": 8}]
    assert rows("select max(step) as step from metrics where run = 'trained'") == [{"step": 8}]


def test_a_damaged_part_of_a_run_that_still_goes_on_is_named(prefcache, folder):
    (folder / "trained/manifest.json").unlink()
    damaged = folder / "trained/steps/to-00000004.parquet"
    flip(damaged)
    assert f"{damaged.name} cannot be read" in prefcache("sql", "from rewards", "runs/tiny", code=4).stderr
