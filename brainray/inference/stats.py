"""Additive statistics of a bulk run, which the task that writes a shard computes.

They contain counts and histograms, the least certain scans and, if there are labels, the most
confident mistakes and the probabilities of at most :data:`MAX_LABELLED` scans. Their size does not
grow with the number of scans.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import psutil
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from brainray.inference.labels import Labels
from brainray.inference.schema import stack_probs
from brainray.io.repeat import repeat
from brainray.model.calibration import LOW_CONFIDENCE

NUM_SCANS_SHOWN = 24
"""Scans in a gallery."""
NUM_BINS = 20
"""Bins of the histogram of confidences."""
MAX_LABELLED = 100_000
"""Largest sample of labelled scans. The standard error of an accuracy near 0.97 is then 0.0005."""
MAX_TIMELINE = 401
"""Points of a timeline at which every second one is dropped; odd, so that the last one stays."""
MEMORY_INTERVAL_S = 3.0
SATURATED = 0.8
"""Busy share from which a stage is called the bottleneck."""

IDLE = "there were no new scans"
STAGES = ("read", "decode", "predict", "write")
REMEDIES = {
    "read": "read-bound: move the scans to faster storage",
    "decode": "decode-bound: add CPUs",
    "predict": "predict-bound: add predictors (CPUs or GPUs)",
    "write": "write-bound: use faster storage for the output",
}

_WITHOUT_LABELS = (
    "num_rows",
    "num_in_series",
    "reasons",
    "classes",
    "histogram",
    "least_certain",
)
STATISTICS_COLUMNS = ("scan_uri", "reason", "predicted_class", "confidence", "series", "class_map")
"""Columns that :func:`compute_statistics` needs besides the probabilities."""


@dataclass(frozen=True, slots=True)
class LabelledSample:
    """Labelled scans that have probabilities, or a uniform random sample of them.

    The sample consists of the scans with the smallest hashes of their URIs. So samples can be
    joined in any order.
    """

    hashes: NDArray[np.uint64]
    y_true: NDArray[np.int64]
    y_prob: NDArray[np.float32]
    total: int
    """Number of scans that were sampled."""
    num_unlabelled: int
    """Scans with probabilities but without a label."""

    def add(self, other: "LabelledSample") -> "LabelledSample":
        """Join two samples of different scans."""
        hashes = np.concatenate([self.hashes, other.hashes])
        kept = np.argsort(hashes, kind="stable")[:MAX_LABELLED]
        return LabelledSample(
            hashes[kept],
            np.concatenate([self.y_true, other.y_true])[kept],
            np.concatenate([self.y_prob, other.y_prob])[kept],
            self.total + other.total,
            self.num_unlabelled + other.num_unlabelled,
        )


@dataclass(slots=True)
class RunStats:
    """Statistics of predictions; :meth:`add` adds those of other scans."""

    num_rows: int = 0
    num_in_series: int = 0
    """Rows that are slices of a series."""
    reasons: Counter[str] = field(default_factory=Counter)
    classes: Counter[str] = field(default_factory=Counter)
    histogram: NDArray[np.int64] = field(default_factory=lambda: np.zeros(NUM_BINS, np.int64))
    """Number of confidences in equal bins of [0, 1]."""
    least_certain: list[dict[str, Any]] = field(default_factory=list)
    """``scan_uri``, ``probs`` and ``class_map`` of the scans with the least confidence."""
    labelled: LabelledSample | None = None
    """None if there are no labels."""
    mistakes: list[dict[str, Any]] = field(default_factory=list)
    """The same for the most confident mistakes, with ``true_class``."""

    def add(self, other: "RunStats") -> None:
        """Add the statistics of other scans."""
        self.num_rows += other.num_rows
        self.num_in_series += other.num_in_series
        self.reasons.update(other.reasons)
        self.classes.update(other.classes)
        self.histogram = self.histogram + other.histogram
        self.least_certain = _keep_first(self.least_certain + other.least_certain, sign=1)
        self.mistakes = _keep_first(self.mistakes + other.mistakes, sign=-1)
        if other.labelled is not None:
            joined = self.labelled.add(other.labelled) if self.labelled else other.labelled
            self.labelled = joined

    def to_json(self) -> dict[str, Any]:
        """Return the statistics that need no labels, ready for JSON."""
        return {name: getattr(self, name) for name in _WITHOUT_LABELS} | {
            "histogram": self.histogram.tolist()
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "RunStats":
        """Invert :meth:`to_json`."""
        stats = cls(**{name: document[name] for name in _WITHOUT_LABELS})
        stats.reasons, stats.classes = Counter(stats.reasons), Counter(stats.classes)
        stats.histogram = np.array(stats.histogram, np.int64)
        return stats

    def describe_counts(self) -> dict[str, Any]:
        """Return counts by status, reason and class, as metrics.json has them."""
        rejected = count_rejected(self.reasons)
        without_class = sum(self.reasons.values())
        return {
            "total": self.num_rows,
            "by_status": {
                "classified": self.num_rows - without_class,
                "abstained": without_class - rejected,
                "rejected": rejected,
            },
            "by_reason": dict(sorted(self.reasons.items())),
            "by_class": dict(sorted(self.classes.items())),
        }


def _keep_first(shown: list[dict[str, Any]], *, sign: int) -> list[dict[str, Any]]:
    ordered = sorted(shown, key=lambda scan: (sign * max(scan["probs"]), scan["scan_uri"]))
    return ordered[:NUM_SCANS_SHOWN]


def compute_statistics(
    rows: pa.Table, classes: Sequence[str], labels: Labels | None = None
) -> RunStats:
    """Compute the statistics of some rows, which have :data:`STATISTICS_COLUMNS` and probabilities.

    ``classes`` are in class order; ``labels`` are those of scans, where known.
    """
    stats = RunStats(
        num_rows=rows.num_rows,
        num_in_series=rows.num_rows - rows["series"].null_count,
        reasons=Counter(rows["reason"].drop_null().to_pylist()),
        classes=Counter(rows["predicted_class"].drop_null().to_pylist()),
    )
    rows = rows.filter(pc.is_valid(rows["confidence"]))  # classified or abstained
    confidence = rows["confidence"].to_numpy()
    stats.histogram = np.histogram(confidence, NUM_BINS, (0.0, 1.0))[0].astype(np.int64)
    probs = stack_probs(rows, classes)
    stats.least_certain = _describe_first(rows, confidence, probs)
    if labels is not None:
        _add_labelled(stats, rows, probs, classes, labels)
    return stats


def _describe_first(
    rows: pa.Table, values: NDArray[np.float32], probs: NDArray[np.float32]
) -> list[dict[str, Any]]:
    """Describe the rows with the smallest values; ties are ordered by URI."""
    table = pa.table({"value": values, "scan_uri": rows["scan_uri"]})
    order = [("value", "ascending"), ("scan_uri", "ascending")]
    return [
        {
            "scan_uri": rows["scan_uri"][row].as_py(),
            "probs": probs[row].tolist(),
            "class_map": rows["class_map"][row].as_py(),
        }
        for row in pc.select_k_unstable(table, NUM_SCANS_SHOWN, order).to_pylist()
    ]


def _add_labelled(
    stats: RunStats,
    rows: pa.Table,
    probs: NDArray[np.float32],
    classes: Sequence[str],
    labels: Labels,
) -> None:
    given = [labels.find(uri) for uri in rows["scan_uri"].to_pylist()]
    known = np.array([label is not None for label in given], np.bool_)
    rows, probs = rows.filter(pa.array(known)), probs[known]
    y_true = np.array([classes.index(label) for label in given if label is not None], np.int64)
    hashes = hash_names(rows["scan_uri"].to_pylist())
    kept = np.argsort(hashes, kind="stable")[:MAX_LABELLED]
    stats.labelled = LabelledSample(
        hashes[kept], y_true[kept], probs[kept], len(y_true), len(given) - len(y_true)
    )
    is_wrong = probs.argmax(axis=1) != y_true
    rows, probs = rows.filter(pa.array(is_wrong)), probs[is_wrong]
    stats.mistakes = [
        scan | {"true_class": labels.find(scan["scan_uri"])}
        for scan in _describe_first(rows, -probs.max(axis=1), probs)
    ]


def hash_names(names: Sequence[str]) -> NDArray[np.uint64]:
    """Hash each name, equally in every process, shape (n,)."""
    hashes: NDArray[np.uint64] = pd.util.hash_array(np.array(names, dtype=object), categorize=False)
    return hashes


def count_rejected(reasons: "Counter[str]") -> int:
    """Count rejected scans: those with a reason other than low confidence."""
    return sum(count for reason, count in reasons.items() if reason != LOW_CONFIDENCE)


class Progress:
    """The progress of a run, and the statistics so far."""

    def __init__(self) -> None:
        self.total: int | None = None
        """Scan files to open; None until the plan is made."""
        self.done = 0
        """Scan files that are done, new or known."""
        self.new = RunStats()
        """Statistics of the rows that this run wrote."""
        self.num_known = 0
        """Scan files that were opened although their content had rows already."""
        self.runtime: dict[str, str] | None = None
        """From :meth:`brainray.inference.engine.Engine.describe`."""
        self.stages_s = dict.fromkeys(STAGES, 0.0)
        self.timeline: list[tuple[float, int]] = []
        """Seconds since the start, and scan files done, at a bounded number of points."""
        self.started_at = datetime.now(UTC)
        self._started = time.perf_counter()
        self._rows_at_first = 0
        self._stages_at_first_s: dict[str, float] = {}

    @property
    def num_rejected(self) -> int:
        """Scans of this run that were rejected."""
        return count_rejected(self.new.reasons)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self._started

    @property
    def warm_s(self) -> float:
        """Seconds from the end of the first shard to the end of the last one."""
        return self.timeline[-1][0] - self.timeline[0][0] if self.timeline else 0.0

    @property
    def rate(self) -> float | None:
        """Slices per second since the first shard was done; None before the second one.

        A known file counts as one slice.
        """
        done = self.new.num_rows + self.num_known - self._rows_at_first
        return done / self.warm_s if done and self.warm_s else None

    @property
    def left_s(self) -> float | None:
        """Estimated seconds for the remaining files; None if unknown."""
        done = self.done - self.timeline[0][1] if self.timeline else 0
        if self.total is None or not done or not self.warm_s:
            return None
        return (self.total - self.done) * self.warm_s / done

    def add(
        self,
        stats: RunStats,
        num_files: int,
        num_known: int,
        stages_s: dict[str, float],
        runtime: dict[str, str] | None,
    ) -> None:
        """Count one shard: its files, those that were known, and the work of each stage."""
        self.new.add(stats)
        self.done += num_files
        self.num_known += num_known
        self.runtime = self.runtime or runtime
        for name, seconds in stages_s.items():
            self.stages_s[name] += seconds
        if not self.timeline:
            self._rows_at_first = self.new.num_rows + self.num_known
            self._stages_at_first_s = dict(self.stages_s)
        self.timeline.append((round(self.elapsed_s, 2), self.done))
        if len(self.timeline) == MAX_TIMELINE:
            self.timeline = self.timeline[::2]

    def compute_busy(self, capacity: dict[str, int]) -> dict[str, float]:
        """Return each stage's busy share since the first shard; it has so many workers at once."""
        if not self.warm_s:
            return dict.fromkeys(STAGES, 0.0)
        busy = {}
        for name, spent in self.stages_s.items():
            share = (spent - self._stages_at_first_s[name]) / (capacity[name] * self.warm_s)
            busy[name] = round(min(1.0, share), 4)
        return busy


def find_bottleneck(busy: dict[str, float]) -> str:
    """Describe the bottleneck of a run, from the busy share of every stage."""
    stage = max(busy, key=lambda name: busy[name])
    if busy[stage] < SATURATED:
        return f"nothing is saturated (the busiest stage, {stage}, {busy[stage]:.0%} of the time)"
    return REMEDIES[stage]


@contextmanager
def watch_memory() -> Iterator[Callable[[], int]]:
    """Measure the memory every few seconds until the block ends; yield what returns the peak.

    It is that of this process and its children, a local Ray cluster included, in bytes.
    """
    peak = 0

    def measure() -> None:
        nonlocal peak
        peak = max(peak, _measure_memory_bytes())

    measure()
    with repeat(measure, MEMORY_INTERVAL_S, "memory"):
        yield lambda: peak


def _measure_memory_bytes() -> int:
    """Measure this process tree: the anonymous memory of each process, and shared memory once."""
    own, shared = 0, [0]
    root = psutil.Process()
    for process in (root, *root.children(recursive=True)):
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            continue
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        own += 1024 * int(fields.get("RssAnon", "0 kB").split()[0])
        shared.append(1024 * int(fields.get("RssShmem", "0 kB").split()[0]))
    return own + max(shared)
