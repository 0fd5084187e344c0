"""A command that reads changes nothing, wherever it is run; one that writes an answer writes that file and no other."""

import json
import os
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from prefcache.pipeline.stored import artifact, verified_shards
from prefcache.pipeline.stored.memos import VerifiedMemo
from tests.helpers import foreign_files
from tests.helpers.caches import flip
from tests.helpers.project import write_config, write_pairs

N = 24
Tree = dict[str, tuple[Any, ...]]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory, model) -> Path:
    """24 pairs and a record that is none, scored and trained on in a step or two."""
    from prefcache.cli import main

    project = tmp_path_factory.mktemp("experiment")
    write_pairs(project / "pairs.jsonl", N)
    with open(project / "pairs.jsonl", "a") as file:
        file.write(json.dumps({"prompt": "why?", "chosen": "so", "rejected": "so"}) + "\n")
    config = write_config(project, model, epochs=0.5, samples=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(project)
        for stage in ("prepare", "score", "train"):
            done = CliRunner().invoke(main, [stage, str(config)], catch_exceptions=False)
            assert done.exit_code == 0, done.stderr
    return project


@pytest.fixture
def folder(experiment, tmp_path) -> Path:
    """A copy, in the place of the temporary folder, that a test may damage."""
    shutil.copytree(experiment, tmp_path, dirs_exist_ok=True)
    return tmp_path / "runs/tiny"


def tree(root: Path) -> Tree:
    """Every file and folder: what it is, when it was changed, and its bytes."""
    found = {}
    for path in [root, *root.rglob("*")]:
        facts = path.lstat()
        content = path.read_bytes() if path.is_file() else None
        found[str(path.relative_to(root))] = (facts.st_mode, facts.st_size, facts.st_mtime_ns, facts.st_ino, content)
    return found


def changed(before: Tree, after: Tree) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}


@pytest.fixture
def sealed_off(folder) -> Iterator[Path]:
    """The project, made read-only. Where root runs the tests, that binds nobody: what counts is the comparison."""
    root = folder.parent.parent
    paths = [root, *root.rglob("*")]
    for path in reversed(paths):
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    yield root
    for path in paths:
        path.chmod(path.stat().st_mode | stat.S_IWUSR)


# Of the experiment's folder {x}, a run's own config {c}, the project {p} and a folder for answers {o}.
LIGHT = [
    "sql|select count(*) from rewards|{x}",
    "sql|select sum(margin) from pairs|{x}|--out|{o}/a.parquet",
    "sql|select 1|{c}",
    "ask|length-bias|{x}",
    "export|{c}|--output|{o}/a.jsonl",
    "score|{c}|--dry-run",
    "verify|{p}/cache",
    "gc|{p}/cache|--dry-run",
    "runs|{x}",
    "clean|{x}",
]
HEAVY = [
    "report|{c}|--output|{o}/a.html",
    "show|{id}|{c}",
    "doctor|{c}|--why",
    "preview|{c}",
    "parity|{c}|plain|transformers|-n|4",
    "export|{c}|--output|{o}/b.parquet|--per-token",
    "export|{c}|--for|trl|--output|{o}/c.parquet",
    "score|--input|{p}/pairs.jsonl|--model|{model}|--cache|{p}/cache|--dry-run",
    "from-trl|{o}/dpo.yaml",
    "from-axolotl|{o}/axolotl.yaml",
    "from-llamafactory|{o}/llamafactory.yaml",
    "losses",
    "formats",
    "publish|{c}|me/rows|--dry-run",
    "fetch|{c}|{p}/cache|--dry-run",
]


@pytest.mark.parametrize("where", ["project", "/", "experiment"])
def test_commands_that_read_change_nothing_from_wherever_they_are_run(
    prefcache, sealed_off, model, tmp_path_factory, monkeypatch, where
):
    x, o = sealed_off / "runs/tiny", tmp_path_factory.mktemp("answers")
    (o / "dpo.yaml").write_text(json.dumps({"model_name_or_path": "org/name", "dataset_name": "org/data"}))
    (o / "axolotl.yaml").write_text(foreign_files.AXOLOTL)
    (o / "llamafactory.yaml").write_text(foreign_files.LLAMAFACTORY)
    (example,) = pq.read_table(next((x / "trained/steps").glob("*.parquet")))["example_id"].slice(0, 1).to_pylist()
    monkeypatch.chdir({"project": sealed_off, "/": "/", "experiment": x}[where])
    # Shards are old enough for a memo of what was hashed to be worth its while.
    monkeypatch.setattr(verified_shards, "SETTLED_SECONDS", -1.0)
    before = tree(sealed_off)
    for line in [*LIGHT, *(HEAVY if where == "/" else [])]:
        said = line.format(x=x, c=x / "trained/config.yaml", p=sealed_off, o=o, id=example, model=model)
        prefcache(*said.split("|"))
        assert changed(before, tree(sealed_off)) == set(), said
    assert sorted(path.name for path in o.iterdir() if path.suffix == ".jsonl") == ["a.jsonl"]


