"""Findings of an audit: exact and near duplicates, label conflicts, leaks between splits.

Functions take arrays with a row for each image that could be opened, and return numbers and pairs
of rows.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from brainray.data.near_duplicates import NEAR_DUPLICATE_CORRELATION, find_nearest
from brainray.metrics import compute_accuracy

Indices = NDArray[np.int64]

CORRELATION_STEPS = (NEAR_DUPLICATE_CORRELATION, 0.98, 0.96, 0.9)
"""Correlations at which the nearest-neighbour baseline is divided into parts."""

SIZE_STEPS = (1, 2, 3, 6, 11, 21)
"""Smallest size of each counted class of groups."""

REFERENCES = {"test": ("train", "val"), "val": ("train",)}
"""Splits in which an image of a held-out split must have no near duplicate."""

_MAX_MEMBERS = 4096


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two images to show side by side."""

    left: int
    """Row of the first image; of the held-out one, where the pair crosses splits."""
    right: int
    """Row of the second."""
    correlation: float
    """Of their thumbnails."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Nearest:
    """The most similar image in the reference splits of each held-out image."""

    rows: Indices
    """Held-out images, shape (n,)."""
    nearest: Indices
    """Row of the most similar image of each, shape (n,)."""
    correlation: NDArray[np.float32]
    """Shape (n,)."""


def number_exact_duplicates(pixel_hashes: Sequence[str]) -> Indices:
    """Return a number from 0 for each set of images with identical pixels; −1 without a copy."""
    _, first, kind, counts = np.unique(
        np.array(pixel_hashes), return_index=True, return_inverse=True, return_counts=True
    )
    repeated = np.flatnonzero(counts > 1)
    numbers = np.full(len(counts), -1)
    numbers[repeated[np.argsort(first[repeated])]] = np.arange(len(repeated))
    return numbers[kind].astype(np.int64)


def describe_groups(groups: Indices, labels: Indices) -> dict[str, Any]:
    """Count groups (−1 is none): all, those with several images, those with several labels."""
    member = groups >= 0
    _, group_of, sizes = np.unique(groups[member], return_inverse=True, return_counts=True)
    mixed = _find_mixed(group_of, labels[member], len(sizes))
    return {
        "num_groups": len(sizes),
        "num_repeated": int((sizes > 1).sum()),
        "num_images_in_repeated": int(sizes[sizes > 1].sum()),
        "largest": int(sizes.max(initial=0)),
        "num_mixed": int(mixed.sum()),
        "num_images_in_mixed": int(sizes[mixed].sum()),
    }


def count_sizes(groups: Indices) -> list[dict[str, Any]]:
    """Count groups by size: ``low`` to ``high`` images (None: and more), groups, images."""
    _, sizes = np.unique(groups, return_counts=True)
    rows = []
    for low, above in zip(SIZE_STEPS, (*SIZE_STEPS[1:], None), strict=True):
        inside = sizes[(sizes >= low) & (sizes < (above or np.inf))]
        high = None if above is None else above - 1
        rows.append({"low": low, "high": high, "groups": len(inside), "images": int(inside.sum())})
    return rows


def _find_mixed(group_of: Indices, labels: Indices, num_groups: int) -> NDArray[np.bool_]:
    low = np.full(num_groups, np.iinfo(np.int64).max)
    high = np.full(num_groups, -1)
    np.minimum.at(low, group_of, labels)
    np.maximum.at(high, group_of, labels)
    return np.asarray(high > low)


def find_conflicts(
    groups: Indices, labels: Indices, standardised: NDArray[np.float32]
) -> list[Pair]:
    """Find in each group with several labels the two most similar images of different labels.

    The most similar pair comes first.
    """
    names, group_of, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    mixed = _find_mixed(group_of, labels, len(names)) & (names >= 0)
    members = np.split(np.argsort(group_of, kind="stable"), np.cumsum(sizes)[:-1])
    pairs = []
    for group in np.flatnonzero(mixed):
        rows = members[group][:_MAX_MEMBERS]
        similarity = standardised[rows] @ standardised[rows].T
        similarity[labels[rows][:, None] == labels[rows]] = -np.inf
        left, right = np.unravel_index(similarity.argmax(), similarity.shape)
        if np.isfinite(similarity[left, right]):
            pairs.append(_pair(int(rows[left]), int(rows[right]), similarity[left, right]))
    return sorted(pairs, key=lambda pair: -pair.correlation)


def _pair(left: int, right: int, correlation: np.float32 | float) -> Pair:
    return Pair(left=left, right=right, correlation=min(1.0, float(correlation)))


def find_nearest_references(
    splits: NDArray[np.str_], standardised: NDArray[np.float32]
) -> dict[str, Nearest]:
    """Find each held-out image's most similar image in the splits of :data:`REFERENCES`."""
    found = {}
    for split, references in REFERENCES.items():
        rows = np.flatnonzero(splits == split)
        pool = np.flatnonzero(np.isin(splits, references))
        if len(rows) and len(pool):
            nearest, correlation = find_nearest(standardised[rows], standardised[pool])
            found[split] = Nearest(rows=rows, nearest=pool[nearest], correlation=correlation)
    return found


