"""What stands around every route: security headers, counting, and errors that are told without their details."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

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

    def __init__(self, app: ASGIApp, answered: Callable[[str, int, float], None], paths: Collection[str]) -> None:
        """Stands around `app`.

        Args:
            app: what to guard.
            answered: told path, status and seconds of every answer.
            paths: the paths that are counted by name; all others count as one.
        """
        self._app, self._answered, self._paths = app, answered, frozenset(paths)

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

        try:
            await self._app(scope, receive, send_guarded)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._answered(path, status, time.monotonic() - start_s)
