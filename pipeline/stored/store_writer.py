"""What a scorer does to an object store: it claims chunks there, and sends finished shards while it computes the next one.

A claim is an object that one scorer creates and touches every few seconds. If it does not change for a while, its scorer is
gone, and another one takes it over. Clocks are not compared: each scorer measures that time by its own. As on a disk, claims
only spare work; what keeps the cache right is that the first record of a chunk wins.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, wait
from pathlib import Path

from prefcache.pipeline.daemon_threads import call_in_thread
from prefcache.pipeline.errors import UsageError
from prefcache.pipeline.stored.mirror import Mirror
from prefcache.pipeline.stored.object_store import ObjectStore
from prefcache.pipeline.stored.records import ShardRecord

CLAIMS = "claims"
_BEAT_SECONDS = 20.0
_STALE_SECONDS = 90.0  # without a beat
_POLL_SECONDS = 1.0
_SENT_AT_ONCE = 2
# How long a command that may be about to end waits for a store that does not answer.
_PATIENCE_SECONDS = 0.8


class StoreClaims:
    """The claims of this process in a folder of a store."""

    def __init__(self, store: ObjectStore, prefix: str) -> None:
        self._store, self._prefix, self._id = store, prefix, uuid.uuid4().hex
        self._held = set[str]()
        self._seen: dict[str, tuple[str | None, float]] = {}  # of others: ETag, and when it was first seen
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._heart: threading.Thread | None = None

    def try_claim(self, name: str) -> bool:
        """Claim a chunk; False if another scorer has it and is alive."""
        content = self._describe()
        if self._store.create(self._path(name), content):
            self._hold(name)
            return True
        try:
            other, etag = self._store.get_with_etag(self._path(name))
        except FileNotFoundError:
            return False  # given up at this moment
        return etag is not None and self._is_dead(name, other, etag) and self._take_over(name, etag)

    def claim_if_silent(self, name: str) -> bool:
        """Claim what nobody has touched for a while, by the clock of the store, so that one look is enough."""
        probe = f"probe-{self._id}"
        held = self._store.head(self._path(name))
        self._store.create(self._path(probe), b"")
        now = self._store.head(self._path(probe))
        self._store.delete(self._path(probe))
        if held is None or held.etag is None or now is None:
            return False
        return (now.modified - held.modified).total_seconds() > _STALE_SECONDS and self._take_over(name, held.etag)

    def _take_over(self, name: str, etag: str) -> bool:
        is_mine = self._store.replace(self._path(name), self._describe(), etag)
        if is_mine:
            self._hold(name)
        return is_mine

    def release(self, name: str) -> None:
        """Give a claim up. If the store does not answer in time, the deletion continues, and in any case the claim becomes stale."""
        with self._lock:
            self._held.discard(name)
        deletion = call_in_thread(self._store.delete, self._path(name))
        for done in wait([deletion], _PATIENCE_SECONDS).done:
            done.result()

    def close(self) -> None:
        self._ended.set()

    def _hold(self, name: str) -> None:
        with self._lock:
            self._held.add(name)
            if self._heart is None:
                self._heart = threading.Thread(target=self._beat, daemon=True, name="prefcache-claims")
                self._heart.start()

    def _beat(self) -> None:
        """Touch the claims, so that others see that this scorer is alive."""
        while not self._ended.wait(_BEAT_SECONDS):
            with self._lock:
                if not self._held:
                    self._heart = None
                    return
                names = list(self._held)
            for name in names:
                # A missed beat, or a claim that another has taken over, costs at most double work.
                with contextlib.suppress(Exception):
                    found = self._store.head(self._path(name))
                    if found is not None and found.etag is not None and name in self._held:
                        self._store.replace(self._path(name), self._describe(), found.etag)

    def _is_dead(self, name: str, content: bytes, etag: str) -> bool:
        """Whether a claim's scorer is gone: its process has ended, or it has not touched the claim for a while."""
        with contextlib.suppress(ValueError, KeyError, TypeError):
            holder = json.loads(content)
            if (
                holder["host"] == socket.gethostname()
                and holder["boot"] == _find_boot()
                and Path("/proc/self").exists()
                and not Path(f"/proc/{int(holder['pid'])}").exists()
            ):
                return True
        # Its number may be another process's by now, or its claim may be left from an interrupted call.
        known, since = self._seen.get(name, (None, 0.0))
        if known != etag:
            self._seen[name] = etag, time.monotonic()
            return False
        return time.monotonic() - since > _STALE_SECONDS

    def _describe(self) -> bytes:
        facts = {
            "id": self._id,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "boot": _find_boot(),
            "time": time.time(),
        }
        return json.dumps(facts).encode()

    def _path(self, name: str) -> str:
        return f"{self._prefix}/{CLAIMS}/{name}"


