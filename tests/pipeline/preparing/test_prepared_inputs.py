"""score and train say that data or settings are no longer those that were prepared, and read nothing that was not touched."""

import os
from pathlib import Path

import pytest

from prefcache.pipeline import config_file
from prefcache.pipeline.preparing import prepared_inputs
from prefcache.pipeline.stored import artifact
from tests.helpers.project import options, write_pairs


@pytest.fixture
def explain(prepared, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda *settings: prepared_inputs.explain_if_stale(config_file.load(prepared, settings))


def touch(path: Path) -> None:
    """Newer than the preparation, whatever the resolution of the clock."""
    later = (path.parent / "runs/tiny/prepared/manifest.json").stat().st_mtime_ns + 10**9
    os.utime(path, ns=(later, later))


def test_nothing_is_said_of_what_is_the_same(explain, tmp_path):
    assert explain() is None
    assert explain("prepare.workers=1", "train.beta=0.3", "score.dtype=bfloat16") is None
    touch(tmp_path / "pairs.jsonl")
    assert explain() is None  # other times, the same bytes
    (tmp_path / "pairs.jsonl").unlink()
    assert explain() is None  # what is prepared needs it no more
    assert explain("out=elsewhere") is None


def test_changed_data_and_settings_are_named(explain, tmp_path):
    assert explain("prepare.max_length=99") == "runs/tiny/prepared is out of date: config.max_length 2048 (now 99)"
    write_pairs(tmp_path / "more.jsonl", 3)
    assert "pairs.jsonl was left out; data.0" not in explain("prepare.data=more.jsonl")
    assert "more.jsonl was added; pairs.jsonl was left out" in explain("prepare.data=more.jsonl")
    write_pairs(tmp_path / "pairs.jsonl", 3)
    touch(tmp_path / "pairs.jsonl")
    assert explain() == "runs/tiny/prepared is out of date: pairs.jsonl has changed"


def test_data_that_was_not_touched_since_is_not_read(explain, tmp_path, monkeypatch):
    read: list[Path] = []
    monkeypatch.setattr(artifact, "checksum", lambda path: read.append(path) or "0")
    later = (tmp_path / "pairs.jsonl").stat().st_ctime_ns + 10**9
    os.utime(tmp_path / "runs/tiny/prepared/manifest.json", ns=(later, later))
    assert explain() is None and not read
    touch(tmp_path / "pairs.jsonl")
    assert "pairs.jsonl has changed" in explain() and read == [Path("pairs.jsonl")]


def test_score_and_train_warn_and_go_on(prefcache, scored):
    said = "warning: runs/tiny/prepared is out of date: config.held_out 0.2 (now 0.3). It is used as it is; prefcache prepare CONFIG makes it again"
    for arguments in (["score"], ["score", "--dry-run"], ["train", "--quiet"]):
        done = prefcache(*arguments, scored, *options("prepare.held_out=0.3", "train.epochs=0.3", "train.samples=0"))
        assert done.stderr.count(said) == 1
        assert "warning" not in prefcache(*arguments, scored, *options("train.epochs=0.3", "train.samples=0")).stderr
