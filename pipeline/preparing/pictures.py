"""The pictures of records: from what a record holds to their bytes.

    a path          relative to the folder of the data's file, absolute, or file://
    bytes           as they are, base64 text, or a data: address with base64
    a dict          {"bytes": ..., "path": ...} as `datasets` stores it (bytes first), {"url": ...}, {"image_url": ...}
    http(s)://      from the hosts of prepare.image_hosts alone

Whatever cannot be read sends its record to quarantine. The files that were looked at are listed with their stamps, so that
a later change of one can be noticed.
"""

import base64
import binascii
import contextlib
import http.client
import os
import re
import stat
import time
import urllib.error
import urllib.request
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import xxhash

from prefcache.pipeline import images
from prefcache.pipeline.images import MOST_BYTES, Picture, UnusableImage
from prefcache.pipeline.preparing.example import Unusable
from prefcache.pipeline.preparing.sources import STDIN
from prefcache.pipeline.stored.images import FileStamp

MOST_RECORD_BYTES = 256 << 20  # of the pictures of one record
_RECENT_BYTES = 32 << 20
_TIMEOUT, _DEADLINE = 20.0, 60.0  # seconds: of one read, and of a whole picture
_PAUSES = (0.5, 2.0)  # seconds before another attempt
_TEMPORARY_FAILURES = {408, 429, 500, 502, 503, 504}
_BASE64 = re.compile(r"[A-Za-z0-9+/\s]+={0,2}\s*")
_WEB = ("http://", "https://")
_KEYS = ("bytes", "path", "url", "image_url")  # of a dict, in their order
_MOST_SHOWN = 200  # characters of a path in a message
_MOST_NESTED = 2  # {"image_url": {"url": ...}}


class PictureLoader:
    """Loads pictures. One per worker; it keeps the last ones, since the examples of a record share theirs."""

    def __init__(self, image_hosts: Sequence[str] = ()) -> None:
        self._hosts = frozenset(host.lower() for host in image_hosts)
        self._recent: OrderedDict[str, Picture] = OrderedDict()  # by a hash of the bytes, or the address
        self._stamps: dict[str, FileStamp] = {}

    def start_part(self) -> None:
        """Forget which files were looked at."""
        self._stamps = {}

    @property
    def stamps(self) -> list[FileStamp]:
        """The files that were looked at since, also those that were missing."""
        return list(self._stamps.values())

    def load_all(self, values: Sequence[Any], base: Path | None) -> tuple[Picture, ...]:
        """Load the pictures of one record. See `load`."""
        pictures, n_bytes = [], 0
        for value in values:
            pictures.append(self.load(value, base))
            n_bytes += len(pictures[-1].encoded)
            if n_bytes > MOST_RECORD_BYTES:
                raise Unusable(
                    "image too large", "bytes of all images of a record", n_found=n_bytes, n_limit=MOST_RECORD_BYTES
                )
        return tuple(pictures)

    def load(self, value: Any, base: Path | None) -> Picture:
        """Load the picture that a value names or holds; Unusable if that fails.

        `base` is the folder of the data's file; None: the data has none, so that a relative path names nothing.
        """
        if isinstance(value, Picture):
            return value
        for _ in range(_MOST_NESTED):
            if isinstance(value, dict):
                value = next((value[name] for name in _KEYS if value.get(name)), None)
        try:
            is_web = isinstance(value, str) and value[:8].lower().startswith(_WEB)
            if is_web and value in self._recent:
                return self._recent[value]
            encoded = self._fetch(value) if is_web else self._read(value, base)
            name = value if is_web else xxhash.xxh3_128_hexdigest(encoded)
            known = self._recent.get(name)
            # The hash is a fast one, against which two pictures could be made to collide.
            if known is not None and known.encoded == encoded:
                return known
            return self._keep(name, images.decode(encoded))
        except UnusableImage as error:
            raise Unusable(error.reason, error.detail, n_found=error.n_found, n_limit=error.n_limit) from None

    def _keep(self, name: str, picture: Picture) -> Picture:
        self._recent[name] = picture
        while len(self._recent) > 1 and sum(len(each.encoded) for each in self._recent.values()) > _RECENT_BYTES:
            self._recent.popitem(last=False)
        return picture

    def _read(self, value: Any, base: Path | None) -> bytes:
        """Return the bytes that a value holds or that are in the file it names."""
        if isinstance(value, bytes | bytearray | memoryview):
            return bytes(value)
        if isinstance(value, os.PathLike):
            value = os.fspath(value)
        if not isinstance(value, str):
            found = "nothing" if value is None else type(value).__name__
            raise Unusable("no image", f"found {found}; expected a path, bytes, base64 or a data: address")
        if value[:5].lower() == "data:":
            return _decode_data_address(value)
        if (encoded := _decode_base64(value)) is not None:
            return encoded
        return self._read_file(_find_path(value, base))

    # -- files -------------------------------------------------------------------------------------------------------

    def _read_file(self, path: Path) -> bytes:
        name = str(path)
        try:
            # A named pipe would wait for a writer, and opening a device can do anything.
            kind = path.stat().st_mode
            if not stat.S_ISREG(kind):
                found = "a folder" if stat.S_ISDIR(kind) else "a device, pipe or socket"
                raise Unusable("image is not a file", f"{_shorten(name)}: {found}")
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                status = os.fstat(file.fileno())
                encoded = file.read(MOST_BYTES + 1) if stat.S_ISREG(status.st_mode) else b""
        except (OSError, ValueError) as error:  # ValueError: a null byte in the name
            self._stamps[name] = FileStamp(name, None, None)
            reason = getattr(error, "strerror", None) or "not a path"
            raise Unusable("image not read", f"{_shorten(name)}: {reason}") from None
        if len(encoded) > MOST_BYTES:
            raise UnusableImage("image too large", "bytes", n_found=status.st_size, n_limit=MOST_BYTES)
        self._stamps[name] = FileStamp(name, status.st_size, xxhash.xxh3_128_hexdigest(encoded))
        return encoded

    # -- the network -------------------------------------------------------------------------------------------------

    def _fetch(self, address: str) -> bytes:
        host = _host(address)
        if host not in self._hosts:
            raise Unusable("image not fetched", f"{host} is not one of prepare.image_hosts")
        opener = urllib.request.build_opener(_SameHost)
        for pause in (*_PAUSES, None):
            try:
                return _download(opener, address)
            except urllib.error.HTTPError as error:
                reason, is_temporary = f"{host}: HTTP {error.code}", error.code in _TEMPORARY_FAILURES
                error.close()
            except (ValueError, http.client.InvalidURL):
                reason, is_temporary = "not an address", False
            except (OSError, http.client.HTTPException) as error:
                cause = getattr(error, "reason", error)
                reason, is_temporary = f"{host}: {type(cause).__name__}", True
            if pause is None or not is_temporary:
                break
            time.sleep(pause)
        raise Unusable("image not fetched", reason)