@pytest.mark.parametrize("line", ["sql|from pairs|{x}", "export|{c}|--output|{o}/a.csv"])
def test_what_reads_a_damaged_cache_says_so_and_leaves_the_manifest(prefcache, folder, tmp_path_factory, line):
    root = folder.parent.parent
    flip(next(root.glob("cache/tiny-*/*.parquet")))
    before = tree(root)
    said = line.format(x=folder, c=folder / "trained/config.yaml", o=tmp_path_factory.mktemp("answers"))
    assert "prefcache verify" in prefcache(*said.split("|"), code=4).stderr
    assert changed(before, tree(root)) == set()
    # What the sentence names helps.
    prefcache("verify", root / "cache", code=4)
    prefcache("score", "config.yaml")
    prefcache(*said.split("|"))


def test_train_takes_the_manifest_back_for_make(prefcache, folder, tmp_path):
    flip(next(tmp_path.glob("cache/tiny-*/*.parquet")))
    assert "prefcache score" in prefcache("train", "config.yaml", "--set", "train.run=again", code=4).stderr
    assert not (folder / "scored/manifest.json").exists()


@pytest.mark.parametrize("file", ["scored/manifest.json", "prepared/manifest.json"])
def test_a_manifest_of_a_newer_version_is_kept_by_stages_that_write(prefcache, folder, file):
    path = folder / file
    path.write_bytes(artifact.seal({**artifact.unseal(path), "schema_version": 99}))
    kept = path.read_bytes()
    for stage in ("prepare", "score", "train"):
        if stage == "prepare" and file.startswith("scored"):
            continue  # it does not read that one
        assert "Upgrade" in prefcache(stage, "config.yaml", "--set", "train.run=q", code=4).stderr
        assert path.read_bytes() == kept


def test_a_manifest_is_kept_while_its_cache_is_away(prefcache, folder, tmp_path):
    path = folder / "scored/manifest.json"
    # The fixture is a copy, whose original has a cache as well.
    content = artifact.unseal(path)
    path.write_bytes(artifact.seal({**content, "cache_absolute": content["cache_absolute"] + "-away"}))
    (tmp_path / "cache").rename(tmp_path / "elsewhere")
    assert "is gone" in prefcache("train", "config.yaml", "--set", "train.run=q", code=4).stderr
    (tmp_path / "elsewhere").rename(tmp_path / "cache")
    assert "nothing to do" in prefcache("score", "config.yaml").stderr


def test_rot_that_the_file_system_does_not_show_is_scored_again_after_verify(prefcache, folder):
    root = folder.parent.parent
    (caches,) = root.glob("cache/tiny-*")
    shard = next(caches.glob("*.parquet"))
    memo, facts = root / "cache" / f".verified-{caches.name}.json", shard.stat()
    flip(shard)
    os.utime(shard, ns=(facts.st_atime_ns, facts.st_mtime_ns))
    entry = artifact.unseal(next(caches.glob(f"{shard.name.rpartition('-')[0]}.json")))
    now = shard.stat()
    # As if only the bytes on the disk had changed, of which a file system keeps no time.
    stamp = [now.st_size, now.st_mtime_ns, now.st_ctime_ns, now.st_ino, entry["xxh3_128"]]
    memo.write_bytes(VerifiedMemo(known={shard.name: tuple(stamp)}).seal())
    assert "nothing to do" in prefcache("score", "config.yaml").stderr
    prefcache("sql", "from reference", "runs/tiny", code=4)
    prefcache("verify", caches, code=4)
    prefcache("score", "config.yaml")
    prefcache("sql", "from reference", "runs/tiny")


# -- where a cache is found ------------------------------------------------------------------------------------------


def set_places(folder: Path, **places: str) -> None:
    """Put these into the manifest, and leave out what else it says of where the cache is."""
    manifest = artifact.unseal(folder / "scored" / artifact.MANIFEST)
    kept = {name: value for name, value in manifest.items() if name not in ("cache_relative", "cache_absolute")}
    artifact.commit_bytes(folder / "scored" / artifact.MANIFEST, artifact.seal(kept | places))


def n_scored(prefcache, where: Path) -> int:
    (row,) = json.loads(prefcache("sql", "select count(*) as n from pairs where used", where, "--json").stdout)
    return row["n"]