def measure_leak(
    found: Nearest,
    references: NDArray[np.bool_],
    exact_duplicates: Indices,
    groups: Indices,
    labels: Indices,
) -> dict[str, Any]:
    """Measure how much of a held-out split has duplicates in its reference splits.

    Parameters
    ----------
    found : Nearest
        Of the held-out split.
    references : ndarray of bool, shape (n,)
        Images of the reference splits.
    exact_duplicates, groups, labels : ndarray of int64, shape (n,)
        From :func:`number_exact_duplicates`,
        :func:`brainray.data.near_duplicates.group_near_duplicates`, and the data set.

    Returns
    -------
    dict
        ``n``; ``num_`` and ``share_`` of ``exact_duplicate`` (identical pixels),
        ``near_duplicate`` (correlation of 0.995 or more, exact duplicates included) and
        ``same_group``; and ``baseline_1nn``, see :func:`evaluate_baseline`.
    """
    rows = found.rows
    exact = is_shared(exact_duplicates, rows, references)
    counts = {
        "exact_duplicate": int(exact.sum()),
        "near_duplicate": int((exact | (found.correlation >= NEAR_DUPLICATE_CORRELATION)).sum()),
        "same_group": int(is_shared(groups, rows, references).sum()),
    }
    return {
        "n": len(rows),
        **{f"num_{name}": count for name, count in counts.items()},
        **{f"share_{name}": count / len(rows) for name, count in counts.items()},
        "near_duplicate_correlation": NEAR_DUPLICATE_CORRELATION,
        "baseline_1nn": evaluate_baseline(
            labels[rows], labels[found.nearest], found.correlation, groups[rows]
        ),
    }


def is_shared(names: Indices, rows: Indices, references: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Return which rows have the number (not −1) of an image of the references."""
    return (names[rows] >= 0) & np.isin(names[rows], names[references])


def evaluate_baseline(
    labels: Indices, answers: Indices, correlation: NDArray[np.float32], groups: Indices
) -> list[dict[str, Any]]:
    """Evaluate the label of the nearest image as a prediction: in all, and by its correlation.

    Each row has ``low`` and ``high`` bounds of the correlation (None: open), ``n``, ``accuracy``
    and ``accuracy_ci95`` (None without images). The first row is for all images.
    """
    bounds: list[tuple[float | None, float | None]] = [(None, None)]
    bounds += zip((*CORRELATION_STEPS, None), (None, *CORRELATION_STEPS), strict=True)
    rows = []
    for low, high in bounds:
        inside = np.ones(len(labels), np.bool_)
        if low is not None:
            inside &= correlation >= low
        if high is not None:
            inside &= correlation < high
        scores: dict[str, Any] = {"accuracy": None, "accuracy_ci95": None}
        if inside.any():
            scores = compute_accuracy(labels[inside], answers[inside], groups=groups[inside])
        rows.append(
            {
                "low": low,
                "high": high,
                "n": int(inside.sum()),
                "accuracy": scores["accuracy"],
                "accuracy_ci95": scores["accuracy_ci95"],
            }
        )
    return rows


def list_crossing_exact_duplicates(
    exact_duplicates: Indices, found: Nearest, references: NDArray[np.bool_], limit: int
) -> list[Pair]:
    """Pair held-out images with a copy in the references; one pair for each set of copies."""
    first: dict[int, int] = {}
    for row in np.flatnonzero(references & (exact_duplicates >= 0)):
        first.setdefault(int(exact_duplicates[row]), int(row))
    pairs, seen = [], set()
    for row in found.rows[is_shared(exact_duplicates, found.rows, references)]:
        name = int(exact_duplicates[row])
        if name not in seen:
            seen.add(name)
            pairs.append(_pair(int(row), first[name], 1.0))
    return _downsample(pairs, limit)


def list_crossing_near_duplicates(
    exact_duplicates: Indices, found: Nearest, limit: int
) -> list[Pair]:
    """Pair held-out images with near duplicates that are no copies, the least similar first."""
    left, right = exact_duplicates[found.rows], exact_duplicates[found.nearest]
    chosen = (found.correlation >= NEAR_DUPLICATE_CORRELATION) & ((left < 0) | (left != right))
    order = np.flatnonzero(chosen)[np.argsort(found.correlation[chosen], kind="stable")]
    pairs = [
        _pair(int(found.rows[at]), int(found.nearest[at]), found.correlation[at]) for at in order
    ]
    return _downsample(pairs, limit)


def list_exact_duplicates(exact_duplicates: Indices, limit: int) -> list[Pair]:
    """Pair two images of each set of copies."""
    rows = np.flatnonzero(exact_duplicates >= 0)
    order = rows[np.argsort(exact_duplicates[rows], kind="stable")]
    starts = np.flatnonzero(np.diff(exact_duplicates[order], prepend=-1))
    pairs = [_pair(int(order[at]), int(order[at + 1]), 1.0) for at in starts]
    return _downsample(pairs, limit)


def _downsample(pairs: list[Pair], limit: int) -> list[Pair]:
    """Return at most `limit` pairs, evenly spaced."""
    if len(pairs) <= limit:
        return pairs
    return [pairs[at] for at in np.linspace(0, len(pairs) - 1, limit).round().astype(int)]
