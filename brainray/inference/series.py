"""What the slices of a series say together: slice evidence, by one stated rule.

A network that is wrong on one slice in a hundred gives a tumour to some slice of nearly every
series, so neither the maximum of a series nor a product over its slices means anything. Here a
class has evidence where a share of the series' slices agree on it, and where they are neighbours.

The evidence is a mean of probabilities that are calibrated for slices. It is not a probability of
the series or of the patient: ``brainray calibrate-series`` fits thresholds where labels are known.
"""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainray.errors import ConfigError

NO_TUMOUR = "notumor"
"""The class that stands for the absence of the others."""
INDETERMINATE = "indeterminate"
NUM_KEY_SLICES = 3
DUPLICATE = "duplicate"
"""Why a slice is not used: the series has the same object, or the same frame of it, already."""

MAX_LOCALIZER_SLICES = 30
"""A series of several orientations and at most so many slices is a localizer."""
GAP = 1.5
"""Times the usual distance between slices from which one is taken to be missing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeriesRule:
    """When the slices of a series give it a class."""

    top_fraction: float = 0.1
    """Share of the slices, those most probable of a class, whose mean probability is its
    evidence (above 0, up to 1)."""
    threshold: float = 0.5
    """Evidence, and probability of each slice of a run, that counts for a class (0 to 1)."""
    min_run: int = 3
    """Neighbouring slices at or above the threshold that a class needs."""
    min_slices: int = 5
    """Slices with probabilities that a series needs; with fewer it is indeterminate."""

    def __post_init__(self) -> None:
        if not 0 < self.top_fraction <= 1:
            raise ConfigError(f"top_fraction must be in (0, 1], got {self.top_fraction}.")
        if not 0 <= self.threshold <= 1:
            raise ConfigError(f"threshold must be in [0, 1], got {self.threshold}.")
        for name in ("min_run", "min_slices"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}.")


def summarise_series(
    slices: Sequence[dict[str, Any]], classes: Sequence[str], rule: SeriesRule | None = None
) -> dict[str, Any]:
    """Put the answers to a series' slices together.

    Parameters
    ----------
    slices : sequence of dict
        Rows of one series, in any order, with the columns ``scan_uri``, ``reason``,
        ``prob_<class>`` (None where rejected), ``sop_instance``, ``frame``, ``plane``,
        ``position_mm``, ``orientation`` and ``flags``, of
        :func:`brainray.inference.schema.build_schema`.
    classes : sequence of str
        In class order.
    rule : SeriesRule, optional

    Returns
    -------
    dict
        ``answer``, a class or "indeterminate"; ``reason``, why it is indeterminate, else None;
        ``evidence`` and ``longest_run``, a number for each class; ``key_slices``, at most
        :data:`NUM_KEY_SLICES` ``scan_uri`` of slices that are strongest for the most evident
        class and no neighbours; ``num_slices``, ``num_used``; ``skipped``, a number for each
        reason; ``plane``; ``flags``, sorted.
    """
    rule = rule or SeriesRule()
    used, skipped = _choose_slices(slices, classes)
    probs = np.array([[row[f"prob_{name}"] for name in classes] for row in used], np.float64)
    probs = probs.reshape(len(used), len(classes))
    evidence = _compute_evidence(probs, rule.top_fraction)
    runs = [_find_longest_run(probs[:, k] >= rule.threshold) for k in range(len(classes))]
    answer, reason = decide_series(evidence, runs, len(used), classes, rule)
    planes = Counter(row["plane"] for row in used)
    flags = _find_flags(used)
    if _is_localizer(slices, used):
        answer, reason = INDETERMINATE, "localizer"
    shown = answer if answer in classes else _find_most_evident(evidence, classes)
    return {
        "answer": answer,
        "reason": reason,
        "evidence": dict(zip(classes, map(float, evidence), strict=True)),
        "longest_run": dict(zip(classes, runs, strict=True)),
        "key_slices": _choose_key_slices(used, probs[:, list(classes).index(shown)]),
        "num_slices": len(slices),
        "num_used": len(used),
        "skipped": dict(sorted(skipped.items())),
        "plane": planes.most_common(1)[0][0] if used else None,
        "flags": sorted(flags),
    }


def _choose_slices(
    slices: Sequence[dict[str, Any]], classes: Sequence[str]
) -> tuple[list[dict[str, Any]], Counter[str]]:
    """Return the slices with probabilities, by position, each once; count the others by reason."""
    used, skipped, seen = [], Counter[str](), set()
    # By name first, so that of two copies the same one is used in every order.
    for row in sorted(slices, key=lambda row: str(row["scan_uri"])):
        name = (row["sop_instance"], row["frame"])
        if row["sop_instance"] is not None and name in seen:
            skipped[DUPLICATE] += 1
        elif row[f"prob_{classes[0]}"] is None:
            skipped[str(row["reason"])] += 1
        else:
            used.append(row)
        seen.add(name)
    used.sort(
        key=lambda row: (
            row["position_mm"] if row["position_mm"] is not None else math.inf,
            -1 if row["frame"] is None else row["frame"],
            str(row["scan_uri"]),
        )
    )
    return used, skipped


def _compute_evidence(probs: NDArray[np.float64], top_fraction: float) -> NDArray[np.float64]:
    if not len(probs):
        return np.zeros(probs.shape[1])
    count = max(1, math.ceil(top_fraction * len(probs) - 1e-9))
    evidence: NDArray[np.float64] = np.sort(probs, axis=0)[-count:].mean(axis=0)
    return evidence


def _find_longest_run(holds: NDArray[np.bool_]) -> int:
    longest = current = 0
    for one in holds.tolist():
        current = current + 1 if one else 0
        longest = max(longest, current)
    return longest


def decide_series(
    evidence: NDArray[np.float64],
    runs: Sequence[int],
    num_used: int,
    classes: Sequence[str],
    rule: SeriesRule,
) -> tuple[str, str | None]:
    """Return the class of a series, or "indeterminate" and why.

    Parameters
    ----------
    evidence : ndarray of float64, shape (K,)
        Mean probability of each class over its most probable slices.
    runs : sequence of int, length K
        Longest run of neighbours at or above the rule's threshold, of each class.
    num_used : int
        What the rule's ``min_slices`` is compared with.
    classes : sequence of str
        The K names, in class order.
    rule : SeriesRule
    """
    if num_used < rule.min_slices:
        return INDETERMINATE, "too_few_slices"
    tumours = [k for k, name in enumerate(classes) if name != NO_TUMOUR]
    strong = {k for k in tumours if evidence[k] >= rule.threshold}
    long = {k for k in tumours if runs[k] >= rule.min_run}
    if len(strong & long) == 1:
        return classes[(strong & long).pop()], None
    if strong & long:
        return INDETERMINATE, "several_classes"
    if strong | long or NO_TUMOUR not in classes:
        return INDETERMINATE, "weak_evidence"
    return NO_TUMOUR, None


def _find_most_evident(evidence: NDArray[np.float64], classes: Sequence[str]) -> str:
    """Return the class that a reader would check first: a tumour where there is one."""
    named = [k for k, name in enumerate(classes) if name != NO_TUMOUR] or range(len(classes))
    return classes[max(named, key=lambda k: evidence[k])]


def _choose_key_slices(used: Sequence[dict[str, Any]], probs: NDArray[np.float64]) -> list[str]:
    chosen: list[int] = []
    for place in np.argsort(-probs, kind="stable").tolist():
        if len(chosen) == NUM_KEY_SLICES:
            break
        if all(abs(place - other) > 1 for other in chosen):
            chosen.append(place)
    return [str(used[place]["scan_uri"]) for place in chosen]


# ---- flags ---------------------------------------------------------------------------------------


def _find_flags(used: Sequence[dict[str, Any]]) -> set[str]:
    flags = {flag for row in used for flag in row["flags"] or ()}
    if len(_count_orientations(used)) > 1:
        flags.add("mixed")
    positions = sorted(
        {round(row["position_mm"], 3) for row in used if row["position_mm"] is not None}
    )
    steps = [after - before for before, after in pairwise(positions)]
    if steps and max(steps) > GAP * float(np.median(steps)):
        flags.add("incomplete")
    return flags


def _count_orientations(rows: Sequence[dict[str, Any]]) -> Counter[tuple[float, ...]]:
    found = (row["orientation"] for row in rows if row["orientation"] is not None)
    return Counter(tuple(round(cosine, 1) + 0.0 for cosine in one) for one in found)


def _is_localizer(slices: Sequence[dict[str, Any]], used: Sequence[dict[str, Any]]) -> bool:
    """Tell a localizer by its geometry: a few slices of several orientations."""
    return len(slices) <= MAX_LOCALIZER_SLICES and len(_count_orientations(used)) > 1
