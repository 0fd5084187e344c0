"""A proxy between prefcache and an S3 server, which makes the network as slow and as faulty as a test wants it.

It forwards HTTP/1.1 with the client's headers as they are, for the signature covers the Host header. Which requests a
fault hits is drawn from a seed; with several clients at once, their order is not determined.
"""

import dataclasses
import http.client
import random
import re
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from enum import StrEnum
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, NamedTuple

BLOCK = 256 * 1024


class Fault(StrEnum):
    """What goes wrong with a request."""

    ERROR = "503 without the request being carried out"
    LOST_ANSWER = "500 although the request was carried out"
    DROPPED = "the connection ends before the request is carried out"
    DROPPED_ANSWER = "the connection ends after the request was carried out"
    CUT_BODY = "the connection ends in the middle of the body"
    SHORT_BODY = "half of the body, under headers that say so"
    WRONG_LENGTH = "a Content-Length, and a total in Content-Range, that are not the object's"
    FLIPPED_BIT = "one bit of the body is another one"
    FORBIDDEN = "403"
    REFUSED_SIGNATURE = "403 whose body repeats what was signed, and by which key, as S3 does"
    SHORT_LISTING = "a listing that lacks every second object and says it is whole"
    CUT_LISTING = "a listing that ends in the middle of its XML"
    DRIBBLING = "the body comes in 20 parts, with pauses in between"
    HANGING = "no answer for a while, then the connection ends"


class Request(NamedTuple):
    """A request as rules see it."""

    number: int
    kind: str  # get, head, put, list, delete, post
    method: str
    path: str  # with the query
    headers: http.client.HTTPMessage


class Answer(NamedTuple):
    status: int
    reason: str
    headers: list[tuple[str, str]]
    body: bytes


@dataclasses.dataclass
class Rule:
    """Inject a fault into some requests."""

    fault: Fault
    share: float = 1.0
    when: Callable[[Request], bool] = lambda request: True
    seconds: float = 0.5  # how long a dribbling body takes, or a hanging request hangs
    times: int | None = None  # at most


def faults_in(share: float) -> list[Rule]:
    """Rules by which this share of all requests fails, in equal parts in every way that passes by itself."""
    kinds = [Fault.ERROR, Fault.LOST_ANSWER, Fault.DROPPED, Fault.DROPPED_ANSWER, Fault.CUT_BODY]
    rules, left = [], 1.0
    for kind in kinds:
        rules.append(Rule(kind, share / len(kinds) / left))  # a rule is asked only where those before it did not hit
        left -= share / len(kinds)
    return rules


def kind_of(method: str, path: str) -> str:
    """What a provider counts a request as."""
    if method == "GET" and re.search(r"[?&](list-type|prefix|delimiter)=", path):
        return "list"
    return method.lower()


class StoreProxy:
    """Listens on a free port of this machine and forwards to another port of it."""

    def __init__(
        self,
        upstream: int,
        rules: Sequence[Rule] = (),
        latency: float = 0.0,
        bytes_per_second: float | None = None,
        seed: int = 0,
    ) -> None:
        self.upstream = upstream
        self.rules = list(rules)  # may be changed at any time
        self.latency = latency
        self.bytes_per_second = bytes_per_second
        self.on_request: Callable[[Request], None] | None = None  # called before a request is forwarded
        self.answer: Callable[[Request, bytes], Answer] | None = None  # instead of the server
        self.requests: Counter[str] = Counter()
        self.injected: Counter[Fault] = Counter()
        self.bytes: Counter[str] = Counter()  # of bodies: received by the client, sent by it
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._line_is_free_at = 0.0
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "StoreProxy":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._server.shutdown()
        self._server.server_close()

    def reset(self) -> None:
        """Count from zero."""
        with self._lock:
            for counter in (self.requests, self.injected, self.bytes):
                counter.clear()

    def admit(self, method: str, path: str, headers: http.client.HTTPMessage) -> tuple[Request, Rule | None]:
        """Count a request; return the rule that hits it, if one does."""
        with self._lock:
            request = Request(self.requests.total(), kind_of(method, path), method, path, headers)
            self.requests[request.kind] += 1
            for rule in self.rules:
                if rule.times != 0 and rule.when(request) and self._random.random() < rule.share:
                    self.injected[rule.fault] += 1
                    if rule.times is not None:
                        rule.times -= 1
                    return request, rule
        return request, None

    def carry(self, n_bytes: int, direction: str) -> None:
        """Wait as long as these bytes take on the line, which all connections share."""
        with self._lock:
            self.bytes[direction] += n_bytes
            if self.bytes_per_second is None:
                return
            now = time.monotonic()
            self._line_is_free_at = max(now, self._line_is_free_at) + n_bytes / self.bytes_per_second
            wait = self._line_is_free_at - now
        time.sleep(wait)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256
    proxy: StoreProxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        pass  # a client that was killed


