"""The list of pairs shows what `prefcache sql` says under the same conditions."""

import json
import re
import threading
import time

import pytest

from tests.helpers.pages import elements, listed_ids, serve
from tests.helpers.project import invoke


@pytest.fixture(scope="module")
def folder(trained_once):
    return trained_once


@pytest.fixture(scope="module")
def site(folder):
    with serve(folder) as site:
        yield site


@pytest.fixture(scope="module")
def sql(folder):
    return lambda query: json.loads(invoke(folder, "sql", query, "--json").stdout)


def count(site, query) -> int:
    (n,) = re.findall(r"<b>([\d,]+)</b>", site.get("/pairs/count", query).text)
    return int(n.replace(",", ""))


@pytest.mark.parametrize(
    ("query", "condition"),
    [
        ([], "true"),
        ([("margin.max", "0")], "margin <= 0"),
        ([("margin.min", "-1"), ("margin.max", "1"), ("length_difference.min", "0")], "margin between -1 and 1 and length_difference >= 0"),
        ([("split", "held_out")], "split = 'held_out'"),
        ([("n_prompt.min", "8")], "n_prompt >= 8"),
        ([("where", "n_chosen > n_rejected -- longer")], "n_chosen > n_rejected"),
        ([("where", "prompt like '%1%'")], "prompt like '%1%'"),
        ([("text", "EIGHT")], "(prompt || chosen || rejected) ilike '%eight%'"),
        ([("outcome.trained", "right")], "example_id in (select example_id from rewards where correct)"),
        ([("outcome.trained", "wrong")], "example_id in (select example_id from rewards where not correct)"),
        ([("reward.trained.min", "0.01")], "example_id in (select example_id from rewards where margin >= 0.01)"),
        ([("where", "trained.margin > 0.01")], "example_id in (select example_id from rewards where margin > 0.01)"),
    ],
)  # fmt: skip
def test_a_filter_lists_and_counts_what_sql_finds(site, sql, query, condition):
    rows = sql(f"select example_id from pairs where used and {condition} order by position")
    expected = [row["example_id"] for row in rows]
    for path in ("/pairs/rows", "/pairs"):  # a part that the page loads, and a page that waits for it
        assert listed_ids(site.get(path, [*query, ("wait", 1)]).text) == expected[:50]
    assert count(site, query) == len(expected)


@pytest.mark.parametrize("order", ["asc", "desc"])
@pytest.mark.parametrize("column", ["margin", "margin_per_token", "n_chosen", "source", "length_difference"])
def test_a_list_is_sorted_by_any_column(site, sql, column, order):
    rows = sql(f"select example_id from pairs where used order by {column} {order} nulls last, position")
    page = site.get("/pairs", [("sort", column), ("order", order)]).text
    assert listed_ids(page) == [row["example_id"] for row in rows][:50]


def test_pages_follow_one_another(site, sql):
    first, second, third = (listed_ids(site.get("/pairs", [("page", n)]).text) for n in (1, 2, 3))
    rows = sql("select example_id from pairs where used order by position")
    assert [*first, *second, *third] == [row["example_id"] for row in rows]
    assert len(first) == 50 and second and not third


def test_histograms_count_every_row_once(site, sql):
    """Each histogram's description has the number of values; dragging uses the range that it covers."""
    text = site.get("/pairs/histograms").text
    (n_margins,) = sql("select count(margin) as n from pairs where used")
    (n_rewards,) = sql("select count(margin) as n from rewards")
    assert dict(re.findall(r'data-key="([^"]+)"[^>]*aria-label="[^"]*: ([\d,]+) values', text)) == {
        "margin": str(n_margins["n"]),
        "margin_per_token": str(n_margins["n"]),
        "length_difference": str(n_margins["n"]),
        "reward.trained": str(n_rewards["n"]),
    }
    kept = site.get("/pairs/histograms", [("margin.max", "-1000")]).text
    assert "no values under this filter" in kept


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ([("where", "promt = 1")], "There is no column promt"),
        ([("where", "margin <")], "SQL condition"),
        ([("where", "true) or (true")], "SQL condition"),
        ([("margin.min", "<b>low")], "expected a number"),
        ([("sort", "nothing")], "nothing"),
        ([("where", "exists (select 1 from read_text('/etc/passwd'))")], "not available"),
    ],
)
def test_a_mistake_is_explained_above_the_form_that_has_it(site, query, message):
    answer = site.get("/pairs", [*query, ("wait", 1)])
    assert answer.status == 400
    (shown,) = re.findall(r'role="alert">([^<]*)<', answer.text)
    assert message in shown
    assert site.get("/pairs", [("where", "x < 1 and 'a\"' = ''")]).text.count("x &lt; 1 and") >= 1
    assert "<b>low" not in answer.text


def test_a_slow_condition_holds_up_nobody_else(site):
    """Until it is ended, lists and counts by numbers are answered as before."""
    slow = "(select count(*) from pairs a, pairs b, pairs c, pairs d, pairs e where a.margin < b.margin + c.margin + d.margin + e.margin) > 0"
    page = site.get("/pairs", [("where", slow)])
    assert page.status == 200 and "searching" in page.text
    asked = threading.Thread(target=lambda: site.get("/pairs/count", [("where", slow)]), daemon=True)
    asked.start()
    time.sleep(1)
    began = time.monotonic()
    assert listed_ids(site.get("/pairs", [("sort", "margin")]).text) and count(site, [("margin.max", "0")])
    assert time.monotonic() - began < 20 and asked.is_alive()


def test_a_filter_that_leaves_nothing_says_so(site):
    answer = site.get("/pairs", [("margin.min", "1e9")])
    assert answer.status == 200 and "No pairs meet these conditions" in answer.text


def test_what_is_typed_changes_no_element(site):
    hostile = "\"><script>alert(1)</script><img src=x onerror=alert(1)>'\u202e\x1b[31m"
    harmless = elements(site.get("/pairs", [("text", "harmless")]).text)
    page = site.get("/pairs", [("text", hostile)]).text
    assert elements(page) == harmless
    assert "<U+202E>" not in hostile and "\u202e" not in page and "\x1b" not in page


def test_nothing_is_written_by_looking(site, folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for path in ("/pairs", "/pairs/count", "/pairs/histograms", "/selections"):
        site.get(path)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before


@pytest.mark.parametrize("page", ["0", "-1", "x", "1.5", "9" * 20, "9" * 5000])
def test_a_page_that_does_not_exist_is_an_answer_too(site, page):
    assert site.get("/pairs", [("page", page)]).status == 200
