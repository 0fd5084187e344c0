"""The runs' page: the figures of `prefcache runs`, and curves through the metrics of those that are chosen."""

import html
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from prefcache.ui.axis_ticks import choose_ticks
from prefcache.ui.line_svg import Line, choose_colour, draw
from tests.helpers.pages import Site, serve
from tests.helpers.project import invoke, options, write_config, write_pairs


@pytest.fixture(scope="module")
def experiment(tmp_path_factory, model) -> Path:
    """A run, one with another loss that was evaluated more often, and an unfinished copy of the first."""
    folder = tmp_path_factory.mktemp("experiment")
    write_pairs(folder / "pairs.jsonl", 60)
    config = write_config(folder, model, epochs=6)
    other = options("train.run=other", "train.loss=ipo", "train.eval_every=10")
    for stage, *settings in (("prepare",), ("score",), ("train",), ("train", *other)):
        invoke(folder, stage, config, *settings)
    shutil.copytree(folder / "runs/tiny/trained", folder / "runs/tiny/begun")
    (folder / "runs/tiny/begun/manifest.json").unlink()
    return folder


@pytest.fixture(scope="module")
def site(experiment) -> Iterator[Site]:
    with serve(experiment) as site:
        yield site


def rows(page: str) -> dict[str, list[str]]:
    """The cells of each run's row."""
    body = page.partition("<tbody>")[2].partition("</tbody>")[0]
    cells = [
        [html.unescape(re.sub(r"<[^>]*>", "", cell)) for cell in re.findall(r"<t[dh].*?</t[dh]>", row, re.DOTALL)]
        for row in re.findall(r"<tr>.*?</tr>", body, re.DOTALL)
    ]
    return {name: row for _, name, *row in cells}


def figures(part: str) -> dict[str, str]:
    """What each figure says in words, by its title."""
    found = re.findall(r"<figcaption>(.*?)</figcaption>.*?aria-label=\"(.*?)\"", part, re.DOTALL)
    return {html.unescape(title): html.unescape(words) for title, words in found}


def test_the_table_has_the_figures_of_the_command(experiment, site):
    page = site.get("/runs")
    listed = json.loads(invoke(experiment, "runs", "--json").stdout)["runs"]
    table = rows(page.text)
    assert set(table) == {"begun", "other", "trained"} == {run["run"] for run in listed}
    for run in listed:
        state, loss, beta, steps, accuracy, margin, evaluated_loss, alerts, _ = table[run["run"]]
        assert state.startswith(run["state"]) and (loss, beta) == (run["loss"], f"{run['beta']:.4g}")
        assert steps.split()[0] == f"{run['steps']:,}"
        if run["after"]:
            before, after = run["before"], run["after"]
            assert evaluated_loss == f"{before['loss']:.4g} \N{RIGHTWARDS ARROW} {after['loss']:.4g}"
            assert accuracy.endswith(f"{after['reward_accuracy']:.4g}") and margin.endswith(
                f"{after['reward_margin']:.4g}"
            )
        assert all(kind in alerts for kind in run["alerts"]) and (run["alerts"] or alerts == "none")


def test_curves_go_through_the_metrics_of_the_chosen_runs(experiment, site):
    page = site.get("/runs?run=other").text
    (source,) = re.findall(r'data-src="([^"]*)"', page)
    assert html.unescape(source) == "/runs/curves?run=other"
    found = figures(site.get("/runs/curves?run=other").text)
    assert list(found) == [
        *("loss", "reward accuracy", "reward margin"),
        *("held-out loss", "held-out reward accuracy", "held-out reward margin"),
    ]
    query = "select step, loss, eval_loss from metrics where run = 'other' order by step"
    metrics = json.loads(invoke(experiment, "sql", "--json", query, "runs/tiny").stdout)
    for title, name, begin in (("loss", "loss", 1), ("held-out loss", "eval_loss", 0)):
        points = [(each["step"], each[name]) for each in metrics if each[name] is not None and each["step"] >= begin]
        (first, before), (last, after) = points[0], points[-1]
        assert f"other: from {before:.4g} at step {first} to {after:.4g} at step {last}." in found[title]
    # Step 0 has an evaluation and no step of training.
    assert "at step 0" in found["held-out loss"] and "at step 0" not in found["loss"]
    assert "trained" not in found["loss"]
    assert "trained" in figures(site.get("/runs/curves?run=other&run=trained").text)["loss"]


def test_a_run_that_began_after_the_server_is_on_the_page(experiment, site):
    invoke(experiment, "train", "config.yaml", *options("train.run=late"))
    assert "late" in rows(site.get("/runs").text)
    assert "late" in figures(site.get("/runs/curves?run=late").text)["loss"]


def test_without_runs_the_page_says_how_to_make_one(scored_once):
    with serve(scored_once) as site:
        page = site.get("/runs")
    assert page.status == 200 and "No run yet." in page.text and "prefcache train CONFIG" in page.text


def test_lines_are_drawn_to_scale():
    # The plot is from 46 to 352 and from 168 up to 8, with 2% and 6% of the range left free on either side.
    chart = draw("loss", [Line("a", "run-1", [(0, 1.0), (100, 3.0)]), Line("b", "run-2", [(50, 2.0)])])
    (a, b), between = chart.paths, [(x, y) for path in chart.paths for x, y in path.dots]
    width, height = 306 / 104, 160 / 2.24
    expected = [
        (46 + 2 * width, 168 - 0.12 * height),
        (46 + 102 * width, 168 - 2.12 * height),
        (46 + 52 * width, 168 - 1.12 * height),
    ]
    assert [x for x, _ in between] == pytest.approx([x for x, _ in expected], abs=0.01)
    assert [y for _, y in between] == pytest.approx([y for _, y in expected], abs=0.01)
    assert (a.colour, b.colour, chart.zero) == ("run-1", "run-2", None)
    assert chart.description == "a: from 1 at step 0 to 3 at step 100. b: 2 at step 50."


def test_a_constant_line_and_a_single_point_can_be_drawn():
    chart = draw("loss", [Line("a", "run-1", [(5, 0.0), (6, 0.0)])])
    assert [y for _, y in chart.paths[0].dots] == [88, 88] and chart.zero == 88
    assert [tick.label for tick in draw("loss", [Line("a", "run-1", [(5, 2.0)])]).x_ticks] == ["5"]


def test_ticks_are_round_and_within():
    assert choose_ticks(0, 100) == [0, 50, 100]
    assert choose_ticks(-0.13, 0.31) == [0, 0.2]
    assert choose_ticks(1, 83, 6) == [20, 40, 60, 80]
    assert choose_ticks(2, 2) == [2]


def test_the_ninth_run_has_the_first_colour_with_dashes():
    assert [choose_colour(n) for n in (0, 7, 8)] == ["run-1", "run-8", "run-1 dashed"]
