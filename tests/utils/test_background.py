"""Reading ahead and writing behind: order, errors from the other side, and nothing left running."""

import contextlib
import itertools
import sys
import threading
import time

import pytest

from utils.process import Background, ReadAhead


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


def test_error_of_the_consumer_reaches_whoever_puts_and_nobody_waits_for_ever():
    consumed = []

    def consume(number):
        if number == 3:
            raise OSError("disk full")
        consumed.append(number)

    with pytest.raises(OSError, match="disk full"), Background(consume, depth=1) as background:
        for number in range(1000):
            background.put(number)
    assert consumed == [0, 1, 2]


def test_error_at_the_last_item_is_raised_on_leaving():
    def consume(_):
        time.sleep(0.05)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"), Background(consume) as background:
        background.put(1)


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
