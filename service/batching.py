"""Requests gathered into batches: images of one shape that arrive together go through the model together.

One batch runs at a time, in a thread of its own; the event loop only keeps the books. While a batch runs the next
gathers, so a busy service fills its batches without waiting. An idle one waits for others only where some are on
their way (`expected`), and never longer than `wait_s`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

from models.inference.predictor import Window
from utils.boxes import Detections
from utils.log import LOGGER
from utils.nms import NMSConfig

TIMER_SLACK_S = 0.0005  # timers may ring a tick early, when nobody is ripe yet


class InferenceError(Exception):
    """A batch failed; its cause is the runtime's error, which is logged."""


class Prepared(NamedTuple):
    """An image ready for the model, and how its sender wants detections chosen."""

    windows: list[Window]  # of `Predictor.prepare`
    nms: NMSConfig


class Outcome(NamedTuple):
    """What came of one image."""

    detections: Detections
    queue_s: float  # that it waited
    inference_s: float  # of its batch
    batch: int  # images in it


@dataclass
class _Waiting:
    prepared: Prepared
    result: asyncio.Future[Outcome]
    since_s: float = field(default_factory=time.monotonic)


class Batcher:
    """The queue before a model. Use from one event loop, between `start` and `close`.

    Attributes:
        failing: whether the last batch raised an error, and each of its images alone as well.
    """

    def __init__(
        self,
        detect: Callable[[Sequence[Prepared]], list[Detections]],
        batch_size: int,
        wait_s: float,
        on_batch: Callable[[int], None],
        on_drop: Callable[[int], None],
    ) -> None:
        """Prepares an empty queue.

        Args:
            detect: runs a batch of images of one shape; called in one thread only.
            batch_size: most images in a batch.
            wait_s: longest wait for images that are still being read.
            on_batch: called with the size of every batch.
            on_drop: called with how many images were left out because nobody waits for them any more.
        """
        self.failing = False
        self._detect, self._batch_size, self._wait_s = detect, batch_size, wait_s
        self._on_batch, self._on_drop = on_batch, on_drop
        self._queues: dict[tuple[int, ...], list[_Waiting]] = {}
        self._expected, self._closing = 0, False
        self._changed = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "inference")
        self._loop_task: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return sum(len(queue) for queue in self._queues.values())

    def start(self) -> None:
        """Starts working; needs a running event loop."""
        self._loop_task = asyncio.get_running_loop().create_task(self._work())

    async def close(self) -> None:
        """Finishes what is queued, then stops."""
        self._closing = True
        self._changed.set()
        if self._loop_task is not None:
            await self._loop_task
        self._thread.shutdown()

    @contextmanager
    def expected(self) -> Iterator[None]:
        """Marks an image as being on its way to the queue: for the time of the block others may wait for it."""
        self._expected += 1
        try:
            yield
        finally:
            self._expected -= 1
            self._changed.set()

    def enqueue(self, prepared: Prepared) -> asyncio.Future[Outcome]:
        """Queues an image; cancelling the result takes it out. It holds an `InferenceError` if the batch fails."""
        loop = asyncio.get_running_loop()
        waiting = _Waiting(prepared, loop.create_future())
        self._queues.setdefault(prepared.windows[0].inputs.shape, []).append(waiting)
        self._changed.set()
        loop.call_later(self._wait_s + TIMER_SLACK_S, self._changed.set)
        return waiting.result

    async def _work(self) -> None:
        """Runs batch after batch until closed and empty."""
        while True:
            self._changed.clear()
            before = len(self)
            kept = {shape: [item for item in queue if not item.result.done()] for shape, queue in self._queues.items()}
            self._queues = {shape: queue for shape, queue in kept.items() if queue}
            if dropped := before - len(self):  # whose senders have left
                self._on_drop(dropped)
            if batch := self._next_batch():
                await self._run(batch)
            elif self._closing and not self._queues:
                return
            else:
                await self._changed.wait()

    def _next_batch(self) -> list[_Waiting]:
        """Takes the batch that has waited longest among those that are full or need not wait; empty where none is."""
        latest_s = time.monotonic() - self._wait_s
        patient = self._expected > 0 and not self._closing
        ripe = [
            queue
            for queue in self._queues.values()
            if not patient or len(queue) >= self._batch_size or queue[0].since_s <= latest_s
        ]
        if not ripe:
            return []
        queue = min(ripe, key=lambda waiting: waiting[0].since_s)
        batch = queue[: self._batch_size]
        del queue[: self._batch_size]
        return batch

    async def _run(self, batch: list[_Waiting]) -> None:
        """Runs a batch in the thread and hands out its results; where it fails, each of its images alone."""
        start_s = time.monotonic()
        images = [item.prepared for item in batch]
        try:
            found = await asyncio.get_running_loop().run_in_executor(self._thread, self._detect, images)
        except Exception as error:  # whatever a runtime raises: its sender learns of it, the service goes on
            if len(batch) > 1:
                LOGGER.warning(f"WARNING: inference on {len(batch)} images failed ({error}); trying each alone")
                del images  # of those that are answered nothing is to be kept
                works = False
                while batch:
                    await self._run([batch.pop(0)])
                    works |= not self.failing
                self.failing = not works
                return
            self.failing = True
            LOGGER.exception("inference on an image failed")
            if not batch[0].result.done():
                batch[0].result.set_exception(InferenceError(str(error)))
            return
        self.failing = False
        self._on_batch(len(batch))
        took_s = time.monotonic() - start_s
        for item, detections in zip(batch, found, strict=True):
            if not item.result.done():
                item.result.set_result(Outcome(detections, start_s - item.since_s, took_s, len(batch)))
