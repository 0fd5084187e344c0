"""The answer to a query in Python: what it looks like, and that other libraries take it as it is."""

import sys

import duckdb
import numpy as np
import pandas as pd
import polars
import pyarrow as pa
import pytest

import prefcache
from prefcache.pipeline.errors import ResourceError, UsageError
from prefcache.sql_result import SqlResult

ACTING = "<img src=x onerror=alert(1)>\x1b[31m\u202e"


def answer(n: int) -> SqlResult:
    return SqlResult(pa.table({"<i>text": [ACTING] * n, "value": [1.23456789] * n, "none": [None] * n}))


def test_in_a_notebook_it_is_a_table_and_text_from_models_is_text():
    shown = answer(23)._repr_html_()
    assert "<th>&lt;i&gt;text</th><th>value</th><th>none</th>" in shown
    row = "<tr><td>&lt;img src=x onerror=alert(1)&gt;\u241b[31m&lt;U+202E&gt;</td><td>1.23457</td><td></td></tr>"
    assert shown.count(row) == shown.count("<tr>") - 1 == 20
    assert shown.endswith("<p>3 more rows</p>")
    assert answer(1)._repr_html_().endswith("<p>1 row</p>") and answer(21)._repr_html_().endswith("<p>1 more row</p>")


def test_in_a_terminal_it_is_a_table_or_lines_where_that_is_too_wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    header, rule, *rows, last = repr(answer(23)).splitlines()
    assert header.split() == ["<i>text", "value", "none"] and set(rule.strip()) == {"─"}
    assert rows == [" <img src=x onerror=alert(1)>\u241b[31m<U+202E>  1.23457"] * 20 and last == "3 more rows"
    wide = SqlResult(pa.table({f"column_{i}": ["x" * 400] for i in range(2)}))
    assert repr(wide).splitlines() == [
        "-- row 1",
        *(f"column_{i}  {'x' * 300}\u2026" for i in range(2)),
        "1 row",
    ]
    assert repr(answer(0)).endswith("\n0 rows")


def test_columns_of_one_name_are_all_there():
    twice = SqlResult(pa.table([pa.array([1]), pa.array([2])], names=["a", "a"]))
    assert twice.fetchall() == [(1, 2)] and "<td>1</td><td>2</td>" in twice._repr_html_()


def test_duckdb_polars_pandas_and_arrow_take_it_directly():
    result = answer(3)
    assert duckdb.sql("select count(*), sum(value) from result").fetchall() == [(3, pytest.approx(3 * 1.23456789))]
    assert polars.DataFrame(result).to_dicts() == result.pl().to_dicts() == result.table.to_pylist()
    assert pd.DataFrame.from_arrow(result).shape == result.df().shape == (3, 3)
    assert pa.table(result) == result.arrow() == result.table
    assert result.columns == ["<i>text", "value", "none"] and len(result) == 3
    assert result.fetchall() == [(ACTING, 1.23456789, None)] * 3


def test_without_polars_pl_says_what_it_needs(monkeypatch):
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(UsageError, match=r"^pl\(\) needs polars, which is not installed: pip install polars\.$"):
        answer(1).pl()


def test_it_takes_parameters_and_reports_errors_as_the_command_does(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    query = "select count(*) as n from examples where n_chosen > $least"
    assert prefcache.sql(query, parameters={"least": np.int64(0)}).fetchall() == [(60,)]
    assert prefcache.sql(query, "runs/tiny", parameters={"least": 10**6}).df()["n"].tolist() == [0]
    with pytest.raises(UsageError, match="There is no column nmaes"):
        prefcache.sql("select nmaes from examples", tmp_path / "config.yaml")
    # 60 ** 6 rows take far longer, on any machine.
    with pytest.raises(ResourceError, match=r"took more than 0\.2 s and was ended.*timeout="):
        prefcache.sql(
            "select count(*) from examples a, examples b, examples c, examples d, examples e, examples f", timeout=0.2
        )
