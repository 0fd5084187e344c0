"""A pair's page: its tokens have the values that `show` computes, its neighbours are those of the data, and texts stay text."""

import html
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest

from prefcache.pipeline.visible_text import visible
from tests.helpers.examples import mask
from tests.helpers.hostile_texts import HOSTILE
from tests.helpers.pages import Site, elements, serve
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


def add_run(folder: Path, name: str, *settings: str) -> None:
    invoke(folder, "train", "config.yaml", *options(f"train.run={name}", "prepare.held_out=0.1", *settings))


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
            assert [reference, policy] == [f"{round(token[name], 3) + 0.0:.3f}" for name in ("reference", "policy")]
            assert difference == f"{round(token['log_ratio'], 3) + 0.0:+.3f}"
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


def test_colours_show_the_reference_a_run_minus_it_or_a_run_minus_another(experiment, site):
    (example,) = ids(experiment, "line = 7")
    logps = {}
    for run in ("trained", "hot"):
        shown = invoke(experiment, "show", example, "config.yaml", "--set", f"train.run={run}", "--json").stdout
        tokens = [token for answer in json.loads(shown)["answers"] for token in answer["tokens"]]
        logps[run] = [token["policy"] for token in tokens]
        logps["reference"] = [token["reference"] for token in tokens]
    titles = {
        "": logps["reference"],
        "?run=hot&compute=yes": [a - b for a, b in zip(logps["hot"], logps["reference"], strict=True)],
        "?run=hot&minus=trained&compute=yes": [a - b for a, b in zip(logps["hot"], logps["trained"], strict=True)],
    }
    for query, values in titles.items():
        page = site.get(f"/pairs/{example}{query}").text
        spans = re.findall(r'<span class="([^"]*)" title="([^"]*) nats">', page)
        assert [float(title) for _, title in spans] == pytest.approx(values, abs=6e-4)
        shades = (0.05, 0.2, 0.5, 2.0) if query else (1, 2, 4, 8)
        for colour, title in spans:
            value = float(title)
            n = sum(abs(value) >= least for least in shades)
            assert colour == (f"{'up' if value > 0 else 'down'} by{n}" if n else "even")
    # What a run stored at its end is not computed.
    stored = pq.read_table(experiment / "runs/tiny/trained/tokens.parquet").to_pylist()[0]
    page = site.get(f"/pairs/{stored['example_id']}?run=trained").text
    assert "trained stored at the end of the run" in page
    table = tables(page)[("chosen", "rejected").index(stored["answer"])]
    assert [row[3] for row in table] == [f"{round(value, 3) + 0.0:.3f}" for value in stored["logps"]]


def test_what_is_not_stored_is_computed_only_when_asked_for(experiment, site):
    (example,) = ids(experiment, "line = 9")
    add_run(experiment, "fresh")
    with serve(experiment) as other:
        page = other.get(f"/pairs/{example}?run=fresh").text
        assert "Compute with fresh\N{RIGHT SINGLE QUOTATION MARK}s model" in page and "of weights, takes about" in page
        assert "how much more likely" not in page
        assert "how much more likely" in other.get(f"/pairs/{example}?run=fresh&compute=yes").text
        # The model is loaded now.
        assert "how much more likely" in other.get(f"/pairs/{ids(experiment, 'line = 10')[0]}?run=fresh").text


def test_the_server_loads_no_pytorch_and_its_processes_end_with_it(experiment):
    (example,) = ids(experiment, "line = 7")
    before = psutil.Process().children()
    with serve(experiment) as other:
        assert "how much more likely" in other.get(f"/pairs/{example}?run=hot&compute=yes").text
        (server,) = (each for each in psutil.Process().children() if each not in before and "ui" in each.cmdline())
        others = server.children(recursive=True)
        libraries = {each.pid: Path(f"/proc/{each.pid}/maps").read_text() for each in (server, *others)}
        assert "libtorch" not in libraries[server.pid]
        assert sum("libtorch" in each for each in libraries.values()) == 1
    psutil.wait_procs(others, timeout=10)
    assert not any(each.is_running() for each in others)


def test_a_visit_is_a_point_of_its_runs_curve(experiment, site):
    (example,) = ids(experiment, "line = 7")
    visits = ask(experiment, f"select run, step, margin from steps where example_id = '{example}' order by run, step")
    part = html.unescape(site.get(f"/pairs/{example}/visits").text)
    for run in ("hot", "trained"):
        steps = [visit for visit in visits if visit["run"] == run]
        assert len(steps) == 2
        first, last = steps
        assert f"{run} visited it 2 times, at steps {first['step']} to {last['step']}." in part
        values = f"{first['margin']:.4g} at step {first['step']} to {last['margin']:.4g} at step {last['step']}."
        assert f"{run}: from {values}" in part
    assert part.count("<circle") == 3 * 2 * 2  # three charts, two runs


