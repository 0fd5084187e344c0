"""Prepared data that is sent to an object store and fetched from it: the same bytes, whole, or an error."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from prefcache.pipeline.errors import IntegrityError, ResourceError, UsageError
from prefcache.pipeline.stored import artifact, object_store
from prefcache.pipeline.stored.object_store import open_store
from prefcache.pipeline.stored.prepared import Prepared
from prefcache.pipeline.stored.prepared_store import fetch_prepared, send_prepared, split_url
from tests.helpers import examples
from tests.helpers.caches import flip
from tests.helpers.examples import pair
from tests.helpers.store_proxy import Fault, Rule, faults_in
from tests.helpers.stores import use_environment

ROWS = [pair(i, [1, i], [2, 3], [4, i]) for i in range(20)]


@pytest.fixture
def prepared(tmp_path: Path) -> Prepared:
    examples.prepared(tmp_path / "here/prepared", ROWS)
    return Prepared(tmp_path / "here/prepared")


@pytest.fixture
def sent(prepared: Prepared, s3) -> Prepared:
    send_prepared(prepared, open_store(s3.url))
    return prepared


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def in_store(s3, prepared: Prepared, file: str) -> str:
    assert f"prepared/{prepared.id}/{file}" in s3.objects()
    return f"prepared/{prepared.id}/{file}"


def test_what_is_fetched_is_what_was_prepared(prepared, s3, tmp_path):
    url = send_prepared(prepared, open_store(s3.url))
    assert split_url(url) == (s3.url, prepared.id)
    there = fetch_prepared(open_store(s3.url), prepared.id, tmp_path / "there/prepared")
    assert contents(there) == contents(prepared.folder)
    assert Prepared(there).id == prepared.id and Prepared(there).table().equals(prepared.table())


def test_nothing_is_transferred_twice(sent, s3, tmp_path):
    store = open_store(s3.url)
    fetch_prepared(store, sent.id, tmp_path / "there")
    before = store.bytes.copy(), store.requests["get"]
    assert send_prepared(sent, store) == f"{s3.url}/prepared/{sent.id}"
    fetch_prepared(store, sent.id, tmp_path / "there")
    manifest_bytes = (sent.folder / "manifest.json").stat().st_size
    # The manifest is written with If-None-Match, which says whether the one that is there is the same.
    assert store.bytes["sent"] == before[0]["sent"] + manifest_bytes
    assert store.bytes["received"] == before[0]["received"] + manifest_bytes


def test_an_interrupted_transfer_continues(sent, s3, tmp_path):
    store, there = open_store(s3.url), fetch_prepared(open_store(s3.url), sent.id, tmp_path / "there")
    shard = sent.manifest.shards[0]
    # As a process leaves them that was killed before the last file, on either side.
    for name in ("manifest.json", shard.file):
        (there / name).unlink()
        s3.remove(in_store(s3, sent, name))
    received, sent_bytes = store.bytes["received"], store.bytes["sent"]
    manifest_bytes = (sent.folder / "manifest.json").stat().st_size
    send_prepared(sent, store)
    assert store.bytes["sent"] == sent_bytes + shard.bytes + manifest_bytes
    fetch_prepared(store, sent.id, there)
    assert store.bytes["received"] == received + shard.bytes + manifest_bytes
    assert contents(there) == contents(sent.folder)


def test_damage_here_is_fetched_again(sent, s3, tmp_path):
    there = fetch_prepared(open_store(s3.url), sent.id, tmp_path / "there")
    flip(there / sent.manifest.shards[0].file)
    fetch_prepared(open_store(s3.url), sent.id, there)
    assert contents(there) == contents(sent.folder)


def test_damage_is_not_sent(prepared, s3):
    flip(prepared.folder / prepared.manifest.shards[0].file)
    with pytest.raises(IntegrityError, match="Nothing damaged is sent"):
        send_prepared(prepared, open_store(s3.url))
    assert not [name for name in s3.objects() if name.endswith("manifest.json")]


def test_prepared_data_that_was_replaced_meanwhile_is_not_sent_as_what_it_was(prepared, s3):
    manifest = prepared.folder / "manifest.json"
    manifest.write_bytes(manifest.read_bytes() + b"\n")
    with pytest.raises(IntegrityError, match="was prepared again meanwhile"):
        send_prepared(prepared, open_store(s3.url))


@pytest.mark.parametrize("what", ["shard", "short", "gone", "manifest"])
def test_other_bytes_in_the_store_are_refused(sent, s3, tmp_path, what):
    name = in_store(s3, sent, "manifest.json" if what == "manifest" else sent.manifest.shards[0].file)
    data = bytearray(s3.read(name))
    data[len(data) // 2] ^= 1
    s3.remove(name) if what == "gone" else s3.write(name, bytes(data[:-1] if what == "short" else data))
    said = {"short": "bytes were written|were written", "gone": "is missing"}.get(what, "checksum")
    with pytest.raises(IntegrityError, match=rf"{said}.*[Ss]end it again"):
        fetch_prepared(open_store(s3.url), sent.id, tmp_path / "there")
    assert not (tmp_path / "there/manifest.json").exists()


@pytest.mark.parametrize("file", ["../../evil.arrow", "/evil.arrow", "manifest.json", ".prefcache.claim", "a/b.arrow"])
def test_a_manifest_that_leads_elsewhere_is_refused(sent, s3, tmp_path, file):
    content = json.loads(s3.read(in_store(s3, sent, "manifest.json")))
    content["shards"][0]["file"] = file
    del content[artifact.SEAL]
    data = artifact.seal(content)
    forged = artifact.checksum_bytes(data)  # as the URL that somebody hands over says
    s3.write(f"prepared/{forged}/manifest.json", data)
    with pytest.raises(IntegrityError):
        fetch_prepared(open_store(s3.url), forged, tmp_path / "a/b/there")
    assert not list(tmp_path.rglob("*evil*"))


def test_what_leads_out_of_the_folder_is_not_written_through(sent, s3, tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    (there / sent.manifest.shards[0].file).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(IntegrityError, match="nothing outside of that folder"):
        fetch_prepared(open_store(s3.url), sent.id, there)
    assert not (tmp_path / "elsewhere").exists()


def test_a_folder_with_other_data_is_left_as_it_is(sent, s3, tmp_path):
    examples.prepared(tmp_path / "there", ROWS[:3])
    before = contents(tmp_path / "there")
    with pytest.raises(UsageError, match="holds another preparation"):
        fetch_prepared(open_store(s3.url), sent.id, tmp_path / "there")
    assert contents(tmp_path / "there") == before


def test_an_unknown_id_says_what_to_do(s3, tmp_path):
    with pytest.raises(UsageError, match="prefcache upload CONFIG"):
        fetch_prepared(open_store(s3.url), "0" * 32, tmp_path / "there")


@pytest.mark.parametrize(
    "url", ["s3://bucket/refs", "s3://bucket/prepared/abc", "s3://bucket/refs/prepared/", "runs/x"]
)
def test_only_the_url_of_prepared_data_is_one(url):
    with pytest.raises(UsageError):
        split_url(url)


def test_of_processes_that_fetch_at_once_one_does(sent, s3, tmp_path):
    code = (
        "import sys; from pathlib import Path; from prefcache.pipeline.stored.object_store import open_store;"
        "from prefcache.pipeline.stored.prepared_store import fetch_prepared;"
        "store = open_store(sys.argv[1]); fetch_prepared(store, sys.argv[2], Path(sys.argv[3])); print(store.bytes['received'])"
    )
    command = [sys.executable, "-c", code, s3.url, sent.id, str(tmp_path / "there")]
    fetching = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
    received = [int(process.communicate(timeout=60)[0]) for process in fetching]
    # One brings everything, the others nothing.
    assert sorted(received) == [0, 0, 0, sum(map(len, contents(sent.folder).values()))]
    assert contents(tmp_path / "there") == contents(sent.folder)


def test_a_large_file_is_sent_in_parts_and_is_one_object(s3, tmp_path):
    data = bytes(range(256)) * (17 << 12)  # 17 MiB, in parts of 16
    (tmp_path / "large.arrow").write_bytes(data)
    store = open_store(s3.url)
    before = store.requests["put"]
    store.put_file("large.arrow", tmp_path / "large.arrow")
    assert s3.read("large.arrow") == data
    assert store.requests["put"] == before + 4  # one begins, one for each part, one ends


@pytest.mark.parametrize("seed", range(3))
def test_a_faulty_network_changes_nothing(prepared, s3, tmp_path, monkeypatch, seed):
    monkeypatch.setattr(object_store, "_FIRST_PAUSE", 0.01)
    with s3.through_proxy(faults_in(0.2), seed=seed) as proxy:
        use_environment(s3.environment_of(proxy.url, tmp_path / "mirror"), monkeypatch)
        send_prepared(prepared, open_store(s3.url))
        fetch_prepared(open_store(s3.url), prepared.id, tmp_path / "there")
        assert proxy.injected.total()
    assert contents(tmp_path / "there") == contents(prepared.folder)


@pytest.mark.parametrize("fault", [Fault.FLIPPED_BIT, Fault.SHORT_BODY, Fault.WRONG_LENGTH, Fault.SHORT_LISTING])
def test_wrong_answers_of_the_store_are_refused_or_asked_for_again(sent, s3, tmp_path, monkeypatch, fault):
    monkeypatch.setattr(object_store, "_FIRST_PAUSE", 0.01)
    with s3.through_proxy([Rule(fault)]) as proxy:
        use_environment(s3.environment_of(proxy.url, tmp_path / "mirror"), monkeypatch)
        with pytest.raises((IntegrityError, ResourceError)):
            fetch_prepared(open_store(s3.url), sent.id, tmp_path / "there")
    assert not (tmp_path / "there/manifest.json").exists()
    # Nothing wrong was kept: the rest comes when the store answers right.
    use_environment(s3.environment, monkeypatch)
    fetch_prepared(open_store(s3.url), sent.id, tmp_path / "there")
    assert contents(tmp_path / "there") == contents(sent.folder)
