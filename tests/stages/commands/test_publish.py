"""publish sends the rows of a config's data and no others, as a data set that anybody can load."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from prefcache.pipeline.stored import artifact
from prefcache.pipeline.stored.prepared import Prepared, sequence_table
from tests.helpers.hub import Hub, client_settings, run_hub
from tests.helpers.project import write_config, write_pairs
from tests.helpers.runs import sft
from tests.helpers.scored import cache_folder
from tests.helpers.sessions import open_session

NAME = "me/rows"
KEY = f"datasets/{NAME}"


@pytest.fixture
def hub():
    with run_hub() as hub:
        yield hub


@pytest.fixture
def run(hub, tmp_path):
    with open_session(tmp_path, {**os.environ, **client_settings(hub, tmp_path / "home")}) as session:
        yield session


def score_more(prefcache, config: Path, n: int) -> None:
    """Score other pairs into the same cache, and merge what is small: shards then have rows of both."""
    write_pairs(config.parent / "more.jsonl", n, start=200)
    more = ["--set", "prepare.data=more.jsonl", "--set", "out=runs/more"]
    for stage in ("prepare", "score"):
        prefcache(stage, "-q", config, *more)
    prefcache("gc", "-q")


def keys_of(folder: Path) -> list[bytes]:
    return [key for file in folder.glob("*.parquet") for key in pq.read_table(file)["key"].to_pylist()]


def save(hub: Hub, folder: Path) -> Path:
    """The published data set as a folder."""
    folder.mkdir()
    for name, data in hub.repositories[KEY].files.items():
        (folder / name).write_bytes(data)
    return folder


def test_shards_are_sent_as_they_are_with_records_and_a_card(hub, run, scored, tmp_path, model):
    stamps = {file: file.stat().st_ctime_ns for file in cache_folder(tmp_path).iterdir()}
    done = run("publish", scored, NAME, "--license", "cc-by-4.0")
    # A shard whose times change, if only those of its links, would be hashed again by the next reader.
    assert stamps == {file: file.stat().st_ctime_ns for file in cache_folder(tmp_path).iterdir()}
    assert f"{hub.url}/{KEY}" in done.stdout and "120 rows in" in done.stdout
    (made,) = hub.created
    assert (made["type"], made["name"], made["visibility"]) == ("dataset", "rows", "private")
    files = dict(hub.repositories[KEY].files)
    folder = cache_folder(tmp_path)
    card, reference = files.pop("README.md").decode(), json.loads(files.pop("reference.json"))
    files.pop(".gitattributes")
    assert files == {file.name: file.read_bytes() for file in folder.iterdir() if file.name in files}
    assert {file.name for file in folder.glob("*.parquet")} == {name for name in files if name.endswith(".parquet")}
    record = json.loads((folder / "reference.json").read_text())
    assert reference["model_id"] == record["model_id"] and reference["name"] == model.name
    for fact in (record["model_id"], "dtype float32", "deviation from the plain float32 forward", "license: cc-by-4.0"):
        assert fact in card
    assert f"prefcache fetch my.yaml {NAME}" in card
    for data in hub.repositories[KEY].files.values():
        assert str(model.parent).encode() not in data and str(tmp_path).encode() not in data
    run("publish", "-q", scored, "me/others", "--public")
    assert hub.created[1]["visibility"] == "public"


def test_rows_of_other_data_are_never_sent(hub, run, prefcache, scored, tmp_path):
    score_more(prefcache, scored, 20)
    assert len(keys_of(cache_folder(tmp_path))) == 160
    result = json.loads(run("publish", "-q", scored, NAME, "--json").stdout)
    assert result["rewritten"] == result["shards"] == 1
    ours = set(sequence_table(Prepared(tmp_path / "runs/tiny/prepared").table())["key"].to_pylist())
    folder = save(hub, tmp_path / "published")
    assert sorted(keys_of(folder)) == sorted(ours)
    verified = json.loads(prefcache("verify", "published", "--json").stdout)
    assert (verified["damaged"], verified["caches"][0]["rows"]) == (0, 120)
    # Published again for fewer pairs, the rows of the others are gone from its main branch.
    (tmp_path / "pairs.jsonl").write_text("".join((tmp_path / "pairs.jsonl").read_text().splitlines(True)[:10]))
    for stage in ("prepare", "score"):
        prefcache(stage, "-q", scored)
    run("publish", "-q", scored, NAME)
    again = save(hub, tmp_path / "again")
    assert len(keys_of(again)) == 20 and set(keys_of(again)) < ours


def test_datasets_loads_what_is_published(hub, run, scored, tmp_path):
    import datasets

    run("publish", "-q", scored, NAME)
    folder = save(hub, tmp_path / "published")
    rows = datasets.load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "datasets"))
    assert len(rows) == 120 and rows.column_names == pq.read_schema(next(folder.glob("*.parquet"))).names
    assert sorted(rows["key"]) == sorted(keys_of(folder))


@pytest.mark.slow  # a process that imports datasets
def test_datasets_loads_it_from_the_hub(hub, run, scored, tmp_path):
    run("publish", "-q", scored, NAME)
    code = f"import datasets; print(len(datasets.load_dataset({NAME!r}, split='train')))"
    environment = {**os.environ, **client_settings(hub, tmp_path / "home")}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["120"], done.stderr


def test_a_dry_run_says_what_would_be_sent_asks_no_hub_and_leaves_nothing(prefcache, scored, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    plan = json.loads(prefcache("publish", "-q", scored, NAME, "--dry-run", "--json").stdout)
    assert plan["dry_run"] and plan["rows"] == 120 and {"README.md", "reference.json"} < set(plan["files"])
    assert plan["bytes"] == sum(plan["files"].values())
    assert f"{plan['bytes']:,} bytes would be sent" in prefcache("publish", scored, NAME, "--dry-run").stdout
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_interrupted_publication_leaves_nothing_behind_and_is_continued(hub, run, scored):
    hub.loses = 3
    assert f"{NAME} was not published" in run("publish", "-q", scored, NAME, code=2).stderr
    assert set(hub.repositories[KEY].files) == {".gitattributes"} and len(hub.stored) >= 3
    stored, hub.loses = dict(hub.stored), None
    hub.asked.clear()
    run("publish", "-q", scored, NAME)
    sent = {path.rpartition("/")[2] for path, _ in hub.asked if path.startswith("/lfs/")}
    assert sent and not sent & set(stored)
    shards = [data for name, data in hub.repositories[KEY].files.items() if name.endswith(".parquet")]
    assert {hashlib.sha256(data).hexdigest() for data in shards} == set(hub.stored)


def test_nothing_else_on_the_hub_is_replaced(hub, run, scored):
    run("publish", "-q", scored, NAME)
    hub.repositories[KEY].add({"data.csv": b"a,b\n"})
    assert "exists and is not a published cache" in run("publish", "-q", scored, NAME, code=2).stderr
    hub.repositories[KEY].add(hub.repositories[KEY].commits[-2][1])
    files = hub.repositories[KEY].files
    other = {**json.loads(files["reference.json"]), "model_id": "b" * 32}
    del other[artifact.SEAL]
    hub.repositories[KEY].add({**files, "reference.json": artifact.seal(other)})
    message = run("publish", "-q", scored, NAME, code=5).stderr
    assert f"{NAME} holds log-probs of tiny@bbbbbbbb" in message and "Name another data set for them" in message
    assert f"{NAME} was not published" in run("publish", "-q", scored, NAME, code=2, HF_TOKEN="hf_another").stderr


def test_what_is_not_scored_is_not_published(prefcache, prepared, scored_once):
    assert "has not been scored" in prefcache("publish", prepared, NAME, "--dry-run", code=2).stderr


@pytest.mark.slow  # it scores and compares with an adapter
def test_an_adapter_keeps_its_identity_and_only_the_same_adapter_fetches_it(hub, run, model, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", 8)
    config = write_config(tmp_path, model)
    adapter = sft(model, tmp_path / "adapter")
    with_it = ["--set", f"adapter={adapter}"]
    for stage in ("prepare", "score"):
        run(stage, "-q", config, *with_it)
    run("publish", "-q", config, NAME, *with_it)
    reference = json.loads(hub.repositories[KEY].files["reference.json"])
    assert reference["name"] == f"{model.name} + adapter" and "adapter" in reference
    assert str(tmp_path).encode() not in b"".join(hub.repositories[KEY].files.values())
    shutil.rmtree(tmp_path / "cache")
    assert "this config names" in run("fetch", "-q", config, NAME, code=5).stderr
    assert json.loads(run("fetch", "-q", config, NAME, *with_it, "--json").stdout)["rows"] == 16
