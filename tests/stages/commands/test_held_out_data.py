"""Evaluation data of one's own: prepared and scored like the rest, never trained on, with metrics under its name."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.stored.records import RunManifest
from tests.helpers.project import options, pair, write_config, write_pairs
from tests.helpers.runs import batches_of, metrics, table

SETS = "prepare.held_out_data={easy: easy.jsonl, hard: [hard.jsonl, more.jsonl]}"


@pytest.fixture
def sets(tmp_path, model) -> Path:
    """24 pairs of data, and sets of 5 and of 3 + 2."""
    write_pairs(tmp_path / "pairs.jsonl", 24)
    write_pairs(tmp_path / "easy.jsonl", 5, start=100)
    write_pairs(tmp_path / "hard.jsonl", 3, start=200)
    write_pairs(tmp_path / "more.jsonl", 2, start=300)
    return write_config(tmp_path, model, samples=2, eval_every=2)


def rows_of(folder: Path, split: str | None = None) -> list[dict]:
    return Prepared(folder / "runs/tiny/prepared").table(split).to_pylist()


def prompts_of(folder: Path, split: str) -> list[str]:
    return [row["prompt"] for row in rows_of(folder, split)]


def run(prefcache, config, *settings: str) -> dict:
    for stage in ("prepare", "score"):
        prefcache(stage, config, *options(*settings))
    return json.loads(prefcache("train", config, *options(*settings), "--json").stdout)


def test_each_set_is_a_split_of_its_own_and_changes_nothing_about_the_others(prefcache, sets, tmp_path):
    prefcache("prepare", sets)
    before = {split: rows_of(tmp_path, split) for split in ("train", "held_out")}
    done = prefcache("prepare", sets, *options(SETS))
    n = {split: len(rows) for split, rows in before.items()}
    assert f"{n['train']} training, {n['held_out']} held-out, 5 easy and 5 hard pairs of 34 records" in done.stdout
    assert {split: rows_of(tmp_path, split) for split in before} == before
    assert prompts_of(tmp_path, "easy") == [pair(i)["prompt"] for i in range(100, 105)]
    assert prompts_of(tmp_path, "hard") == [pair(i)["prompt"] for i in (200, 201, 202, 300, 301)]
    rows = json.loads(
        prefcache("sql", "select split, count(*) as n from examples group by 1", "runs/tiny", "--json").stdout
    )
    assert {row["split"]: row["n"] for row in rows} == n | {"easy": 5, "hard": 5}
    assert "nothing to do" in prefcache("prepare", sets, *options(SETS)).stderr
    # Without them, their shards go.
    prefcache("prepare", sets)
    assert not list((tmp_path / "runs/tiny/prepared").glob("easy-*"))


def test_metrics_have_the_names_that_trl_has_for_a_dict_of_data_sets(prefcache, sets, tmp_path):
    result = run(prefcache, sets, SETS)
    folder = tmp_path / "runs/tiny/trained"
    visits, last = table(folder, "steps"), result["steps"]
    trained = {example_id for ids in batches_of(folder).values() for example_id in ids}
    for name, n in (("easy", 5), ("hard", 5)):
        ids = {row["example_id"] for row in rows_of(tmp_path, name)}
        assert len(ids) == n and not ids & trained and result["evaluated"][name] == n
        losses = [row["loss"] for row in visits if row["split"] == name and row["step"] == last]
        margins = [row for row in visits if row["split"] == name and row["step"] == 0]
        assert len(losses) == n and {row["example_id"] for row in margins} == ids
        row = metrics(folder)[-1]
        assert row[f"eval_{name}_loss"] == pytest.approx(sum(losses) / n)
        assert row[f"eval_{name}_rewards/margins"] != row["eval_rewards/margins"]
        # The policy starts as the reference.
        assert metrics(folder)[0][f"eval_{name}_rewards/margins"] == pytest.approx(0, abs=1e-5)
        assert result["after"]["evaluation"][f"{name}_loss"] == pytest.approx(sum(losses) / n)
    # As long as the held-out share, at every second step and at both ends.
    assert {row["step"] for row in visits if row["split"] == "easy"} == {
        row["step"] for row in visits if row["split"] == "held_out"
    }
    viewed = json.loads(
        prefcache("sql", "select eval_easy_loss as loss from metrics order by step desc", "runs/tiny", "--json").stdout
    )
    assert viewed[0]["loss"] == metrics(folder)[-1]["eval_easy_loss"]
    card = (folder / "model/README.md").read_text()
    assert "pairs of the evaluation data easy" in card and "held-out pairs" in card


def test_an_unnamed_file_is_called_data_and_can_be_all_that_is_evaluated(prefcache, sets, tmp_path):
    settings = ("prepare.held_out=0", "prepare.held_out_data=easy.jsonl")
    result = run(prefcache, sets, *settings)
    assert result["held_out"] == 0 and result["evaluated"] == {"data": 5} and result["examples"] == 24
    last = metrics(tmp_path / "runs/tiny/trained")[-1]
    assert last["eval_data_loss"] is not None and last["eval_loss"] is None
    # Prompts to answer, and examples to show token by token, are then those of this data.
    ids = {row["example_id"] for row in rows_of(tmp_path, "data")}
    for file in ("samples.parquet", "tokens.parquet"):
        assert {row["example_id"] for row in pq.read_table(tmp_path / "runs/tiny/trained" / file).to_pylist()} <= ids
    told = prefcache("train", sets, *options(*settings)).stdout
    assert "5 pairs of data" in told and "held-out" not in told
    page = tmp_path / "report.html"
    prefcache("report", "runs/tiny", "--output", page)
    assert "Measured on 5 pairs of data, which training never sees" in page.read_text()


def test_the_report_has_a_table_for_each_set(prefcache, sets, tmp_path):
    run(prefcache, sets, SETS)
    page = tmp_path / "report.html"
    prefcache("report", "runs/tiny", "--output", page)
    html = page.read_text()
    assert html.count('<th scope="row" rowspan="1">reward margin</th>') == 3
    for title in ("held-out pairs</h3>", "<h3>5 pairs of easy</h3>", "<h3>5 pairs of hard</h3>"):
        assert title in html


def test_the_report_says_how_many_prompts_are_also_trained_on(prefcache, sets, tmp_path):
    write_pairs(tmp_path / "easy.jsonl", 5)  # the first of the data
    run(prefcache, sets, "prepare.held_out=0", "prepare.held_out_data=easy.jsonl")
    page = tmp_path / "report.html"
    prefcache("report", "runs/tiny", "--output", page)
    html = page.read_text()
    assert "Measured on 5 pairs of data, 5 of which have a prompt that is also trained on, before" in html
    assert "never sees" not in html


def test_a_set_that_alone_has_margins_is_named_in_the_report(prefcache, sets, tmp_path):
    # Sums alone are cached, so answers of which some tokens do not count have no margin: all but those of the set.
    said = [{"role": role, "content": "one"} for role in ("assistant", "user", "assistant")]
    pairs = [pair(i) | {"chosen": said} for i in range(3)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    settings = options("prepare.held_out=0", "prepare.held_out_data={easy_ones: easy.jsonl}", "score.logps=false")
    for stage in ("prepare", "score"):
        prefcache(stage, sets, *settings)
    page = tmp_path / "report.html"
    prefcache("report", "runs/tiny", "--output", page)
    html = page.read_text()
    assert "of 5 pairs of easy_ones" in html
    # In the tables, too, under the name that its metrics have.
    assert '<th scope="row">easy_ones</th>' in html and '<th scope="col" class="n">easy_ones</th>' in html


def test_the_best_step_can_be_chosen_by_such_a_metric(prefcache, sets, tmp_path):
    result = run(prefcache, sets, SETS, "train.best=easy_loss", "train.learning_rate=1e-2")
    rows = [row for row in metrics(tmp_path / "runs/tiny/trained") if row["step"] and row["eval_easy_loss"] is not None]
    best = min(rows, key=lambda row: row["eval_easy_loss"])
    assert result["best"] == {"step": best["step"], "metric": "eval_easy_loss", "value": best["eval_easy_loss"]}
    # A name that the data lacks is refused before the run, with those that there are.
    said = prefcache("train", sets, *options(SETS, "train.best=eval_soft_loss", "train.run=b"), code=2).stderr
    assert "eval_soft_loss" in said and "eval_easy_loss" in said


def test_a_prompt_that_is_also_trained_on_is_counted_said_and_kept(prefcache, sets, tmp_path):
    seen = [pair(i) for i in range(24)]
    with open(tmp_path / "easy.jsonl", "a") as file:
        # One pair as it is in the data; one with other spaces and another answer.
        file.write(json.dumps(seen[0]) + "\n")
        file.write(json.dumps(seen[1] | {"prompt": f"{seen[1]['prompt']} ", "chosen": "another answer"}) + "\n")
    done = prefcache(
        "prepare", sets, *options("prepare.held_out=0", "prepare.held_out_data=easy.jsonl", "prepare.duplicates=drop")
    )
    assert "2 examples of prepare.held_out_data have a prompt that is also trained on" in done.stderr
    assert "2 of the evaluation data have a prompt that is also trained on" in done.stdout
    assert len(rows_of(tmp_path, "train")) == 24 and len(rows_of(tmp_path, "data")) == 7
    ids = [row["example_id"] for row in rows_of(tmp_path)]
    assert len(set(ids)) == len(ids)


def test_labels_take_mismatched_answers_from_their_own_set(prefcache, sets, tmp_path):
    labels = "prepare.examples=labels"
    prefcache("prepare", sets, *options(labels))
    before = rows_of(tmp_path, "train")
    prefcache("prepare", sets, *options(labels, SETS))
    assert rows_of(tmp_path, "train") == before
    own = rows_of(tmp_path, "easy")
    assert {row["kl_of"] for row in own} <= {row["example_id"] for row in own}
    result = run(prefcache, sets, labels, SETS, "train.loss=kto")
    assert result["after"]["evaluation"]["easy_kl"] is not None


def test_a_bad_record_of_evaluation_data_is_in_quarantine(prefcache, sets, tmp_path):
    with open(tmp_path / "easy.jsonl", "a") as file:
        file.write("{\n")
    done = prefcache("prepare", sets, *options(SETS))
    assert "1 in quarantine" in done.stdout


def test_exported_rows_say_which_set_they_are_of(prefcache, sets, tmp_path):
    for stage in ("prepare", "score"):
        prefcache(stage, sets, *options(SETS))
    prefcache("export", sets, "--output", "rows.jsonl", *options(SETS))
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 34
    by_prompt = {row["prompt"]: row["prefcache_split"] for row in rows}
    assert all(by_prompt[row["prompt"]] == row["split"] for row in rows_of(tmp_path))


def test_the_reference_that_moves_scores_each_set(prefcache, sets, tmp_path):
    result = run(prefcache, sets, SETS, "train.moving_reference={every: 2, alpha: 1}", "train.epochs=2")
    assert result["after"]["evaluation"]["hard_loss"] > 0


def test_a_resumed_run_ends_with_the_same_evaluations(prefcache, sets, tmp_path):
    settings = (SETS, "train.checkpoint_every=2", "train.keep_checkpoints=9")
    first = run(prefcache, sets, *settings)
    folder = tmp_path / "runs/tiny/trained"
    (folder / "manifest.json").unlink()
    last = sorted((folder / "checkpoints").iterdir())[-1]
    last.rename(folder / "moved-away")
    again = json.loads(prefcache("train", sets, *options(*settings), "--json").stdout)
    assert again["after"] == first["after"]
    assert RunManifest.find(folder).evaluated == {"easy": 5, "hard": 5}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("prepare.held_out_data={train: easy.jsonl}", "'train' names a set of examples; expected lower-case letters"),
        ("prepare.held_out_data={held_out: easy.jsonl}", "neither train nor held_out"),
        ("prepare.held_out_data={Easy Set: easy.jsonl}", "'Easy Set' names a set of examples"),
        ("prepare.held_out_data={easy: []}", "prepare.held_out_data.easy"),
        ("prepare.held_out_data={easy: {path: easy.jsonl, colums: {}}}", "did you mean"),
        ("prepare.held_out_data=nowhere.jsonl", "No data at nowhere.jsonl"),
    ],
)
def test_what_cannot_be_evaluation_data_is_refused(prefcache, sets, setting, message):
    assert message in prefcache("prepare", sets, *options(setting), code=2).stderr
