"""Connections with the deadlines that uvicorn's own lack, so that clients who only wait keep nobody else out."""

from __future__ import annotations

import asyncio
import time
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_TIMEOUT_S = 10.0  # for a request's head, from its first byte; for the first one from the connection on
STALLED_S = 30.0  # in which a client must have read something of its answer
MAX_CONNECTIONS = 512  # a process may often open no more than 1,024 files


class Connection(H11Protocol):
    """One client's connection. Where there are too many, the one that has waited longest without a request goes."""

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
