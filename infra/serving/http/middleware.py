"""What every request passes: a name for it, headers that keep browsers strict, and a count.

It owns those and the rule that a server without keys answers its own machine's pages only; it knows nothing of routes.
"""

import ipaddress
import re
import uuid
from collections.abc import Collection, Iterable
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from infra.serving.http.errors import ApiError, shown
from monitoring import metrics
from monitoring.logs import bound

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,128}")
PROBED = ("/health", "/ready", "/metrics")
"""Asked by address, by kubelets and scrapers that send whatever Host they have."""
STRICT = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cache-control": "no-store",
}
"""Where an answer does not say otherwise."""


class NameAndCount:
    """Every answer bears `x-request-id`, the client's own if it is one; counts answers by route template."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"

        async def named(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in STRICT.items():
                    headers.setdefault(name, value)
                route = getattr(scope.get("route"), "path", "none")
                method = scope["method"] if scope["method"] in METHODS else "other"
                metrics.HTTP_REQUESTS_TOTAL.labels(route, method, str(message["status"])).inc()
            await send(message)

        with bound(request_id=request_id):
            await self.app(scope, receive, named)


METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


class OwnPagesOnly:
    """Where no key is asked for, a foreign page in the user's browser must not reach the server.

    A Host header that is not ours is a name rebound to this machine; an Origin that is not the Host is another page.
    """

    def __init__(self, app: ASGIApp, *, hosts: Collection[str]) -> None:
        self.app = app
        self.hosts = frozenset({"localhost", *hosts})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope) if scope["type"] == "http" and scope["path"] not in PROBED else None
        if refusal is None:
            await self.app(scope, receive, send)
        else:
            await refusal.response()(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        host = headers.get("host", "")
        if not self._is_own(_host_name(host)):
            return ApiError(
                403,
                f"Host '{shown(host)}' is not this server; without API keys it answers to loopback names only"
                " (allowed_hosts names others)",
                code="unknown_host",
            )
        if any(origin != f"{scope['scheme']}://{host}" for origin in _origins(headers)):
            return ApiError(
                403, "a page of another site may not use a server without API keys", code="cross_site_request"
            )
        return None

    def _is_own(self, name: str) -> bool:
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return name in self.hosts


def _origins(headers: Headers) -> Iterable[str]:
    return [value for value in headers.getlist("origin")]


def _host_name(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
