"""Every method of an object store, against a real S3 server over HTTP."""

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime

import pytest

from prefcache.pipeline.errors import IntegrityError, UsageError
from prefcache.pipeline.stored.object_store import ObjectStore, _explain_permanent, open_store, refuse_escape
from tests.helpers.project import ROOT
from tests.helpers.stores import KEY_ID, SECRET, Bucket


@pytest.fixture
def store(s3: Bucket) -> ObjectStore:
    return ObjectStore(s3.url)


def test_what_is_put_is_what_another_client_reads(store, s3):
    for n_bytes in (0, 1, 100_000, 12_000_000):
        data = os.urandom(n_bytes)
        store.put(f"folder/{n_bytes}", data)
        assert s3.read(f"folder/{n_bytes}") == data == store.get(f"folder/{n_bytes}")
    assert s3.objects() == {"folder/0": 0, "folder/1": 1, "folder/100000": 100_000, "folder/12000000": 12_000_000}
    assert store.bytes == {"sent": 12_100_001, "received": 12_100_001}


def test_a_view_of_memory_can_be_put(store, s3):
    store.put("it", memoryview(b"0123456789")[2:5])
    assert s3.read("it") == b"234"


def test_a_large_file_is_put_in_parts(store, s3, tmp_path):
    data = os.urandom(33 << 20)
    (tmp_path / "large").write_bytes(data)
    store.put_file("large", tmp_path / "large")
    store.put("large too", data)
    assert s3.read("large") == data == s3.read("large too")
    # Each begins, has parts of 16, 16 and 1 MiB, and is completed.
    assert store.requests["put"] == 10 and store.bytes["sent"] == 66 << 20


def test_names_with_all_the_characters_that_prefcache_writes(store, s3):
    names = ["Qwen--Qwen2.5-0.5B@a1b2/chunk.json", "a b/c+d=e,f~g", "ä/ü.json", "signed-0a.json.sig"]
    for name in names:
        store.put(name, name.encode())
    assert sorted(each.name for each in store.list_objects()) == sorted(names) == sorted(s3.objects())
    assert [store.get(name).decode() for name in names] == names


def test_a_listing_has_all_objects_below_a_folder_on_all_its_pages(store, s3):
    for _ in store.parallel(lambda n: store.put(f"many/{n:04}", b"x" * (n % 7)), range(1100)):
        pass
    store.put("many-others/1", b"")
    store.put("other", b"")
    store.requests.clear()
    listed = store.list_objects("many/")
    assert [(each.name, each.size) for each in listed] == [(f"many/{n:04}", n % 7) for n in range(1100)]
    assert len(store.list_objects()) == 1102
    assert store.list_folders() == ["many", "many-others"]
    # 1,100 objects are 2 pages of at most 1,000; the folders 1. The store's own count is what a provider's bill says.
    assert store.requests["list"] == 2 + 2 + 1 == s3.server_requests["list"]


def test_an_object_is_described_by_its_size_etag_and_time(store, s3):
    s3.write("it", b"12345")
    described = store.head("it")
    assert described == store.list_objects()[0]
    assert (described.name, described.size) == ("it", 5)
    assert abs((datetime.now(UTC) - described.modified).total_seconds()) < 60
    assert described.etag == store.get_with_etag("it")[1] is not None
    assert store.head("another") is None


def test_a_range_is_read_without_the_rest(store, s3):
    s3.write("it", bytes(range(256)) * 1000)
    assert store.get_range("it", 255, 258) == bytes([255, 0, 1])
    assert store.bytes["received"] == 3
    with pytest.raises(Exception, match="it"):
        store.get_range("it", 255_999, 256_001)


def test_a_missing_object_is_a_missing_file(store):
    for read in (store.get, store.get_with_etag, lambda name: store.get_range(name, 0, 1)):
        with pytest.raises(FileNotFoundError, match="folder/it"):
            read("folder/it")
    store.delete("folder/it")


def test_deleting_removes_only_that_object(store, s3):
    for name in ("a", "a/b", "ab"):
        store.put(name, b"")
    store.delete("a")
    assert set(s3.objects()) == {"a/b", "ab"}


def test_create_never_overwrites(store, s3):
    assert store.create("it", b"first")
    assert not store.create("it", b"second")
    assert store.create("it", b"first")  # these bytes are there
    assert s3.read("it") == b"first"


def test_replace_only_replaces_what_it_saw(store, s3):
    store.put("it", b"1")
    etag = store.get_with_etag("it")[1]
    assert store.replace("it", b"2", etag)
    assert not store.replace("it", b"3", etag)
    assert not store.replace("another", b"3", etag)
    assert s3.read("it") == b"2" and set(s3.objects()) == {"it"}


