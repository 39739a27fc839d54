"""What stands before all routes: whose requests are answered, and how large they may be.

A server on the loopback address can be reached by any page that a browser on this machine shows: by a form
that posts text/plain, or by a name that resolves to 127.0.0.1 (DNS rebinding). So there the Host header must
be one that is served, and a page of another origin is refused unless --cors names it.
"""

import dataclasses
import hmac
from collections.abc import Callable
from typing import Any

from jaxgpt_export.serve.api.answer import Message, Receive, Send
from jaxgpt_export.serve.api.api_error import ApiError

OPEN_PATHS = ("/", "/playground.css", "/playground.js", "/health", "/v1/health")  # without a key
LOOPBACK_NAMES = ("localhost", "127.0.0.1", "::1")
FORMS = ("text/plain", "multipart/form-data")  # what a page may post anywhere, and no client of an API does


@dataclasses.dataclass(frozen=True)
class Rules:
    """Who is answered.

    Attributes:
      host: that the server listens on.
      api_key: that clients send as a bearer token; None: anybody.
      cors: origins of pages that may read answers, such as https://example.com; * is any.
      body_bytes: that a request may have.
    """

    host: str
    api_key: str | None
    cors: tuple[str, ...]
    body_bytes: int

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine reaches the server."""
        return self.host in LOOPBACK_NAMES or self.host.startswith("127.")


class Guard:
    """An ASGI application before another one, which it calls for requests that may be answered.

    Args:
      app: the other one.
      rules: who is answered.
      refuse: answers a request of a path with an ApiError.
    """

    def __init__(self, app: Any, rules: Rules, refuse: Callable[[str, ApiError], Any]) -> None:
        self._app, self._rules, self._refuse = app, rules, refuse

    async def __call__(self, scope: Any, receive: Receive, send: Send) -> None:
        """Answer a request, or refuse it."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        headers = {
            name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]
        }
        origin = headers.get("origin")
        allowed = origin is not None and ("*" in self._rules.cors or origin in self._rules.cors)
        if allowed:
            send = _with_cors(send, str(origin), headers.get("access-control-request-headers", ""))
        try:
            self._check(scope, headers, origin if not allowed else None)
        except ApiError as error:
            return await self._refuse(scope["path"], error)(scope, receive, send)
        if allowed and scope["method"] == "OPTIONS":
            await send({"type": "http.response.start", "status": 204, "headers": []})
            return await send({"type": "http.response.body", "body": b""})
        return await self._app(scope, self._limited(receive), send)

    def _check(self, scope: Any, headers: dict[str, str], foreign: str | None) -> None:
        host = headers.get("host", "")
        if self._rules.is_loopback and _name_of(host) not in (*LOOPBACK_NAMES, self._rules.host):
            raise ApiError(
                403,
                f"the Host header is {host!r}, which is not served here; use {self._rules.host}",
                code="bad_host",
            )
        if foreign is not None and scope["method"] != "GET" and foreign.split("://")[-1] != host:
            raise ApiError(
                403,
                f"a page of {foreign} may not post here; allow it with --cors {foreign}",
                code="bad_origin",
            )
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if scope["method"] == "POST" and kind in FORMS:
            raise ApiError(403, f"the body is {kind}, expected application/json", code="bad_content_type")
        key = self._rules.api_key
        if key is not None and scope["path"] not in OPEN_PATHS and scope["method"] != "OPTIONS":
            scheme, _, given = headers.get("authorization", "").partition(" ")
            right = hmac.compare_digest(given.strip().encode("latin-1"), key.encode())
            if scheme.lower() != "bearer" or not right:
                raise ApiError(
                    401,
                    "the API key is missing or wrong; send it as: Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        length = headers.get("content-length", "0")
        if not length.isdigit() or int(length) > self._rules.body_bytes:
            raise self._too_large()

    def _limited(self, receive: Receive) -> Receive:
        taken = 0

        async def limited() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > self._rules.body_bytes:
                raise self._too_large()
            return message

        return limited

    def _too_large(self) -> ApiError:
        most = self._rules.body_bytes
        return ApiError(413, f"the body has more than {most} bytes, which are allowed", code="body_too_large")


def _name_of(host: str) -> str:
    """Return the name in a Host header, without the port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.rpartition(":")[0] if ":" in host else host


def _with_cors(send: Send, origin: str, asked: str) -> Send:
    """Return a send that allows a page's requests, with all headers it asks for: clients add some."""
    headers = [
        (b"access-control-allow-origin", origin.encode("latin-1")),
        (b"access-control-allow-headers", (asked or "authorization, content-type").encode("latin-1")),
        (b"access-control-allow-methods", b"GET, POST, OPTIONS"),
        (b"vary", b"origin, access-control-request-headers"),
    ]

    async def with_cors(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", []), *headers]}
        await send(message)

    return with_cors
