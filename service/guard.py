"""What stands between the service and whoever connects: deadlines, whom it answers, security headers, counting.

A page of another site can make a browser send requests here and read the answers once its own name leads to this
machine (DNS rebinding). Its requests still say that name in their Host header, so only known names are answered.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable, Collection
from ipaddress import ip_address
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from service.uploads import Upload
from utils.errors import UserError

HEAD_TIMEOUT_S = 10.0  # for a request's head, from its first byte; for the first one from the connection on
STALLED_S = 30.0  # in which a client must have read something of its answer
MAX_CONNECTIONS = 512  # a process may often open no more than 1,024 files

LOCAL_HOSTS = ("127.0.0.1", "localhost", "::1")
LONGEST_NAME = 253

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


class Connection(H11Protocol):
    """One client's connection with the deadlines that uvicorn's own lacks, so that who only waits keeps nobody out.

    Where there are too many, the one that has waited longest without a request goes.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        super().__init__(*arguments, **keywords)
        self._head_deadline: asyncio.TimerHandle | None = None
        self._waits_since_s = time.monotonic()

    @property
    def waits(self) -> bool:
        """Whether no request is in progress: its head has not come as a whole yet, or it was answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:
        """Begins to wait for a request, in the place of another connection where there are too many."""
        super().connection_made(transport)
        self._set_deadline()
        # Many may come in one turn of the loop: one that was cut off is still listed, and must not be chosen again
        there = [one for one in self.connections if not one.transport.is_closing()]
        waiting = [one for one in there if one.waits and one is not self]
        if len(there) > MAX_CONNECTIONS and waiting:
            min(waiting, key=lambda one: one._waits_since_s).transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        """Ends the waiting."""
        super().connection_lost(error)
        self._drop_deadline()

    def data_received(self, data: bytes) -> None:
        """Takes bytes; the deadline for a head stays while it is incomplete, however many pieces come."""
        super().data_received(data)
        if not self.waits:
            self._drop_deadline()
        elif self._head_deadline is None:
            self._set_deadline()

    def on_response_complete(self) -> None:
        """Begins to wait for the next request, and sees to it that the answer is read."""
        self._waits_since_s = time.monotonic()
        super().on_response_complete()
        self._watch_answer(unread=0)

    def _set_deadline(self) -> None:
        self._head_deadline = self.loop.call_later(HEAD_TIMEOUT_S, self.timeout_keep_alive_handler)

    def _drop_deadline(self) -> None:
        if self._head_deadline is not None:
            self._head_deadline.cancel()
            self._head_deadline = None

    def _watch_answer(self, unread: int) -> None:
        """Cuts off a client that read nothing of its answer since `unread` bytes were left."""
        left = self.transport.get_write_buffer_size()
        if left and left == unread:
            self.transport.abort()
        elif left:
            self.loop.call_later(STALLED_S, self._watch_answer, left)


class TrustedHosts:
    """The names that requests may ask for."""

    def __init__(self, bound: Collection[str] = (), more: Collection[str] = ()) -> None:
        """Trusts this machine's own names.

        Args:
            bound: name and address that the service listens on. Where that is every address of the machine, all
                addresses are trusted: no name leads to another one.
            more: further names; `*` trusts all.

        Raises:
            UserError: one of `more` is no name.
        """
        for name in more:
            if (
                not 0 < len(name) <= LONGEST_NAME
                or not name.isascii()
                or not name.isprintable()
                or set(name) & {*"/ ,"}
            ):
                shown = name[:LONGEST_NAME]
                raise UserError(f"--trusted-hosts '{shown}': a name such as cam.example.org, or *, is expected.")
        self._names = {_name_of(name) for name in (*LOCAL_HOSTS, *bound, *more)}
        self._any_address = any(_is_address(name) and ip_address(name).is_unspecified for name in bound)

    def trusts(self, host: str) -> bool:
        """Says whether a Host header names one of them; the port does not matter. An empty one is trusted.

        Browsers always send it; what speaks HTTP/1.0, such as some load balancers' health checks, need not.
        """
        name = _name_of(host)
        return not name or name in self._names or "*" in self._names or (self._any_address and _is_address(name))


def _name_of(host: str) -> str:
    """Returns a Host header's name, without brackets and port."""
    host = host.strip().lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    name = host if host.count(":") > 1 else host.partition(":")[0]
    return name.rstrip(".")


def _is_address(name: str) -> bool:
    try:
        ip_address(name)
    except ValueError:
        return False
    return True


class Guard:
    """ASGI middleware around every route; plain, since Starlette's base class hides from routes that a client left."""

    def __init__(
        self,
        app: ASGIApp,
        hosts: TrustedHosts,
        answered: Callable[[str, int, float], None],
        paths: Collection[str],
        max_image_bytes: int,
        keys: Collection[bytes] = (),
        open_paths: Collection[str] = (),
    ) -> None:
        """Stands around `app`.

        Args:
            app: what to guard.
            hosts: the names that requests may ask for.
            answered: called with path, status and seconds of every answer.
            paths: the paths that are counted by name; all others count as one.
            max_image_bytes: see `Upload`.
            keys: of which requests must bring one; none asks for none.
            open_paths: what is answered without.
        """
        self._keys, self._open_paths = tuple(keys), frozenset(open_paths)
        self._app, self._hosts, self._answered, self._paths = app, hosts, answered, frozenset(paths)
        self._max_image_bytes = max_image_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Passes a request on and adds to its answer."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start_s, status = time.monotonic(), 500

        async def send_guarded(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        headers = Headers(scope=scope)
        host, refusal = headers.get("host", ""), None
        if not self._hosts.trusts(host):
            detail = f"no service is called {host[:100]!r} here; serve.py --trusted-hosts NAME allows it"
            refusal = JSONResponse({"detail": detail}, 400)
        elif self._keys and scope["path"] not in self._open_paths and not self._has_key(headers):
            detail = "a key is needed: send it in the header X-API-Key, or Authorization: Bearer KEY"
            refusal = JSONResponse({"detail": detail}, 401, {"WWW-Authenticate": "Bearer"})
        try:
            if refusal is None:
                await self._app(scope, receive, send_guarded)
            else:
                await Upload(Request(scope, receive), self._max_image_bytes).drain()
                await refusal(scope, receive, send_guarded)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._answered(path, status, time.monotonic() - start_s)

    def _has_key(self, headers: Headers) -> bool:
        """Says whether a request brings one of the keys; how long that takes tells nothing about them."""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = headers.get("x-api-key") or (bearer.strip() if scheme.lower() == "bearer" else "")
        return any([hmac.compare_digest(given.encode("utf-8"), key) for key in self._keys])
