"""SQL over a small real experiment: two references, two runs, one of them unfinished, and files that are damaged."""

import contextlib
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
from click.testing import CliRunner
from conftest import PREFCACHE, write_config, write_pairs

from pipeline.stored.prepared import Prepared

N = 40
LAST = 10  # the last step, with a checkpoint; others are at 4 and 8, of which two are kept


@pytest.fixture(scope="module")
def experiment(tmp_path_factory, model, other_model) -> Path:
    """40 pairs and a record that is none, scored by two references; a run of each of two betas."""
    folder = tmp_path_factory.mktemp("experiment")
    write_pairs(folder / "pairs.jsonl", N)
    with open(folder / "pairs.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "why?", "chosen": "so", "rejected": "so"}) + "\n")
    config = write_config(folder, model, epochs=2, samples=0, checkpoint_every=4)
    commands = [
        ("prepare", config),
        ("score", config, "--set", f"model={other_model}"),
        ("score", config),
        ("train", config),
        (
            "train",
            config,
            "--set",
            "train.run=strong",
            "--set",
            "train.beta=0.5",
            "--set",
            "train.loss={sigmoid: 1, sft: 1}",
        ),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for command in commands:
            run_command(*command)
    return folder


def run_command(*arguments: Any) -> str:
    from stages.cli import main

    done = CliRunner().invoke(main, [str(each) for each in arguments], catch_exceptions=False)
    assert done.exit_code == 0, done.stderr
    return done.stdout


@pytest.fixture
def folder(experiment, tmp_path) -> Path:
    """A copy, in the place of the temporary folder, that a test may damage."""
    shutil.copytree(experiment, tmp_path, dirs_exist_ok=True)
    return tmp_path / "runs/tiny"


@pytest.fixture
def rows(prefcache, folder) -> Callable[[str], list[dict]]:
    return lambda query: json.loads(prefcache("sql", query, "runs/tiny", "--json").stdout)


# -- side by side ----------------------------------------------------------------------------------------------------


def logps(folder: Path, pairs: list[dict], model: Path) -> dict[str, dict[str, float]]:
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


def test_two_references_stand_side_by_side_with_what_each_model_gives(rows, folder, model, other_model):
    prepared = Prepared(folder / "prepared").table().to_pylist()
    found = rows("select example_id, reference, used, ref_chosen_logp, ref_rejected_logp, margin from pairs")
    assert len(found) == 2 * N
    for name, used in ((model, True), (other_model, False)):
        expected = logps(folder, prepared[:6], name)
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


def test_views_describe_the_columns_of_an_experiment(prefcache, folder):
    assert "loss/sft double" in prefcache("sql", "--views", "runs/tiny").stdout
    assert "loss/sft double" not in prefcache("sql", "--views").stdout


def test_quarantine_and_checkpoints_by_hand(rows, folder):
    (row,) = rows("select line, reason, raw from quarantine")
    assert (row["line"], json.loads(row["raw"])["chosen"]) == (N + 1, "so")
    found = rows("select run, step, bytes, folder from checkpoints order by run, step")
    assert [(row["run"], row["step"]) for row in found] == [
        ("strong", 8),
        ("strong", LAST),
        ("trained", 8),
        ("trained", LAST),
    ]
    files = Path(found[0]["folder"]).iterdir()
    assert found[0]["bytes"] == sum(file.stat().st_size for file in files if file.name != "manifest.json")


def test_a_run_that_still_goes_on_shows_its_finished_parts(rows, folder):
    run = folder / "trained"
    (run / "manifest.json").unlink()
    for part in run.glob("*/to-00000010.parquet"):
        part.unlink()
    (run / "steps/.to-00000010.parquet.host-1.tmp").write_bytes(b"half of a part")
    assert rows("select finished, seconds from runs where run = 'trained'") == [{"finished": False, "seconds": None}]
    assert rows("select max(step) as step from steps where run = 'trained'") == [{"step": 8}]
    assert rows("select max(step) as step from metrics where run = 'trained'") == [{"step": 8}]


# -- how answers are given -------------------------------------------------------------------------------------------

QUERY = "select 'a|b' as x, 1.5 as y, null as z union all select 'c', 2, 'd\"' order by 1"


@pytest.mark.parametrize(
    ("form", "expected"),
    [
        ("csv", 'x,y,z\na|b,1.5,\nc,2.0,"d"""\n'),
        ("markdown", '| x | y | z |\n| --- | --- | --- |\n| a\\|b | 1.5 |  |\n| c | 2 | d" |\n'),
    ],
)
def test_answers_for_machines(prefcache, folder, form, expected):
    query = QUERY.replace("1.5", "1.5::double")
    assert prefcache("sql", query, "runs/tiny", "--format", form).stdout == expected


def test_what_stands_in_the_data_does_not_drive_a_terminal(prefcache, folder, monkeypatch):
    query = "select 'a' || chr(27) || '[31m' || chr(155) || 'b' as x"
    assert prefcache("sql", query, "runs/tiny", "--format", "csv").stdout == "x\na\x1b[31m\x9bb\n"
    for form in ("table", "csv", "json", "markdown"):
        shown = (
            on_a_terminal(PREFCACHE, "sql", query, folder, "--format", form)
            .replace("\x1b[0m", "")
            .replace("\x1b[1m", "")
        )
        assert "\x1b" not in shown and "\x9b" not in shown and "[31m" in shown


def on_a_terminal(*command: Any) -> str:
    """What a command writes there."""
    ours, its = os.openpty()
    with subprocess.Popen([str(each) for each in command], stdin=its, stdout=its, stderr=its):
        os.close(its)
        written = b""
        # The end of a terminal is an error to Linux.
        with contextlib.suppress(OSError):
            while block := os.read(ours, 4096):
                written += block
    os.close(ours)
    return written.decode()


def test_the_names_of_columns_are_whole_however_many_there_are(prefcache, folder):
    names = [f"margin_per_token_of_those_that_are_{letter}" for letter in "abcdefgh"]
    lines = prefcache("sql", f"select {', '.join(f'1 as {name}' for name in names)}", "runs/tiny").stdout.splitlines()
    head = lines[: next(i for i, line in enumerate(lines) if "\u2500" in line)]
    cells = zip(*(line.split() for line in head if line.strip() and len(line.split()) == len(names)), strict=True)
    assert ["".join(parts) for parts in cells] == names


def test_answers_as_parquet_on_stdout_and_in_files(prefcache, folder, tmp_path):
    query = "select example_id, margin, n_chosen from pairs where used order by example_id"
    expected = json.loads(prefcache("sql", query, "config.yaml", "--format", "json").stdout)
    command = [PREFCACHE, "sql", query, "runs/tiny", "--format", "parquet"]
    shown = subprocess.run(command, cwd=tmp_path, capture_output=True, check=True).stdout
    assert pq.read_table(io.BytesIO(shown)).to_pylist() == expected
    for name in ("a.parquet", "a.jsonl.gz"):
        assert f"{name}: {N} rows" in prefcache("sql", query, "runs/tiny", "--out", name).stdout
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == expected
    assert [json.loads(line) for line in gzip.open(tmp_path / "a.jsonl.gz")] == expected
    # What fails leaves nothing behind, and what was there as it was.
    failing = "select if(line > 3, error('boom'), line::varchar) as line from examples"
    assert "boom" in prefcache("sql", failing, "runs/tiny", "--out", "a.parquet", code=2).stderr
    assert pq.read_table(tmp_path / "a.parquet").to_pylist() == expected and not list(tmp_path.glob(".a.*"))
    assert "no kind of file" in prefcache("sql", query, "runs/tiny", "--out", "a.txt", code=2).stderr


def test_an_empty_answer_says_why_and_a_long_one_is_ended(prefcache, folder):
    done = prefcache("sql", "select * from rewards where run = 'other'", "runs/tiny")
    assert "0 are left after (run = 'other')" in done.stderr and "0 rows" in done.stdout
    endless = "with recursive t as (select 1 i union all select i + 1 from t) select max(i) from t"
    assert "more than 0.5 s" in prefcache("sql", endless, "runs/tiny", "--timeout", "0.5", code=6).stderr


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


def test_a_damaged_part_of_a_run_that_still_goes_on_is_named(prefcache, folder):
    (folder / "trained/manifest.json").unlink()
    damaged = folder / "trained/steps/to-00000004.parquet"
    flip(damaged)
    assert f"{damaged.name} cannot be read" in prefcache("sql", "from rewards", "runs/tiny", code=4).stderr
