"""A selection is a file that `train.only` takes, of exactly the examples that were asked for."""

import shutil

import pyarrow.parquet as pq
import pytest

from tests.helpers.pages import listed_ids, serve
from tests.helpers.project import invoke


@pytest.fixture(scope="module")
def folder(scored_once, tmp_path_factory):
    return shutil.copytree(scored_once, tmp_path_factory.mktemp("saved"), dirs_exist_ok=True)


@pytest.fixture(scope="module")
def site(folder):
    with serve(folder) as site:
        yield site


def saved(folder, name) -> list[str]:
    (path,) = folder.glob(f"runs/*/selections/{name}.parquet")
    return pq.read_table(path)["example_id"].to_pylist()


def listed(site, *query) -> list[str]:
    """The ids of two pages, which is all that there are."""
    return [each for n in (1, 2) for each in listed_ids(site.get("/pairs", [*query, ("page", n), ("wait", 1)]).text)]


def save(site, name, **form):
    fields = {"which": "ticked", "use": "only", "filter": "", "name": name} | form
    ids = fields.pop("id", [])
    return site.post("/selections", [*fields.items(), *(("id", each) for each in ids)])


def test_the_ticked_pairs_are_saved_and_the_command_trains_on_them(site, folder):
    ids = listed(site, ("split", "train"))[3:9]
    answer = save(site, "ticked", id=ids)
    assert (answer.status, answer.headers["location"]) == (303, "/selections?saved=ticked.parquet")
    assert saved(folder, "ticked") == ids
    page = site.get("/selections").text
    (command,) = [line for line in page.splitlines() if "train.only=" in line]
    arguments = command.removeprefix("<pre>").removesuffix("</pre>").replace("CONFIG", "config.yaml").split()
    done = invoke(folder, *arguments[1:], "--set", "train.epochs=1")
    assert f"6 of {len(listed(site, ('split', 'train')))} train examples named by train.only" in done.stderr


def test_all_that_a_filter_leaves_is_saved(site, folder):
    assert save(site, "negative", which="filter", filter="margin.max=0&where=n_chosen+%3E%3D+2").status == 303
    assert saved(folder, "negative") == listed(site, ("margin.max", "0"), ("where", "n_chosen >= 2"))


def test_an_exclusion_is_every_other_training_pair(site, folder):
    train = listed(site, ("split", "train"))
    assert save(site, "without", use="exclude", id=train[:2]).status == 303
    assert saved(folder, "without") == train[2:]


@pytest.mark.parametrize("name", ["", "../evil", "a/b", ".hidden", "a" * 65, "a\0b", "-x"])
def test_a_name_is_a_plain_one(site, folder, name):
    before = sorted(folder.rglob("*"))
    answer = save(site, name, which="filter")
    assert answer.status == 400 and "expected up to 64 letters" in answer.text
    assert sorted(folder.rglob("*")) == before


def test_nothing_is_overwritten(site, folder):
    assert save(site, "once", which="filter").status == 303
    before = saved(folder, "once")
    answer = save(site, "once", which="filter", filter="margin.max=0")
    assert answer.status == 400 and "exists. Choose another name" in answer.text
    assert saved(folder, "once") == before


def test_a_selection_has_no_name_of_a_run(site, folder):
    (folder / "runs/tiny/taken").mkdir()
    assert "has a run taken" in save(site, "taken", which="filter").text


def test_an_empty_or_unknown_selection_is_refused(site):
    assert "No example is ticked" in save(site, "none").text
    assert "There is no example" in save(site, "unknown", id=["ffff"]).text
    assert "No example would be in it" in save(site, "empty", which="filter", filter="margin.min=1e9").text
    assert "no column" in save(site, "wrong", which="filter", filter="where=promt%3D1").text


def test_a_file_that_is_no_selection_is_not_listed(site, folder):
    assert save(site, "beside", which="filter").status == 303
    (selections,) = folder.glob("runs/*/selections")
    (selections / "broken.parquet").write_text("no table")
    page = site.get("/selections")
    assert page.status == 200 and "beside.parquet" in page.text and "broken.parquet" not in page.text


def test_a_folder_that_cannot_be_written_is_an_error_with_the_reason(site, folder):
    (prepared,) = folder.glob("runs/*/prepared")
    selections, aside = prepared.parent / "selections", prepared.parent / "aside"
    selections.mkdir(exist_ok=True)
    selections.rename(aside)
    selections.write_text("a file of this name")
    try:
        answer = save(site, "refused", which="filter")
    finally:
        selections.unlink()
        aside.rename(selections)
    assert answer.status == 400 and "cannot be written (File exists)" in answer.text
