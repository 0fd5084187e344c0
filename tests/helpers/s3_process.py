"""An S3 server in a process of its own, until its standard input ends: `python -m tests.helpers.s3_process moto`.

Two that share no code: moto, which the environment of the tests has, and LocalStack's, which has one of its own. The
first line printed is the port. `GET /-/requests` returns the number of requests by bucket and kind.
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

from werkzeug.serving import WSGIRequestHandler, make_server

from tests.helpers.store_proxy import kind_of


class CountedServer:
    """A server's WSGI application, which counts its requests."""

    def __init__(self, application: Any, one_at_a_time: bool) -> None:
        self.application = application
        self.requests: defaultdict[str, Counter[str]] = defaultdict(Counter)
        self.counting = threading.Lock()
        self.turn = threading.Semaphore(1 if one_at_a_time else 1000)

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
        with self.counting:
            self.requests[path.split("/")[1]][kind_of(environ["REQUEST_METHOD"], f"{path}?{query}")] += 1
        with self.turn:
            parts = self.application(environ, start_response)
            try:
                return list(parts)
            finally:
                getattr(parts, "close", lambda: None)()


class Connection(WSGIRequestHandler):
    """A connection that is kept for many requests."""

    protocol_version = "HTTP/1.1"

    def log(self, type: str, message: str, *args: Any) -> None:
        pass


def build_moto() -> CountedServer:
    """moto with S3's promise that a conditional write is atomic: moto itself looks first, and writes after that."""
    from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app

    return CountedServer(DomainDispatcherApplication(create_backend_app), one_at_a_time=True)


def build_localstack() -> CountedServer:
    """LocalStack's own S3, which holds a lock for a conditional write."""
    os.environ |= {"SERVICES": "s3", "DISABLE_EVENTS": "1", "SKIP_SSL_CERT_DOWNLOAD": "1"}
    from localstack.aws.app import LocalstackAwsGateway
    from rolo.gateway.wsgi import WsgiGateway

    return CountedServer(WsgiGateway(LocalstackAwsGateway()), one_at_a_time=False)


def main(kind: str) -> None:
    logging.disable(logging.ERROR)
    application = {"moto": build_moto, "localstack": build_localstack}[kind]()
    server = make_server("127.0.0.1", 0, application, threaded=True, request_handler=Connection)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(server.server_port, flush=True)
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1])