class _SameHost(urllib.request.HTTPRedirectHandler):
    """Follows redirects within a host."""

    max_redirections = 5

    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> Any:
        if not newurl.lower().startswith(_WEB) or _host(newurl) != _host(req.full_url):
            raise Unusable("image not fetched", f"{_host(req.full_url)} redirects to another host")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _host(address: str) -> str:
    """Return HOST, or HOST:PORT for another port than the usual one."""
    try:
        parts = urlsplit(address)
        if parts.username is not None or parts.password is not None or not parts.hostname:
            raise ValueError
        is_usual = parts.port in (None, 443 if parts.scheme.lower() == "https" else 80)
    except ValueError:
        raise Unusable("image not fetched", "not an address of a host") from None
    return parts.hostname if is_usual else f"{parts.hostname}:{parts.port}"


def _download(opener: urllib.request.OpenerDirector, address: str) -> bytes:
    until, blocks, n_bytes = time.monotonic() + _DEADLINE, [], 0
    request = urllib.request.Request(address, headers={"User-Agent": "prefcache", "Accept": "image/*"})
    with opener.open(request, timeout=_TIMEOUT) as response:
        while block := response.read1(1 << 16):
            blocks.append(block)
            n_bytes += len(block)
            if n_bytes > MOST_BYTES:
                raise UnusableImage("image too large", "bytes", n_found=n_bytes, n_limit=MOST_BYTES)
            if time.monotonic() > until:
                raise TimeoutError
        if response.length:
            raise ConnectionError("fewer bytes than announced")
    return b"".join(blocks)


# -- text ------------------------------------------------------------------------------------------------------------


def base_folder(source: str) -> Path | None:
    """Return the folder to which the paths of a source's records are relative; None if it has none."""
    path = Path(source)
    if source != STDIN and path.is_file():
        return path.parent
    return path if source != STDIN and path.is_dir() else None


def _find_path(value: str, base: Path | None) -> Path:
    if value[:7].lower() == "file://":
        host, slash, rest = value[7:].partition("/")
        if host.lower() not in ("", "localhost"):
            raise Unusable("image not read", "a file:// address with a host; expected file:///PATH")
        value = unquote(slash + rest)
    path = Path(value)
    if path.is_absolute():
        return path
    if base is None:
        raise Unusable("image not read", "a relative path in data without a folder")
    return base / path


def _shorten(name: str) -> str:
    """Shorten what may be no path at all, such as broken base64."""
    return name if len(name) <= _MOST_SHOWN else f"{name[:_MOST_SHOWN]}..."


def _decode_data_address(value: str) -> bytes:
    head, comma, content = value.partition(",")
    if not comma or not head.lower().endswith(";base64"):
        raise UnusableImage("broken image", "a data: address without base64")
    return _decode_strictly(content)


def _decode_base64(value: str) -> bytes | None:
    """Decode text that begins like a picture in base64, and holds nothing else; None if it may be a path."""
    start = value[:24].strip()
    with contextlib.suppress(binascii.Error, ValueError):
        if images.find_format(base64.b64decode(start[: len(start) // 4 * 4], validate=True)) is not None:
            return _decode_strictly(value) if _BASE64.fullmatch(value) else None
    return None


def _decode_strictly(value: str) -> bytes:
    try:
        return base64.b64decode("".join(value.split()), validate=True)
    except ValueError:
        raise UnusableImage("broken image", "base64") from None
