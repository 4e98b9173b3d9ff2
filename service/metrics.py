"""What the service counts and times, in Prometheus' text format and in each answer's Server-Timing header."""

from __future__ import annotations

import time
from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """One service's counters, with a registry of their own, so that several can live in a process."""

    def __init__(self, queue_length: Callable[[], int], in_progress: Callable[[], int]) -> None:
        """Creates the counters at zero.

        Args:
            queue_length: tells how many images wait for the model.
            in_progress: tells how many requests are being worked on.
        """
        self._registry = CollectorRegistry()
        ProcessCollector(registry=self._registry)
        ours = {"namespace": "yolov5", "registry": self._registry}
        self._requests = Counter("requests", "Requests answered.", ("path", "status"), **ours)
        self._images = Counter("images", "Images that went through the model.", **ours)
        self._dropped = Counter("dropped", "Images whose sender left before the model saw them.", **ours)
        self._batches = Histogram("batch_size", "Images in a batch.", buckets=BATCH_SIZES, **ours)
        self._request_s = Histogram("request_seconds", "Whole requests.", ("path",), buckets=SECONDS, **ours)
        self._stage_s = Histogram("stage_seconds", "Stages of a request.", ("stage",), buckets=SECONDS, **ours)
        Gauge("queue_length", "Images waiting for the model.", **ours).set_function(queue_length)
        Gauge("requests_in_progress", "Requests being worked on.", **ours).set_function(in_progress)
        self.dropped = self._dropped.inc  # counts images that nobody waits for any more

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Counts an answered request."""
        self._requests.labels(path, str(status)).inc()
        self._request_s.labels(path).observe(seconds)

    def stage(self, name: str, seconds: float) -> None:
        """Times a stage of a request: read, decode, queue, inference or encode."""
        self._stage_s.labels(name).observe(seconds)

    def batch(self, size: int) -> None:
        """Counts a batch of `size` images."""
        self._images.inc(size)
        self._batches.observe(size)

    def text(self) -> bytes:
        """Returns all in the text format."""
        return generate_latest(self._registry)


class StageClock:
    """Times the stages of one request, for the metrics and for its client."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics, self._taken_s = metrics, {}
        self.restart()

    def restart(self) -> None:
        """Starts a stage."""
        self._start_s = time.monotonic()

    @property
    def elapsed_s(self) -> float:
        """Seconds since the stage was started."""
        return time.monotonic() - self._start_s

    def lap(self, stage: str) -> None:
        """Ends a stage and starts the next."""
        self.add(stage, self.elapsed_s)
        self.restart()

    def add(self, stage: str, seconds: float) -> None:
        """Notes a stage that was timed elsewhere."""
        self._taken_s[stage] = seconds
        self._metrics.stage(stage, seconds)

    def header(self) -> str:
        """Returns the stages in milliseconds as a Server-Timing header."""
        return ", ".join(f"{stage};dur={1000 * seconds:.1f}" for stage, seconds in self._taken_s.items())
