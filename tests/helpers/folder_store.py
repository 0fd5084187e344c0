"""A folder as an S3 store of millions of rows, on a line with a latency and a bandwidth, in a process of its own.

As much of S3 as prefcache uses, and nothing is checked: what is right is tested with real servers. `GET /-/counts`
returns the requests by kind and the bytes, and counts from zero again.

    python -m tests.helpers.folder_store FOLDER LATENCY BYTES_PER_SECOND
"""

import json
import re
import sys
import threading
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

from tests.helpers.store_proxy import Answer, Request, StoreProxy

_PAGE = 1000


class FolderStore:
    """Answers requests from FOLDER/BUCKET/KEY."""

    def __init__(self, root: Path, proxy: StoreProxy) -> None:
        self.root, self.proxy = root, proxy
        self._writing = threading.Lock()

    def answer(self, request: Request, body: bytes) -> Answer:
        parts = urlsplit(request.path)
        if parts.path == "/-/counts":
            counts = {"requests": self.proxy.requests, "bytes": self.proxy.bytes}
            found = json.dumps(counts).encode()
            self.proxy.reset()
            return Answer(200, "OK", [], found)
        path = self.root / unquote(parts.path).lstrip("/")
        match request.kind:
            case "list":
                return self._list(path, {name: values[0] for name, values in parse_qs(parts.query).items()})
            case "put":
                return self._put(path, body, request)
            case "post":
                return self._delete_many(path, body)
            case "delete":
                path.unlink(missing_ok=True)
                return Answer(204, "No Content", [], b"")
        if not path.is_file():
            return Answer(404, "Not Found", [], b"<Error><Code>NoSuchKey</Code></Error>")
        return _read(path, request)

    def _list(self, bucket: Path, query: dict[str, str]) -> Answer:
        prefix, after = query.get("prefix", ""), query.get("continuation-token", "")
        below = bucket / prefix if prefix.endswith("/") else bucket
        if query.get("delimiter"):
            folders = sorted(each.name for each in below.iterdir() if each.is_dir()) if below.is_dir() else []
            found = [f"<CommonPrefixes><Prefix>{escape(prefix + name)}/</Prefix></CommonPrefixes>" for name in folders]
            return _xml("ListBucketResult", "<IsTruncated>false</IsTruncated>" + "".join(found))
        keys = sorted(str(each.relative_to(bucket)) for each in below.rglob("*") if each.is_file())
        keys = [key for key in keys if key.startswith(prefix) and key > after]
        page, is_cut = keys[:_PAGE], len(keys) > _PAGE
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if is_cut else ""
        entries = "".join(_entry(bucket, key) for key in page)
        return _xml("ListBucketResult", f"<IsTruncated>{str(is_cut).lower()}</IsTruncated>{token}{entries}")

    def _put(self, path: Path, body: bytes, request: Request) -> Answer:
        with self._writing:
            if request.headers.get("If-None-Match") and path.exists():
                return Answer(412, "Precondition Failed", [], b"<Error><Code>PreconditionFailed</Code></Error>")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(body)
        return Answer(200, "OK", [("ETag", _etag(path))], b"")

    def _delete_many(self, bucket: Path, body: bytes) -> Answer:
        keys = re.findall(r"<Key>([^<]*)</Key>", body.decode())
        for key in keys:
            (bucket / key).unlink(missing_ok=True)
        return _xml("DeleteResult", "".join(f"<Deleted><Key>{key}</Key></Deleted>" for key in keys))


def _read(path: Path, request: Request) -> Answer:
    size = path.stat().st_size
    modified = datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%a, %d %b %Y %H:%M:%S GMT")
    headers = [("ETag", _etag(path)), ("Last-Modified", modified)]
    if request.method == "HEAD":
        return Answer(200, "OK", [*headers, ("Content-Length", str(size))], b"")
    begin, end = 0, size
    if part := re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("Range", "")):
        begin, end = int(part[1]), min(int(part[2]) + 1, size)
        headers.append(("Content-Range", f"bytes {begin}-{end - 1}/{size}"))
    with open(path, "rb") as file:
        file.seek(begin)
        data = file.read(end - begin)
    return Answer(206 if part else 200, "OK", headers, data)


def _entry(bucket: Path, key: str) -> str:
    stat = (bucket / key).stat()
    modified = datetime.fromtimestamp(stat.st_mtime, UTC).strftime("%Y-%m-%dT%H:%M:%S.000Z")
    etag = escape(_etag(bucket / key), {'"': "&quot;"})
    return (
        f"<Contents><Key>{escape(key)}</Key><LastModified>{modified}</LastModified><ETag>{etag}</ETag>"
        f"<Size>{stat.st_size}</Size><StorageClass>STANDARD</StorageClass></Contents>"
    )


def _etag(path: Path) -> str:
    stat = path.stat()
    return f'"{stat.st_mtime_ns:x}-{stat.st_size:x}"'


def _xml(name: str, content: str) -> Answer:
    body = f'<?xml version="1.0" encoding="UTF-8"?><{name}>{content}</{name}>'
    return Answer(200, "OK", [("Content-Type", "application/xml")], body.encode())


def main(folder: str, latency: str, bytes_per_second: str) -> None:
    proxy = StoreProxy(0, latency=float(latency), bytes_per_second=float(bytes_per_second))
    proxy.answer = FolderStore(Path(folder), proxy).answer
    with proxy:
        print(proxy.port, flush=True)
        sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