class _Handler(BaseHTTPRequestHandler):
    """A client's connection, and one of its own to the server."""

    protocol_version = "HTTP/1.1"
    server: _Server
    _upstream: http.client.HTTPConnection | None = None

    def setup(self) -> None:
        super().setup()
        self.connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def finish(self) -> None:
        if self._upstream:
            self._upstream.close()
        super().finish()

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def handle_request(self) -> None:
        proxy = self.server.proxy
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if len(body) < length:  # the client is gone
            self.close_connection = True
            return
        request, rule = proxy.admit(self.command, self.path, self.headers)
        time.sleep(proxy.latency)
        proxy.carry(len(body), "sent")
        match rule and rule.fault:
            case Fault.ERROR:
                return self._answer(_error(503, "SlowDown", "Please reduce your request rate."))
            case Fault.FORBIDDEN:
                return self._answer(_error(403, "AccessDenied", "Access Denied"))
            case Fault.REFUSED_SIGNATURE:
                return self._answer(_refuse_signature(self.headers))
            case Fault.DROPPED:
                return self._drop()
            case Fault.HANGING:
                assert rule is not None
                time.sleep(rule.seconds)
                return self._drop()
        if proxy.on_request:
            proxy.on_request(request)
        answer = self._forward(body) if proxy.answer is None else proxy.answer(request, body)
        match rule and rule.fault:
            case Fault.LOST_ANSWER:
                return self._answer(_error(500, "InternalError", "We encountered an internal error."))
            case Fault.DROPPED_ANSWER:
                return self._drop()
            case Fault.CUT_BODY:
                self._answer(answer, only=len(answer.body) // 2)
                return self._drop()
            case Fault.DRIBBLING:
                assert rule is not None
                return self._answer(answer, pause=rule.seconds / 20)
            case None:
                return self._answer(answer)
        assert rule is not None
        self._answer(_falsify(answer, request, rule.fault))
        if rule.fault is Fault.WRONG_LENGTH:  # whose client would wait for the rest
            self._drop()

    do_GET = do_HEAD = do_PUT = do_DELETE = do_POST = handle_request

    def _forward(self, body: bytes) -> Answer:
        for attempt in range(2):  # the server may have closed a connection that was idle
            try:
                if self._upstream is None:
                    self._upstream = http.client.HTTPConnection("127.0.0.1", self.server.proxy.upstream, timeout=120)
                    self._upstream.connect()
                    self._upstream.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self._upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
                for name, value in self.headers.items():
                    self._upstream.putheader(name, value)
                self._upstream.endheaders(body or None)
                answer = self._upstream.getresponse()
                break
            except (http.client.RemoteDisconnected, ConnectionResetError, BrokenPipeError):
                self._upstream = None
                if attempt:
                    raise
        hop = {"connection", "transfer-encoding", "keep-alive"}
        headers = [(name, value) for name, value in answer.getheaders() if name.lower() not in hop]
        data = answer.read()
        if answer.will_close:
            self._upstream.close()
            self._upstream = None
        return Answer(answer.status, answer.reason, headers, data)

    def _answer(self, answer: Answer, only: int | None = None, pause: float | None = None) -> None:
        """Send an answer, or only so many bytes of its body."""
        self.send_response_only(answer.status, answer.reason)
        names = {name.lower() for name, _ in answer.headers}
        for name, value in answer.headers:
            self.send_header(name, value)
        if "content-length" not in names and answer.status != 204:
            self.send_header("Content-Length", str(len(answer.body)))
        self.end_headers()
        body = memoryview(answer.body)[:only]
        block = BLOCK if pause is None else max(1, len(body) // 20)
        for start in range(0, 0 if self.command == "HEAD" else len(body), block):
            part = body[start : start + block]
            self.server.proxy.carry(len(part), "received")
            self.wfile.write(part)
            if pause is not None:
                self.wfile.flush()
                time.sleep(pause)

    def _drop(self) -> None:
        self.close_connection = True
        self.wfile.flush()
        # shutdown, for rfile and wfile hold the socket: close alone would not end the connection.
        self.connection.shutdown(socket.SHUT_RDWR)


def _error(status: int, code: str, message: str) -> Answer:
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
    return Answer(status, code, [("Content-Type", "application/xml")], body)


def _refuse_signature(headers: http.client.HTTPMessage) -> Answer:
    """The 403 of S3 for a wrong secret key."""
    signed = headers.get("Authorization", "")
    key_id = re.search(r"Credential=([^/,]*)", signed)
    body = (
        '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>SignatureDoesNotMatch</Code><Message>The request signature we '
        "calculated does not match the signature you provided. Check your key and signing method.</Message>"
        f"<AWSAccessKeyId>{key_id[1] if key_id else ''}</AWSAccessKeyId><StringToSign>{signed}</StringToSign>"
        f"<SignatureProvided>{signed.rpartition('Signature=')[2]}</SignatureProvided></Error>"
    ).encode()
    return Answer(403, "Forbidden", [("Content-Type", "application/xml")], body)


def _falsify(answer: Answer, request: Request, fault: Fault) -> Answer:
    """The answer as a broken server, or a proxy on the way, would give it."""
    body = answer.body
    match fault:
        case Fault.SHORT_BODY:
            body = body[: len(body) // 2]
        case Fault.FLIPPED_BIT if body:
            at = len(body) // 2
            body = body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]
        case Fault.SHORT_LISTING if request.kind == "list":
            parts = re.split(rb"(?=<Contents>)", body)
            end = parts[-1].partition(b"</Contents>")[2] if len(parts) > 1 else b""
            kept = [part.partition(b"</Contents>")[0] + b"</Contents>" for part in parts[1::2]]
            body = b"".join([parts[0], *kept, end])
        case Fault.CUT_LISTING if request.kind == "list":
            body = body[: len(body) // 2]
    headers = [(name, value) for name, value in answer.headers if name.lower() != "content-length"]
    length = len(body)
    if request.method == "HEAD":
        length = next((int(value) for name, value in answer.headers if name.lower() == "content-length"), 0)
    if fault is Fault.WRONG_LENGTH:
        length += 7
        headers = [
            (
                name,
                re.sub(r"/(\d+)$", lambda m: f"/{int(m[1]) + 7}", value) if name.lower() == "content-range" else value,
            )
            for name, value in headers
        ]
    if answer.status != 204:
        headers.append(("Content-Length", str(length)))
    return Answer(answer.status, answer.reason, headers, body)
