"""The command line: help that answers, errors that say what to do, exit codes that mean something."""

import ast
import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from prefcache.cli import main
from prefcache.interrupts import SENTENCE
from tests.helpers.project import PREFCACHE, ROOT, invoke, start, write_config, write_pairs


def test_the_help_lists_every_command_once_whole_and_names_the_exit_codes(prefcache):
    text = prefcache("--help").stdout
    lines = [line for line in text.splitlines() if line.startswith("  ") and "  " in line.strip()]
    names = [line.split()[0] for line in lines]
    assert sorted(name for name in names if name in main.commands) == sorted(main.commands)
    assert not [line for line in lines if line.endswith("...")]
    assert (
        "0 ok, 2 usage, 3 bad data, 4 integrity, 5 identity mismatch, 6 disk or memory, 7 alerts of a strict run, 130 interrupted"
        in " ".join(text.split())
    )


def test_an_output_has_two_names_and_options_are_explained(prefcache):
    for command in ("sql", "ask", "report", "export", "score", "from-trl", "from-axolotl", "from-llamafactory"):
        (option,) = (each for each in main.commands[command].params if "--output" in each.opts)
        assert sorted(option.opts) == ["--out", "--output"]
    text = " ".join(prefcache("score", "--help").stdout.split())
    assert "--force With --input: replace an existing file" in text
    assert "Seconds after which the query is ended." in " ".join(prefcache("sql", "--help").stdout.split())


