"""Every ready question, asked of a small real experiment, against answers worked out from its files in plain Python."""

import json
import math
import re
import statistics
from collections import Counter, defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prefcache.pipeline import views
from prefcache.pipeline.images import decode
from prefcache.pipeline.questions import QUESTIONS, get_question
from prefcache.pipeline.schema import IMAGES, PREPARED
from prefcache.pipeline.stored.prepared import Prepared
from tests.helpers.conversations import assistant, user
from tests.helpers.illustrated import encode, id_of, image_row
from tests.helpers.project import invoke, pair, write_config
from tests.helpers.vision_models import picture

LONG = " ".join(["red", "cat", "sings"] * 40)
SAME = {
    "prompt": "why so?",
    "chosen": "the red cat runs and sings and eats",
    "rejected": "The red cat runs, and sings, and eats!",
}
RUN = "hot"


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model, other_model) -> Path:
    """Two sources, one with grades; among their pairs a duplicate, a contradiction, two answers that hardly differ and one that is
    cut. Scored by two references, trained for three epochs at a rate that makes pairs change sides."""
    import yaml

    folder = tmp_path_factory.mktemp("questions")
    first, second = [pair(i) for i in range(24)], [pair(i) for i in range(30, 40)]
    graded = [row | {"chosen_score": 5 + i % 4, "rejected_score": i % 6} for i, row in enumerate(first)]
    doubled = first[0] | {"prompt": first[0]["prompt"].upper() + " "}
    turned = first[1] | {"chosen": first[1]["rejected"], "rejected": first[1]["chosen"]}
    second += [doubled, turned, SAME, pair(50) | {"chosen": LONG}]
    for name, rows in (("a", graded), ("b", second)):
        (folder / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    tree = {
        "model": str(model),
        "out": "runs/q",
        "prepare": {"data": ["a.jsonl", "b.jsonl"], "held_out": 0.2, "max_length": 100, "too_long": "keep_start"},
        "train": {"run": RUN, "learning_rate": 3e-2, "batch_size": 4, "epochs": 3, "samples": 0, "alerts": "off"},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    invoke(folder, "prepare", "config.yaml")
    invoke(folder, "score", "config.yaml", "--set", f"model={other_model}")
    invoke(folder, "score", "config.yaml")
    invoke(folder, "train", "config.yaml")
    return folder


@pytest.fixture
def ask(folder):
    def ask(name: str, *settings: str) -> list[dict]:
        sets = [word for setting in settings for word in ("--set", setting)]
        return json.loads(invoke(folder, "ask", name, "config.yaml", "--json", *sets).stdout)["rows"]

    return ask


# -- what the files hold, read without SQL ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sums(folder, model, other_model) -> dict[str, dict[bytes, float]]:
    """The log-prob of every sequence by each reference."""
    found = {}
    for name in (model, other_model):
        shards = folder.glob(f"cache/{name.name}-*/*.parquet")
        found[str(name)] = {row["key"]: row["logp_sum"] for shard in shards for row in pq.read_table(shard).to_pylist()}
    return found


@pytest.fixture(scope="module")
def pairs(folder, sums, model) -> list[dict[str, Any]]:
    """Every prepared pair, with margins by the reference that is used."""
    rows = Prepared(folder / "runs/q/prepared").table().to_pylist()
    for row in rows:
        chosen, rejected = (sums[str(model)][row[f"{side}_key"]] for side in ("chosen", "rejected"))
        row |= {"margin": chosen - rejected, "per_token": chosen / row["n_chosen"] - rejected / row["n_rejected"]}
        row["longer"] = row["n_chosen"] - row["n_rejected"]
        row["cut"] = row["cut_prompt"] + row["cut_chosen"] + row["cut_rejected"]
    return rows


@pytest.fixture(scope="module")
def visits(folder) -> list[dict[str, Any]]:
    """Every visit of the run, with its reward margin; in the order of steps."""
    parts = sorted(folder.glob(f"runs/q/{RUN}/steps/*.parquet"))
    rows = [row for part in parts for row in pq.read_table(part).to_pylist()]
    for row in rows:
        row["chosen_ratio"] = row["chosen_logp"] - row["ref_chosen_logp"]
        row["rejected_ratio"] = row["rejected_logp"] - row["ref_rejected_logp"]
        row["margin"] = 0.1 * (row["chosen_ratio"] - row["rejected_ratio"])
    return sorted(rows, key=lambda row: row["step"])


def by(rows: list[dict], *names: str) -> dict[Any, list[dict]]:
    found = defaultdict(list)
    for row in rows:
        found[row[names[0]] if len(names) == 1 else tuple(row[name] for name in names)].append(row)
    return found


def mean(values: Any) -> float:
    return pytest.approx(statistics.fmean(values))


def correlation(xs: list[float], ys: list[float]) -> float:
    return pytest.approx(statistics.correlation(xs, ys))


def test_every_question_has_help_and_is_tested_here():
    assert all(question.help.endswith(".") or question.help.endswith(")") for question in QUESTIONS.values())
    source = Path(__file__).read_text()
    assert [name for name in QUESTIONS if not re.search(rf'ask"?\W+"{name}"', source)] == []


def test_every_question_is_answered_before_anything_is_prepared():
    con = views.connect(views.Sources())
    for question in QUESTIONS.values():
        assert list(views.ask(con, question.sql, (), question.values({})).rows()) == []


def test_questions_are_listed_and_their_sql_is_printed(folder):
    listed = invoke(folder, "ask").stdout
    assert all(f"{name}\n    {question.help}" in listed for name, question in QUESTIONS.items())
    assert "--set limit=20: most rows to list" in listed
    assert invoke(folder, "ask", "cost", "--sql").stdout == QUESTIONS["cost"].sql


def test_a_question_or_parameter_that_is_none_names_the_nearest(folder):
    for arguments, said in (
        (["length-bais"], "length-bias"),
        (["disagreements", "runs/q", "--set", "limits=3"], "The nearest is limit"),
        (["disagreements", "runs/q", "--set", "limit=some"], "limit=some: expected a number, such as 20"),
        (["disagreements", "runs/q", "--set", "limit=-1"], "limit=-1: expected a whole number, or null for all rows"),
        (["small-gap", "runs/q", "--set", "share=5"], "share=5: expected a share above 0 and up to 1"),
        (["near-identical", "runs/q", "--set", "similarity=null"], "similarity=null: expected a number, such as 0.9"),
        (["label-noise", "runs/q", "--set", "nats=NaN"], "nats=NaN: expected a number of 0 or more"),
        (["training-cost", "runs/q", "--set", "epochs=0"], "epochs=0: expected a number above 0"),
    ):
        assert said in invoke(folder, "ask", *arguments, code=2).stderr
    # A run may have a number for its name.
    assert json.loads(invoke(folder, "ask", "small-gap", "runs/q", "--set", "run=1", "--json").stdout)["rows"] == []


# -- the data and its references -------------------------------------------------------------------------------------


def test_agreement(ask, pairs, model):
    found = {row["source"]: row for row in ask("agreement") if row["reference"] == str(model)}
    for source, rows in by(pairs, "source").items():
        assert found[source]["pairs"] == len(rows)
        assert found[source]["agrees"] == mean([row["margin"] > 0 for row in rows])
        assert found[source]["agrees_per_token"] == mean([row["per_token"] > 0 for row in rows])
        assert found[source]["margin"] == mean([row["margin"] for row in rows])


def test_disagreements(ask, pairs):
    expected = sorted((row["per_token"], row["example_id"]) for row in pairs if row["per_token"] < 0)
    found = ask("disagreements", "limit=5")
    assert [row["example_id"] for row in found] == [name for _, name in expected[:5]]
    texts = {row["example_id"]: row for row in pairs}
    # Both answers are shown, their beginnings if they are long.
    for row in ask("disagreements", "limit=100"):
        for side in ("chosen", "rejected"):
            whole = texts[row["example_id"]][side]
            assert row[side] == (whole if len(whole) <= 60 else f"{whole[:60]}…")


def test_reference_conflicts(ask, pairs, sums, model, other_model):
    expected = {}
    for row in pairs:
        mine, theirs = (
            sums[str(each)][row["chosen_key"]] / row["n_chosen"]
            - sums[str(each)][row["rejected_key"]] / row["n_rejected"]
            for each in (model, other_model)
        )
        if (mine > 0) != (theirs > 0):
            expected[row["example_id"]] = (pytest.approx(mine), pytest.approx(theirs))
    found = ask("reference-conflicts", "limit=100")
    assert expected and expected == {
        row["example_id"]: (row["margin_per_token"], row["other_margin_per_token"]) for row in found
    }
    clear = [min(abs(row["margin_per_token"]), abs(row["other_margin_per_token"])) for row in found]
    assert clear == sorted(clear, reverse=True)


def test_label_noise(ask, pairs, sums):
    expected = {}
    for row in pairs:
        per_token = [
            each[row["chosen_key"]] / row["n_chosen"] - each[row["rejected_key"]] / row["n_rejected"]
            for each in sums.values()
        ]
        if max(per_token) < -0.1:
            expected[row["example_id"]] = max(per_token)
    found = ask("label-noise", "nats=0.1", "limit=100")
    assert expected and {row["example_id"]: row["margin_per_token"] for row in found} == pytest.approx(expected)
    assert all(row["n_references"] == 2 for row in found)


def test_references(ask, pairs, sums, other_model):
    theirs = sums[str(other_model)]
    others = [theirs[row["chosen_key"]] - theirs[row["rejected_key"]] for row in pairs]
    (found,) = ask("references")
    assert (found["reference"], found["pairs"]) == (str(other_model), len(pairs))
    assert found["same_sign"] == mean([(a > 0) == (row["margin"] > 0) for a, row in zip(others, pairs, strict=True)])
    assert found["apart"] == mean([abs(a - row["margin"]) for a, row in zip(others, pairs, strict=True)])


def test_length_bias(ask, pairs):
    found = {row["source"]: row for row in ask("length-bias")}
    for source, rows in by(pairs, "source").items():
        differ = [row["longer"] > 0 for row in rows if row["longer"]]
        assert found[source]["longer_wins"] == mean(differ)
        lengths = [row["longer"] for row in rows]
        assert found[source]["corr_margin"] == correlation(lengths, [row["margin"] for row in rows])
    (graded,) = (rows for source, rows in by(pairs, "source").items() if source.endswith("a.jsonl"))
    grades = [row["chosen_score"] - row["rejected_score"] for row in graded]
    (of_grades,) = (row["corr_grades"] for source, row in found.items() if source.endswith("a.jsonl"))
    assert of_grades == correlation([row["longer"] for row in graded], grades)


def test_near_identical(ask):
    # 6 words, all of them in both
    (found,) = ask("near-identical")
    assert (found["line"], found["similarity"]) == (13, 1.0)
    assert found["chosen"].startswith("the red cat") and found["rejected"].startswith("The red cat")


def test_near_identical_answers_in_any_script(tmp_path, model):
    """Words of scripts without blanks are compared by the character, and marks alone are no words."""
    beginning = "我们今天早上在河边的公园里"
    answers = [
        (f"{beginning}看见了三只白色的鸟", f"{beginning}看见了两只白色的鸟"),  # 20 characters shared of 22
        ("A: 我们明天去北京看望老朋友吧", "A: 我们明天去北京看不懂为什么没来上班"),  # 9 of 23
        ("слон идет по городу медленно", "слон идет по городу быстро"),  # 4 of 6
        ("!? !? !? !? !? !? ...", "!? !? !? !? !? !? !!!"),
    ]
    rows = [pair(i) | {"chosen": a, "rejected": b} for i, (a, b) in enumerate(answers)]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    write_config(tmp_path, model)
    invoke(tmp_path, "prepare", "config.yaml")
    rows = invoke(tmp_path, "ask", "near-identical", "config.yaml", "--set", "similarity=0.6", "--json").stdout
    assert [(row["line"], round(row["similarity"], 3)) for row in json.loads(rows)["rows"]] == [(1, 0.909), (3, 0.667)]


@pytest.mark.parametrize(("other", "times"), [(1, [2]), (2, [])], ids=["same picture", "other picture"])
def test_prompts_that_differ_only_by_their_picture_are_no_duplicates(other, times):
    tags = [decode(encode(picture(8, 8, seed))).tag for seed in (1, other)]
    rows = [pair(0) | {"example_id": tag, "prompt": f"{tag}What is it?", "split": "train"} for tag in tags]
    con = views.connect(views.Sources(prepared=pa.Table.from_pylist(rows, schema=PREPARED["pairs"])))
    question = get_question("duplicates")
    found = views.ask(con, question.sql, parameters=question.values({}))
    assert [row[0] for row in found.rows()] == times


def test_duplicates(ask):
    (found,) = ask("duplicates")
    assert (found["times"], found["sources"], found["lines"]) == (2, 2, [1, 11])


def test_contradictions(ask):
    one, other = ask("contradictions")
    assert {one["line"], one["other_line"]} == {2, 12} and one["source"] != one["other_source"]
    # Each of the two is a row, so that a file of the rows names both.
    assert [one["example_id"], other["example_id"]] == [other["other_example_id"], one["other_example_id"]]


def test_training_cost(ask, folder, pairs):
    """What training counts for each example by itself, when it plans its forwards."""
    from prefcache.pipeline.training.dataset import Examples, SplitData

    table = Prepared(folder / "runs/q/prepared").table("train")
    answers = ("chosen", "rejected")
    examples = Examples(SplitData(table, {}, answers))
    rows = ask("training-cost")
    for layout, column in (("shared", "tokens_shared"), ("packed", "tokens_unshared")):
        assert sum(row[column] for row in rows) == examples.sizes(np.arange(len(table)), layout).sum()
    counted = sum(row["n_chosen_counted"] + row["n_rejected_counted"] for row in pairs if row["split"] == "train")
    assert sum(row["tokens_counted"] for row in rows) == counted
    twice = ask("training-cost", "epochs=2.5")
    assert sum(row["tokens_counted"] for row in twice) == pytest.approx(2.5 * counted, abs=2)


@pytest.mark.parametrize("name", ["cost", "training-cost"])
def test_costs_count_the_tokens_of_images_once_per_pair(name):
    shown = decode(encode(picture(8, 8)))
    rows = [
        pair(i)
        | {"example_id": str(i), "split": "train", "source": "a", "line": i, "images": images}
        | {
            "n_prompt": 20,
            "n_chosen": 4,
            "n_rejected": 4,
            "n_common": 0,
            "n_chosen_counted": 4,
            "n_rejected_counted": 4,
        }
        | {"chosen_key": bytes([i, 1] * 8), "rejected_key": bytes([i, 2] * 8)}
        for i, images in enumerate(([], [id_of(shown)], [id_of(shown)] * 2))
    ]
    sources = views.Sources(
        prepared=pa.Table.from_pylist(rows, schema=PREPARED["pairs"]),
        images=pa.Table.from_pylist([image_row(shown) | {"n_tokens": 5}], schema=IMAGES),
    )
    question = get_question(name)
    found = views.ask(views.connect(sources), question.sql, parameters=question.values({}))
    (row,) = found.rows()
    assert dict(zip(found.columns, row, strict=True))["image_tokens"] == 3 * 5
    verdict = question.judge({"image_tokens": 15, **dict(zip(found.columns, row, strict=True))}, question.values({}))
    assert "tokens (15 of them stand for images)" in verdict.sentence


def test_truncation(ask, pairs):
    found = {row["source"]: row for row in ask("truncation")}
    for source, rows in by(pairs, "source").items():
        cut = [row for row in rows if row["cut"]]
        assert bool(cut) == source.endswith("b.jsonl")
        whole = [row["per_token"] for row in rows if not row["cut"]]
        assert found[source]["chosen_cut"] == len(cut) and found[source]["tokens_cut"] == sum(row["cut"] for row in cut)
        kept = sum(row["n_prompt"] + row["n_chosen"] + row["n_rejected"] for row in rows)
        assert found[source]["share_cut"] == pytest.approx(
            found[source]["tokens_cut"] / (kept + found[source]["tokens_cut"])
        )
        assert found[source]["margin_per_token_of_whole"] == mean(whole)


@pytest.mark.parametrize("kind", ["pairs", "labels"])
def test_turns(tmp_path, model, kind):
    question = [user("2 + 2?")]
    several = [assistant("four"), user("and 2 + 3?")]
    records = [
        {"prompt": question, "chosen": [*several, assistant("five")], "rejected": [*several, assistant("six")]},
        {"prompt": question, "chosen": "four", "rejected": "five and six"},
    ]
    (tmp_path / "a.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in records))
    sets = ["--set", f"model={model}", "--set", "out=runs/t", "--set", "prepare.data=[a.jsonl]"]
    sets += ["--set", "prepare.held_out=0", "--set", f"prepare.examples={kind}"]
    invoke(tmp_path, "prepare", *sets)
    (found,) = json.loads(invoke(tmp_path, "ask", "turns", "runs/t", "--json").stdout)["rows"]
    rows = Prepared(tmp_path / "runs/t/prepared").table().to_pylist()
    names = ("chosen", "rejected") if kind == "pairs" else ("completion",)
    n = [sum(row[f"n_{name}"] for name in names) for row in rows]
    counted = [sum(row[f"n_{name}_counted"] for name in names) for row in rows]
    is_several = [any(len(row[f"{name}_spans"]) == 4 for name in names) for row in rows]
    assert sum(is_several) == {"pairs": 1, "labels": 2}[kind] == found["of_several_turns"]
    assert (found["examples"], found["most_turns"], found["turns_of_these"]) == (len(rows), 2, 2)
    assert found["share_counted"] == pytest.approx(sum(counted) / sum(n))
    of_these = [(a, b) for a, b, several in zip(counted, n, is_several, strict=True) if several]
    share = sum(a for a, _ in of_these) / sum(b for _, b in of_these)
    assert share < 1 and found["share_counted_of_these"] == pytest.approx(share)
    shared = 2 * sum(row["n_common"] for row in rows) / sum(n) if kind == "pairs" else None
    assert found["share_in_both"] == (shared and pytest.approx(shared))


def test_cost(ask, pairs):
    found = {row["source"]: row for row in ask("cost")}
    seen: set[bytes] = set()
    for source, rows in sorted(by(pairs, "source").items()):
        n_sequences = n_answers = n_prompts = n_all = 0
        for row in sorted(rows, key=lambda row: row["line"]):
            for side in ("chosen", "rejected"):
                n_all += row["n_prompt"] + row[f"n_{side}"]
                if row[f"{side}_key"] not in seen:
                    seen.add(row[f"{side}_key"])
                    n_sequences, n_answers = n_sequences + 1, n_answers + row[f"n_{side}"]
                    n_prompts += row["n_prompt"] if side == "chosen" else 0
        mine = found[source]
        assert (mine["examples"], mine["sequences"], mine["answer_tokens"]) == (len(rows), n_sequences, n_answers)
        assert (mine["tokens"], mine["tokens_to_read"]) == (n_all, n_answers + n_prompts)
    # The contradiction's two sequences are those of the pair that it contradicts.
    assert sum(row["sequences"] for row in found.values()) == 2 * len(pairs) - 2


# -- runs ------------------------------------------------------------------------------------------------------------


def became(margins: list[float]) -> str:
    right = [margin > 0 for margin in margins]
    changes = sum(a != b for a, b in pairwise(right))
    if all(right):
        return "always right"
    if not any(right):
        return "never right"
    return "back and forth" if changes > 1 else "learnt" if right[-1] else "forgotten"


def test_learning(ask, visits):
    counted = Counter(
        (split, became([row["margin"] for row in rows]))
        for (split, _), rows in by([row for row in visits if row["margin"]], "split", "example_id").items()
    )
    found = ask("learning")
    assert {(row["split"], row["became"]): row["examples"] for row in found} == counted
    assert len({name for _, name in counted}) >= 3  # or the example shows nothing
    for split in ("train", "held_out"):
        assert sum(row["share"] for row in found if row["split"] == split) == pytest.approx(1)


def test_unlearned(ask, visits):
    expected = {}
    for example_id, rows in by([row for row in visits if row["margin"]], "example_id").items():
        if rows[-1]["margin"] <= 0:
            ever = any(row["margin"] > 0 for row in rows)
            expected[example_id] = (
                "forgotten" if ever else "never right",
                len(rows),
                pytest.approx(rows[-1]["margin"]),
            )
    found = ask("unlearned", "limit=100", f"run={RUN}")
    assert expected and {row["example_id"]: (row["became"], row["visits"], row["margin"]) for row in found} == expected
    assert ask("unlearned", "run=another") == []


def test_learned_first(ask, visits, pairs):
    sources = {row["example_id"]: row["source"] for row in pairs}
    # While a margin is exactly 0, the policy is its reference, and is neither right nor wrong.
    trained = [row for row in visits if row["split"] == "train" and row["step"] and row["margin"] != 0]
    last, expected = trained[-1]["step"], defaultdict(list)
    for row in trained:
        tenth = 1 + 10 * (row["step"] - 1) // last
        length = 2 ** int(math.log2((row["n_chosen_counted"] + row["n_rejected_counted"]) / 2))
        expected["source", sources[row["example_id"]], tenth].append(row["margin"])
        expected["length", str(length), tenth].append(row["margin"])
    found = {(row["kind"], row["part"], row["tenth"]): row for row in ask("learned-first")}
    assert found.keys() == expected.keys()
    for key, margins in expected.items():
        assert (found[key]["visits"], found[key]["margin"]) == (len(margins), mean(margins))
        assert found[key]["correct"] == mean([margin > 0 for margin in margins])


def test_margin_tokens(ask, folder):
    gains, examples = defaultdict(float), set()
    for row in pq.read_table(folder / f"runs/q/{RUN}/tokens.parquet").to_pylist():
        examples.add(row["example_id"])
        for token, logp, ref_logp in zip(row["tokens"], row["logps"], row["ref_logps"], strict=True):
            gains[token] += (logp - ref_logp) * (1 if row["answer"] == "chosen" else -1)
    found = ask("margin-tokens", f"run={RUN}", "limit=1000")
    assert {row["token"]: row["gain"] for row in found} == pytest.approx(gains, abs=1e-5)
    assert [abs(row["gain"]) for row in found] == sorted((abs(row["gain"]) for row in found), reverse=True)


def test_reward_hacking(ask, visits):
    trained = [row for row in visits if row["split"] == "train" and row["step"]]
    last = trained[-1]["step"]
    tenths = by([row | {"tenth": 1 + 10 * (row["step"] - 1) // last} for row in trained], "tenth")
    found = {row["tenth"]: row for row in ask("reward-hacking")}
    assert found.keys() == tenths.keys()
    for tenth, rows in tenths.items():
        mine = found[tenth]
        assert (mine["run"], mine["visits"]) == (RUN, len(rows))
        assert mine["chosen_log_ratio"] == pytest.approx(
            statistics.fmean(row["chosen_ratio"] for row in rows), abs=1e-9
        )
        pushed = [row["margin"] > 0 and row["chosen_ratio"] < 0 for row in rows]
        assert mine["right_by_pushing_down"] == mean(pushed)
        lengths = [row["n_chosen_counted"] - row["n_rejected_counted"] for row in rows]
        assert mine["margin_with_length"] == correlation(lengths, [row["margin"] for row in rows])


@pytest.fixture(scope="module")
def latest(visits) -> dict[str, dict]:
    return {row["example_id"]: row for row in visits}


def test_by_source(ask, pairs, latest):
    found = {(row["source"], row["split"]): row for row in ask("by-source")}
    grouped = by(pairs, "source", "split")
    assert found.keys() == grouped.keys()
    for key, rows in grouped.items():
        margins = [latest[row["example_id"]]["margin"] for row in rows]
        assert (found[key]["examples"], found[key]["correct"]) == (len(rows), mean([margin > 0 for margin in margins]))
        assert found[key]["reward_margin"] == mean(margins)
        assert found[key]["reference_margin"] == mean([row["margin"] for row in rows])


def test_kl_by_length(ask, latest):
    buckets = defaultdict(list)
    for row in latest.values():
        for side in ("chosen", "rejected"):
            n = row[f"n_{side}_counted"]
            buckets[side, 2 ** int(math.log2(n))].append((n, row[f"{side}_ratio"]))
    found = {(row["answer"], row["from_tokens"]): row for row in ask("kl-by-length")}
    assert found.keys() == buckets.keys()
    for key, answers in buckets.items():
        assert found[key]["answers"] == len(answers)
        expected = sum(ratio for _, ratio in answers) / sum(n for n, _ in answers)
        assert found[key]["log_ratio_per_token"] == pytest.approx(expected)


# -- what to train on ------------------------------------------------------------------------------------------------


def test_small_gap(ask, latest):
    gaps = sorted((row["margin"], name) for name, row in latest.items() if row["split"] == "train" and row["margin"])
    found = ask("small-gap", "share=0.25")
    assert [row["example_id"] for row in found] == [name for _, name in gaps[: len(found)]]
    assert len(found) == math.ceil(len(gaps) / 4)


def test_reference_probability(ask, pairs):
    clear = sorted((-row["per_token"], row["example_id"]) for row in pairs if row["split"] == "train")
    found = ask("reference-probability", "share=0.4")
    assert [row["example_id"] for row in found] == [name for _, name in clear[: len(found)]]
    assert abs(len(found) - 0.4 * len(clear)) <= 1


def quantile(values: list[float], share: float) -> float:
    """Between the two nearest ones, in proportion."""
    ordered, at = sorted(values), share * (len(values) - 1)
    low = math.floor(at)
    return ordered[low] + (at - low) * (ordered[min(low + 1, len(ordered) - 1)] - ordered[low])


def test_large_margin(ask, pairs, latest):
    train = [row for row in pairs if row["split"] == "train"]
    implicit = {row["example_id"]: latest[row["example_id"]]["margin"] for row in train}
    external = {
        row["example_id"]: row["chosen_score"] - row["rejected_score"]
        for row in train
        if row["chosen_score"] is not None
    }

    def probability(margins: dict[str, float], name: str) -> float:
        if name not in margins:
            return 0.5
        low, high = (quantile(list(margins.values()), share) for share in (0.01, 0.99))
        return min(0.99, max(0.01, (margins[name] - low) / (high - low)))

    expected = {}
    for name in implicit:
        a, b = probability(implicit, name), probability(external, name)
        expected[name] = a * b / (a * b + (1 - a) * (1 - b))
    found = ask("large-margin", "share=0.2")
    assert {row["example_id"]: row["preference"] for row in found} == pytest.approx(
        {row["example_id"]: expected[row["example_id"]] for row in found}
    )
    left = expected.keys() - {row["example_id"] for row in found}
    assert max(expected[name] for name in left) <= min(row["preference"] for row in found)
    assert abs(len(found) - 0.2 * len(expected)) <= 1


def test_both_sides_of_a_contradiction_are_trained_on_and_shown(folder, ask, visits):
    invoke(folder, "ask", "contradictions", "config.yaml", "--out", "both.csv")
    both = {row["example_id"] for row in ask("contradictions")}
    assert both == {row["other_example_id"] for row in ask("contradictions")} and len(both) == 2
    trained = both & {row["example_id"] for row in visits if row["split"] == "train"}
    only = ("train.run=both", "train.only=both.csv", "train.epochs=1")
    invoke(folder, "train", "config.yaml", *(word for setting in only for word in ("--set", setting)))
    rows = [row for part in folder.glob("runs/q/both/steps/*.parquet") for row in pq.read_table(part).to_pylist()]
    assert trained and {row["example_id"] for row in rows if row["split"] == "train"} == trained
    for example in both:
        assert invoke(folder, "show", example, "config.yaml", "--set", f"train.run={RUN}").stdout.startswith(example)


@pytest.mark.parametrize("ending", [".parquet", ".arrow", ".jsonl.gz", ".csv"])
def test_an_answer_is_saved_and_trained_on(folder, ask, visits, ending):
    """The pairs of small-gap, and no others, are visited; all the held-out ones are evaluated."""
    file, run = f"hard{ending}", f"hard{ending.replace('.', '-')}"
    settings = ("--set", f"run={RUN}", "--set", "share=0.25")
    assert "rows" in invoke(folder, "ask", "small-gap", "config.yaml", *settings, "--out", file).stdout
    only = (f"train.run={run}", f"train.only={file}", "train.epochs=1")
    invoke(folder, "train", "config.yaml", *(word for setting in only for word in ("--set", setting)))
    rows = [row for part in folder.glob(f"runs/q/{run}/steps/*.parquet") for row in pq.read_table(part).to_pylist()]
    small = ask("small-gap", f"run={RUN}", "share=0.25")
    visited = by(rows, "split")
    assert sorted(row["example_id"] for row in visited["train"]) == sorted(row["example_id"] for row in small)
    held_out = {row["example_id"] for row in visits if row["split"] == "held_out"}
    assert {row["example_id"] for row in visited["held_out"]} == held_out
