"""Whatever the network and the server do: the right result or a clear error, and no credentials in it."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from prefcache.pipeline.errors import PrefcacheError, ResourceError, UsageError
from prefcache.pipeline.stored import object_store
from prefcache.pipeline.stored.object_store import ObjectStore
from tests.helpers.store_proxy import Fault, Rule, StoreProxy, faults_in
from tests.helpers.stores import KEY_ID, SECRET, Bucket

# Faults that a client notices.
NOTICED = [
    Fault.ERROR,
    Fault.LOST_ANSWER,
    Fault.DROPPED,
    Fault.DROPPED_ANSWER,
    Fault.CUT_BODY,
    Fault.WRONG_LENGTH,
]
DATA = bytes(range(256)) * 40
READS = ["read", "read_range", "list_all", "list_folders"]
WRITES = ["put", "create", "create_second", "replace", "delete"]


@pytest.fixture
def proxy(s3: Bucket, monkeypatch: pytest.MonkeyPatch) -> Iterator[StoreProxy]:
    """A proxy between this process and the server, and short pauses."""
    monkeypatch.setattr(object_store, "_FIRST_PAUSE", 0.01)
    monkeypatch.setattr(object_store, "_TRIES_OF_OBSTORE", 2)
    with s3.through_proxy() as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        yield proxy


@pytest.fixture
def store(s3: Bucket, proxy: StoreProxy) -> ObjectStore:
    return ObjectStore(s3.url)


@contextmanager
def clear_error(*kinds: type[PrefcacheError], match: str = r"s3://test-\w+/refs") -> Iterator[None]:
    """Expect a clear error without credentials in it, or in the errors that led to it."""
    with pytest.raises(kinds, match=match) as caught:
        yield
    error: BaseException | None = caught.value
    while error:
        assert not any(secret in str(error) for secret in (SECRET, KEY_ID, "Signature=", "Credential="))
        error = error.__cause__
    assert len(str(caught.value)) < 700 and "\n" not in str(caught.value)


def operations(store: ObjectStore, s3: Bucket) -> dict[str, Callable[[], None]]:
    """Each operation, with a check of what it returns and of what it did."""
    for name in ("it", "old", "gone", "folder/it"):
        s3.write(name, DATA)
    etag = store.get_with_etag("old")[1]
    assert etag

    def read() -> None:
        assert store.get("it") == DATA

    def read_range() -> None:
        assert store.get_range("it", 100, 1000) == DATA[100:1000]

    def list_all() -> None:
        assert {each.name: each.size for each in store.list_objects()} == s3.objects()

    def list_folders() -> None:
        assert store.list_folders() == ["folder"]

    def put() -> None:
        store.put("new", DATA)
        assert s3.read("new") == DATA

    def create() -> None:
        assert store.create("created", DATA)
        assert s3.read("created") == DATA

    def create_second() -> None:
        assert not store.create("it", b"another")
        assert s3.read("it") == DATA

    def replace() -> None:
        assert store.replace("old", b"changed", etag)
        assert s3.read("old") == b"changed"

    def delete() -> None:
        store.delete("gone")
        assert "gone" not in s3.objects()

    every = (read, read_range, list_all, list_folders, put, create, create_second, replace, delete)
    return {each.__name__: each for each in every}


@pytest.mark.parametrize("fault", [*NOTICED, Fault.DRIBBLING, Fault.HANGING], ids=lambda fault: fault.name)
@pytest.mark.parametrize("operation", READS + WRITES)
def test_a_fault_that_passes_changes_no_result(store, s3, proxy, operation, fault):
    act = operations(store, s3)[operation]
    proxy.rules = [Rule(fault, times=1, seconds=0.2)]
    act()
    assert proxy.injected[fault] == 1


@pytest.mark.parametrize("fault", NOTICED, ids=lambda fault: fault.name)
@pytest.mark.parametrize("operation", READS)
def test_reading_through_a_fault_that_stays_is_a_clear_error(store, s3, proxy, operation, fault):
    act = operations(store, s3)[operation]
    proxy.rules = [Rule(fault)]
    with clear_error(ResourceError, match="run the same command again"):
        act()


@pytest.mark.parametrize("fault", NOTICED, ids=lambda fault: fault.name)
@pytest.mark.parametrize("operation", WRITES)
def test_writing_through_a_fault_that_stays_is_a_clear_error_or_is_done(store, s3, proxy, operation, fault):
    act = operations(store, s3)[operation]
    before = s3.objects()
    proxy.rules = [Rule(fault)]
    is_heard = fault in (Fault.CUT_BODY, Fault.WRONG_LENGTH) and operation in ("put", "create", "replace")
    if is_heard:  # the answer to a write has no body, and its status comes
        act()
        return
    with clear_error(ResourceError):
        act()
    is_carried_out = fault not in (Fault.ERROR, Fault.DROPPED) and operation != "create_second"
    assert (s3.objects() != before) == is_carried_out


@pytest.mark.parametrize("fault", [Fault.FORBIDDEN, Fault.REFUSED_SIGNATURE], ids=lambda fault: fault.name)
@pytest.mark.parametrize("operation", READS + WRITES)
def test_a_refusal_is_the_users_to_solve_and_is_not_repeated(store, s3, proxy, operation, fault):
    act = operations(store, s3)[operation]
    proxy.reset()
    proxy.rules = [Rule(fault)]
    with clear_error(UsageError, match="credentials.*environment"):
        act()
    assert proxy.requests.total() == 1


def test_a_refusal_in_the_middle_of_a_listing(store, s3, proxy):
    # Credentials that expire while 1,001 objects are listed, on two pages.
    for _ in ObjectStore(s3.url).parallel(lambda n: store.put(f"{n:04}", b""), range(1001)):
        pass
    proxy.rules = [Rule(Fault.FORBIDDEN, when=lambda request: "continuation-token" in request.path)]
    with clear_error(UsageError):
        store.list_objects()


@pytest.mark.parametrize("fault", [Fault.CUT_LISTING, Fault.SHORT_BODY], ids=lambda fault: fault.name)
def test_half_of_a_listing_is_not_taken_for_a_listing(store, s3, proxy, fault):
    act = operations(store, s3)
    proxy.rules = [Rule(fault, times=2)]
    act["list_all"]()
    act["list_folders"]()
    proxy.rules = [Rule(fault)]
    for operation in ("list_all", "list_folders"):
        with clear_error(ResourceError):
            act[operation]()


@pytest.mark.parametrize("fault", [Fault.SHORT_BODY, Fault.WRONG_LENGTH], ids=lambda fault: fault.name)
def test_a_range_of_another_length_is_not_taken(store, s3, proxy, fault):
    act = operations(store, s3)["read_range"]
    proxy.rules = [Rule(fault, times=1)]
    act()
    proxy.rules = [Rule(fault)]
    with clear_error(ResourceError):
        act()


def test_a_server_that_never_answers_is_given_up(s3, proxy, monkeypatch):
    monkeypatch.setattr(object_store, "_SECONDS_WITHOUT_BYTES", 0.3)
    store = ObjectStore(s3.url)
    proxy.rules = [Rule(Fault.HANGING, seconds=20)]
    for act in (
        lambda: store.get("it"),
        store.list_objects,
        lambda: store.put("it", b""),
        lambda: store.create("it", b""),
    ):
        began = time.monotonic()
        with clear_error(ResourceError):
            act()
        assert time.monotonic() - began < 10


def test_a_slow_line_is_not_a_fault(s3, proxy, monkeypatch):
    # 60 kB at 30 kB/s take 2 seconds; 0.5 seconds without a byte would be a fault.
    monkeypatch.setattr(object_store, "_SECONDS_WITHOUT_BYTES", 0.5)
    store, data = ObjectStore(s3.url), os.urandom(60_000)
    s3.write("it", data)
    proxy.rules = [Rule(Fault.DRIBBLING, seconds=2)]
    assert store.get("it") == data
    assert proxy.requests["get"] == 1


@pytest.mark.parametrize("fault", NOTICED[:4], ids=lambda fault: fault.name)
@pytest.mark.parametrize("step", ["uploads=", "partNumber=2", "uploadId="])
def test_a_large_object_is_whole_after_a_fault_in_any_of_its_requests(store, s3, proxy, step, fault):
    data = os.urandom(17 << 20)
    # What completes an upload has its id and no part.
    is_step = lambda path: step in path and ("partNumber" in path) == ("partNumber" in step)  # noqa: E731
    proxy.rules = [Rule(fault, times=1, when=lambda request: is_step(request.path + "="))]
    store.put("large", data)
    assert s3.read("large") == data and proxy.injected[fault] == 1


def test_one_creates_though_every_answer_of_the_first_try_is_lost(s3, proxy):
    lost: dict[str, int] = {}

    def is_first(request):
        lost[request.path] = lost.get(request.path, 0) + 1
        return request.kind == "put" and lost[request.path] <= 16

    proxy.rules = [Rule(Fault.LOST_ANSWER, share=0.5, when=is_first), Rule(Fault.DROPPED_ANSWER, when=is_first)]
    stores = [ObjectStore(s3.url) for _ in range(16)]
    for n in range(5):
        won = [False] * 16
        threads = [threading.Thread(target=_create, args=(stores[i], n, i, won)) for i in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert won.count(True) == 1 and s3.read(f"race/{n}") == b"%d" % won.index(True)


def _create(store: ObjectStore, n: int, i: int, won: list[bool]) -> None:
    won[i] = store.create(f"race/{n}", b"%d" % i)


def test_a_bucket_that_changes_while_it_is_read(store, s3, proxy):
    # An object is whole as of one moment, though the connection breaks and it is replaced before the second try.
    old, new = b"old" * 200_000, b"new" * 200_000
    s3.write("it", old)

    def replace(request) -> None:
        if proxy.injected.total() and s3.read("it") == old:
            s3.write("it", new)

    proxy.rules = [Rule(Fault.CUT_BODY, times=1, when=lambda request: request.kind == "get")]
    proxy.on_request = replace
    assert store.get("it") in (old, new)
    assert proxy.injected[Fault.CUT_BODY] == 1

    # One that is deleted between the listing and the reading is missing; one in its place is another.
    proxy.on_request = None
    etag = store.list_objects()[0].etag
    s3.write("it", old)
    assert store.get_with_etag("it") != (new, etag)
    s3.remove("it")
    with pytest.raises(FileNotFoundError):
        store.get("it")


def test_thousands_of_requests_of_which_five_in_a_hundred_fail(store, s3, proxy):
    proxy.rules = faults_in(0.05)

    def use(n: int) -> None:
        data = b"%d" % n * 50
        store.put(f"put/{n}", data)
        assert store.create(f"created/{n}", data)
        assert not store.create(f"created/{n}", b"another")
        assert store.get(f"put/{n}") == data and store.get_range(f"created/{n}", 1, 9) == data[1:9]
        assert {each.name for each in store.list_objects(f"put/{n}")} <= {f"put/{n}"}
        store.delete(f"put/{n}")

    assert len(list(store.parallel(use, range(300)))) == 300
    assert {each.name for each in store.list_objects()} == {f"created/{n}" for n in range(300)}
    proxy.rules = []
    assert all(s3.objects()[f"created/{n}"] == len(b"%d" % n * 50) for n in (0, 150, 299))
    assert proxy.requests.total() > 2400 and 0.03 < proxy.injected.total() / proxy.requests.total() < 0.07


def test_an_endpoint_where_nobody_listens_is_named_with_what_the_system_said(proxy, s3, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    said = rf"in 4 tries \(GET http://127.0.0.1:1/{s3.name}/refs/it: Connection refused\)\. Check the network"
    with clear_error(ResourceError, match=said):
        ObjectStore(s3.url).get("it")