class StoreWriter:
    """Claims chunks of a reference in a store and sends its shards there."""

    def __init__(self, mirror: Mirror, folder: Path) -> None:
        self._mirror, self._folder = mirror, folder
        self._claims = StoreClaims(mirror.store, folder.name)
        self._sending: dict[str, Future[bool]] = {}  # by chunk
        self._ahead: dict[str, Future[bool | None]] = {}

    def refuse_read_only(self) -> None:
        """UsageError if these credentials may not write to the store."""
        name = f"{self._folder.name}/{CLAIMS}/probe-{uuid.uuid4().hex}"
        try:
            self._mirror.store.create(name, b"")
            self._mirror.store.delete(name)
        except UsageError as error:
            raise UsageError(
                f"{self._mirror.url(self._folder)} cannot be written, and some sequences are missing in it. {error}"
            ) from None

    @contextlib.contextmanager
    def claim(self, name: str, *, wait: bool) -> Iterator[bool | None]:
        """Yield whether the chunk is this scorer's for as long as the block runs; None if its record is in the store.

        If the block sends the chunk, it stays claimed until it has arrived.
        """
        future = self._ahead.pop(name, None)
        is_mine = future.result() if future else self._try(name)
        while wait and is_mine is False:
            time.sleep(_POLL_SECONDS)
            is_mine = self._try(name)
        try:
            yield is_mine
        finally:
            if is_mine and name not in self._sending:
                self._claims.release(name)

    def claim_ahead(self, name: str) -> None:
        """Claim the chunk that will be next while another one is computed."""
        if name not in self._ahead and name not in self._sending:
            self._ahead[name] = call_in_thread(self._try, name)

    def send(self, record: ShardRecord, data: memoryview) -> None:
        """Send the bytes of a shard and its record, while this process goes on."""
        while len(self._sending) >= _SENT_AT_ONCE:
            self._sending.pop(next(iter(self._sending))).result()
        name = record.name.removesuffix(".json")
        self._sending[name] = call_in_thread(self._send, name, record, data)

    def send_now(self, record: ShardRecord, data: memoryview) -> bool:
        """Send a shard and its record; return whether it was the first."""
        return self._mirror.send(self._folder, record, data)

    @contextlib.contextmanager
    def flushing(self) -> Iterator[None]:
        """Wait at the block's end until everything has arrived, and raise what went wrong; after an interrupt, for a moment only."""
        seconds = None
        try:
            yield
        except (KeyboardInterrupt, GeneratorExit):
            seconds = _PATIENCE_SECONDS  # the store may not answer
            raise
        finally:
            self._flush(seconds)

    def _flush(self, seconds: float | None) -> None:
        try:
            for sent in wait(self._sending.values(), seconds).done:
                sent.result()
        finally:
            self._sending.clear()
            for name, claimed in self._ahead.items():
                with contextlib.suppress(Exception):
                    if claimed.result(seconds):
                        self._claims.release(name)
            self._ahead.clear()

    def _send(self, name: str, record: ShardRecord, data: memoryview) -> bool:
        try:
            return self._mirror.send(self._folder, record, data)
        finally:
            self._claims.release(name)

    def _try(self, name: str) -> bool | None:
        if self._mirror.fetch_record(self._folder, f"{name}.json"):
            return None
        if not self._claims.try_claim(name):
            return False
        # It may have been finished between the two questions.
        if self._mirror.fetch_record(self._folder, f"{name}.json"):
            self._claims.release(name)
            return None
        return True


def _find_boot() -> str:
    """What processes share that can look for one another: the boot of their machine, and in it their container's table of processes."""
    with contextlib.suppress(OSError):
        boot, table = Path("/proc/sys/kernel/random/boot_id").read_text().strip(), Path("/proc/self/ns/pid").readlink()
        return f"{boot} {table}"
    return ""
