"""Checks before every route: Host, Origin, key, rate limit. Also limits on slow connections and on their number."""

import asyncio
import base64
import hashlib
import hmac
import json
import math
import re
import time
from contextlib import suppress

import h11
from starlette.datastructures import Headers
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from strawberry.common import show
from strawberry.serving.errors import ApiError
from strawberry.serving.metrics import Metrics
from strawberry.serving.settings import Settings


class SecurityMiddleware:
    """Checks before every route: the Host header (against DNS rebinding), the Origin header (against requests from
    other sites' pages), the key, and the rate limit. Also counts requests.

    The key is sent as `Authorization: Bearer KEY`, or as the password of Basic authentication, for which a browser
    asks.
    """

    HEADERS = (  # a browser loads no content from other sites into a response, and shows it in no frame
        (b"x-content-type-options", b"nosniff"), (b"x-frame-options", b"DENY"), (b"referrer-policy", b"same-origin"),
        (b"content-security-policy", b"default-src 'self' 'unsafe-inline'; img-src 'self' data: blob:"),
    )  # fmt: skip

    def __init__(self, app: ASGIApp, settings: Settings, metrics: Metrics, open_paths: set[str]):
        self.app, self.settings, self.metrics, self.open = app, settings, metrics, open_paths
        self.rate = RateLimiter(self.settings.rate)
        names = ("localhost", "127.0.0.1", "::1", self.settings.host, *self.settings.allow_host)
        self.names = {name.lower() for name in names}
        self.cors = CrossOrigin(self.settings.allow_origin)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        origin_headers = self.cors.headers(scope)
        with self.metrics.request(scope) as statuses:

            async def send_with_headers(message: dict) -> None:
                if message["type"] == "http.response.start":
                    statuses.append(message["status"])
                    message["headers"] = [*message.get("headers", ()), *self.HEADERS, *origin_headers]
                await send(message)

            try:
                self.check_names(scope)
                if preflight := self.cors.preflight(scope):
                    await preflight(scope, receive, send_with_headers)
                    return
                self.check_key(scope)
            except ApiError as error:
                await error.response()(scope, receive, send_with_headers)
            else:
                await self.app(scope, receive, send_with_headers)

    def check_names(self, scope: Scope) -> None:
        """Raises ApiError if the Host is not this server's, or the Origin neither this server's nor an allowed one."""
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        named = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([a-zA-Z0-9_.-]+))(?::\d+)?", host)
        name = (named[1] or named[2]).lower() if named else None
        if name not in self.names and (not scope["server"] or name != scope["server"][0]):
            raise ApiError(403, f"Host is {show(host)}, which is no name of this server; start it with --allow_host "
                           "NAME to make it one", "Host")  # fmt: skip
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}", *self.cors.origins):
            raise ApiError(403, f"Origin is {show(origin)}: pages of other sites may not use this server; start it "
                           "with --allow_origin ORIGIN to let them", "Origin")  # fmt: skip

    def check_key(self, scope: Scope) -> None:
        """Raises ApiError if the rate is exceeded, or the key is missing or wrong."""
        headers = Headers(scope=scope)
        if scope["path"] in self.open:
            return
        key = self.key(headers.get("authorization", ""))
        self.rate.acquire(key or (scope["client"] or ("",))[0])
        if self.settings.api_key and key is None:
            raise ApiError(401, "the key is missing or wrong; send it as Authorization: Bearer KEY", "Authorization",
                           "invalid_api_key", {"WWW-Authenticate": 'Basic realm="strawberry"'})  # fmt: skip

    def key(self, authorization: str) -> str | None:
        """The valid key in an Authorization header, or None. The comparison takes constant time, and all keys are
        compared.
        """
        scheme, _, given = authorization.partition(" ")
        given, said = given.strip().encode("latin-1", "replace"), b""
        if scheme.lower() == "bearer":
            said = given
        elif scheme.lower() == "basic":
            with suppress(ValueError):
                said = base64.b64decode(given, validate=True).partition(b":")[2]
        same = [hmac.compare_digest(sha256(said), sha256(key.encode())) for key in self.settings.api_key]
        return next((key for key, is_it in zip(self.settings.api_key, same, strict=True) if is_it), None)


