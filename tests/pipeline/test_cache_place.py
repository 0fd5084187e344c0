"""Where a cache is: a folder, or a URL with a mirror on this machine."""

from pathlib import Path

import pytest

from prefcache.pipeline.cache_place import explain_mirror, is_url, local_folder, parse_url, spell_uniformly
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.stored import artifact


@pytest.mark.parametrize("place", ["cache", "/mnt/cache", "a:b", "./s3:/bucket", "s3", "file:///mnt/cache"])
def test_a_folder_is_used_as_it_is(place):
    assert not is_url(place)
    assert local_folder(place) == Path(place.removeprefix("file://"))


@pytest.mark.parametrize("url", ["s3://bucket/refs", "gs://bucket", "az://container/a/b"])
def test_a_url_has_a_mirror_of_its_own(url, monkeypatch, tmp_path):
    monkeypatch.setenv("PREFCACHE_MIRROR", str(tmp_path))
    assert is_url(url) and parse_url(f"{url}/") == url
    assert local_folder(url).parent == tmp_path and local_folder(url) == local_folder(f"{url}//")
    assert local_folder(url) != local_folder(f"{url}x")


@pytest.mark.parametrize(
    ("place", "recorded"),
    [("s3://bucket//refs/", "s3://bucket/refs"), ("cache/", "cache"), ("file:///mnt/cache", "/mnt/cache")],
)
def test_a_place_is_recorded_alike_however_it_is_written(place, recorded):
    assert spell_uniformly(place) == spell_uniformly(recorded) == recorded


@pytest.mark.parametrize(
    ("url", "variable"),
    [
        ("s3://bucket/refs", "AWS_ENDPOINT_URL"),
        ("s3://bucket/refs", "AWS_ENDPOINT_URL_S3"),
        ("az://container/refs", "AZURE_STORAGE_ACCOUNT_NAME"),
    ],
)
def test_one_name_at_two_endpoints_or_accounts_has_two_mirrors(monkeypatch, url, variable):
    monkeypatch.delenv(variable, raising=False)
    one = local_folder(url)
    monkeypatch.setenv(variable, "another")
    assert local_folder(url) != one


def test_mirrors_lie_in_the_users_folder_for_caches(monkeypatch):
    monkeypatch.delenv("PREFCACHE_MIRROR", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    assert local_folder("s3://b/x").parent == Path("/home/me/.cache/prefcache")
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast")
    assert local_folder("s3://b/x").parent == Path("/fast/prefcache")


def test_errors_about_the_disk_of_a_mirror_name_its_place_and_the_variable_that_moves_it(monkeypatch, tmp_path):
    (tmp_path / "mirror").write_text("a file where the folder should be")
    monkeypatch.setenv("PREFCACHE_MIRROR", str(tmp_path / "mirror"))
    with pytest.raises(UsageError) as raised:
        artifact.commit_bytes(local_folder("s3://bucket/refs") / "store.json", b"")
    assert str(raised.value).endswith(f" in {tmp_path}/mirror; PREFCACHE_MIRROR can name another place for it.")
    # What else lies there, such as an experiment, does not belong to it.
    assert not explain_mirror(tmp_path / "mirror/runs/x") and not explain_mirror(tmp_path / "cache/refs-0123456789ab/x")


@pytest.mark.parametrize("place", ["s3:/bucket/refs", "s3:bucket/refs", "GS:/bucket"])
def test_a_url_with_a_slash_too_few_makes_no_folder(place):
    with pytest.raises(UsageError, match=r"lacks a slash. Expected s3://bucket/path"):
        local_folder(place)


@pytest.mark.parametrize(
    ("url", "says"),
    [
        ("s3://key:secret@bucket/x", "contains credentials"),
        ("s3://key:half/other-secret@bucket/x", "contains credentials"),  # a slash is one of base64's characters
        ("s3://key:[secret@bucket/x", "contains credentials"),
        ("s3://", "does not name a place"),
        ("s3://localhost:9000/bucket", "does not name a place"),
        ("ftp://host/x", r"Expected s3://bucket/path, gs://"),
        ("https://bucket.s3.amazonaws.com/x", "does not name a place"),
        ("s3://bucket/x?versionId=secret", "has something after its path.*Leave it out"),
        ("s3://bucket/x#secret", "has something after its path"),
        ("s3://bucket/a/../b", r"has \.\. in its path"),
        ("s3://[bad/x", "is not a URL"),
    ],
)
def test_what_is_not_the_url_of_a_place_is_refused_and_no_secret_is_repeated(url, says):
    with pytest.raises(UsageError, match=says) as refused:
        parse_url(url)
    assert "secret" not in str(refused.value)
