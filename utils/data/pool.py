"""Processes that share out a long look through files, and that never outlive the program's wish for it.

They leave Ctrl-C and SIGTERM to the process that started them, end with the file that they are at once nobody waits
for their results, and end with that process even if it is killed.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import takewhile
from multiprocessing.context import BaseContext
from typing import Any, TypeVar

from utils.signals import leave_signals_to_parent, signals_held_back

Part = TypeVar("Part")

_over: Any = None  # in a worker: not 0 once the results are not wanted any more


def over_processes(
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
        BrokenProcessPool: a process was killed; see `utils.limits`.
    """
    if workers <= 1:
        yield from map(task, chunks)
        return
    context = context or multiprocessing.get_context()
    over = context.RawValue("b", 0)  # without a lock, which a process that is killed would keep
    with ProcessPoolExecutor(workers, context, initializer=_start_worker, initargs=(over,)) as pool:
        try:
            with signals_held_back():  # it starts processes
                parts = [pool.submit(_do_while_wanted, task, chunk) for chunk in chunks][::-1]
            while parts:
                yield parts.pop().result()
        finally:
            over.value = 1
            # `pool.map` would cancel its parts one by one, over which the pool stumbles if workers end at that moment.
            pool.shutdown(cancel_futures=True)


def _start_worker(over: Any) -> None:
    """Prepares a worker: signals are the parent process's to answer, and OpenCV keeps to one thread."""
    import cv2

    global _over
    leave_signals_to_parent()
    _over = over
    threading.Thread(target=_leave_with_parent, daemon=True).start()
    cv2.setNumThreads(0)


def _leave_with_parent() -> None:
    """Ends this worker once its parent process is gone, for whose next task it would wait for ever."""
    multiprocessing.parent_process().join()
    os._exit(1)


def _do_while_wanted(task: Callable[[Iterable[str]], Part], paths: Sequence[str]) -> Part:
    """Does a worker's task; once the results are not wanted it breaks off."""
    return task(takewhile(lambda _: not _over.value, paths))