class CrossOrigin:
    """CORS for the origins of --allow_origin: what a browser asks for before it lets their pages read an answer.
    Requests carry the key themselves; credentials that a browser adds are not allowed.
    """

    def __init__(self, origins: list[str]):
        self.origins = frozenset(origins)

    def headers(self, scope: Scope) -> list[tuple[bytes, bytes]]:
        """The headers of every answer: none names an origin that is not allowed."""
        if not self.origins:
            return []
        found, origin = [(b"vary", b"Origin")], Headers(scope=scope).get("origin")
        if origin in self.origins:
            found += [(b"access-control-allow-origin", origin.encode("latin-1")),
                      (b"access-control-expose-headers", b"Retry-After, x-should-retry")]  # fmt: skip
        return found

    def preflight(self, scope: Scope) -> Response | None:
        """The answer to a preflight request of an allowed origin, which carries no key; None for other requests."""
        headers = Headers(scope=scope)
        asks = scope["method"] == "OPTIONS" and "access-control-request-method" in headers
        if not asks or headers.get("origin") not in self.origins:
            return None
        allowed = {"Access-Control-Allow-Methods": "GET, POST, DELETE", "Access-Control-Max-Age": "600",
                   "Access-Control-Allow-Headers": "Authorization, *"}  # fmt: skip
        if headers.get("access-control-request-private-network") == "true":  # from a public page to this machine
            allowed["Access-Control-Allow-Private-Network"] = "true"
        return Response(status_code=204, headers=allowed)


def sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


class RateLimiter:
    """A token bucket for each name: `per_minute` requests a minute, with bursts of up to a tenth of that."""

    def __init__(self, per_minute: int):
        self.per_second, self.burst = per_minute / 60, max(1.0, per_minute / 10)
        self.remaining: dict[str, tuple[float, float]] = {}  # name → (requests left, time of that count)

    def acquire(self, name: str) -> None:
        if not self.per_second:
            return
        now = time.monotonic()
        left, then = self.remaining.get(name, (self.burst, now))
        left = min(self.burst, left + (now - then) * self.per_second)
        if left < 1:
            wait = math.ceil((1 - left) / self.per_second)
            raise ApiError(429, f"more than {self.per_second * 60:.0f} requests a minute (--rate); come again "
                           f"in {wait} s", code="rate_limit_exceeded", headers={"Retry-After": str(wait)})  # fmt: skip
        if len(self.remaining) > 10_000:  # names may be arbitrary addresses: remove those with a full bucket
            self.remaining = {
                n: (k, t) for n, (k, t) in self.remaining.items() if k + (now - t) * self.per_second < self.burst
            }
        self.remaining[name] = (left - 1, now)


class HttpProtocol(H11Protocol):
    """A connection. It is closed if the headers of its next request are not complete after HEADER_SECONDS, or if there
    are more than MAX_CONNECTIONS.
    """

    HEADER_SECONDS, MAX_CONNECTIONS = 20, 1000
    slow: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:
        super().connection_made(transport)
        self.watch()
        if len(self.connections) > self.MAX_CONNECTIONS:
            transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self.unwatch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.cycle is None or self.cycle.response_complete:
            self.watch()
        else:
            self.unwatch()

    def watch(self) -> None:
        self.slow = self.slow or self.loop.call_later(self.HEADER_SECONDS, self.too_slow)

    def unwatch(self) -> None:
        if self.slow is not None:
            self.slow.cancel()
            self.slow = None

    def too_slow(self) -> None:
        self.slow = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(ApiError(400, "this is no HTTP request").body()).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
                   (b"connection", b"close")]  # fmt: skip
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()
