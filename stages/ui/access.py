"""Who may use the pages: whoever has the token, under the server's own name, from its own pages.

The token is in the address that the command prints, and then in a cookie. The host's name is checked because a page of another site
may give its own name our address (DNS rebinding); the origin, because it may send forms here.
"""

import hmac
import secrets
import socket
from collections.abc import Iterable
from dataclasses import dataclass, field
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qsl, urlencode

from starlette.datastructures import Headers
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

TOKEN = "token"
_READING = {"GET", "HEAD"}
# No page loads anything from elsewhere, runs or is styled by what its own files do not hold, or is shown inside another page.
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self'; "
    "form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",  # with no-referrer, browsers do not name the origin of a form
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Access:
    """The names under which the server may be asked, and its token."""

    port: int
    hosts: frozenset[str]
    token: str = field(default_factory=lambda: secrets.token_urlsafe(24))

    @classmethod
    def for_address(cls, host: str, port: int) -> "Access":
        # The machine's own name is for servers that listen at every address.
        names = {host, socket.gethostname(), "localhost", "127.0.0.1", "::1"}
        return cls(port, frozenset(f"[{name}]:{port}" if ":" in name else f"{name}:{port}" for name in names))

    @property
    def cookie(self) -> str:
        # Browsers send cookies to every port of a host.
        return f"prefcache-{self.port}"

    def is_token(self, text: str) -> bool:
        return hmac.compare_digest(text.encode(), self.token.encode())


class Guard:
    """Let requests through to an application, or refuse them."""

    def __init__(self, application: ASGIApp, access: Access) -> None:
        self._application, self._access = application, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._application(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # there is nothing but pages
        response = self._check(scope)
        await (response or self._application)(scope, receive, _add_headers(send))

    def _check(self, scope: Scope) -> Response | None:
        """Return what to answer instead of a page, if anything."""
        headers, access = Headers(scope=scope), self._access
        if headers.get("host", "") not in access.hosts:
            return _refuse("This server answers under its own address only. Use the one that `prefcache ui` printed.")
        if scope["method"] not in _READING and not self._is_own_page(headers):
            return _refuse("Only this server's own pages may send this.")
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        tokens = [value for name, value in query if name == TOKEN]
        if tokens and scope["method"] in _READING and access.is_token(tokens[-1]):
            return self._enter(scope["path"], [(name, value) for name, value in query if name != TOKEN])
        if not access.is_token(_read_cookie(headers.get("cookie", ""), access.cookie)):
            return _refuse(
                "The token is missing or wrong. Open the address that `prefcache ui` printed, with its token."
            )
        return None

    def _is_own_page(self, headers: Headers) -> bool:
        origin = headers.get("origin", "")
        return origin.startswith("http://") and origin.removeprefix("http://") == headers.get("host")

    def _enter(self, path: str, query: Iterable[tuple[str, str]]) -> Response:
        """Put the token into a cookie, and take it out of the address, which ends up in histories."""
        # One slash: an address that begins with two names another host.
        response = RedirectResponse(
            "/" + path.lstrip("/") + (f"?{urlencode(rest)}" if (rest := list(query)) else ""), 303
        )
        response.set_cookie(self._access.cookie, self._access.token, httponly=True, samesite="strict")
        return response


def _refuse(reason: str) -> Response:
    return PlainTextResponse(f"{reason}\n", 403)


def _read_cookie(header: str, name: str) -> str:
    try:
        cookies = SimpleCookie(header)
    except CookieError:
        return ""
    return cookies[name].value if name in cookies else ""


def _add_headers(send: Send) -> Send:
    async def send_with_headers(message: Message) -> None:
        if message["type"] == "http.response.start":
            added = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
            message = {**message, "headers": [*message.get("headers", ()), *added]}
        await send(message)

    return send_with_headers
