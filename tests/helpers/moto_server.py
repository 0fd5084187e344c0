"""moto's S3 server in a process of its own, until its standard input ends. The first line it prints is its port.

`GET /-/requests` returns the number of requests by bucket and kind.
"""

import io
import json
import logging
import os
import sys
import threading
from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server

from tests.helpers.store_proxy import kind_of


class OneAtATime:
    """moto with S3's promise that a conditional write is atomic: moto itself looks first, and writes after that."""

    def __init__(self) -> None:
        self.moto = DomainDispatcherApplication(create_backend_app)
        self.lock = threading.Lock()
        self.requests: defaultdict[str, Counter[str]] = defaultdict(Counter)

    def __call__(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        path, query = environ["PATH_INFO"], environ.get("QUERY_STRING", "")
        if path == "/-/requests":
            start_response("200 OK", [("Content-Type", "application/json")])
            return [json.dumps(self.requests).encode()]
        length = int(environ.get("CONTENT_LENGTH") or 0)
        body = environ["wsgi.input"].read(length)
        if len(body) < length:  # the client was killed: S3 stores nothing of an upload that is not whole
            start_response("400 Bad Request", [("Content-Length", "0")])
            return []
        environ["wsgi.input"] = io.BytesIO(body)
        bucket = path.split("/")[1]
        with self.lock:
            self.requests[bucket][kind_of(environ["REQUEST_METHOD"], f"{path}?{query}")] += 1
            return list(self.moto(environ, start_response))


def main() -> None:
    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = make_server("127.0.0.1", 0, OneAtATime(), threaded=True, request_handler=MotoRequestHandler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
