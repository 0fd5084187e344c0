"""A cache in Azure's object store, as the emulator Azurite has it (npm install azurite; its azurite-blob on the PATH)."""

import base64
import hashlib
import hmac
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.stored.cache_maintenance import gc, verify
from prefcache.pipeline.stored.mirror import find_mirror
from prefcache.pipeline.stored.object_store import ObjectStore, open_store
from tests.helpers.caches import PAIRS, fill
from tests.helpers.machines import EXPECTED, LISTS, open_cache, token_lists, values

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("azurite-blob") is None, reason="azurite-blob is not on the PATH"),
]
# Every Azurite has this account and this key.
ACCOUNT = "devstoreaccount1"
KEY = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
URL = "az://team/refs"


@pytest.fixture
def endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        "--blobPort",
        f"{port}",
        "--inMemoryPersistence",
        "--skipApiVersionCheck",
        "--silent",
        "--disableTelemetry",
    ]
    server = subprocess.Popen(["azurite-blob", *options], cwd=tmp_path)
    try:
        url = f"http://127.0.0.1:{port}"
        create_container(url)
        open_store.cache_clear()
        monkeypatch.setenv("AZURE_STORAGE_USE_EMULATOR", "true")
        monkeypatch.setenv("AZURITE_BLOB_STORAGE_URL", url)
        monkeypatch.setenv("PREFCACHE_MIRROR", str(tmp_path / "mirror"))
        yield url
    finally:
        server.kill()
        server.wait()


def create_container(url: str) -> None:
    headers = {"x-ms-date": datetime.now(UTC).strftime("%a, %d %b %Y %H:%M:%S GMT"), "x-ms-version": "2021-08-06"}
    signed = "PUT" + "\n" * 12 + "".join(f"{name}:{value}\n" for name, value in sorted(headers.items()))
    signed += f"/{ACCOUNT}/{ACCOUNT}/team\nrestype:container"
    digest = hmac.new(base64.b64decode(KEY), signed.encode(), hashlib.sha256).digest()
    headers |= {
        "Authorization": f"SharedKey {ACCOUNT}:{base64.b64encode(digest).decode()}",
        "Content-Length": "0",
    }
    request = urllib.request.Request(f"{url}/{ACCOUNT}/team?restype=container", method="PUT", headers=headers)
    for attempt in range(100):
        try:
            urllib.request.urlopen(request)
            return
        except ConnectionError:
            time.sleep(0.1)
        except urllib.error.URLError:
            if attempt == 99:
                raise
            time.sleep(0.1)


def test_of_two_writers_the_first_wins_and_only_the_last_state_is_replaced(endpoint):
    store = ObjectStore(URL)
    assert [store.create("a", data) for data in (b"1", b"2", b"1")] == [True, False, True]
    _, etag = store.get_with_etag("a")
    assert [store.replace("a", data, etag) for data in (b"3", b"4")] == [True, False]
    assert store.get("a") == b"3" and store.head("b") is None
    with pytest.raises(FileNotFoundError):
        store.get("b")
    with pytest.raises(UsageError, match="there is no such bucket"):
        ObjectStore("az://nothing/refs").list_objects()


def test_a_cache_is_scored_read_elsewhere_merged_and_verified(endpoint, tmp_path, monkeypatch):
    fill(open_cache(URL), PAIRS)
    monkeypatch.setenv("PREFCACHE_MIRROR", str(tmp_path / "elsewhere"))
    there = open_cache(URL)
    assert values(there) == EXPECTED and token_lists(there) == LISTS
    assert gc(there.folder, 1 << 30).merged == 6 and verify(there.folder).rows == 24
    assert values(open_cache(URL)) == EXPECTED


def test_records_are_not_read_again(endpoint):
    fill(open_cache(URL), PAIRS)
    cache = open_cache(URL)
    store = find_mirror(cache.folder).store
    before = store.requests["get"]
    open_cache(URL)
    assert store.requests["get"] - before <= 3  # reference.json
