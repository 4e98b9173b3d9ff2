"""What the service counts and times, in Prometheus' text format."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

STAGES = ("read", "decode", "queue", "inference", "encode")  # of a request, in their order
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64)


class Metrics:
    """One service's counters; each has a registry of its own, so that several can live in a process."""

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

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Counts an answered request."""
        self._requests.labels(path, str(status)).inc()
        self._request_s.labels(path).observe(seconds)

    def stage(self, name: str, seconds: float) -> None:
        """Times one of STAGES."""
        self._stage_s.labels(name).observe(seconds)

    def batch(self, size: int) -> None:
        """Counts a batch of `size` images."""
        self._images.inc(size)
        self._batches.observe(size)

    def dropped(self, count: int) -> None:
        """Counts images that nobody waits for any more."""
        self._dropped.inc(count)

    def text(self) -> bytes:
        """Returns all in the text format."""
        return generate_latest(self._registry)


__all__ = ["CONTENT_TYPE", "STAGES", "Metrics"]