FILES = {
    "empty.jsonl": "",
    "blank.jsonl": "\n\n",
    "other.jsonl": json.dumps({"question": "a", "answer": "b"}) + "\n",
    "folder/nothing": "",
    "file": "",
    "pickle/config.json": "{}",
    "pickle/pytorch_model.bin": "",
}
# Settings -> exit code, what was found, what to do.
MISTAKES = {
    "prepare.data=nowhere.jsonl": (2, "No data at nowhere.jsonl", "Expected a file, a folder"),
    "prepare.data=folder": (2, "folder holds no file of records", "Expected one of .jsonl"),
    "prepare.data=empty.jsonl": (3, "empty.jsonl is empty", "expected records"),
    "prepare.data=blank.jsonl prepare.format=pairs": (3, "blank.jsonl", "only blank lines"),
    "prepare.data=other.jsonl": (2, "its columns (question, answer)", "prepare.columns"),
    "prepare.data=other.jsonl prepare.format=pairs": (
        3,
        "missing column (the first: line 1: 'prompt'; found question, answer",
        "quarantine.parquet",
    ),
    "model=folder": (2, "folder has no config.json", "as save_pretrained writes it"),
    "model=nobody/no-such-model": (2, "nobody/no-such-model", "name a local folder"),
    "model=pickle": (2, "pickle, which is never read", "expected *.safetensors"),
    "prepare.format=pair": (2, "prepare.format: there is no format 'pair'", "The nearest is pairs"),
    "out=/proc/nowhere": (2, "/proc/nowhere", "Name a"),
    "out=file/out": (2, "file/out", "Name a"),
    "train.betta=0.2": (2, "train.betta: not a key", "did you mean train.beta?"),
    "train.beta=strong": (2, "train.beta", "found 'strong'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_with_place_remedy_and_exit_code(prefcache, config, tmp_path, mistake):
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    code, place, remedy = MISTAKES[mistake]
    done = prefcache("prepare", config, "--quiet", *(f"--set={setting}" for setting in mistake.split()), code=code)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert place in done.stderr and remedy in done.stderr


def test_a_name_that_leads_nowhere_is_said_in_its_own_words(prefcache, tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("runs/none", "empty"):
        said = prefcache("report", name, code=2).stderr
        assert said.startswith(f"error: {name} is neither a config nor an experiment's folder.")
    said = prefcache("ask", "lenth-bias", "runs/none", code=2).stderr
    assert said.startswith("error: There is no question 'lenth-bias'. The nearest is length-bias.")


def test_a_missing_config_names_one_to_start_from(prefcache):
    assert "prefcache init my.yaml" in prefcache("prepare", "nowhere.yaml", code=2).stderr
    assert "No config" in prefcache("prepare", code=2).stderr


def test_a_loss_that_does_not_exist_is_refused_before_anything_is_loaded(prefcache, config):
    done = prefcache("train", config, "--set", "train.loss=sigmod", code=2)
    assert "The nearest is sigmoid" in done.stderr and "`prefcache losses` lists them" in done.stderr


# -- losses ----------------------------------------------------------------------------------------------------------


def test_every_loss_is_listed_once_under_what_it_reads(prefcache):
    from prefcache.pipeline.training.losses import LOSSES

    text = prefcache("losses").stdout
    titles = ["Pairs\n", "Labelled answers\n", "Pairs, without a reference: no scores are needed\n"]
    starts = [text.index(f"{title}\n") for title in titles]
    assert starts == sorted(starts)
    sections = [text[start:end] for start, end in zip(starts, [*starts[1:], len(text)], strict=True)]
    listed = [{line for line in section.splitlines() if line in LOSSES} for section in sections]
    assert {"sigmoid", "ipo", "aot"} <= listed[0] and {"kto", "bco"} <= listed[1] and {"simpo", "sft"} <= listed[2]
    assert sum(map(len, listed)) == len(LOSSES) == sum(text.splitlines().count(name) for name in LOSSES)
    assert "beta=0.1, label_smoothing=0.0" in listed_with(text, "sigmoid")
    assert "https://arxiv.org/abs/2305.18290" in listed_with(text, "sigmoid")
    assert "`prefcache losses NAME`" in text


def listed_with(text: str, name: str) -> str:
    """What stands under a name in the list."""
    return text.partition(f"\n{name}\n")[2].partition("\n\n")[0]


def test_a_loss_is_shown_with_formula_columns_ranges_and_what_a_healthy_run_does(prefcache):
    text = prefcache("losses", "kto").stdout
    assert text.startswith("kto: Kahneman-Tversky optimization") and "1 - s(beta (a - z))" in text
    assert "Reads labels: completion_logp, ref_completion_logp, label, kl_logp, ref_kl_logp" in text
    assert "Computed over the whole batch of a step, however many micro-batches and processes it has: kl" in text
    assert "Hyperparameters: beta=0.1, desirable_weight=1.0, undesirable_weight=1.0" in text
    assert "    beta: in (0, inf)" in text and "rewards/margins rises" in text
    assert "distance: one of squared, backward, forward" in prefcache("losses", "rpo").stdout
    assert "Computed over the whole batch" in prefcache("losses", "aot").stdout
    assert "Hyperparameters: no hyperparameters" in prefcache("losses", "sft").stdout
    plain = prefcache("losses", "sigmoid").stdout
    assert "Taken over" not in plain and "Reads pairs: chosen_logp, rejected_logp" in plain


def test_losses_as_json_are_what_the_registry_says(prefcache):
    from prefcache.pipeline.training.losses import LOSSES

    every = json.loads(prefcache("losses", "--json").stdout)
    assert [each["name"] for each in every] == list(LOSSES)
    assert {each["kind"] for each in every} == {"pairs", "labels"}
    (one,) = json.loads(prefcache("losses", "dpop", "--json").stdout)
    assert one["hyperparameters"] == {"beta": 0.3, "penalty": 50.0} and one["ranges"]["penalty"] == "[0, inf)"
    assert (one["reference"], one["over_batch"], one["statistics"]) == (True, False, [])
    assert one["healthy"][0]["metric"] == "rewards/margins"


def test_every_loss_can_be_shown(prefcache):
    from prefcache.pipeline.training.losses import LOSSES

    for name in LOSSES:
        assert name in prefcache("losses", name).stdout and name in prefcache("losses", name, "--json").stdout


def test_an_unknown_loss_is_refused_with_the_nearest_and_an_impossible_one_with_why(prefcache):
    assert "The nearest is sigmoid" in prefcache("losses", "sigmod", code=2).stderr
    assert "live reference" in prefcache("losses", "tdpo", code=2).stderr


LOSS_MISTAKES = {
    "train.loss=[sigmoid, kto]": "sigmoid read pairs, kto read labelled answers",
    "train.loss=kto": "holds pairs, not labelled answers",
    "train.loss=rpo": "Loss 'rpo' reads chosen_score, rejected_score",
    "train.loss_args.tau=1": "loss 'sigmoid' has no 'tau'",
    "train.loss_args.ipo.beta=1": "ipo is not among the losses of this run",
    "train.density_ratio=true": "losses that read density_ratio (bco)",
    "train.loss=tdpo": "live reference",
}


def test_a_loss_that_cannot_work_is_refused_before_anything_is_scored(prefcache, prepared):
    for setting, found in LOSS_MISTAKES.items():
        done = prefcache("train", prepared, "--set", setting, code=2)
        assert found in done.stderr and done.stderr.count("\n") == 1


# -- data and models -------------------------------------------------------------------------------------------------


def test_a_tokenizer_of_another_model_is_refused(prefcache, prepared, model, tmp_path):
    other = shutil.copytree(model, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "another tokenizer" in prefcache("score", prepared, "--set", "model=other", code=5).stderr


def test_weights_that_are_not_weights_end_in_one_line(prefcache, config, model, tmp_path):
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not safetensors")
    prefcache("prepare", config, "--set", "model=broken")
    done = prefcache("score", config, "--set", "model=broken", code=2)
    assert "broken/model.safetensors is not a whole safetensors file" in done.stderr


def test_a_damaged_prepared_shard_is_named_and_prepared_again(prefcache, prepared, tmp_path):
    shard = next((tmp_path / "runs/tiny/prepared").glob("train-*.arrow"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    assert shard.name in prefcache("score", prepared, code=4).stderr
    prefcache("prepare", prepared)
    prefcache("score", prepared)


def test_no_config_is_needed_for_a_model_data_and_a_folder(prefcache, model, tmp_path):
    write_pairs(tmp_path / "mine.jsonl", 30)
    settings = ["--set", f"model={model}", "--set", "prepare.data=mine.jsonl", "--set", "out=runs/mine"]
    for stage in ("prepare", "score", "train"):
        prefcache(stage, *settings)
    assert (tmp_path / "runs/mine/trained/model/config.json").exists()


# -- sql -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory, model) -> Path:
    """A folder with one experiment of 30 pairs, trained once."""
    folder = tmp_path_factory.mktemp("trained")
    write_pairs(folder / "pairs.jsonl", 30)
    config = write_config(folder, model)
    for stage in ("prepare", "score", "train"):
        invoke(folder, stage, config)
    return folder


@pytest.fixture(scope="module")
def sql(trained):
    return lambda *arguments, code=0: invoke(trained, "sql", *arguments, code=code)


def test_sql_joins_examples_reference_and_rewards(sql):
    """Every reward is beta times policy minus reference, with the reference read from the cache itself."""
    query = """
        select steps.chosen_reward, 0.1 * (steps.chosen_logp - reference.logp_sum) as by_hand
        from steps join examples using (example_id) join reference on key = chosen_key
    """
    rows = json.loads(sql(query, "--json").stdout)
    assert len(rows) >= 60  # two epochs, and held-out visits
    assert all(row["chosen_reward"] == pytest.approx(row["by_hand"], abs=1e-9) for row in rows)


def test_sql_needs_no_folder_where_there_is_one_experiment_and_asks_where_there_are_more(sql, trained):
    assert "30 rows" in sql("select example_id from examples").stdout
    other = shutil.copytree(trained / "runs/tiny", trained / "runs/other")
    assert "Name one, such as runs/other" in sql("select 1", code=2).stderr
    shutil.rmtree(other)


@pytest.mark.parametrize(
    "query",
    [
        "select * from read_text('/etc/passwd')",
        "select * from '/etc/passwd'",
        "copy examples to 'stolen.csv'",
        "attach 'stolen.db'",
        "install httpfs",
        "set memory_limit = '1GB'",
        "select 1; select 2",
        "drop view examples",
        "create table t as select 1",
        f"select nothing from examples where {' or '.join(['line = 1'] * 40)}",  # longer than a file's name may be
        "select * from exampels",
        "not sql",
        "",
    ],
)
def test_sql_refuses_what_is_not_one_select_over_the_views(sql, trained, query):
    done = sql(query, code=2)
    assert done.stderr.startswith("error: ") and "examples" in done.stderr
    assert not list(trained.glob("stolen*"))


def test_a_file_of_a_question_has_all_rows_and_a_table_a_few(trained):
    invoke(trained, "ask", "disagreements", "--out", "all.csv")
    invoke(trained, "ask", "disagreements", "--set", "limit=2", "--out", "two.csv")
    n_negative = invoke(
        trained, "sql", "select count(*) as n from pairs where used and margin_per_token < 0", "--format", "csv"
    )
    listed = json.loads(invoke(trained, "ask", "disagreements", "--set", "limit=3", "--json").stdout)
    n_rows = {name: len((trained / name).read_text().splitlines()) - 1 for name in ("all.csv", "two.csv")}
    assert n_rows == {"all.csv": int(n_negative.stdout.split()[1]), "two.csv": 2}
    assert len(listed["rows"]) == 3 < n_rows["all.csv"]


def test_sql_shows_hostile_text_as_text(sql):
    done = sql("select chr(27) || '[31mred' as x")
    assert "\x1b" not in done.stdout and "[31mred" in done.stdout


def test_sql_says_how_many_rows_it_left_out(sql):
    assert "2 rows of 30" in sql("select * from examples", "--limit", "2").stdout
    assert len(json.loads(sql("select * from examples", "--json", "--limit", "2").stdout)) == 30


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_query_without_end_can_be_interrupted(trained, sent):
    endless = "with recursive t as (select 1 i union all select i + 1 from t) select max(i) from t"
    child = start(PREFCACHE, "sql", endless, cwd=trained, stderr=subprocess.PIPE, text=True)
    time.sleep(3)
    child.send_signal(sent)
    _, said = child.communicate(timeout=60)
    assert (child.returncode, said) == (130, f"error: {SENTENCE}\n")


def test_no_text_of_the_package_sends_a_user_to_a_makefile():
    # An installed package has none. Where prefcache runs from a checkout, vLLM's remedy may name `make vllm`.
    for file in [*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "stages").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and "in a checkout" not in node.value:
                assert not re.search(r"\bmake (prepare|score|train|report)\b", node.value), (file, node.lineno)
