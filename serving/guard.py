"""What is turned away before it reaches a handler: foreign hosts and origins, no key, bodies and heads that drag on."""

import asyncio
import hmac
import ipaddress
import json
from urllib.parse import urlsplit

from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from serving.protocol import ApiError

HEAD_SECONDS = 10  # for a request's head to come
BODY_SECONDS = 20  # for its body
TAKE_SECONDS = 60  # for a client to take what was sent, where that has filled the buffers
MOST_CONNECTIONS = 512
POLICY = (  # of the page: its own files and nothing inline, and no text may become HTML or code
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types"
)
HEADERS = {
    "content-security-policy": POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


def is_loopback(host: str) -> bool:
    address = _address(host)
    return host.lower() == "localhost" or (address is not None and address.is_loopback)


def _address(host: str):
    try:
        return ipaddress.ip_address(host.strip("[]"))
    except ValueError:
        return None


def name_in(netloc: str) -> str:
    """The host of host:port, in lower case; "" where it is none."""
    try:
        return (urlsplit(f"//{netloc}").hostname or "") if "@" not in netloc and "/" not in netloc else ""
    except ValueError:
        return ""


class Guard:
    """ASGI middleware that checks Host, Origin and key, and adds HEADERS to every response.

    A page elsewhere can have its name resolved to this address (DNS rebinding), but not change the Host that a browser
    sends. So a Host must be a name of this server's: localhost, an address (on a loopback server a loopback one), or
    one of `names`. An Origin may be one of those at another port: of a proxy in front, which sends a Host of its own.
    """

    def __init__(self, app, host: str, names: list[str], api_key: str | None):
        self.app, self.api_key = app, api_key
        self.loopback, self.host, self.names = is_loopback(host), host.lower(), {name.lower() for name in names}

    async def __call__(self, scope, receive, send):
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)

        async def guarded(message):
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *own]
            await send(message)

        try:
            self.check(scope["path"], [(name.decode(), value.decode("latin-1")) for name, value in scope["headers"]])
        except ApiError as error:
            return await send_json(guarded, error)
        await self.app(scope, receive, guarded)

    def check(self, path: str, headers: list[tuple[str, str]]) -> None:
        """ApiError for a request that is not answered."""
        hosts, origins, keys = ([value for name, value in headers if name == wanted]
                                for wanted in ("host", "origin", "authorization"))  # fmt: skip
        if len(hosts) != 1 or not self.is_own(name_in(hosts[0])):
            shown = hosts[0][:100] if hosts else ""
            raise ApiError(f"Host {shown!a} is no name of this server: see --allowed_hosts", 403, code="wrong_host")
        origin = urlsplit_host(origins[0]) if len(origins) == 1 else ""
        if origins and (not origin or origin != hosts[0].lower() and name_in(origin) not in self.names):
            raise ApiError(f"Origin {origins[0][:100]!a} is another site", 403, code="wrong_origin")
        if self.api_key is not None and path.startswith(("/v1/", "/api/")):
            given = keys[0].partition(" ") if len(keys) == 1 else ("", "", "")
            right = hmac.compare_digest(given[2].strip().encode("latin-1"), self.api_key.encode())
            if given[0].lower() != "bearer" or not right:
                raise ApiError("Authorization: Bearer with the --api_key is needed", 401, code="invalid_api_key")

    def is_own(self, name: str) -> bool:
        address = _address(name)
        own_address = address is not None and (address.is_loopback or not self.loopback)
        return bool(name) and (name in {"localhost", self.host, *self.names} or own_address)


def urlsplit_host(origin: str) -> str:
    """host:port of an origin, in lower case; "" of null and other schemes."""
    scheme, _, netloc = origin.lower().partition("://")
    return netloc if scheme in ("http", "https") else ""


async def send_json(send, error: ApiError) -> None:
    body = json.dumps(error.body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send(dict(type="http.response.start", status=error.status, headers=headers))
    await send(dict(type="http.response.body", body=body))


async def read_body(request, limit: int) -> bytes:
    """The body of a Starlette request of JSON; ApiError where it is of another type, too large or too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":  # which a form on another site cannot send
        raise ApiError("Content-Type: application/json is needed", 415)
    length = request.headers.get("content-length", "0")
    too_large = ApiError(f"the body is larger than {limit:,} bytes", 413)
    if not length.isdigit() or int(length[:20]) > limit:
        raise too_large

    async def collect():
        body = bytearray()
        async for part in request.stream():
            body += part
            if len(body) > limit:
                raise too_large
        return bytes(body)

    try:
        return await asyncio.wait_for(collect(), BODY_SECONDS)
    except ClientDisconnect:
        raise ApiError("the client left before its body was here", 499) from None  # nginx's number; nobody reads it
    except asyncio.TimeoutError:
        raise ApiError(f"the body did not come within {BODY_SECONDS} seconds", 408) from None


class Impatient(H11Protocol):
    """uvicorn's HTTP, which by itself waits without end for a head, and for a client to take what is sent."""

    def connection_made(self, transport):
        super().connection_made(transport)
        self.head = self.loop.call_later(HEAD_SECONDS, self.late)
        self.taking = None
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()

    def data_received(self, data):
        super().data_received(data)
        between = self.cycle is None or self.cycle.response_complete
        if not between and self.head:
            self.head.cancel()
            self.head = None
        elif between and not self.head:  # the head of the next request has begun
            self.head = self.loop.call_later(HEAD_SECONDS, self.late)

    def connection_lost(self, exc):
        for timer in filter(None, (self.head, self.taking)):
            timer.cancel()
        super().connection_lost(exc)

    def late(self):
        if not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
            self.transport.close()

    def pause_writing(self):
        super().pause_writing()
        self.taking = self.loop.call_later(TAKE_SECONDS, self.transport.abort)

    def resume_writing(self):
        super().resume_writing()
        if self.taking:
            self.taking.cancel()
            self.taking = None