def test_tokens_that_do_not_count_are_marked_and_left_out_of_the_sum(tmp_path, model, monkeypatch):
    write_pairs(tmp_path / "pairs.jsonl", 20)
    config = write_config(tmp_path, model)
    invoke(tmp_path, "prepare", config)
    mask(tmp_path / "runs/tiny/prepared", lambda n: [0, 1, 2, n] if n > 2 else [0, n])
    invoke(tmp_path, "score", config)
    (example,) = ids(tmp_path, "line = 3")
    shown = json.loads(invoke(tmp_path, "show", example, "config.yaml", "--json").stdout)
    with serve(tmp_path) as site:
        page = site.get(f"/pairs/{example}").text
    for answer, rows in zip(shown["answers"], tables(page), strict=True):
        assert [row[-1] for row in rows] == ["yes" if token["counts"] else "no" for token in answer["tokens"]]
        assert f"of which {answer['n_counted']} count, in 2 turns; sum {answer['reference_sum']:+.3f} nats" in page
    assert page.count('<span class="uncounted"') == 4  # in each text and in each table


def test_without_scores_or_runs_the_texts_are_shown_and_what_is_missing_is_said(tmp_path, model):
    write_pairs(tmp_path / "pairs.jsonl", 20)
    invoke(tmp_path, "prepare", write_config(tmp_path, model))
    (example,) = ids(tmp_path, "line = 3")
    with serve(tmp_path) as site:
        page = site.get(f"/pairs/{example}").text
        assert "No tokenizer of these examples is on this machine" in page and "No run yet." in page
        assert "The reference has not scored it" in page and "<details" not in page
        assert ask(tmp_path, f"select chosen from examples where example_id = '{example}'")[0]["chosen"] in page
        assert "No other example" in site.get(f"/pairs/{example}/neighbours").text


def test_a_run_without_a_model_says_so(experiment, site):
    (example,) = ids(experiment, "line = 11")
    (experiment / "runs/tiny/hot/model").rename(experiment / "moved")
    try:
        page = site.get(f"/pairs/{example}?run=hot&compute=yes")
        assert page.status == 200 and "hot has no model" in page.text
    finally:
        (experiment / "moved").rename(experiment / "runs/tiny/hot/model")


def test_a_label_has_one_answer_and_contradictions_of_its_own_kind(tmp_path, model):
    records = [{"prompt": f"why {i}?", "completion": f"the cat {i}", "label": i % 2 == 0} for i in range(40)]
    records += [records[0], records[0] | {"label": False}, records[0] | {"completion": "a dog sleeps"}]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
    config = write_config(tmp_path, model, loss="kto", epochs=2)
    for stage in ("prepare", "score", "train"):
        invoke(tmp_path, stage, config, *options("prepare.held_out=0"))
    first, *others = ids(tmp_path, "line in (1, 41, 42, 43)")
    with serve(tmp_path) as site:
        page = site.get(f"/pairs/{first}?run=trained&compute=yes").text
        assert '<h2 class="small" id="answer-completion">' in page and "answer-kl" not in page
        assert ">desirable<" in page and len(tables(page)) == 1
        assert "reward" in site.get(f"/pairs/{first}/visits").text
        part = site.get(f"/pairs/{first}/neighbours").text
    found = [re.findall(r'href="/pairs/([^"]*)"', group) for group in part.split("<h3>")[1:]]
    duplicate, swapped, other = others
    assert found == [[swapped], [duplicate], [other]]


def test_texts_that_would_act_stay_texts(tmp_path, model):
    pages = {}
    for name, texts in (("hostile", HOSTILE), ("harmless", ["why <not>?", "two\nlines"] * 25)):
        folder = tmp_path / name
        folder.mkdir()
        records = [
            {"prompt": text, "chosen": f"{text} {n}", "rejected": f"{n} {text}"} for n, text in enumerate(texts)
        ] + [{"prompt": text, "chosen": f"{n} {text}", "rejected": f"{text} {n}"} for n, text in enumerate(texts)]
        (folder / "pairs.jsonl").write_text("".join(json.dumps(each) + "\n" for each in records))
        config = write_config(folder, model, epochs=1)
        for stage in ("prepare", "score", "train"):
            invoke(
                folder,
                stage,
                config,
                *options("prepare.max_quarantine=1", "prepare.max_length=512", "prepare.held_out=0.2"),
            )
        examples = ids(folder, "true")
        assert len(examples) >= 90
        with serve(folder) as site:
            paths = [f"/pairs/{example}" for example in examples] + [f"/pairs/{examples[0]}/neighbours"]
            paths += [f"/pairs/{examples[0]}?run=trained&compute=yes", f"/pairs/{examples[0]}/visits"]
            paths += [
                f"/questions/{question}/answer?limit=200"
                for question in ("contradictions", "disagreements", "duplicates")
            ]
            pages[name] = [site.get(path).text for path in paths]
    kinds = {name: {element for page in each for element in elements(page)} for name, each in pages.items()}
    assert kinds["hostile"] <= kinds["harmless"]
    assert all(visible(page) == page for page in pages["hostile"])
