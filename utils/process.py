"""Threads, worker processes and signals.

An iterator read ahead and a consumer that lags behind, both bounded; a pool of processes that outlives neither its
parent nor Ctrl-C; SIGTERM and Ctrl-C as exceptions raised at a moment when no library swallows them.
"""

from __future__ import annotations

import contextlib
import math
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import takewhile
from multiprocessing.context import BaseContext
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
_END = object()
_POLL_S = 0.1  # how often a full queue looks whether anybody is still reading


class ReadAhead(Generic[Item]):
    """Iterates over `source` in a thread of its own, at most `depth` items ahead of the reader.

    Use in a `with` block; leaving it stops the thread and closes `source` if that is a generator. With `size_of`, which
    says how many bytes an item takes, those that wait take at most `max_bytes`, or are a single one.
    """

    def __init__(
        self,
        source: Iterable[Item],
        depth: int = 4,
        size_of: Callable[[Item], int] = lambda _: 0,
        max_bytes: float = math.inf,
    ) -> None:
        self._source, self._size_of, self._max_bytes = source, size_of, max_bytes
        self._queue: queue.Queue[Any] = queue.Queue(depth)
        self._waiting_bytes, self._taken = 0, threading.Condition()
        self._stopped = threading.Event()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._read, name="read-ahead", daemon=True)

    def __enter__(self) -> ReadAhead[Item]:
        self._thread.start()
        return self

    def __exit__(self, *_exception: object) -> None:
        """Stops reading, wherever it is."""
        self._stopped.set()
        self._thread.join()

    def __iter__(self) -> Iterator[Item]:
        """Yields the source's items in order, then raises what the source raised, if it did."""
        while (item := self._queue.get()) is not _END:
            with self._taken:
                self._waiting_bytes -= self._size_of(item)
                self._taken.notify()
            yield item
        if self._error is not None:
            raise self._error

    def _read(self) -> None:
        iterator = iter(self._source)
        try:
            for item in iterator:
                size = self._size_of(item)
                with self._taken:
                    while self._waiting_bytes and self._waiting_bytes + size > self._max_bytes:
                        if self._stopped.is_set():
                            return
                        self._taken.wait(_POLL_S)
                    self._waiting_bytes += size
                if not self._put(item):
                    break
        except BaseException as error:  # carried to the reader, whatever it is
            self._error = error
        finally:
            if hasattr(iterator, "close"):
                iterator.close()
            self._put(_END)

    def _put(self, item: Any) -> bool:
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
        self._consume = consume
        # Not a bounded `Queue`: Ctrl-C in the middle of its `put` can lose the news of the next item, which would then
        # never be consumed. A `SimpleQueue` cannot be interrupted, and here a semaphore's news come from the thread.
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._places = threading.Semaphore(depth)
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="background", daemon=True)

    def __enter__(self) -> Background:
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
            if self._error is None:  # else the queue is only emptied, so that nobody waits for a place
                try:
                    self._consume(*arguments)
                except BaseException as error:  # carried to whoever puts the next
                    self._error = error
            self._places.release()


REPETITION_S = 5.0  # launchers and service managers may send SIGTERM to a process and to its group
RAISING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGCHLD") if hasattr(signal, name)]


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which clusters and service managers ask a program to end: closes all that Ctrl-C would."""


@contextlib.contextmanager
def sigterm_raised() -> Iterator[None]:
    """Lets SIGTERM raise `Terminated` in the main thread, unless the caller answers it in another way.

    Its repetitions do not disturb what is being closed then; forked processes end at once and quietly.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    process, counts_from = os.getpid(), -math.inf

    def answer(*_: Any) -> None:
        nonlocal counts_from
        if os.getpid() != process:
            _leave()
        if time.monotonic() > counts_from:
            counts_from = time.monotonic() + REPETITION_S
            raise Terminated

    signal.signal(signal.SIGTERM, answer)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def defer_signals() -> Iterator[None]:
    """Lets signals that raise wait until the body is done, where it would swallow what they raise.

    Forking does, for Python ignores exceptions in its preparations; and so does the end of torch's workers, in a
    `__del__`. The signals are Ctrl-C, SIGTERM, and SIGCHLD, by which torch learns that a worker was killed. Blocking
    them would not do: another thread of the process would take them.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    arrived: list[int] = []

    def note(number: int, _: Any) -> None:
        arrived.append(number)

    known = [number for number in RAISING if signal.getsignal(number) is not None]  # None: not set from Python
    former = {number: signal.signal(number, note) for number in known}
    try:
        yield
    finally:
        for number, answer in former.items():
            if signal.getsignal(number) is note:  # unless the body has set its own
                signal.signal(number, answer)
        for number in arrived:
            signal.raise_signal(number)


def leave_signals_to_parent() -> None:
    """Makes this worker process deaf to Ctrl-C, and lets SIGTERM end it without a word."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave)


def _leave(*_: Any) -> None:
    os._exit(0)  # any other status would be an error in the process that started this one


Part = TypeVar("Part")

_over: Any = None  # in a worker: not 0 once the results are not wanted any more


def process_map(
    task: Callable[[Iterable[str]], Part],
    chunks: Sequence[Sequence[str]],
    workers: int,
    context: BaseContext | None = None,
) -> Iterator[Part]:
    """Yields what `task` makes of each chunk of paths, in order.

    Args:
        task: a function of a module, which takes one path after the other.
        chunks: of paths.
        workers: how many processes; 0 or 1 do it in this one.
        context: how processes are started; the system's own way by default.

    Raises:
        BrokenProcessPool: a process was killed; see `utils.errors`.
    """
    if workers <= 1:
        yield from map(task, chunks)
        return
    context = context or multiprocessing.get_context()
    over = context.RawValue("b", 0)  # without a lock, which a process that is killed would keep
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(over,)) as pool:
        try:
            with defer_signals():  # it starts processes
                parts = [pool.submit(_do_while_wanted, task, chunk) for chunk in chunks][::-1]
            while parts:
                yield parts.pop().result()
        finally:
            over.value = 1
            # `pool.map` would cancel its parts one by one, over which the pool stumbles if workers end at that moment.
            pool.shutdown(cancel_futures=True)


def _start_worker(over: Any) -> None:
    import cv2

    global _over
    leave_signals_to_parent()
    _over = over
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    cv2.setNumThreads(0)


def _leave_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)  # else it would wait for ever for the next task


def _do_while_wanted(task: Callable[[Iterable[str]], Part], paths: Sequence[str]) -> Part:
    return task(takewhile(lambda _: not _over.value, paths))
