"""Prometheus metrics of a replica: counts and times, nothing of a request's content."""

from collections import Counter
from collections.abc import Callable, Iterable

import prometheus_client as prometheus

from brainray.serving.schemas import AnswerBody

CONTENT_TYPE = prometheus.exposition.CONTENT_TYPE_LATEST
LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
REQUESTS = ("brainray_requests", "Requests answered.", ("path", "method", "status"))
LATENCY = ("brainray_request_seconds", "From a request's headers to its answer.", ("path",))
ANSWERS = ("brainray_answers", "Slices answered.", ("status", "predicted_class", "reason"))


class Metrics:
    """Counts of one replica, which ``/metrics`` shows under its name.

    With ``use_ray`` it counts also with ``ray.serve.metrics``, which Ray's nodes export for all
    replicas.
    """

    def __init__(self, replica: str, *, use_ray: bool = False) -> None:
        self._registry = prometheus.CollectorRegistry(auto_describe=True)
        self._replica = replica
        self._counters = {
            name: prometheus.Counter(name, text, (*tags, "replica"), registry=self._registry)
            for name, text, tags in (REQUESTS, ANSWERS)
        }
        name, text, tags = LATENCY
        self._latency = prometheus.Histogram(
            name, text, (*tags, "replica"), registry=self._registry, buckets=LATENCY_BUCKETS_S
        )
        self._use_ray = use_ray
        if use_ray:
            from ray.serve import metrics

            self._ray_counters = {
                # Ray's annotation means tuple[str, ...].
                name: metrics.Counter(name, description=text, tag_keys=tags)  # type: ignore[arg-type]
                for name, text, tags in (REQUESTS, ANSWERS)
            }
            self._ray_latency = metrics.Histogram(
                name, description=text, boundaries=list(LATENCY_BUCKETS_S), tag_keys=tags
            )

    def add_gauge(self, name: str, description: str, read: Callable[[], float]) -> None:
        """Export a number that is read at each request to ``/metrics``."""
        gauge = prometheus.Gauge(
            f"brainray_{name}", description, ("replica",), registry=self._registry
        )
        gauge.labels(self._replica).set_function(read)

    def count_request(self, path: str, method: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._count(REQUESTS[0], 1, path=path, method=method, status=str(status))
        self._latency.labels(path, self._replica).observe(seconds)
        if self._use_ray:
            self._ray_latency.observe(seconds, tags={"path": path})

    def count_answers(self, answers: Iterable[AnswerBody]) -> None:
        """Count the answers to each slice of a request."""
        slices = (one for answer in answers for one in answer.slices or (answer,))
        kinds = Counter((one.status, one.predicted_class or "", one.reason or "") for one in slices)
        for (status, name, reason), count in kinds.items():
            self._count(ANSWERS[0], count, status=status, predicted_class=name, reason=reason)

    def render(self) -> bytes:
        """Return Prometheus' text format."""
        return prometheus.generate_latest(self._registry)

    def _count(self, name: str, count: int, **tags: str) -> None:
        self._counters[name].labels(**tags, replica=self._replica).inc(count)
        if self._use_ray:
            self._ray_counters[name].inc(count, tags=tags)
