"""Who may come in: Host, Origin, then the API key. Runs in: trio; owns: nothing but settings.

Every request passes here before it is routed. All routes are closed but those handed over as open, and which route a
request means is asked of the router itself, never guessed from a path or a URL put together again.
"""

import hashlib
import hmac
import ipaddress
import re
from collections.abc import Iterable, Sequence
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.routing import BaseRoute, Match
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from edgekv.http.errors import ApiError
from edgekv.http.settings import ApiKey, HttpSettings

_HOST = re.compile(r"(?P<name>\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::(?P<port>[0-9]{1,5}))?")
_ORIGIN = re.compile(r"https?://(?P<authority>[^/?#@\s]+)", re.ASCII)
# Control characters and U+FFFD, which escapes that are not UTF-8 decode to: a pattern's `$` lets a final newline pass.
_ODD_IN_PATH = re.compile("[\x00-\x1f\x7f\ufffd]")
_WILDCARDS = ("", "0.0.0.0", "::")


class Gate:
    """Pure ASGI middleware; puts the caller's `ApiKey | None` into `scope["state"]["caller"]`."""

    def __init__(self, app: ASGIApp, *, settings: HttpSettings, open_routes: Sequence[BaseRoute]) -> None:
        self._app = app
        self._open_routes = tuple(open_routes)
        self._bound_to_any = settings.host in _WILDCARDS
        self._host_names = frozenset(_host_names([settings.host, *settings.allowed_hosts]))
        self._origins = frozenset(origin.lower().rstrip("/") for origin in settings.allowed_origins)
        self._keys = tuple((key, _digest(key.key.encode())) for key in settings.api_keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let one request pass, or answer it here."""
        if scope["type"] != "http":
            return
        try:
            if _ODD_IN_PATH.search(scope["path"]):
                raise ApiError(400, "The path holds what no path of ours does.", code="invalid_path")
            headers = Headers(scope=scope)
            host = self._check_host(headers)
            origin = self._check_origin(headers, host)
            if origin is not None:
                send = _with_cors(send, origin)
                if scope["method"] == "OPTIONS":
                    await _preflight()(scope, receive, send)
                    return
            if not self._is_open(scope):
                scope.setdefault("state", {})["caller"] = self._caller(headers, scope.get("client"))
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check_host(self, headers: Headers) -> str:
        hosts = headers.getlist("host")
        match = _HOST.fullmatch(hosts[0]) if len(hosts) == 1 else None
        if match is None:
            raise ApiError(400, "The Host header is missing or malformed.", code="invalid_host")
        name = match["name"].lower().rstrip(".")
        if "*" in self._host_names or name in self._host_names or is_loopback(name):
            return hosts[0].lower()
        if self._bound_to_any and _ip(name) is not None:
            return hosts[0].lower()  # a page that rebinds a name to our address cannot send the address as its Host
        raise ApiError(403, "This Host is not allowed; add its name to server.allowed_hosts.", code="host_not_allowed")

    def _check_origin(self, headers: Headers, host: str) -> str | None:
        origins = headers.getlist("origin")
        if not origins:
            return None
        origin = origins[0].lower()
        match = _ORIGIN.fullmatch(origin)
        same = match is not None and match["authority"] == host
        if len(origins) == 1 and (same or origin in self._origins or "*" in self._origins):
            return origins[0]
        raise ApiError(
            403, "Pages of this Origin are not allowed; add it to server.allowed_origins.", code="origin_not_allowed"
        )

    def _is_open(self, scope: Scope) -> bool:
        return any(route.matches(scope)[0] is Match.FULL for route in self._open_routes)

    def _caller(self, headers: Headers, client: Any) -> ApiKey | None:
        if not self._keys:
            if client is not None and is_loopback(client[0]):
                return None
            raise ApiError(
                401, "Without server.api_keys only this machine may use the server.", code="api_key_required"
            )
        values = [value for name, value in headers.raw if name == b"authorization"]
        scheme, _, given = values[0].partition(b" ") if len(values) == 1 else (b"", b"", b"")
        digest, found = _digest(given.strip()), None
        # Every key is compared, each in constant time: how long this takes says nothing about any of them.
        for key, expected in self._keys:
            if hmac.compare_digest(digest, expected):
                found = key
        if scheme.lower() != b"bearer" or found is None:
            message = "Incorrect API key provided." if values else "You didn't provide an API key."
            message += " Send it as 'Authorization: Bearer KEY'."
            raise ApiError(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})
        return found


def is_loopback(name: str) -> bool:
    """Whether a host name or address can only mean this machine."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    address = _ip(name)
    if isinstance(address, ipaddress.IPv6Address) and address.ipv4_mapped is not None:
        address = address.ipv4_mapped
    return address is not None and address.is_loopback


def _ip(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return None


def _host_names(hosts: Iterable[str]) -> Iterable[str]:
    for host in hosts:
        if host not in _WILDCARDS:
            yield host.lower()
            yield f"[{host.lower()}]"


def _digest(key: bytes) -> bytes:
    # Equal lengths: compare_digest hides where two strings differ, not how long they are.
    return hashlib.sha256(key).digest()


def _preflight() -> Response:
    return Response(
        status_code=204,
        headers={
            "access-control-allow-methods": "GET, POST",
            # All but credentials: the official client for browsers sends a dozen x-stainless-* headers of its own.
            "access-control-allow-headers": "authorization, *",
            "access-control-max-age": "600",
        },
    )


def _with_cors(send: Send, origin: str) -> Send:
    async def send_with_cors(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["access-control-allow-origin"] = origin
            headers["access-control-expose-headers"] = "retry-after"
            headers.add_vary_header("origin")
        await send(message)

    return send_with_cors
