"""Verdicts: what they say of all the data, of too little, of nothing, and of labels; and that what they advise exists."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pytest

from prefcache.cli import main
from prefcache.pipeline import config_settings, intervals
from prefcache.pipeline.questions import QUESTIONS, Verdict
from prefcache.pipeline.questions.verdict import JUDGES, Share, find_worst
from prefcache.pipeline.training.losses import LOSSES
from tests.helpers.project import invoke, options, pair, write_config, write_pairs

SOURCES = [file.read_text() for file in Path("pipeline/questions").glob("*_verdicts.py")]


def judge(name: str, numbers: Mapping[str, Any], **values: Any) -> Verdict:
    question = QUESTIONS[name]
    return question.judge(dict(numbers), question.values(values))


# -- shares ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n_right", "n"), [(8, 10), (3, 5), (4192, 5904)])
def test_the_ends_of_a_shares_interval_are_those_that_the_score_test_just_accepts(n_right, n):
    estimate = Share(n_right, n).estimate
    for p in (estimate.low, estimate.high):
        assert abs(n_right / n - p) / (p * (1 - p) / n) ** 0.5 == pytest.approx(1.959964, rel=1e-6)


def test_a_correlation_has_fishers_interval():
    # artanh(0.5) = 0.5493; 1.96 / sqrt(28 - 3) = 0.3920; tanh(0.1573) = 0.1560, tanh(0.9413) = 0.7358
    estimate = intervals.correlation(0.5, 28)
    assert (estimate.low, estimate.high) == pytest.approx((0.1560, 0.7358), abs=1e-4)
    assert intervals.correlation(0.5, 3).low == -1 and intervals.correlation(0.5, 3).high == 1


def test_a_source_is_named_only_beyond_an_interval_that_holds_for_all_sources():
    whole = Share(500, 1000)
    differ = [{"n": 50, "k": 25 + i % 7} for i in range(20)]
    assert find_worst(differ, lambda source, n: Share(source["k"], source["n"], n), whole) is None
    # 32 of 50 alone is outside: 50% to 76%; among twenty sources one such is to be expected.
    assert not Share(32, 50, 20).excludes(0.5)
    worst = find_worst([*differ, {"n": 50, "k": 45}], lambda source, n: Share(source["k"], source["n"], n), whole)
    assert worst is not None and worst[0]["k"] == 45


# -- sentences -------------------------------------------------------------------------------------------------------


def length_bias(longer: int, differ: int, *sources: tuple[str, int, int]) -> Verdict:
    named = [{"source": name, "longer": k, "differ": n} for name, k, n in sources]
    return judge("length-bias", {"pairs": differ, "differ": differ, "longer": longer, "labels": 0, "sources": named})


def test_a_length_bias_is_strong_clear_absent_or_not_to_be_told():
    strong = length_bias(4192, 5904)
    assert strong.sentence.startswith(
        "The longer answer wins in 71% of 5,904 pairs (95% interval 70% to 72%): the bias towards longer answers is strong. Try "
        "train.loss=sigmoid_norm"
    )
    assert strong.numbers["longer_wins"] == pytest.approx(4192 / 5904) and strong.numbers["longer_wins_low"] < 0.7
    assert "towards shorter answers is clear" in length_bias(400, 1000).sentence
    assert "no length bias worth acting on" in length_bias(2050, 4000).sentence
    assert "no length bias can be told from so few" in length_bias(74, 137).sentence
    assert length_bias(12, 20).sentence.endswith("too few to say whether there is a length bias.")
    assert "the same length in all 7 pairs" in judge("length-bias", {"pairs": 7, "differ": 0, "labels": 0}).sentence


def test_the_source_with_the_most_bias_is_named():
    said = length_bias(700, 1000, ("a.jsonl", 250, 500), ("b.jsonl", 450, 500)).sentence
    assert "It is most so in b.jsonl: 90% of 500 pairs" in said
    assert "most so" not in length_bias(700, 1000, ("a.jsonl", 350, 500), ("b.jsonl", 350, 500)).sentence


def test_one_visit_of_each_example_is_no_verdict_about_learning():
    once = {"run": "a", "split": "train", "became": "always right", "n": 90, "n_visits": 90}
    never = once | {"became": "never right", "n": 10, "n_visits": 10}
    said = judge("learning", {"runs": 1, "groups": [once, never]}).sentence
    assert said.startswith(
        "Each of 100 examples was visited once, so that it cannot be said what was learnt or forgotten."
    )
    twice = [group | {"n_visits": 2 * group["n"]} for group in (once, never)]
    assert "90% were always right and 10% were never right" in judge("learning", {"runs": 1, "groups": twice}).sentence
    wrong = {"run": "a", "split": "train", "n": 100, "n_wrong": 10, "most_visits": 1}
    said = judge("unlearned", {"runs": 1, "groups": [wrong]}).sentence
    assert said.startswith(
        "Wrong at their last visit: 10 of 100 training examples (10%, 95% interval 6% to 17%). Each training example was visited once"
    )
    selected = {"runs": 1, "run": "a", "labels": 0, "examples": 90, "kept": 9, "highest": 0.1}
    selected |= {"rewarded": 90, "epochs": 1.0}
    assert "Each was visited once" in judge("small-gap", selected).sentence
    assert "Each was visited once" not in judge("small-gap", selected | {"epochs": 2.0}).sentence
    said = judge("small-gap", selected | {"rewarded": 40}).sentence
    assert said.startswith("9 of 40 training pairs that run a has rewards of, among 90, are kept")


def test_a_run_of_one_visit_does_not_count_as_unlearned_next_to_one_of_several():
    once = {"run": "once", "split": "train", "n": 100, "n_wrong": 90, "most_visits": 1}
    thrice = {"run": "trained", "split": "train", "n": 100, "n_wrong": 0, "most_visits": 3}
    # Held-out examples are visited at the run's end, however often before.
    held_out = {"run": "trained", "split": "held_out", "n": 40, "n_wrong": 20, "most_visits": 1}
    said = judge("unlearned", {"runs": 2, "groups": [once, thrice, held_out]}).sentence
    assert "0 of 100 training examples" in said and "20 of 40 held-out examples" in said and "by heart" in said


def test_what_is_learnt_first_last_and_not_is_named():
    def group(part: str, tenth: int, n_right: int) -> dict[str, Any]:
        return {"run": "a", "kind": "length", "part": part, "tenth": tenth, "n": 100, "n_right": n_right}

    rights = {"8": (55, 80), "16": (75, 90), "32": (50, 55)}
    groups = [group(part, 1 + at, n) for part, both in rights.items() for at, n in enumerate(both)]
    said = judge("learned-first", {"runs": 1, "labels": 0, "groups": groups}).sentence
    assert said.startswith(
        "Run a: answers of 16 to 31 tokens from tenth 1 on, answers of 8 to 15 tokens from tenth 2 on; not clearly: answers of 32 to 63 tokens."
    )


def test_nothing_found_is_a_sentence_too():
    assert judge("contradictions", {"pairs": 5904, "labels": 0, "contradictory": 0}).sentence == (
        "No pair contradicts another among 5,904."
    )


# -- what they name exists -------------------------------------------------------------------------------------------


def test_every_question_has_a_verdict_and_every_verdict_a_question():
    assert JUDGES.keys() == QUESTIONS.keys()


def test_the_settings_losses_and_commands_that_verdicts_advise_exist():
    known = {setting.key for setting in config_settings.settings()}
    commands = set(main.commands)
    settings = {name for text in SOURCES for name in re.findall(r"\b((?:train|prepare|score)(?:\.\w+)+)", text)}
    # The hyperparameters of losses are no settings of their own.
    assert len(settings) >= 10 and {re.sub(r"(loss_args)\..*", r"\1", name) for name in settings} <= known
    losses = {name for text in SOURCES for name in re.findall(r"train\.loss=(\w+)", text)}
    summed = {name for text in SOURCES for name in re.findall(r"[{ ](\w+): 0\.\d", text)}
    assert losses >= {"sigmoid_norm", "r_dpo", "dpop", "robust"} and losses | summed <= set(LOSSES)
    asked = {name for text in SOURCES for name in re.findall(r"prefcache ask ([\w-]+)", text)}
    assert asked and asked <= set(QUESTIONS)
    assert {name for text in SOURCES for name in re.findall(r"prefcache (\w+) (?:CONFIG|EXAMPLE)", text)} <= commands
    assert isinstance(main, click.Group)


# -- asked of experiments --------------------------------------------------------------------------------------------


def ask(folder: Path, name: str, out: str, *settings: str) -> dict[str, Any]:
    sets = [word for setting in settings for word in ("--set", setting)]
    answer: dict[str, Any] = json.loads(invoke(folder, "ask", name, out, "--json", *sets).stdout)
    assert list(answer) == ["question", "parameters", "rows", "verdict"]
    assert answer["question"] == name and list(answer["verdict"]) == ["sentence", "numbers"]
    return answer


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model) -> Path:
    """Pairs and the same as labels, scored and trained for two epochs, and pairs of which a third is too long."""
    folder = tmp_path_factory.mktemp("verdicts")
    write_pairs(folder / "a.jsonl", 24)
    long = [pair(i) | {"chosen": " ".join(["red"] * (60 if i % 3 else 400))} for i in range(12)]
    (folder / "long.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in long))
    shared = ["--set", f"model={model}", "--set", "prepare.held_out=0.2", "--set", "prepare.max_quarantine=1"]
    train = ["--set", "train.epochs=2", "--set", "train.samples=0", "--set", "train.learning_rate=1e-2"]
    for name, data, more in (
        ("pairs", "a.jsonl", []),
        ("labels", "a.jsonl", ["--set", "prepare.examples=labels", "--set", "train.loss=kto"]),
        ("long", "long.jsonl", ["--set", "prepare.max_length=220"]),
    ):
        settings = [*shared, *train, *more, "--set", f"prepare.data={data}", "--set", f"out=runs/{name}"]
        for command in ("prepare", "score", "train") if name != "long" else ("prepare",):
            invoke(folder, command, *settings)
    return folder


@pytest.mark.parametrize("name", QUESTIONS)
def test_every_question_says_something_of_pairs_of_labels_and_of_data_without_scores_or_runs(folder, name):
    for out in ("pairs", "labels", "long"):
        said = ask(folder, name, f"runs/{out}")["verdict"]["sentence"]
        assert said.endswith(".") and len(said) > 20 and "None" not in said and "nan" not in said


COMPARE_ANSWERS = [
    *("agreement", "contradictions", "disagreements", "kl-by-length", "label-noise", "large-margin", "learned-first"),
    *("length-bias", "near-identical", "reference-conflicts", "reference-probability", "references", "reward-hacking"),
    "small-gap",
]


@pytest.mark.parametrize("name", COMPARE_ANSWERS)
def test_a_question_about_pairs_says_so_when_the_data_has_labels(folder, name):
    answer = ask(folder, name, "runs/labels")
    assert answer["rows"] == []
    assert answer["verdict"]["sentence"].startswith("This data has no pairs but 48 labels")


def test_questions_about_learning_are_answered_for_labels_too(folder):
    assert sum(row["examples"] for row in ask(folder, "learning", "runs/labels")["rows"]) == 48
    assert {row["split"] for row in ask(folder, "by-source", "runs/labels")["rows"]} == {"train", "held_out"}


def test_truncation_counts_what_drop_quarantined_and_says_which_limit_would_keep_it(folder):
    answer = ask(folder, "truncation", "runs/long")
    (row,) = answer["rows"]
    assert (row["examples"], row["records_dropped"]) == (8, 4)
    lengths = "select n_tokens from quarantine order by 1"
    longest = json.loads(invoke(folder, "sql", lengths, "runs/long", "--json").stdout)[-1]["n_tokens"]
    said = answer["verdict"]["sentence"]
    assert said.startswith(
        "4 records of 12 (33%) are left out as too long. A limit of 440 tokens instead of 220 would keep "
    )
    assert f"the longest that was counted has {longest:,}" in said
    assert (
        "all 24 examples are within the length limits" in ask(folder, "truncation", "runs/pairs")["verdict"]["sentence"]
    )


def test_prompts_beyond_their_own_limit_are_told_from_what_max_length_removed(tmp_path, model):
    rows = [pair(i) for i in range(6)]
    for i in (0, 1):
        rows[i]["prompt"] = "why so? " * 60
    rows[2]["chosen"] = "the red cat sings " * 60
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    write_config(tmp_path, model)
    limits = [f"prepare.{name}" for name in ("max_prompt_length=50", "max_length=200", "max_quarantine=1")]
    invoke(tmp_path, "prepare", "config.yaml", *options(*limits))
    said = ask(tmp_path, "truncation", "runs/tiny")["verdict"]["sentence"]
    assert said.startswith("3 records of 6 (50%) are left out as too long.")
    assert "longer than prepare.max_prompt_length=50 in 2 records" in said
    assert "A limit of 400 tokens instead of 200 would keep 1 of them" in said


def test_nothing_is_advised_where_the_reference_disagrees_with_no_pair():
    group = {"source": "a", "pairs": 50, "n": 50, "n_disagrees": 0}
    said = judge("disagreements", {"pairs": 50, "labels": 0, "reference": "r", "groups": [group]}).sentence
    assert (
        said
        == "The reference finds the rejected answer likelier per token in 0 of 50 pairs (0%, 95% interval 0% to 7%)."
    )


def test_what_went_to_quarantine_is_counted_by_reason_and_detail(folder):
    query = "select reason, detail, count(*) as n, min(n_found) > 220 as over from quarantine group by all"
    assert json.loads(invoke(folder, "sql", query, "runs/long", "--json").stdout) == [
        {
            "reason": "too long",
            "detail": "tokens in prompt and answer, against prepare.max_length",
            "n": 4,
            "over": True,
        }
    ]


def test_formats_for_machines_have_the_rows_alone_and_the_verdict_on_stderr(folder):
    said = ask(folder, "length-bias", "runs/pairs")["verdict"]["sentence"]
    for form in ("csv", "markdown"):
        done = invoke(folder, "ask", "length-bias", "runs/pairs", "--format", form)
        assert done.stderr == f"{said}\n" and said not in done.stdout
    table = invoke(folder, "ask", "length-bias", "runs/pairs")
    assert table.stdout.endswith(f"1 row\n{said}\n") and not table.stderr
    saved = invoke(folder, "ask", "length-bias", "runs/pairs", "--out", "a.csv")
    assert saved.stdout == f"a.csv: 1 row\n{said}\n"
    assert len((folder / "a.csv").read_text().splitlines()) == 2


def test_in_python_an_answer_has_its_rows_and_its_verdict(folder, monkeypatch):
    import prefcache

    monkeypatch.chdir(folder)
    answer = ask(folder, "near-identical", "runs/pairs", "similarity=0.8")
    found = prefcache.ask("near-identical", "runs/pairs", parameters={"similarity": 0.8})
    assert found.table.to_pylist() == answer["rows"]
    assert found.verdict == Verdict(**answer["verdict"])
    assert repr(found).replace("\n", " ").endswith(found.verdict.sentence)
    assert f"<p><b>{found.verdict.sentence}</b></p>" in found._repr_html_()
    with pytest.raises(prefcache.UsageError, match="expected a number"):
        prefcache.ask("near-identical", "runs/pairs", parameters={"similarity": "much"})
    with pytest.raises(prefcache.UsageError, match="The nearest is length-bias"):
        prefcache.ask("length-bais", "runs/pairs")
