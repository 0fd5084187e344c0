"""The command line: help that answers, errors that say what to do, exit codes that mean something."""

import json
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import PREFCACHE, write_config, write_pairs

from stages.cli import main


def test_every_command_is_in_a_section_of_the_help(prefcache):
    listed = [
        line.split()[0]
        for line in prefcache("--help").stdout.splitlines()
        if line.startswith("  ") and "  " in line.strip()
    ]
    assert sorted(name for name in listed if name in main.commands) == sorted(main.commands)


@pytest.mark.parametrize(
    "command",
    [
        *("prepare", "preview", "formats", "losses", "score", "train", "merge", "push"),
        *("show", "doctor", "report", "sql", "ask"),
    ],
)
def test_help_begins_with_a_verb_phrase_and_shows_an_example(prefcache, command):
    text = prefcache(command, "--help").stdout
    assert f"prefcache {command} " in text and text.splitlines()[2].strip().endswith(".")


def test_every_command_is_in_the_help(prefcache):
    text = prefcache("--help").stdout
    assert all(f"  {name} " in text for name in main.commands)
    assert (
        "0 ok, 2 usage, 3 bad data, 4 integrity, 5 identity mismatch, 6 disk or memory, 7 alerts of a strict run, 130 interrupted"
        in " ".join(text.split())
    )


def _missing(root: Path) -> list[str]:
    return ["--set", "prepare.data=nowhere.jsonl"]


def _folder_as_data(root: Path) -> list[str]:
    return ["--set", "prepare.data=runs"]


def _empty(root: Path) -> list[str]:
    (root / "empty.jsonl").touch()
    return ["--set", "prepare.data=empty.jsonl"]


def _blank(root: Path) -> list[str]:
    (root / "blank.jsonl").write_text("\n\n")
    return ["--set", "prepare.data=blank.jsonl", "--set", "prepare.format=pairs"]


def _other_columns(root: Path) -> list[str]:
    (root / "other.jsonl").write_text(json.dumps({"question": "a", "answer": "b"}) + "\n")
    return ["--set", "prepare.data=other.jsonl"]


def _few_usable(root: Path) -> list[str]:
    return [*_other_columns(root), "--set", "prepare.format=pairs"]


def _no_model(root: Path) -> list[str]:
    (root / "folder").mkdir()
    return ["--set", "model=folder"]


def _no_such_model(root: Path) -> list[str]:
    return ["--set", "model=nobody/no-such-model"]


def _pickle_model(root: Path) -> list[str]:
    (root / "pickle").mkdir()
    (root / "pickle/config.json").write_text("{}")
    (root / "pickle/pytorch_model.bin").touch()
    return ["--set", "model=pickle"]


def _no_such_format(root: Path) -> list[str]:
    return ["--set", "prepare.format=pair"]


def _nowhere_to_write(root: Path) -> list[str]:
    return ["--set", "out=/proc/nowhere"]


def _misspelt(root: Path) -> list[str]:
    return ["--set", "train.betta=0.2"]


def _wrong_value(root: Path) -> list[str]:
    return ["--set", "train.beta=strong"]


