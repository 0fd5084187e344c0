"""An object store, by its URL: S3 and what speaks like it, Google Cloud Storage, Azure. Through obstore.

obstore and not pyarrow.fs, which has no conditional writes: without them two scorers could both believe that they were
first. An object appears whole or not at all. `create` is a put with If-None-Match, of which one writer wins; `replace` is
one with If-Match. Credentials come from the environment and are never stored, printed or put into a URL.

A failed request is repeated; when it keeps failing, the error says what to do. A missing object is a FileNotFoundError.
"""

import contextlib
import errno
import functools
import math
import os
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from prefcache.pipeline.cache_place import parse_url
from prefcache.pipeline.daemon_threads import call_in_thread, map_parallel
from prefcache.pipeline.errors import IntegrityError, ResourceError, UsageError

T = TypeVar("T")
U = TypeVar("U")

# Requests at once: enough that a latency of 50 ms does not limit the reading of many small objects.
N_PARALLEL = 32
_TRIES = 4
_TRIES_OF_OBSTORE = 6  # of each request, within one of ours
_FIRST_PAUSE = 0.5
# A slow line is not a fault: a request may take as long as bytes arrive. While a request sends bytes, none arrive.
_SECONDS_WITHOUT_BYTES = 120.0
_SECONDS_PER_REQUEST = 3600.0
# A larger object is sent in parts, each by a request of its own.
_PART_BYTES = 16 << 20
# Of a large object, in memory at once while it is read.
_PIECE_BYTES = 8 << 20
# Of an object that is read as a whole: only records are.
_MOST_BYTES = 64 << 20


class StoredObject(NamedTuple):
    """What a listing says of an object."""

    name: str  # below the store's URL
    size: int
    etag: str | None
    modified: datetime


