"""The questions' pages: the same verdict and rows as `prefcache ask`, and rows that become a selection."""

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from prefcache.pipeline.questions import QUESTIONS
from prefcache.ui.questioner import MOST_ROWS
from tests.helpers.pages import Answer, Site, serve
from tests.helpers.project import invoke, write_config, write_pairs


@pytest.fixture(scope="module")
def experiment(tmp_path_factory, model) -> Path:
    """300 scored pairs, of which four contradict another. There is no run."""
    folder = tmp_path_factory.mktemp("experiment")
    write_pairs(folder / "pairs.jsonl", 298)
    first, second = map(json.loads, (folder / "pairs.jsonl").read_text().splitlines()[:2])
    with open(folder / "pairs.jsonl", "a") as file:
        for each in (first, second):
            file.write(json.dumps(each | {"chosen": each["rejected"], "rejected": each["chosen"]}) + "\n")
    for stage in ("prepare", "score"):
        invoke(folder, stage, write_config(folder, model))
    return folder


@pytest.fixture(scope="module")
def site(experiment) -> Iterator[Site]:
    with serve(experiment) as site:
        yield site


def ask(folder: Path, question: str) -> dict:
    return json.loads(invoke(folder, "ask", question, "runs/tiny", "--json").stdout)


def ids(page: Answer) -> list[str]:
    return re.findall(r'name="id" value="([^"]*)"', page.text)


def test_every_question_is_listed_with_its_help_and_has_a_page(site):
    listing = html.unescape(site.get("/questions").text)
    for question in QUESTIONS.values():
        assert f'href="/questions/{question.name}"' in listing and question.help in listing
        page = site.get(f"/questions/{question.name}")
        assert page.status == 200 and f'data-src="/questions/{question.name}/answer"' in page.text
        assert all(f'name="{name}"' in page.text for name in question.parameters)


@pytest.mark.parametrize("question", ["contradictions", "length-bias"])
def test_the_answer_is_that_of_the_command(experiment, site, question):
    expected = ask(experiment, question)
    sentence = expected["verdict"]["sentence"]
    page = site.get(f"/questions/{question}/answer")
    assert sentence in html.unescape(page.text)
    assert len(re.findall(r"<tr>", page.text)) == len(expected["rows"]) + 1  # and the head
    assert sentence in html.unescape(site.get(f"/questions/{question}/verdict").text)


def test_examples_of_an_answer_lead_to_their_pages_and_become_a_selection(experiment, site):
    expected = [row["example_id"] for row in ask(experiment, "contradictions")["rows"]]
    page = site.get("/questions/contradictions/answer")
    assert len(expected) == 4 and ids(page) == expected
    assert all(f'href="/pairs/{each}"' in page.text for each in expected)
    form = [*(("id", each) for each in ids(page)), ("which", "ticked"), ("use", "exclude"), ("name", "clean")]
    assert site.post("/selections", form).status == 303
    saved = pq.read_table(experiment / "runs/tiny/selections/clean.parquet")["example_id"].to_pylist()
    assert len(saved) > 200 and not set(saved) & set(expected)


def test_a_parameter_of_the_address_is_asked_with_and_a_wrong_one_is_explained(site):
    assert len(ids(site.get("/questions/contradictions/answer?limit=1"))) == 1
    wrong = site.get("/questions/contradictions?limit=many")
    assert wrong.status == 400 and "expected a number" in wrong.text
    assert site.get("/questions/nothing").status == 400


def test_a_long_answer_shows_its_first_rows_and_how_many_there_are(experiment, site):
    page = site.get("/questions/disagreements/answer?limit=100000")
    query = "select count(*) as n from pairs where margin_per_token < 0"
    (row,) = json.loads(invoke(experiment, "sql", "--json", query, "runs/tiny").stdout)
    shown = len(re.findall(r"<tr>", page.text)) - 1
    assert shown == min(row["n"], MOST_ROWS)
    assert f"{row['n']:,} rows" in page.text


def test_without_scripts_an_answer_is_a_page_of_its_own(site):
    page = site.get("/questions/length-bias/answer", **{"sec-fetch-dest": "document"})
    assert page.text.startswith("<!doctype html>") and "<title>length-bias" in page.text