@pytest.mark.parametrize("is_old", [False, True])
def test_a_cache_is_found_when_the_project_has_moved(prefcache, folder, tmp_path_factory, monkeypatch, is_old):
    relative = artifact.unseal(folder / "scored" / artifact.MANIFEST)["cache_relative"]
    # Of an earlier version, it says what the command said: cache/tiny-...
    set_places(folder, **({} if is_old else {"cache_relative": relative, "cache_absolute": "/gone"}))
    project = folder.parent.parent
    copy = Path(shutil.copytree(project, tmp_path_factory.mktemp("moved") / "project"))
    monkeypatch.chdir("/")
    shutil.rmtree(project / "cache")
    assert n_scored(prefcache, copy / "runs/tiny") == N
    assert (
        "is gone" in prefcache("sql", "from pairs", folder, code=4).stderr
        and (folder / "scored/manifest.json").exists()
    )


def test_a_cache_is_found_when_the_experiment_alone_has_moved(prefcache, folder, tmp_path_factory, monkeypatch):
    (caches,) = folder.parent.parent.glob("cache/tiny-*")
    moved = tmp_path_factory.mktemp("moved") / "x"
    shutil.move(folder, moved)
    set_places(moved, cache_relative=f"../../../cache/{caches.name}", cache_absolute=str(caches))
    monkeypatch.chdir("/")
    assert n_scored(prefcache, moved) == N


def test_a_runs_own_config_trains_it_from_anywhere(prefcache, folder, tmp_path, monkeypatch):
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path / "away")
    done = prefcache("train", folder / "trained/config.yaml", "--json")
    assert not json.loads(done.stdout)["changed"] and f"relative to {tmp_path}" in done.stderr
    assert list((tmp_path / "away").iterdir()) == []


# -- the quarantine --------------------------------------------------------------------------------------------------


def test_another_table_in_the_quarantines_place_is_named_by_export_and_doctor(prefcache, folder):
    pq.write_table(pa.table({"x": [1]}), folder / "prepared/quarantine.parquet")
    assert "quarantine.parquet has " in prefcache("export", "config.yaml", "--output", "a.csv", code=4).stderr
    found = json.loads(prefcache("doctor", "config.yaml", "--json").stdout)["findings"]
    (problem,) = (each for each in found if each["area"] == "data")
    assert problem["state"] == "problem" and "quarantine.parquet has " in problem["what"]


# -- answers onto files ----------------------------------------------------------------------------------------------

WRITERS = {
    "sql": ("sql|from runs|runs/tiny|--out", ".parquet"),
    "ask": ("ask|length-bias|config.yaml|--out", ".jsonl"),
    "report": ("report|config.yaml|--output", ".html"),
    "export": ("export|config.yaml|--output", ".parquet"),
    "export --for trl": ("export|config.yaml|--for|trl|--output", ".parquet"),
    "score": ("score|--input|more.jsonl|--model|{model}|--output", ".jsonl"),
    "from-trl": ("from-trl|dpo.yaml|--output", ".yaml"),
    "from-axolotl": ("from-axolotl|axolotl.yaml|--output", ".yaml"),
    "from-llamafactory": ("from-llamafactory|llamafactory.yaml|--output", ".yaml"),
}


@pytest.mark.parametrize("command", WRITERS)
def test_every_command_that_writes_asks_the_same_of_its_output(prefcache, folder, model, tmp_path, command):
    said, ending = WRITERS[command]
    line = said.format(model=model).split("|")
    write_pairs(tmp_path / "more.jsonl", 3)
    (tmp_path / "axolotl.yaml").write_text(foreign_files.AXOLOTL)
    (tmp_path / "llamafactory.yaml").write_text(foreign_files.LLAMAFACTORY)
    (tmp_path / "dpo.yaml").write_text(
        json.dumps({"model_name_or_path": "org/name", "dataset_name": str(tmp_path / "pairs.jsonl")})
    )
    owned = [f"runs/tiny/trained/new{ending}", f"runs/tiny/prepared/new{ending}", f"cache/.standalone/new{ending}"]
    os.link(tmp_path / "pairs.jsonl", tmp_path / f"linked{ending}")
    before = tree(tmp_path)
    for name in (*owned, f"linked{ending}"):
        said = prefcache(*line, name, "--force", code=2).stderr
        assert "error: " in said and name in said
    assert changed(before, tree(tmp_path)) == set()
    plain = tmp_path / f"plain{ending}"
    plain.write_text("mine")
    assert "--force" in prefcache(*line, plain, code=2).stderr
    assert plain.read_text() == "mine"
    prefcache(*line, plain, "--force")
    assert plain.read_bytes() != b"mine"


def test_a_report_is_renewed_without_force_where_it_belongs(prefcache, folder):
    (folder / "trained/report.html").write_text("an older one")
    prefcache("report", "config.yaml")
    assert (folder / "trained/report.html").read_text() != "an older one"
