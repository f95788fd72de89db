"""What a bulk run has seen: counts, times, memory, and what limits it."""

import os
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa

from brainray.io.repeat import repeat
from brainray.model.trust import LOW_CONFIDENCE

MEMORY_INTERVAL_S = 3.0
SATURATED = 0.8
"""A stage that is busy for this share of the time is what limits the run."""

IDLE = "nothing was new, so nothing was predicted"

STAGES = ("list", "read", "decode", "predict", "write")
REMEDIES = {
    "list": "listing-bound: give fewer, fuller folders or a Parquet table",
    "read": "read-bound: the storage is the limit; bring the scans nearer",
    "decode": "decode-bound: add CPUs",
    "predict": "predict-bound: add predictors (CPUs or GPUs)",
    "write": "write-bound: the output's storage is the limit",
}


@dataclass(frozen=True, slots=True)
class Standing:
    """How far a run has come, for the person who waits."""

    done: int
    total: int
    is_total_known: bool
    rejected: int
    elapsed_s: float
    """Since the first answer."""
    done_at_first: int
    """Answers of the first chunk, which cost the start."""


@dataclass(slots=True)
class Tally:
    """What a run has seen so far."""

    started: float = field(default_factory=time.perf_counter)
    first_answer: float | None = None
    done_at_first: int = 0
    spent_at_first_s: dict[str, float] = field(default_factory=dict)
    """Of every stage, until the first chunk was answered."""
    num_new: int = 0
    num_known: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    classes: Counter[str] = field(default_factory=Counter)
    stages_s: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    timeline: list[tuple[float, int]] = field(default_factory=list)
    runtime: dict[str, str] = field(
        default_factory=lambda: {"backend": "none", "precision": "none", "description": IDLE}
    )

    @property
    def done(self) -> int:
        """Scans that are through, new or found to be answered already."""
        return self.num_new + self.num_known

    def add(self, block: pa.Table, answers: pa.Table, num_known: int) -> None:
        """Count one chunk."""
        now = time.perf_counter()
        self.num_new += answers.num_rows
        self.num_known += num_known
        self.reasons.update(r for r in answers["reason"].to_pylist() if r)
        self.classes.update(c for c in answers["predicted_class"].to_pylist() if c)
        for name in ("list", "read", "decode", "predict"):
            self.stages_s[name] += block[f"{name}_s"][0].as_py()
        if self.first_answer is None:
            self.first_answer, self.done_at_first = now, self.done
            self.spent_at_first_s = dict(self.stages_s)
        self.timeline.append((round(now - self.started, 2), self.done))

    @property
    def warm_s(self) -> float:
        """Seconds from the first chunk's answers to the last one's."""
        return self.timeline[-1][0] - self.timeline[0][0] if self.timeline else 0.0

    def compute_busy(self, capacity: dict[str, int]) -> dict[str, float]:
        """Compute the busy share of every stage once warm, from how many work at it at a time."""
        if not self.warm_s:
            return dict.fromkeys(STAGES, 0.0)
        return {
            name: round(
                min(1.0, (spent - self.spent_at_first_s[name]) / (capacity[name] * self.warm_s)), 4
            )
            for name, spent in self.stages_s.items()
        }

    def describe(self) -> dict[str, Any]:
        """Return the counts of the new answers, as metrics.json has them."""
        return describe_counts(self.num_new, self.reasons, self.classes)


def describe_counts(total: int, reasons: "Counter[str]", classes: "Counter[str]") -> dict[str, Any]:
    """Return counts by status, reason and class, as metrics.json has them."""
    rejected = count_rejected(reasons)
    without_class = sum(reasons.values())
    return {
        "total": total,
        "by_status": {
            "classified": total - without_class,
            "abstained": without_class - rejected,
            "rejected": rejected,
        },
        "by_reason": dict(sorted(reasons.items())),
        "by_class": dict(sorted(classes.items())),
    }


def count_rejected(reasons: "Counter[str]") -> int:
    """Count the scans that were rejected: those that an image's low confidence does not explain."""
    return sum(count for reason, count in reasons.items() if reason != LOW_CONFIDENCE)


@dataclass
class MemoryPeak:
    """The most memory that this process and all below it had: Ray's too, where Ray runs here."""

    bytes: int = 0


@contextmanager
def watch_memory() -> Iterator[MemoryPeak]:
    """Measure the memory again and again until the block ends."""
    peak = MemoryPeak()

    def measure() -> None:
        peak.bytes = max(peak.bytes, measure_memory_bytes(os.getpid()))

    measure()
    with repeat(measure, MEMORY_INTERVAL_S, "memory"):
        yield peak


def measure_memory_bytes(pid: int) -> int:
    """Measure a process tree: every process's own memory, and what they share once."""
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


def find_bottleneck(busy: dict[str, float]) -> str:
    """Say in words what limits a run, from the busy share of every stage."""
    stage = max(busy, key=lambda name: busy[name])
    if busy[stage] < SATURATED:
        return f"nothing is saturated (the busiest stage, {stage}, {busy[stage]:.0%} of the time)"
    return REMEDIES[stage]


def thin(timeline: list[tuple[float, int]], most: int = 200) -> list[list[float]]:
    """Keep at most so many points of a timeline, the last among them, ready for JSON."""
    stride = -(-len(timeline) // most) if timeline else 1
    return [list(point) for point in timeline[::-1][::stride][::-1]]