def test_of_sixteen_threads_one_creates_an_object(store, s3):
    with ThreadPoolExecutor(16) as pool:
        for n in range(20):
            won = list(pool.map(lambda i, n=n: store.create(f"race/{n}", b"%d" % i), range(16)))
            assert won.count(True) == 1 and s3.read(f"race/{n}") == b"%d" % won.index(True)


def test_of_sixteen_threads_one_replaces_an_object(store, s3):
    with ThreadPoolExecutor(16) as pool:
        for n in range(20):
            store.put(f"race/{n}", b"old")
            etag = store.get_with_etag(f"race/{n}")[1]
            won = list(pool.map(lambda i, n=n, etag=etag: store.replace(f"race/{n}", b"%d" % i, etag), range(16)))
            assert won.count(True) == 1 and s3.read(f"race/{n}") == b"%d" % won.index(True)


def _create_all(url: str, i: int, ready, won) -> None:
    store = ObjectStore(url)
    ready.wait()
    won.put((i, [store.create(f"race/{n}", b"%d" % i) for n in range(20)]))


def test_of_eight_processes_one_creates_an_object(s3):
    context = multiprocessing.get_context("spawn")
    ready, won = context.Barrier(8), context.Queue()
    processes = [context.Process(target=_create_all, args=(s3.url, i, ready, won)) for i in range(8)]
    for process in processes:
        process.start()
    by_process = dict(won.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    for n in range(20):
        (winner,) = [i for i, results in by_process.items() if results[n]]
        assert s3.read(f"race/{n}") == b"%d" % winner


def test_parallel_keeps_the_order_and_passes_on_an_error(store):
    assert list(store.parallel(lambda n: n * n, range(100))) == [n * n for n in range(100)]
    with pytest.raises(FileNotFoundError):
        list(store.parallel(store.get, ["a", "b"]))


def test_in_a_fork_the_error_says_to_spawn(store):
    # obstore itself would wait for ever.
    store.put("parent", b"1")
    if child := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        return
    code = 1
    try:
        with pytest.raises(UsageError, match="spawn"):
            store.get("parent")
        code = 0
    finally:
        os._exit(code)


def test_a_fork_of_a_process_that_made_no_request_can_make_them(s3):
    code = (
        "import os\n"
        "from prefcache.pipeline.stored.object_store import ObjectStore\n"
        f"store = ObjectStore({s3.url!r})\n"
        "if os.fork(): os.wait()\n"
        "store.put(f'{os.getpid()}', b'')\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=60)
    assert len(s3.objects()) == 2


def test_a_url_has_one_store_in_a_process(s3):
    assert open_store(s3.url) is open_store(s3.url)


def test_a_bucket_that_does_not_exist_is_named(s3):
    store = ObjectStore("s3://no-such-bucket-of-ours/refs")
    for act in (store.list_objects, lambda: store.get("it"), lambda: store.create("it", b"")):
        with pytest.raises(UsageError, match=r"no-such-bucket-of-ours.*no such bucket"):
            act()


def test_no_credentials_in_what_is_shown(store):
    shown = f"{store!r} {store} {vars(store)}"
    assert KEY_ID not in shown and SECRET not in shown


@pytest.mark.parametrize(
    "name", ["../it", "a/../../it", "/etc/passwd", "a//b", "", ".", "a/..", "a\0b", "a\nb", "a\\b", "x" * 300]
)
def test_names_that_could_lead_elsewhere_are_refused(name):
    with pytest.raises(IntegrityError, match="Remove it"):
        refuse_escape(name)


@pytest.mark.parametrize("endpoint", ["127.0.0.1:9000", "minio", "http://", "https://a b", "s3://bucket"])
def test_an_endpoint_that_is_no_address_is_refused(endpoint, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", endpoint)
    with pytest.raises(UsageError, match="Expected one with http:// or https://"):
        ObjectStore("s3://bucket/refs")


@pytest.mark.parametrize(
    "message",
    [
        "Generic S3 error: Error performing PUT http://169.254.169.254/latest/api/token in 3ms - HTTP error: error sending request",
        "Error performing PUT http://169.254.169.254/latest/api/token - Server returned non-2xx status code: 403 Forbidden",
    ],
)
def test_a_machine_without_credentials_is_told_that_it_has_none(message):
    # What obstore says if nothing answers where an instance's role would be.
    assert "no credentials were found" in str(_explain_permanent(message))


def test_without_obstore_the_error_says_what_to_install(s3):
    code = (
        "import sys; sys.modules['obstore'] = None\n"
        "from prefcache.pipeline.errors import UsageError\n"
        "from prefcache.pipeline.stored.object_store import ObjectStore\n"
        "try: ObjectStore('s3://bucket/refs')\n"
        "except UsageError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "pip install 'prefcache[stores]'" in done.stdout, done.stderr


@pytest.fixture(autouse=True)
def _no_warning_about_forks():
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        yield