class ObjectStore:
    """The objects below a URL. Names are relative to it."""

    def __init__(self, url: str) -> None:
        self.url = parse_url(url)
        self._store = _connect(self.url)
        self.requests: Counter[str] = Counter()  # by kind, as a provider prices them: get, put, list, delete
        self.bytes: Counter[str] = Counter()  # received, sent
        self._counting = threading.Lock()

    def __repr__(self) -> str:
        return f"<ObjectStore {self.url}>"

    # -- reading -----------------------------------------------------------------------------------------------------

    def list_objects(self, prefix: str = "") -> list[StoredObject]:
        """List all objects whose names begin with this folder's: `prefix` ends with a slash, or is empty."""
        return self._retry("list", prefix, lambda: self._list_pages(prefix))

    def list_folders(self) -> list[str]:
        """List the names of the folders directly below the URL."""
        import obstore

        found = self._retry("list", "", lambda: obstore.list_with_delimiter(self._store))
        return sorted(path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"])

    def head(self, name: str) -> StoredObject | None:
        """What the store says of an object; None if there is none."""
        import obstore

        try:
            return _describe(self._retry("get", name, lambda: obstore.head(self._store, name)))
        except FileNotFoundError:
            return None

    def get(self, name: str) -> bytes:
        return self.get_with_etag(name)[0]

    def get_with_etag(self, name: str) -> tuple[bytes, str | None]:
        import obstore

        def read() -> tuple[bytes, str | None]:
            result = obstore.get(self._store, name)
            if result.meta["size"] > _MOST_BYTES:
                raise IntegrityError(
                    f"{self._path(name)} has {result.meta['size']:,} bytes, and prefcache writes no record that is so large. Remove it."
                )
            data = bytes(result.bytes())
            if len(data) != result.meta["size"]:
                raise _Incomplete(f"{len(data)} of {result.meta['size']} bytes came")
            return data, result.meta["e_tag"]

        data, etag = self._retry("get", name, read)
        self._count("received", len(data))
        return data, etag

    def get_range(self, name: str, start: int, end: int) -> bytes:
        """Read the bytes from `start` up to `end`."""
        import obstore

        def read() -> bytes:
            data = bytes(obstore.get_range(self._store, name, start=start, end=end))
            if len(data) != end - start:
                raise _Incomplete(f"{len(data)} of {end - start} bytes came")
            return data

        data = self._retry("get", name, read)
        self._count("received", len(data))
        return data

    def read_pieces(self, name: str, n_bytes: int) -> Iterator[bytes]:
        """Yield an object of this size a piece at a time, so that it need not fit into memory."""
        for start in range(0, n_bytes, _PIECE_BYTES):
            yield self.get_range(name, start, min(start + _PIECE_BYTES, n_bytes))

    # -- writing -----------------------------------------------------------------------------------------------------

    def put(self, name: str, data: bytes | memoryview) -> None:
        """Write an object whose name says what it contains, so that writing it twice changes nothing."""
        view = memoryview(data).cast("B")  # obstore takes other formats for iterators
        self._send(name, view, view.nbytes)

    def put_file(self, name: str, path: Path) -> None:
        """Write such an object from a file: a large one in parts, of which few are in memory at once."""
        self._send(name, path, path.stat().st_size)

    def _send(self, name: str, content: bytes | memoryview | Path, n_bytes: int) -> None:
        import obstore

        is_large = n_bytes > _PART_BYTES

        def write() -> None:
            try:
                obstore.put(self._store, name, content, use_multipart=is_large, chunk_size=_PART_BYTES)
            except FileNotFoundError as error:
                if is_large and "NoSuchBucket" not in str(error):
                    # Also when the answer to the last request of an upload got lost, which obstore then repeats.
                    raise _Incomplete("the store no longer knows of this upload") from None
                raise

        self._retry("put", name, write)
        if is_large:  # a request for each part, one before and one after them
            self._count("put", 1 + math.ceil(n_bytes / _PART_BYTES), self.requests)
        self._count("sent", n_bytes)

    def create(self, name: str, data: bytes) -> bool:
        """Write an object unless there is one of this name; return whether there is one with these bytes now.

        If the reply to an earlier try was lost, the existing object may be this writer's own.
        """
        import obstore

        def write() -> bool:
            try:
                obstore.put(self._store, name, data, mode="create", use_multipart=False)
            except obstore.exceptions.AlreadyExistsError:
                return False
            return True

        is_first = self._retry("put", name, write)
        self._count("sent", len(data))
        try:
            return is_first or self.get(name) == data
        except FileNotFoundError:  # deleted meanwhile
            return self.create(name, data)

    def replace(self, name: str, data: bytes, etag: str) -> bool:
        """Replace an object that still is as its ETag says; return whether its bytes are these now.

        As with `create`, the reply to a replacement of this writer's may have been lost.
        """
        import obstore

        def write() -> bool:
            try:
                obstore.put(self._store, name, data, mode={"e_tag": etag}, use_multipart=False)
            except obstore.exceptions.PreconditionError:
                return False
            return True

        try:
            is_replaced = self._retry("put", name, write)
            self._count("sent", len(data))
            return is_replaced or self.get(name) == data
        except FileNotFoundError:
            return False

    def delete(self, name: str) -> None:
        """Delete an object, if there is one."""
        import obstore

        def delete() -> None:
            with contextlib.suppress(FileNotFoundError):
                obstore.delete(self._store, name)

        self._retry("delete", name, delete)

    def parallel(self, function: Callable[[T], U], items: Sequence[T]) -> Iterator[U]:
        """Yield the function's results in the order of the items, many of which are under way at once."""
        if len(items) < 2:
            yield from map(function, items)
        else:
            yield from map_parallel(function, items, N_PARALLEL)

    # -- requests ----------------------------------------------------------------------------------------------------

    def _list_pages(self, prefix: str) -> list[StoredObject]:
        import obstore

        objects = []
        for n, page in enumerate(obstore.list(self._store, prefix or None, chunk_size=1000)):
            objects += [_describe(each) for each in page]
            if n:  # the first was counted when it was asked for
                self._count("list", 1, self.requests)
        return objects

    def _retry(self, kind: str, name: str, request: Callable[[], T]) -> T:
        """Carry out a request, and repeat it while its failure may pass."""
        import obstore

        refuse_fork(self.url)
        pause = _FIRST_PAUSE
        for attempt in range(_TRIES):
            self._count(kind, 1, self.requests)
            try:
                return _wait_interruptibly(request)
            except FileNotFoundError as error:
                if reason := _explain_permanent(str(error)):
                    raise UsageError(f"{self._path(name)}: {reason}") from None
                raise FileNotFoundError(errno.ENOENT, "there is no such object", self._path(name)) from None
            except (obstore.exceptions.PermissionDeniedError, obstore.exceptions.UnauthenticatedError) as error:
                if reason := _explain_permanent(str(error)):
                    raise UsageError(f"{self._path(name)}: {reason}") from None
                raise UsageError(self._refused(name, error)) from None
            except (obstore.exceptions.BaseError, OSError, _Incomplete) as error:
                if reason := _explain_permanent(str(error)):
                    raise UsageError(f"{self._path(name)}: {reason}") from None
                if _is_refusal(str(error)):  # of a listing, for which obstore has no error of its own
                    raise UsageError(self._refused(name, error)) from None
                if attempt + 1 == _TRIES:
                    raise ResourceError(
                        f"{self._path(name)} could not be reached in {_TRIES} tries ({_shorten(error)}). Check the network and the "
                        "endpoint, then run the same command again; finished work is kept."
                    ) from None
            time.sleep(pause * random.uniform(0.5, 1.0))
            pause *= 2
        raise AssertionError

    def _path(self, name: str) -> str:
        return f"{self.url}/{name}".rstrip("/")

    def _refused(self, name: str, error: Exception) -> str:
        return (
            f"{self._path(name)}: access was refused ({_shorten(error)}). Check that the credentials of this machine may read it, "
            "and write to it if something is to be stored; they come from the environment (AWS_ACCESS_KEY_ID, ...) and never from "
            "a config."
        )

    def _count(self, kind: str, n: int, counter: Counter[str] | None = None) -> None:
        with self._counting:
            (self.bytes if counter is None else counter)[kind] += n


class _Incomplete(Exception):
    """An answer is shorter than it claims to be."""


def _wait_interruptibly(request: Callable[[], T]) -> T:
    """Carry out a request where Ctrl-C need not wait for its answer: not in the main thread, which handles signals."""
    return call_in_thread(request).result() if threading.current_thread() is threading.main_thread() else request()


# The process whose threads carry out obstore's requests. They start with the first request and do not survive a fork.
_requesting_pid: int | None = None


def refuse_fork(url: str) -> None:
    """Raise UsageError in a fork of a process that has made requests: obstore's next one would wait forever."""
    global _requesting_pid
    if _requesting_pid is None:
        _requesting_pid = os.getpid()
    elif _requesting_pid != os.getpid():
        raise UsageError(
            f"{url} cannot be read in a forked process once its parent has read from an object store. Start the process by spawn "
            "(multiprocessing.get_context('spawn'), or DataLoader's multiprocessing_context='spawn')."
        )


@functools.cache
def open_store(url: str) -> ObjectStore:
    """The store of a URL, one in each process."""
    return ObjectStore(url)


def refuse_escape(name: str) -> str:
    """Return an object's name if it is one file in one folder of ours; IntegrityError if it could lead elsewhere."""
    if not all(re.fullmatch(r"[\w.][\w.+@=,~ -]{0,254}", step) and step not in (".", "..") for step in name.split("/")):
        raise IntegrityError(
            f"The object store has an object named {name[:200]!r}, which prefcache does not write. Remove it."
        )
    return name


def _describe(meta: Any) -> StoredObject:
    return StoredObject(meta["path"], meta["size"], meta["e_tag"], meta["last_modified"])


def _connect(url: str) -> Any:
    try:
        import obstore.store
    except ImportError:
        raise UsageError(
            f"{url} is in an object store, and obstore is not installed. Install it (pip install 'prefcache[stores]')."
        ) from None
    # obstore repeats single requests, such as that for a page of a listing; ObjectStore whole operations.
    options: dict[str, Any] = {
        "client_options": {
            "timeout": timedelta(seconds=_SECONDS_PER_REQUEST),
            "read_timeout": timedelta(seconds=_SECONDS_WITHOUT_BYTES),
            "connect_timeout": timedelta(seconds=10),
        },
        "retry_config": {
            "max_retries": _TRIES_OF_OBSTORE - 1,
            "retry_timeout": timedelta(seconds=_SECONDS_WITHOUT_BYTES),
        },
    }
    if url.startswith("s3://"):
        endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        if endpoint:
            _check_endpoint(endpoint)
            options["endpoint"] = endpoint
            options["client_options"]["allow_http"] = endpoint.startswith("http://")
        options |= _boto3_credentials()
    try:
        return obstore.store.from_url(url, **options)
    except (obstore.exceptions.BaseError, ValueError) as error:
        raise UsageError(f"{url} cannot be used ({_shorten(error)}).") from None


def _check_endpoint(endpoint: str) -> None:
    """Raise UsageError if the endpoint is not an address: obstore would panic at its first request."""
    if not re.fullmatch(r"https?://[^/?#\s]+(/[^?#\s]*)?", endpoint):
        raise UsageError(
            "AWS_ENDPOINT_URL (or AWS_ENDPOINT_URL_S3) is not an address. Expected one with http:// or https://, such as "
            "https://minio.example.com:9000."
        )


def _boto3_credentials() -> dict[str, Any]:
    """Credentials of a profile or of SSO, which boto3 knows, where the environment has none and boto3 is installed."""
    if os.environ.get("AWS_ACCESS_KEY_ID") or os.environ.get("AWS_WEB_IDENTITY_TOKEN_FILE"):
        return {}
    try:
        import boto3
        from obstore.auth.boto3 import Boto3CredentialProvider

        session = boto3.Session()
        if session.get_credentials() is None:
            return {}
    except Exception:  # a broken profile of boto3's must not hide what obstore finds itself
        return {}
    return {"credential_provider": Boto3CredentialProvider(session)}


def _explain_permanent(message: str) -> str | None:
    """Why a request can never succeed; None if trying again may help."""
    if "object with invalid path" in message:
        return "the store has an object whose name is not a path, which prefcache does not write. Remove it."
    if "NoSuchBucket" in message or "ContainerNotFound" in message:
        return "there is no such bucket. Create it, or correct the URL."
    if "//169.254.169.254/" in message or "//169.254.170.2/" in message:  # where instances and containers have a role's
        return (
            "no credentials were found, and this machine has no role that gives it some. Set AWS_ACCESS_KEY_ID and "
            "AWS_SECRET_ACCESS_KEY, or install boto3 and set AWS_PROFILE."
        )
    if "InvalidAccessKeyId" in message or "SignatureDoesNotMatch" in message:
        return "the store does not accept these credentials. They come from the environment (AWS_ACCESS_KEY_ID, ...)."
    if "ExpiredToken" in message or "TokenRefreshRequired" in message:
        return "the credentials have expired. Get new ones, for example by logging in again."
    if "RequestTimeTooSkewed" in message:
        return "the store refuses requests because the clock of this machine is wrong. Set it."
    if "PermanentRedirect" in message or "AuthorizationHeaderMalformed" in message:
        return "the bucket is in another region. Set AWS_DEFAULT_REGION to it."
    return None


def _is_refusal(message: str) -> bool:
    return re.search(r"status code: 40[13]\b|<Code>(AccessDenied|AllAccessDisabled)</Code>", message) is not None


def _shorten(error: Exception) -> str:
    """Return the sentence of an error that says what happened.

    Without query strings, which may hold signatures, and with no more of S3's XML than the code and its message: the rest
    can hold the key id and what was signed.
    """
    text = str(error).strip()
    code, message = (re.search(rf"<{tag}>([^<]*)</{tag}>", text) for tag in ("Code", "Message"))
    if code:
        text = f"{code[1]}: {message[1]}" if message else code[1]
    line = re.sub(r"(https?://[^\s?]*)\?\S*", r"\1", text.partition("\n")[0])
    line = re.sub(r"^Generic \w+ error: |Error performing (list request: )?", "", line)
    # How often obstore tried, and for how long, says less than what the system said, which is in its account of the source.
    line = re.sub(r" in [\d.]+\w*s(, after \d+ retries, max_retries: \d+, retry_timeout: \w+)? +- ", ": ", line)
    line = re.sub(
        r"^The operation lacked the necessary privileges [^:]*: |Server returned non-2xx status code: ", "", line
    )
    if causes := re.findall(r'^ *(?:message|error): "([^"?]+)"', text, re.MULTILINE):
        line = line.replace("HTTP error: error sending request", causes[-1])
    return re.sub(r"\b(AKIA|ASIA)[A-Z0-9]{12,}", "...", line)[:300].rstrip(".: ")
