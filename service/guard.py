"""What stands around every route: whom it answers, security headers, counting, and errors told without details."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.hosts import TrustedHosts
from service.uploads import Limits, Upload

HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",  # unless the route has its own
    "Cache-Control": "no-store",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
FAILED = 500


class Guard:
    """ASGI middleware; plain, since Starlette's base class hides from routes that their client left."""

    def __init__(
        self, app: ASGIApp, hosts: TrustedHosts, answered: Callable[[str, int, float], None], paths: Collection[str]
    ) -> None:
        """Stands around `app`.

        Args:
            app: what to guard.
            hosts: the names that requests may ask for.
            answered: told path, status and seconds of every answer.
            paths: the paths that are counted by name; all others count as one.
        """
        self._app, self._hosts, self._answered, self._paths = app, hosts, answered, frozenset(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on and adds to its answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start_s, status = time.monotonic(), FAILED

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        host = Headers(scope=scope).get("host", "")
        try:
            if self._hosts.trusts(host):
                await self._app(scope, receive, send_guarded)
            else:
                await Upload(Request(scope, receive), Limits()).drain()
                detail = f"no service is called {host[:100]!r} here; serve.py --trusted-hosts NAME lets it be"
                await JSONResponse({"detail": detail}, 400)(scope, receive, send_guarded)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._answered(path, status, time.monotonic() - start_s)
