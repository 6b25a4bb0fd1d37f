"""Refuses requests that do not come from the page itself (other hosts or origins), and bodies that are too large.

DNS rebinding shows as a foreign Host, a request from another page as a foreign Origin or Sec-Fetch-Site.
"""

from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOCAL = ("localhost", "127.0.0.1", "::1")
LARGEST_BODY = 1 << 20  # bytes of a request that is not an upload
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "cache-control": "no-store",
}


class Guard:
    """ASGI middleware around the whole application.

    Args:
        app: the application to guard.
        hosts: host names under which the page is served, without port.
        limits: path -> largest body in bytes; `LARGEST_BODY` for others.
    """

    def __init__(self, app: ASGIApp, hosts: frozenset[str], limits: dict[str, int] | None = None):
        self.app, self.hosts, self.limits = app, hosts, limits or {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            return  # web sockets are not accepted, so the server closes them
        send = with_headers(send)
        limit = self.limits.get(scope["path"], LARGEST_BODY)
        if found := refusal(Headers(scope=scope), scope["method"], scope["path"], self.hosts, limit):
            status, sentence = found
            await JSONResponse({"detail": sentence}, status)(scope, receive, send)
            return
        await self.app(scope, limited(receive, limit), send)


def refusal(headers: Headers, method: str, path: str, hosts: frozenset[str], limit: int) -> tuple[int, str] | None:
    """The status and sentence of a refused request; None if it is allowed.

    Args:
        headers: of the request.
        method: such as GET.
        path: of the request.
        hosts: see `Guard`.
        limit: largest body in bytes.
    """
    host = headers.get("host", "")
    if len(headers.getlist("host")) != 1 or host_name(host) not in hosts:
        return 403, "the page is not served under this host name: start tools/serve.py with --name NAME"
    origin = headers.get("origin")
    if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
        return 403, "the request comes from another page"
    # other pages may link to this one
    opened = method == "GET" and path == "/" and headers.get("sec-fetch-mode") == "navigate"
    if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not opened:
        return 403, "the request comes from another page"
    length = headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit()) or int(length[:20]) > limit:
        return 413, f"the request is larger than {limit:,} bytes"
    return None


def host_name(host: str) -> str | None:
    """The name in `name:port`, in lower case; None if it is not a host."""
    try:
        parts = urlsplit(f"//{host}")
        return None if parts.username is not None or parts.path or parts.query else parts.hostname
    except ValueError:
        return None


def limited(receive: Receive, limit: int) -> Receive:
    """`receive` with an error beyond `limit` bytes, for bodies without a Content-Length."""
    size = 0

    async def counted() -> Message:
        nonlocal size
        message = await receive()
        size += len(message.get("body", b""))
        if size > limit:
            raise HTTPException(413, f"the request is larger than {limit:,} bytes")
        return message

    return counted


def with_headers(send: Send) -> Send:
    """`send` that adds `HEADERS` to every response."""

    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in HEADERS.items():
                headers[name] = value
        await send(message)

    return sent
