"""What the service counts of itself, for Prometheus; nothing of what was in a request."""

from collections import Counter as Tally
from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from brainray.serving.answer import Answer

METRICS_TYPE = CONTENT_TYPE_LATEST
LATENCY_BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)


class Meters:
    """Counters of one ingress replica.

    Parameters
    ----------
    replica : str
        Name of the replica; a label of every sample, so that Prometheus can add them up.
    """

    def __init__(self, replica: str) -> None:
        self._registry = CollectorRegistry(auto_describe=True)
        self._replica = replica
        self._requests = Counter(
            "brainray_requests",
            "Requests answered.",
            ("path", "method", "status", "replica"),
            registry=self._registry,
        )
        self._latency = Histogram(
            "brainray_request_seconds",
            "From the headers of a request to the end of its answer.",
            ("path", "replica"),
            registry=self._registry,
            buckets=LATENCY_BUCKETS_S,
        )
        self._answers = Counter(
            "brainray_answers",
            "Scans answered.",
            ("status", "predicted_class", "reason", "replica"),
            registry=self._registry,
        )

    def watch(self, name: str, meaning: str, read: Callable[[], float]) -> None:
        """Show a number that is read when asked for."""
        gauge = Gauge(f"brainray_{name}", meaning, ("replica",), registry=self._registry)
        gauge.labels(self._replica).set_function(read)

    def count_request(self, path: str, method: str, status: int, seconds: float) -> None:
        """Count an answered request."""
        self._requests.labels(path, method, str(status), self._replica).inc()
        self._latency.labels(path, self._replica).observe(seconds)

    def count_answers(self, answers: list[Answer]) -> None:
        """Count what became of the scans of a request."""
        kinds = Tally((a.status, a.predicted_class or "", a.reason or "") for a in answers)
        for (status, name, reason), count in kinds.items():
            self._answers.labels(status, name, reason, self._replica).inc(count)

    def render(self) -> bytes:
        """Return Prometheus' text format."""
        return generate_latest(self._registry)


def merge(texts: Iterable[bytes]) -> bytes:
    """Merge the texts of several replicas: what is said of a metric once, and then its samples."""
    heads: dict[str, list[str]] = {}
    samples: dict[str, list[str]] = {}
    for text in texts:
        name = ""
        for line in text.decode().splitlines():
            if line.startswith("# HELP "):
                name = line.split(" ", 3)[2]
            if not line.startswith("#"):
                samples.setdefault(name, []).append(line)
            elif line not in heads.setdefault(name, []):
                heads[name].append(line)
    lines = [line for name in heads for line in (*heads[name], *samples.get(name, ()))]
    return "".join(line + "\n" for line in lines).encode()
