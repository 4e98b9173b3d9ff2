"""Threads that read ahead and write behind, and signals: order, errors, and nothing left running."""

import contextlib
import itertools
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from utils.process import Background, ReadAhead, Terminated, defer_signals, leave_signals_to_parent, sigterm_raised

ROOT = Path(__file__).resolve().parents[2]


def test_items_arrive_in_order_and_at_most_so_many_are_read_ahead():
    read = []

    def source():
        for number in range(20):
            read.append(number)
            yield number

    with ReadAhead(source(), depth=3) as reader:
        iterator = iter(reader)
        assert next(iterator) == 0
        time.sleep(0.1)
        assert len(read) <= 5  # one taken, three queued, one waiting for a place
        assert list(iterator) == list(range(1, 20))


def test_what_is_read_ahead_is_bounded_by_its_bytes_and_large_items_pass_alone():
    read = []

    def source():
        for size in (6, 6, 6, 100, 1):
            read.append(size)
            yield size

    with ReadAhead(source(), depth=10, size_of=int, max_bytes=12) as reader:
        time.sleep(0.1)
        assert read == [6, 6, 6]  # two wait, the third for its place
        iterator = iter(reader)
        assert next(iterator) == 6
        time.sleep(0.1)
        assert read == [6, 6, 6, 100]
        assert list(iterator) == [6, 6, 100, 1]
    with ReadAhead(iter([9, 9]), size_of=int, max_bytes=12):
        time.sleep(0.05)  # leaving it ends the thread that waits


def test_error_of_the_source_is_raised_after_what_came_before_it():
    def source():
        yield 1
        raise ValueError("broken")

    seen = []
    with pytest.raises(ValueError, match="broken"), ReadAhead(source()) as reader:
        seen.extend(reader)
    assert seen == [] or seen == [1]


def test_leaving_early_stops_the_thread_and_closes_the_source():
    closed = threading.Event()

    def source():
        try:
            while True:
                yield 0
        finally:
            closed.set()

    before = threading.active_count()
    with ReadAhead(source(), depth=2) as reader:
        next(iter(reader))
    assert closed.is_set()
    assert threading.active_count() == before


def test_everything_put_is_consumed_in_order_before_the_block_ends():
    consumed = []

    def consume(number, text):
        time.sleep(0.002)
        consumed.append((number, text))

    with Background(consume, depth=2) as background:
        for number in range(10):
            background.put(number, "x")
    assert consumed == [(number, "x") for number in range(10)]


@pytest.mark.parametrize("count", [4, 1000])  # the error comes at the last item, or long before it
def test_error_of_the_consumer_reaches_whoever_puts_and_nobody_waits_for_ever(count):
    consumed = []

    def consume(number):
        if number == 3:
            time.sleep(0.02)
            raise OSError("disk full")
        consumed.append(number)

    with pytest.raises(OSError, match="disk full"), Background(consume, depth=1) as background:
        for number in range(count):
            background.put(number)
    assert consumed == [0, 1, 2]


def test_what_was_put_is_still_consumed_when_the_block_fails():
    consumed = []
    with pytest.raises(KeyboardInterrupt), Background(consumed.append) as background:
        background.put(1)
        raise KeyboardInterrupt
    assert consumed == [1]


class InterruptedPut(threading.Thread):
    """Puts one item and is interrupted at a line of Python that runs for it, as Ctrl-C may do to the main thread."""

    def __init__(self, line: int):
        super().__init__(daemon=True)
        self.lines_left, self.consumed, self.interrupted = line, [], False

    def trace(self, _frame, event, _argument):
        if event == "line":
            self.lines_left -= 1
            if self.lines_left < 0:
                sys.settrace(None)
                raise KeyboardInterrupt
        return self.trace

    def run(self):
        with contextlib.suppress(KeyboardInterrupt), Background(self.consumed.append) as background:
            time.sleep(0.005)  # the consumer waits for the item
            try:
                sys.settrace(self.trace)
                background.put(1)
            except KeyboardInterrupt:
                self.interrupted = True
                raise
            finally:
                sys.settrace(None)
                time.sleep(0.005)  # the consumer waits for the next


def test_an_interruption_anywhere_in_putting_keeps_nobody_waiting():
    for line in itertools.count():
        put = InterruptedPut(line)
        put.start()
        put.join(10)
        assert not put.is_alive(), f"hangs when interrupted at line {line}"
        assert put.consumed in ([], [1])
        if not put.interrupted:
            break
    assert line > 5 and put.consumed == [1]


SCRIPT = """
import argparse, os, signal, sys, time
from utils.cli import with_hint, run_command
def main(options):
    with with_hint(lambda: "Resume with --resume."):
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(5)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)  # again, while things are being closed
            print("closed")
sys.exit(run_command(main, argparse.ArgumentParser(prog="train.py")))
"""
posix = pytest.mark.skipif(os.name == "nt", reason="Windows ends programs in another way")


@posix
def test_sigterm_closes_what_is_open_tells_what_is_advised_and_exits_143():
    done = subprocess.run([sys.executable, "-c", SCRIPT], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (143, "closed\n")
    assert done.stderr == "\ntrain.py: ended by SIGTERM. Resume with --resume.\n"


@posix
def test_the_answer_is_set_for_the_body_alone_and_others_are_respected():
    with sigterm_raised():
        with pytest.raises(Terminated):
            signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with sigterm_raised():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


@posix
def test_repetitions_count_again_after_a_while(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("utils.process.time.monotonic", lambda: now[0])
    with sigterm_raised():
        for later, counts in ((0, True), (4.9, False), (0.2, True)):
            now[0] += later
            with pytest.raises(Terminated) if counts else contextlib.nullcontext():
                signal.raise_signal(signal.SIGTERM)


@posix
@pytest.mark.parametrize(("number", "raised"), [(signal.SIGTERM, Terminated), (signal.SIGINT, KeyboardInterrupt)])
def test_held_back_signals_come_at_the_end_even_if_another_thread_gets_them(number, raised):
    steps, stop = [], threading.Event()
    other = threading.Thread(target=stop.wait)
    other.start()
    try:
        with sigterm_raised(), pytest.raises(raised), defer_signals():
            os.kill(os.getpid(), number)
            steps.append("done")
    finally:
        stop.set()
        other.join()
    assert steps == ["done"]


@posix
def test_outside_the_main_thread_nothing_is_changed():
    seen = []

    def body():
        with sigterm_raised(), defer_signals():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=body)
    thread.start()
    thread.join()
    assert seen == [signal.SIG_DFL]


@posix
@pytest.mark.parametrize("prepare", [leave_signals_to_parent, lambda: None], ids=["worker", "any forked process"])
def test_forked_processes_end_quietly_with_status_0(prepare):
    """Any other status, or dying of the signal, would raise an error in the process that started them."""
    with sigterm_raised():
        child = os.fork()
        if child == 0:
            prepare()
            signal.raise_signal(signal.SIGTERM)
            os._exit(1)
    assert os.waitpid(child, 0)[1] == 0
