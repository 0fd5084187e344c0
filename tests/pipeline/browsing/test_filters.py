"""A filter survives the way to an address and back, and selects what its conditions say."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from prefcache.pipeline import views
from prefcache.pipeline.browsing import browse_table, queries
from prefcache.pipeline.browsing.browse_table import BROWSED, NUMBERS, RunColumn
from prefcache.pipeline.browsing.filters import Catalog, Filter, Outcome, Range, RangeColumn, parse_filter, to_query
from prefcache.pipeline.browsing.queries import Order
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.stored.duckdb_connection import literal
from tests.helpers import experiments

CATALOG = Catalog(
    kind="pairs",
    sources=["a.jsonl", "b's.jsonl"],
    splits=["train", "held_out"],
    runs={"trained": RunColumn("trained", "trained", "pairs")},
    ranges={
        "margin": RangeColumn("margin", "reference margin", "margin"),
        "n_prompt": RangeColumn("n_prompt", "prompt tokens", "n_prompt", is_whole=True),
    },
    sortable=["position", "margin", "trained.margin"],
)
NUMBER = st.none() | st.integers(-(10**9), 10**9).map(float) | st.sampled_from([0.5, -0.125])
TEXTS = st.text(st.characters(codec="utf-8"), max_size=20).map(lambda text: text.strip().rstrip("; \n"))


@given(
    st.sets(st.sampled_from(CATALOG.sources)),
    TEXTS,
    TEXTS,
    st.dictionaries(st.sampled_from(sorted(CATALOG.ranges)), st.tuples(NUMBER, NUMBER)),
    st.sampled_from(["", "right", "wrong", "unvisited"]),
)
def test_an_address_says_the_whole_filter(sources, text, where, ends, outcome):
    ranges = [Range(key, *ends[key]) for key in CATALOG.ranges if key in ends and ends[key] != (None, None)]
    outcomes = (Outcome("trained", outcome),) if outcome else ()
    chosen = Filter(tuple(sorted(sources)), (), text, where and f"prompt = {literal(where)}", tuple(ranges), outcomes)
    assert parse_filter(to_query(chosen), CATALOG) == chosen


def test_what_is_empty_or_not_a_filter_is_ignored():
    assert parse_filter([("text", " "), ("margin.min", ""), ("page", "3"), ("sort", "margin")], CATALOG) == Filter()


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("margin.min", "low", "reference margin: found 'low', expected a number"),
        ("margin.max", "nan", "expected a number"),
        ("source", "c.jsonl", "c.jsonl"),
        ("split", "test", "test"),
        ("outcome.trained", "maybe", "maybe"),
    ],
)
def test_a_wrong_value_is_named(name, value, message):
    with pytest.raises(UsageError, match=message):
        parse_filter([(name, value)], CATALOG)


@pytest.fixture(scope="module")
def positions(tmp_path_factory):
    """Answer which of the two pairs a filter leaves. Pair 0 is trained on, with margin 1, pair 1 is held out, without one."""
    extension = browse_table.make_extension("pairs", ["trained"])
    con = views.connect(experiments.sources(tmp_path_factory.mktemp("experiment"), {"trained": 0.1}), extension)

    def ask(chosen: Filter, table: str = BROWSED, order: Order | None = None) -> list[int]:
        query = queries.list_rows(chosen, CATALOG, table, ["margin", "trained.margin"], order or Order(), 50, 0)
        rows = views.ask(con, query.sql, (), query.parameters or None, extension).rows()
        positions = [position for position, *_ in rows]
        count = queries.count_bins(chosen, CATALOG, table, [])
        assert [*views.ask(con, count.sql, (), count.parameters or None, extension).rows()] == [(-1, 0, len(positions))]
        return positions

    return ask


@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        (Filter(), [0, 1]),
        (Filter(sources=("a.jsonl",)), [0, 1]),
        (Filter(splits=("held_out",)), [1]),
        (Filter(text="WHY 1"), [1]),
        (Filter(text="YES"), [0, 1]),
        (Filter(text="%"), []),  # not a pattern
        (Filter(text="'; select 1 --"), []),
        (Filter(ranges=(Range("margin", 1.0, 1.0),)), [0]),
        (Filter(ranges=(Range("margin", None, 0.99),)), []),
        (Filter(ranges=(Range("n_prompt", 3.0, None),)), [0, 1]),
        (Filter(outcomes=(Outcome("trained", "right"),)), [0]),
        (Filter(outcomes=(Outcome("trained", "wrong"),)), [1]),
        (Filter(outcomes=(Outcome("trained", "unvisited"),)), []),
        (Filter(where="trained.margin < 0 -- the wrong ones"), [1]),
        (Filter(where="prompt like '%0?' or margin is null"), [0, 1]),
        (Filter(where="example_id in (select example_id from steps where loss < 0.45)"), [0]),
        (Filter(splits=("train",), where="true or true"), [0]),
    ],
)
def test_a_filter_selects_what_it_says(positions, chosen, expected):
    assert positions(chosen) == expected
    if not (chosen.text or "prompt" in chosen.where or "example_id" in chosen.where):
        assert positions(chosen, NUMBERS) == expected


@pytest.mark.parametrize(
    "where", ["true) or (true", "true] or [true", "1 = 1; select 1", "margin <", "select 1", "a, b) = (1, 2"]
)
def test_what_is_not_one_condition_is_refused(where):
    with pytest.raises(UsageError, match="SQL condition"):
        parse_filter([("where", where)], CATALOG)


@pytest.mark.parametrize("where", ["getenv('HOME') > ''", "exists (select 1 from read_text('/etc/passwd'))"])
def test_a_condition_reads_no_file(positions, where):
    with pytest.raises(UsageError, match="not available"):
        positions(Filter(where=where))


def test_a_column_that_does_not_exist_is_named(positions):
    with pytest.raises(UsageError, match="no column promt"):
        positions(Filter(where="promt = ''"))


def test_rows_without_a_value_come_last_in_both_orders(positions):
    assert positions(Filter(), order=Order("margin")) == [0, 1]
    assert positions(Filter(), order=Order("margin", is_descending=True)) == [0, 1]
    assert positions(Filter(), order=Order("trained.margin")) == [1, 0]
    with pytest.raises(UsageError, match="sort"):
        positions(Filter(), order=Order("margin; drop table numbers"))
