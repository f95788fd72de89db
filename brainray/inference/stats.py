"""Additive statistics of a bulk run, which the task that writes a shard computes.

They contain counts and histograms, the least certain scans and, if there are labels, the most
confident mistakes and the probabilities of at most :data:`MAX_LABELLED` scans. Their size does not
grow with the number of scans.
"""

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
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

STATISTICS_COLUMNS = (
    "scan_uri",
    "reason",
    "predicted_class",
    "confidence",
    "series",
    "class_map",
)
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
        return {
            "num_rows": self.num_rows,
            "num_in_series": self.num_in_series,
            "reasons": dict(self.reasons),
            "classes": dict(self.classes),
            "histogram": self.histogram.tolist(),
            "least_certain": self.least_certain,
        }

    @classmethod
    def from_json(cls, document: dict[str, Any]) -> "RunStats":
        """Invert :meth:`to_json`."""
        return cls(
            num_rows=document["num_rows"],
            num_in_series=document["num_in_series"],
            reasons=Counter(document["reasons"]),
            classes=Counter(document["classes"]),
            histogram=np.array(document["histogram"], np.int64),
            least_certain=document["least_certain"],
        )

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
    return sorted(shown, key=lambda scan: (sign * max(scan["probs"]), scan["scan_uri"]))[
        :NUM_SCANS_SHOWN
    ]


def compute_statistics(
    rows: pa.Table, classes: Sequence[str], labels: Labels | None = None
) -> RunStats:
    """Compute the statistics of some rows.

    Parameters
    ----------
    rows : Table
        :data:`STATISTICS_COLUMNS` and the probabilities.
    classes : sequence of str
        In class order.
    labels : Labels, optional
        Labels of scans, where known.
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
    order = _find_first(confidence, rows["scan_uri"])
    stats.least_certain = [_describe_scan(rows, row, probs) for row in order]
    if labels is not None:
        _add_labelled(stats, rows, probs, classes, labels)
    return stats


def _find_first(values: NDArray[np.float32], scan_uris: pa.ChunkedArray) -> list[int]:
    """Return the rows with the smallest values; ties are ordered by URI."""
    table = pa.table({"value": values, "scan_uri": scan_uris})
    order = pc.select_k_unstable(
        table, NUM_SCANS_SHOWN, [("value", "ascending"), ("scan_uri", "ascending")]
    )
    rows: list[int] = order.to_pylist()
    return rows


def _describe_scan(rows: pa.Table, row: int, probs: NDArray[np.float32]) -> dict[str, Any]:
    return {
        "scan_uri": rows["scan_uri"][row].as_py(),
        "probs": probs[row].tolist(),
        "class_map": rows["class_map"][row].as_py(),
    }


def _add_labelled(
    stats: RunStats,
    rows: pa.Table,
    probs: NDArray[np.float32],
    classes: Sequence[str],
    labels: Labels,
) -> None:
    uris = rows["scan_uri"].to_pylist()
    given = [labels.find(uri) for uri in uris]
    known = np.flatnonzero([label is not None for label in given])
    y_true = np.array([classes.index(str(given[row])) for row in known], np.int64)
    hashes = hash_names([uris[row] for row in known])
    sample = LabelledSample(hashes, y_true, probs[known], len(known), len(uris) - len(known))
    empty = LabelledSample(hashes[:0], y_true[:0], probs[:0], 0, 0)
    stats.labelled = sample.add(empty)  # keeps at most MAX_LABELLED
    top = probs[known].argmax(axis=1)
    wrong = np.flatnonzero(top != y_true)
    worst = _find_first(-probs[known[wrong], top[wrong]], rows["scan_uri"].take(known[wrong]))
    stats.mistakes = [
        _describe_scan(rows, int(known[row]), probs) | {"true_class": classes[y_true[row]]}
        for row in wrong[worst]
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
        self._first_s: float | None = None
        self._done_at_first = 0
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
        return self.timeline[-1][0] - self._first_s if self._first_s is not None else 0.0

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
        done = self.done - self._done_at_first
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
        """Count one shard."""
        self.new.add(stats)
        self.done += num_files
        self.num_known += num_known
        self.runtime = self.runtime or runtime
        for name, seconds in stages_s.items():
            self.stages_s[name] += seconds
        seconds = round(self.elapsed_s, 2)
        if self._first_s is None:
            self._first_s, self._done_at_first = seconds, self.done
            self._rows_at_first = self.new.num_rows + self.num_known
            self._stages_at_first_s = dict(self.stages_s)
        self.timeline.append((seconds, self.done))
        if len(self.timeline) == MAX_TIMELINE:
            self.timeline = self.timeline[::2]

    def compute_busy(self, capacity: dict[str, int]) -> dict[str, float]:
        """Return each stage's busy share since the first shard.

        Parameters
        ----------
        capacity : dict
            Concurrent workers of each stage.
        """
        if not self.warm_s:
            return dict.fromkeys(STAGES, 0.0)
        return {
            name: round(
                min(1.0, (spent - self._stages_at_first_s[name]) / (capacity[name] * self.warm_s)),
                4,
            )
            for name, spent in self.stages_s.items()
        }


def find_bottleneck(busy: dict[str, float]) -> str:
    """Describe the bottleneck of a run, from the busy share of every stage."""
    stage = max(busy, key=lambda name: busy[name])
    if busy[stage] < SATURATED:
        return f"nothing is saturated (the busiest stage, {stage}, {busy[stage]:.0%} of the time)"
    return REMEDIES[stage]


@dataclass
class MemoryPeak:
    """Peak memory of this process and its children, a local Ray cluster included."""

    bytes: int = 0


@contextmanager
def watch_memory() -> Iterator[MemoryPeak]:
    """Measure the memory every few seconds until the block ends."""
    peak = MemoryPeak()

    def measure() -> None:
        peak.bytes = max(peak.bytes, measure_memory_bytes(os.getpid()))

    measure()
    with repeat(measure, MEMORY_INTERVAL_S, "memory"):
        yield peak


def measure_memory_bytes(pid: int) -> int:
    """Measure a process tree: the anonymous memory of each process, and shared memory once."""
    own, shared = 0, [0]
    root = psutil.Process(pid)
    for process in (root, *root.children(recursive=True)):
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            continue
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        own += 1024 * int(fields.get("RssAnon", "0 kB").split()[0])
        shared.append(1024 * int(fields.get("RssShmem", "0 kB").split()[0]))
    return own + max(shared)
