"""The table of numbers says what the views say, whatever the runs are called."""

import pytest

from prefcache.pipeline import views
from prefcache.pipeline.browsing import browse_table
from prefcache.pipeline.browsing.browse_table import BROWSED, NUMBERS
from prefcache.pipeline.errors import UsageError
from tests.helpers import experiments

RUNS = {"lr-0.1": 0.1, "margin": 0.5, 'a"b': 1.0}


@pytest.fixture(scope="module")
def con(tmp_path_factory):
    sources = experiments.sources(tmp_path_factory.mktemp("experiment"), RUNS)
    return views.connect(sources, browse_table.make_extension("pairs", list(RUNS)))


@pytest.fixture(scope="module")
def columns(con):
    taken = browse_table.list_columns(con, "pairs")
    return {column.run: column for column in browse_table.name_columns("pairs", list(RUNS), taken)}


def test_each_example_has_its_numbers_of_the_view_pairs(con):
    expected = con.execute("select position, source, split, n_prompt, margin, length_difference from pairs").fetchall()
    rows = con.execute(f"select position, source, split, n_prompt, margin, length_difference from {NUMBERS}").fetchall()
    assert sorted(rows) == sorted(expected)
    assert len(rows) == 2


def test_each_run_has_its_latest_rewards_under_a_name_of_its_own(con, columns):
    for run, beta in RUNS.items():
        column = columns[run]
        rows = con.execute(
            f"select {column.reward}, {column.field('correct')} from {NUMBERS} order by position"
        ).fetchall()
        # Pair e0 at its last visit: beta * ((-3 + 5) - (-10 + 6)) = 6 beta; e1: beta * ((-9.5 + 7.5) - (-7 + 8)) = -3 beta.
        assert rows == [(pytest.approx(6 * beta), True), (pytest.approx(-3 * beta), False)]
    assert columns["margin"].name == "run_margin"  # the examples have a margin of their own


def test_texts_are_in_the_view_next_to_it(con):
    assert con.execute(f"select prompt, chosen from {BROWSED} where position = 1").fetchall() == [("why 1?", "yes")]
    assert "prompt" not in browse_table.list_columns(con, NUMBERS)


def test_names_that_differ_in_case_only_are_kept_apart():
    names = [column.name for column in browse_table.name_columns("pairs", ["Run", "run", "RUN"], ["source"])]
    assert len({name.lower() for name in names}) == 3


def test_a_query_of_other_tables_is_refused_as_ever(con):
    extension = browse_table.make_extension("pairs", list(RUNS))
    assert views.ask(con, f"select count(*) from {NUMBERS}", extension=extension)
    with pytest.raises(UsageError, match="no view numbers"):
        views.ask(con, f"select count(*) from {NUMBERS}")
    with pytest.raises(UsageError, match="no view stored"):
        views.ask(con, "select * from stored.prepared", extension=extension)


def test_an_experiment_without_runs_has_a_table_too(tmp_path):
    con = views.connect(experiments.sources(tmp_path, {}), browse_table.make_extension("pairs", []))
    assert con.execute(f"select count(*) from {NUMBERS}").fetchall() == [(2,)]
