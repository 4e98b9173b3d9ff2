"""Work beside the main thread: an iterator read ahead, and a consumer that lags behind, both of bounded length.

Errors on the other side are raised on this one, threads are joined on leaving the `with` block, also after Ctrl-C.
Threads suffice: decoding, encoding and inference all release Python's lock.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
_END = object()
_POLL_S = 0.1  # how often a full queue looks whether anybody is still reading


class ReadAhead(Generic[Item]):
    """Iterates over `source` in a thread of its own, at most `depth` items ahead of the reader.

    Use in a `with` block; leaving it stops the thread and closes `source` if that is a generator.
    """

    def __init__(self, source: Iterable[Item], depth: int = 4) -> None:
        """Prepares reading; the thread starts with the `with` block."""
        self._source = source
        self._queue: queue.Queue[Any] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._read, name="read-ahead", daemon=True)

    def __enter__(self) -> ReadAhead[Item]:
        """Starts reading."""
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        """Stops reading, wherever it is."""
        self._stopped.set()
        self._thread.join()

    def __iter__(self) -> Iterator[Item]:
        """Yields the source's items in order, then raises what the source raised, if it did."""
        while (item := self._queue.get()) is not _END:
            yield item
        if self._error is not None:
            raise self._error

    def _read(self) -> None:
        iterator = iter(self._source)
        try:
            for item in iterator:
                if not self._put(item):
                    break
        except BaseException as error:  # carried to the reader, whatever it is
            self._error = error
        finally:
            if hasattr(iterator, "close"):
                iterator.close()
            self._put(_END)

    def _put(self, item: Any) -> bool:
        """Waits for a free place; False once nobody reads any more."""
        while not self._stopped.is_set():
            try:
                self._queue.put(item, timeout=_POLL_S)
                return True
            except queue.Full:
                continue
        return False


class Background:
    """Calls `consume` with what is put, in order, in a thread of its own, at most `depth` calls behind.

    Use in a `with` block; leaving it waits until everything put has been consumed, then raises what `consume` raised,
    unless the block itself is failing.
    """

    def __init__(self, consume: Callable[..., None], depth: int = 4) -> None:
        """Prepares consuming; the thread starts with the `with` block."""
        self._consume = consume
        # Not a bounded `Queue`: Ctrl-C in the middle of its `put` can lose the news of the next item, which would then
        # never be consumed. A `SimpleQueue` cannot be interrupted, and here a semaphore's news come from the thread.
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._places = threading.Semaphore(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="background", daemon=True)

    def __enter__(self) -> Background:
        """Starts consuming."""
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_exception: object) -> None:
        """Waits for what was put, then raises the consumer's error."""
        self._queue.put(_END)
        self._thread.join()
        if self._error is not None and kind is None:
            raise self._error

    def put(self, *arguments: Any) -> None:
        """Hands a call's arguments over; waits while `depth` lie before them, and raises what `consume` raised."""
        if self._error is not None:
            raise self._error
        self._places.acquire()
        self._queue.put(arguments)

    def _work(self) -> None:
        while (arguments := self._queue.get()) is not _END:
            if self._error is None:  # after an error the queue is only emptied, so that nobody waits for a place
                try:
                    self._consume(*arguments)
                except BaseException as error:  # carried to whoever puts the next
                    self._error = error
            self._places.release()
