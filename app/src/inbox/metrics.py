"""Prometheus metrics, right across the workers of a Gunicorn master.

With PROMETHEUS_MULTIPROC_DIR set, every worker keeps its values in files of that folder and each answer sums them.
The folder has to be empty when the master starts, and Gunicorn's `child_exit` hook has to call
`prometheus_client.multiprocess.mark_process_dead(worker.pid)`.
"""

import os

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

_METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_LATENCY_BUCKETS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25)


class Metrics:
    """What this worker counts."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        labels = ("method", "route", "status")
        self._requests = Counter("http_requests", "Requests answered.", labels, registry=self._registry)
        self._latency = Histogram(
            "http_request_duration_seconds",
            "Time from the first byte of a request to the end of its answer, streams left out.",
            labels,
            buckets=_LATENCY_BUCKETS_S,
            registry=self._registry,
        )
        self._streams = Gauge(
            "inbox_open_streams",
            "Clients that follow new events.",
            ("kind",),
            registry=self._registry,
            multiprocess_mode="livesum",
        )
        self._stored = Counter("inbox_events_stored", "Events committed, replays left out.", registry=self._registry)

    def answered(self, method: str, route: str | None, status: int, seconds: float | None) -> None:
        """Count a request; `seconds` is None for a stream, `route` is None when no route matched.

        Templates and known methods only: a label that clients choose would grow without end.
        """
        labels = (method if method in _METHODS else "OTHER", route or "none", str(status))
        self._requests.labels(*labels).inc()
        if seconds is not None:
            self._latency.labels(*labels).observe(seconds)

    def stored(self) -> None:
        """Count an event that was committed."""
        self._stored.inc()

    def streams(self, kind: str) -> Gauge:
        """Return the gauge of open streams of a kind, `sse` or `websocket`."""
        return self._streams.labels(kind)

    def exposition(self) -> bytes:
        """Return the text format. Reads files when there are several workers: call it in a thread."""
        registry = self._registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
