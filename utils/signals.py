"""What SIGTERM and Ctrl-C do: end a program by an exception, at a moment when no library swallows it, and once.

Worker processes leave both to the process that started them: `signals_held_back` around their start, and
`leave_signals_to_parent` first thing in them.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

REPETITION_S = 5.0  # launchers and service managers may send SIGTERM to a process and to its group
RAISING = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGCHLD") if hasattr(signal, name)]


class Terminated(KeyboardInterrupt):
    """SIGTERM, by which clusters and service managers ask a program to end: closes all that Ctrl-C would."""


class SigtermAnswer:
    """Raises `Terminated` in this process; the signal's repetitions do not disturb what is being closed then."""

    def __init__(self) -> None:
        """Belongs to the process that it is made in; forked ones end at once and quietly."""
        self.process = os.getpid()
        self.until = -math.inf  # when a repetition counts again

    def __call__(self, *_: Any) -> None:
        """Answers the signal."""
        if os.getpid() != self.process:
            _leave()
        if time.monotonic() > self.until:
            self.until = time.monotonic() + REPETITION_S
            raise Terminated


@contextlib.contextmanager
def sigterm_raised() -> Iterator[None]:
    """Lets SIGTERM raise `Terminated` in the main thread, unless the caller answers it in another way."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, SigtermAnswer())
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@contextlib.contextmanager
def signals_held_back() -> Iterator[None]:
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
    """Ends this process; any other status than 0 would be an error in the process that started it."""
    os._exit(0)