MISTAKES = {
    _missing: (2, "No data at nowhere.jsonl", "Expected a file, a folder"),
    _folder_as_data: (2, "runs holds no file of records", "Expected one of .jsonl"),
    _empty: (3, "empty.jsonl is empty", "expected records"),
    _blank: (3, "blank.jsonl", "only blank lines"),
    _other_columns: (2, "its columns (question, answer)", "prepare.columns"),
    _few_usable: (3, "missing column (the first: line 1: 'prompt'; found question, answer", "quarantine.parquet"),
    _no_model: (2, "folder is no model", "Expected a folder as save_pretrained writes it"),
    _no_such_model: (2, "nobody/no-such-model", "name a local folder"),
    _pickle_model: (2, "pickle, which is never read", "expected *.safetensors"),
    _no_such_format: (2, "prepare.format: there is no format 'pair'", "The nearest is pairs"),
    _nowhere_to_write: (2, "/proc/nowhere", "Name a"),
    _misspelt: (2, "train.betta is no key", "the nearest is train.beta"),
    _wrong_value: (2, "train.beta", "found 'strong'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_ends_in_one_line_with_place_remedy_and_exit_code(prefcache, config, tmp_path, mistake):
    (tmp_path / "runs").mkdir()
    code, place, remedy = MISTAKES[mistake]
    done = prefcache("prepare", config, "--quiet", *mistake(tmp_path), code=code)
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert place in done.stderr and remedy in done.stderr


def test_a_missing_config_names_one_to_start_from(prefcache):
    assert "data/demo/config.yaml" in prefcache("prepare", "nowhere.yaml", code=2).stderr
    assert "No config" in prefcache("prepare", code=2).stderr


def test_a_loss_that_does_not_exist_is_refused_before_anything_is_loaded(prefcache, config):
    done = prefcache("train", config, "--set", "train.loss=sigmod", code=2)
    assert "The nearest is sigmoid" in done.stderr and "`prefcache losses` lists them" in done.stderr


# -- losses ----------------------------------------------------------------------------------------------------------


def test_every_loss_is_listed_once_under_what_it_reads(prefcache):
    from pipeline.training.losses import LOSSES

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
    assert text.startswith("kto: Kahneman-Tversky optimisation") and "1 - s(beta (a - z))" in text
    assert "Reads labels: completion_logp, ref_completion_logp, label, kl_logp, ref_kl_logp" in text
    assert "Taken over the whole batch of a step, however many micro-batches and processes it has: kl" in text
    assert "Hyperparameters: beta=0.1, desirable_weight=1.0, undesirable_weight=1.0" in text
    assert "    beta: in (0, inf)" in text and "rewards/margins rises" in text
    assert "distance: one of squared, backward, forward" in prefcache("losses", "rpo").stdout
    assert "Taken over the whole batch" in prefcache("losses", "aot").stdout
    plain = prefcache("losses", "sigmoid").stdout
    assert "Taken over" not in plain and "Reads pairs: chosen_logp, rejected_logp" in plain


def test_losses_without_hyperparameters_say_so(prefcache):
    assert "Hyperparameters: no hyperparameters" in prefcache("losses", "sft").stdout


def test_losses_as_json_are_what_the_registry_says(prefcache):
    from pipeline.training.losses import LOSSES

    every = json.loads(prefcache("losses", "--json").stdout)
    assert [each["name"] for each in every] == list(LOSSES)
    assert {each["kind"] for each in every} == {"pairs", "labels"}
    (one,) = json.loads(prefcache("losses", "dpop", "--json").stdout)
    assert one["hyperparameters"] == {"beta": 0.3, "penalty": 50.0} and one["ranges"]["penalty"] == "[0, inf)"
    assert (one["reference"], one["over_batch"], one["statistics"]) == (True, False, [])
    assert one["healthy"][0]["metric"] == "rewards/margins"


@pytest.mark.parametrize("how", [[], ["--json"]])
def test_every_loss_can_be_shown(prefcache, how):
    from pipeline.training.losses import LOSSES

    for name in LOSSES:
        assert name in prefcache("losses", name, *how).stdout


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


def test_a_loss_that_cannot_work_is_refused_before_anything_is_scored(prefcache, config):
    prefcache("prepare", config)
    for setting, found in LOSS_MISTAKES.items():
        done = prefcache("train", config, "--set", setting, code=2)
        assert found in done.stderr and done.stderr.count("\n") == 1


# -- data and models -------------------------------------------------------------------------------------------------


def test_a_tokenizer_of_another_model_is_refused(prefcache, config, model, tmp_path):
    prefcache("prepare", config)
    other = shutil.copytree(model, tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["model"]["merges"].pop()
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "another tokenizer" in prefcache("score", config, "--set", "model=other", code=5).stderr


def test_weights_that_are_not_weights_end_in_one_line(prefcache, config, model, tmp_path):
    broken = shutil.copytree(model, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"not safetensors")
    prefcache("prepare", config, "--set", "model=broken")
    done = prefcache("score", config, "--set", "model=broken", code=2)
    assert "does not load as a causal language model" in done.stderr


def test_a_damaged_prepared_shard_is_named(prefcache, config, tmp_path):
    prefcache("prepare", config)
    shard = next((tmp_path / "runs/tiny/prepared").glob("train-*.arrow"))
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    assert shard.name in prefcache("score", config, code=4).stderr
    # Preparing again notices and mends it.
    prefcache("prepare", config)
    prefcache("score", config)


def test_a_folder_that_may_not_be_written_to_is_named(prefcache, config, tmp_path):
    (tmp_path / "file").touch()
    assert "file/out" in prefcache("prepare", config, "--set", "out=file/out", code=2).stderr


def test_no_config_is_needed_for_a_model_data_and_a_folder(prefcache, model, tmp_path):
    write_pairs(tmp_path / "mine.jsonl", 30)
    settings = ["--set", f"model={model}", "--set", "prepare.data=mine.jsonl", "--set", "out=runs/mine"]
    for stage in ("prepare", "score", "train"):
        prefcache(stage, *settings)
    assert (tmp_path / "runs/mine/trained/model/config.json").exists()


@pytest.fixture
def trained(prefcache, tmp_path, model) -> Path:
    write_pairs(tmp_path / "pairs.jsonl", 30)
    config = write_config(tmp_path, model)
    for stage in ("prepare", "score", "train"):
        prefcache(stage, config)
    return tmp_path / "runs/tiny"


def test_sql_joins_examples_reference_and_rewards(prefcache, trained):
    """Every reward is beta times policy minus reference, with the reference read from the cache itself."""
    query = """
        select steps.chosen_reward, 0.1 * (steps.chosen_logp - reference.logp_sum) as by_hand
        from steps join examples using (example_id) join reference on key = chosen_key
    """
    rows = json.loads(prefcache("sql", query, "--json").stdout)
    assert len(rows) >= 60  # two epochs, and held-out visits
    assert all(row["chosen_reward"] == pytest.approx(row["by_hand"], abs=1e-9) for row in rows)


def test_sql_needs_no_folder_where_there_is_one_experiment_and_asks_where_there_are_more(prefcache, trained):
    assert "30 rows" in prefcache("sql", "select example_id from examples").stdout
    shutil.copytree(trained, trained.with_name("other"))
    assert "Name one after the query" in prefcache("sql", "select 1", code=2).stderr


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
def test_sql_refuses_what_is_not_one_select_over_the_views(prefcache, trained, query):
    done = prefcache("sql", query, code=2)
    assert done.stderr.startswith("error: ") and "examples" in done.stderr
    assert not list(trained.parent.parent.glob("stolen*"))


def test_sql_shows_hostile_text_as_text(prefcache, trained):
    done = prefcache("sql", "select chr(27) || '[31mred' as x")
    assert "\x1b" not in done.stdout and "[31mred" in done.stdout


def test_sql_says_how_many_rows_it_left_out(prefcache, trained):
    assert "2 rows of 30" in prefcache("sql", "select * from examples", "--limit", "2").stdout
    assert len(json.loads(prefcache("sql", "select * from examples", "--json", "--limit", "2").stdout)) == 30


def test_a_query_without_end_can_be_interrupted(trained, tmp_path):
    endless = "with recursive t as (select 1 i union all select i + 1 from t) select max(i) from t"
    for sent in (signal.SIGINT, signal.SIGTERM):
        child = subprocess.Popen([PREFCACHE, "sql", endless], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        time.sleep(3)
        child.send_signal(sent)
        _, said = child.communicate(timeout=60)
        assert child.returncode == -sent and not said  # which a shell shows as 130 and 143
