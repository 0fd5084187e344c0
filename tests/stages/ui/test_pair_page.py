"""A pair's page: its tokens have the values that `show` computes, its neighbours are those of the data, and texts stay text."""

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.pages import Site, serve
from tests.helpers.project import invoke, options, write_config, write_pairs


@pytest.fixture(scope="module")
def experiment(tmp_path_factory, model) -> Path:
    """60 pairs with two runs. The last three of them are a duplicate, a contradiction, and another answer to the first prompt."""
    folder = tmp_path_factory.mktemp("experiment")
    write_pairs(folder / "pairs.jsonl", 57)
    first = json.loads((folder / "pairs.jsonl").read_text().splitlines()[0])
    swapped = first | {"chosen": first["rejected"], "rejected": first["chosen"]}
    with open(folder / "pairs.jsonl", "a") as file:
        for record in (first, swapped, first | {"chosen": "the red bird sings"}):
            file.write(json.dumps(record) + "\n")
    config = write_config(folder, model, epochs=2)
    for stage, *settings in (
        ("prepare",),
        ("score",),
        ("train",),
        ("train", "train.run=hot", "train.learning_rate=0.01"),
    ):
        invoke(folder, stage, config, *options(*settings, "prepare.held_out=0.1"))
    return folder


@pytest.fixture(scope="module")
def site(experiment) -> Iterator[Site]:
    with serve(experiment) as site:
        yield site


def ask(folder: Path, query: str) -> list[dict[str, Any]]:
    return json.loads(invoke(folder, "sql", "--json", query, "runs/tiny").stdout)


def ids(folder: Path, where: str) -> list[str]:
    return [
        row["example_id"] for row in ask(folder, f"select example_id from examples where {where} order by position")
    ]


def tables(page: str) -> list[list[list[str]]]:
    """The cells of each table of tokens."""
    found = re.findall(r'<table class="token-table">.*?<tbody>(.*?)</tbody>', page, re.DOTALL)
    return [
        [
            [html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in re.findall(r"<td.*?</td>", row, re.DOTALL)]
            for row in rows
        ]
        for rows in (re.findall(r"<tr>.*?</tr>", body, re.DOTALL) for body in found)
    ]


def test_tokens_have_the_values_that_show_computes(experiment, site):
    (example,) = ids(experiment, "line = 7")
    shown = json.loads(invoke(experiment, "show", example, "config.yaml", "--json").stdout)
    page = site.get(f"/pairs/{example}?run=trained&compute=yes")
    assert page.status == 200
    for answer, rows in zip(shown["answers"], tables(page.text), strict=True):
        assert len(rows) == answer["n_tokens"]
        for token, (_, _, reference, policy, difference, counts) in zip(answer["tokens"], rows, strict=True):
            assert [reference, policy, difference] == [
                f"{round(token[name], 3) + 0.0:+.3f}" for name in ("reference", "policy", "log_ratio")
            ]
            assert counts == "yes" and token["counts"]
        assert f"sum {answer['log_ratio_sum']:+.3f} nats" in page.text


def test_neighbours_are_the_duplicate_the_contradiction_and_the_other_answer(experiment, site):
    first, duplicate, swapped, other = ids(experiment, "line in (1, 58, 59, 60)")
    part = site.get(f"/pairs/{first}/neighbours").text
    titles = re.findall(r"<h3>(\w[\w ]*\w)", part)
    found = [re.findall(r'href="/pairs/([^"]*)"', group) for group in part.split("<h3>")[1:]]
    assert dict(zip(titles, found, strict=True)) == {
        "Contradictions": [swapped],
        "Duplicates": [duplicate],
        "Same prompt": [other],
    }
    (alone,) = ids(experiment, "line = 7")
    assert "No other example has the same prompt or answers." in site.get(f"/pairs/{alone}/neighbours").text


def test_an_id_that_no_example_has_is_not_found(site):
    page = site.get("/pairs/nothing")
    assert page.status == 404 and "There is no example" in page.text
