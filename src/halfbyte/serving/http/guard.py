"""Who may ask, and how much: before a request is read any further.

Why: a page of any site can make its reader's browser ask 127.0.0.1, under that name (then `Origin` tells) or, by DNS
rebinding, under one of its own (then `Host` tells). A `Host` that is an address cannot be rebound.
It may also send a form or text without asking this server first (Fetch's "CORS-safelisted" content types), but not
JSON. No type at all is what some scripts send (LiteLLM, as to Ollama), and what a page may send from a Blob; browsers
then say that they are one, in `Origin` or `Sec-Fetch-Site`.
What: Host, Origin, content type and key are checked; a body has to come within a time and stay within a size; answers
carry the headers that keep browsers from guessing and framing. Only then the application runs, which sees all of it.
Source: https://fetch.spec.whatwg.org (bodies, Origin); https://w3c.github.io/webappsec-fetch-metadata
"""

import asyncio
import hmac
import ipaddress
import re
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from types import MappingProxyType

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from halfbyte.serving.http.refusal import Json, Refusal
from halfbyte.serving.settings import Settings

_DRAINED = 8  # times the limit
BODY_S, AT_ONCE = 20.0, 512  # seconds that a body may take, requests
# pages, of which a studio has some: nothing of a model, nothing that was asked
OPEN = re.compile(r"(/ask/[\w-]+)?/((page|parts|tip|studio)\.js|style\.css)?|/health")
_HEADERS = MappingProxyType({
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
})  # fmt: skip


@dataclass
class Guard:
    app: ASGIApp
    settings: Settings
    inside: int = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        self.inside += 1
        try:
            self._check(scope)
            below = self.settings.uploads
            upload = below is not None and scope["method"] == "PUT" and scope["path"].startswith(below)
            passed = receive if upload else _replayed(await self._body(scope, receive), receive)
        except Refusal as refusal:
            ours = self.settings.uploads is not None  # of a studio, not Ollama's
            await Json.of(refusal, "" if ours else scope["path"], close=True)(scope, receive, with_headers)
        else:
            await self.app(scope, passed, with_headers)
        finally:
            self.inside -= 1

    def _check(self, scope: Scope) -> None:
        headers, key = Headers(scope=scope), self.settings.key
        if self.inside > AT_ONCE:
            raise Refusal(429, "too many requests at once.", kind="rate_limit_error", code="too_many_requests",
                          headers={"Retry-After": "1"})  # fmt: skip
        hosts = headers.getlist("host")
        if len(hosts) != 1 or not self._is_ours(hosts[0]):
            raise Refusal(421, "this name is not served here; start with --allow-host NAME", code="wrong_host")
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{hosts[0]}", f"https://{hosts[0]}"):
            raise Refusal(403, "pages of other sites may not ask this server.", code="wrong_origin")
        if key is not None and OPEN.fullmatch(scope["path"]) is None:
            given = headers.get("authorization", "").encode()
            if not hmac.compare_digest(given, f"Bearer {key}".encode()):
                raise Refusal(401, "a key is required: Authorization: Bearer KEY", code="invalid_api_key",
                              headers={"WWW-Authenticate": "Bearer"})  # fmt: skip
        kind = headers.get("content-type")
        absent = kind is None and origin is None and "sec-fetch-site" not in headers
        is_json = (kind or "").partition(";")[0].strip().lower() == "application/json"
        if scope["method"] == "POST" and not (is_json or absent):
            raise Refusal(415, "Content-Type has to be application/json.", code="wrong_content_type")

    def _is_ours(self, host: str) -> bool:
        name = host.rsplit(":", 1)[0] if not host.endswith("]") else host
        name = name.strip("[]").lower().rstrip(".")
        if name in ("localhost", self.settings.host.lower(), *self.settings.hosts):
            return True
        with suppress(ValueError):
            return bool(ipaddress.ip_address(name))
        return False

    async def _body(self, scope: Scope, receive: Receive) -> bytes:
        limit = self.settings.body_bytes
        too_large = Refusal(413, f"the body is larger than {limit:,} bytes.", code="body_too_large")
        parts, size = list[bytes](), 0
        try:
            async with asyncio.timeout(BODY_S):
                while True:
                    message = await receive()
                    if message["type"] != "http.request":
                        raise Refusal(400, "the client has gone.", code="gone")
                    part = message.get("body", b"")
                    size += len(part)
                    if size <= limit:
                        parts.append(part)
                    else:  # some more is read and dropped: who is still sending would not see the answer
                        parts.clear()
                    ended = not message.get("more_body", False)
                    if size > limit and (ended or size > _DRAINED * limit):
                        raise too_large
                    if ended:
                        return b"".join(parts)
        except TimeoutError:
            raise Refusal(408, f"the body did not come within {BODY_S:g} s.", code="body_too_slow",
                          headers={"X-Should-Retry": "false"}) from None  # fmt: skip


def _replayed(body: bytes, receive: Receive) -> Receive:
    """The body once more, then what comes after it: that the client is gone."""
    first: list[Mapping[str, object]] = [{"type": "http.request", "body": body, "more_body": False}]

    async def again() -> Message:
        return dict(first.pop()) if first else await receive()

    return again
