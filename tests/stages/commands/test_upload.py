"""upload and download: a machine without the data scores and trains what another one prepared."""

import json
import shutil

import pytest

from tests.helpers.project import invoke, write_pairs


@pytest.fixture
def there(prepared, s3, tmp_path):
    """A folder with the config and nothing else, and the URL of the data."""
    folder = tmp_path / "there"
    folder.mkdir()
    shutil.copy(prepared, folder)
    return folder


def upload(prefcache, config, s3, *arguments, **how):
    return prefcache("upload", config, "--set", f"cache={s3.url}", *arguments, **how)


def test_what_is_downloaded_is_what_was_prepared(prefcache, prepared, s3, tmp_path):
    said = json.loads(upload(prefcache, prepared, s3, "--json").stdout)
    assert said["sent"] > said["bytes"] > 0 and said["url"].startswith(f"{s3.url}/prepared/")
    again = json.loads(upload(prefcache, prepared, s3, "--json").stdout)
    assert again["url"] == said["url"] and again["sent"] < 5000  # the manifest, which is compared

    done = prefcache("download", said["url"], "--out", "there")
    assert done.stdout.startswith("there/prepared: 60 pairs, ")
    here = tmp_path / "runs/tiny/prepared"
    names = {path.name for path in here.iterdir() if path.suffix in (".arrow", ".parquet", ".json")}
    assert {path.name for path in (tmp_path / "there/prepared").iterdir()} == names
    assert all((here / name).read_bytes() == (tmp_path / "there/prepared" / name).read_bytes() for name in names)
    assert json.loads(prefcache("download", said["url"], "--out", "there", "--json").stdout)["received"] == 0


def test_a_machine_without_the_data_has_the_same_to_score(prefcache, prepared, there, s3):
    url = upload(prefcache, prepared, s3).stdout.splitlines()[-1]
    shutil.rmtree(prepared.parent / "runs")
    (prepared.parent / "pairs.jsonl").unlink()
    prefcache("download", url, "--out", there / "runs/tiny")
    done = invoke(there, "score", "config.yaml")
    assert "120 scored now" in done.stdout
    # The data is not there to be compared with: nothing to warn of.
    assert "warning" not in done.stderr


def test_other_data_is_not_replaced(prefcache, prepared, s3, tmp_path):
    url = upload(prefcache, prepared, s3).stdout.splitlines()[-1]
    write_pairs(tmp_path / "pairs.jsonl", 10)
    prefcache("prepare", prepared)
    manifest = (tmp_path / "runs/tiny/prepared/manifest.json").read_bytes()
    done = prefcache("download", url, "--out", "runs/tiny", code=2)
    assert "runs/tiny/prepared holds another preparation. Name another place" in done.stderr
    assert (tmp_path / "runs/tiny/prepared/manifest.json").read_bytes() == manifest


def test_a_cache_that_is_a_folder_takes_no_data(prefcache, prepared):
    done = prefcache("upload", prepared, code=2)
    assert "The cache is a folder (cache)" in done.stderr and "--set cache=s3://bucket/refs" in done.stderr


def test_what_names_no_prepared_data_is_refused(prefcache, s3):
    assert "does not name prepared data" in prefcache("download", s3.url, "--out", "there", code=2).stderr
    done = prefcache("download", f"{s3.url}/prepared/{'0' * 32}", "--out", "there", code=2)
    assert "prefcache upload CONFIG" in done.stderr
