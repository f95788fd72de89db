"""Findings of an audit: exact and near duplicates, label conflicts, leaks between splits.

Functions take arrays with a row for each image that could be opened, and return numbers and pairs
of rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
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
    hashes = pd.Series(pixel_hashes, dtype=str)
    return np.asarray(pd.factorize(hashes.where(hashes.duplicated(keep=False)))[0], np.int64)


def describe_groups(groups: Indices, labels: Indices) -> dict[str, Any]:
    """Count groups (−1 is none): all, those with several images, those with several labels."""
    found = pd.Series(labels[groups >= 0]).groupby(groups[groups >= 0])
    sizes, is_mixed = found.size(), found.nunique() > 1
    return {
        "num_groups": len(sizes),
        "num_repeated": int((sizes > 1).sum()),
        "num_images_in_repeated": int(sizes[sizes > 1].sum()),
        "largest": int(sizes.max()) if len(sizes) else 0,
        "num_mixed": int(is_mixed.sum()),
        "num_images_in_mixed": int(sizes[is_mixed].sum()),
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


def find_conflicts(
    groups: Indices, labels: Indices, standardised: NDArray[np.float32]
) -> list[Pair]:
    """Find in each group with several labels the two most similar images of different labels.

    The most similar pair comes first.
    """
    pairs = []
    for group, rows in pd.Series(labels).groupby(groups).indices.items():
        rows = rows[:_MAX_MEMBERS]
        if group < 0 or len(set(labels[rows])) < 2:
            continue
        similarity = standardised[rows] @ standardised[rows].T
        similarity[labels[rows][:, None] == labels[rows]] = -np.inf
        left, right = np.unravel_index(similarity.argmax(), similarity.shape)
        pairs.append(_pair(rows[left], rows[right], similarity[left, right]))
    return sorted(pairs, key=lambda pair: -pair.correlation)


def _pair(left: int, right: int, correlation: np.float32 | float) -> Pair:
    return Pair(left=int(left), right=int(right), correlation=min(1.0, float(correlation)))


def find_nearest_references(
    splits: NDArray[np.str_],
    standardised: NDArray[np.float32],
    references: Mapping[str, Sequence[str]] = REFERENCES,
) -> dict[str, Nearest]:
    """Find each held-out image's most similar image in the reference splits of its split."""
    found = {}
    for split, others in references.items():
        rows, pool = np.flatnonzero(splits == split), np.flatnonzero(np.isin(splits, others))
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

    ``references`` are the images of its reference splits, shape (n,).

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
        row: dict[str, Any] = {"low": low, "high": high, "n": int(inside.sum())}
        row |= {"accuracy": None, "accuracy_ci95": None}
        if inside.any():
            scores = compute_accuracy(labels[inside], answers[inside], groups=groups[inside])
            row |= {name: scores[name] for name in ("accuracy", "accuracy_ci95")}
        rows.append(row)
    return rows


def list_crossing_exact_duplicates(
    exact_duplicates: Indices, found: Nearest, references: NDArray[np.bool_], limit: int
) -> list[Pair]:
    """Pair held-out images with a copy in the references; one pair for each set of copies."""
    rows = np.flatnonzero(references)
    first = pd.Series(rows, exact_duplicates[rows]).groupby(level=0).first()
    shared = found.rows[is_shared(exact_duplicates, found.rows, references)]
    names = pd.Series(exact_duplicates[shared], shared).drop_duplicates()
    return _downsample([_pair(row, first[name], 1.0) for row, name in names.items()], limit)


def list_crossing_near_duplicates(
    exact_duplicates: Indices, found: Nearest, limit: int
) -> list[Pair]:
    """Pair held-out images with near duplicates that are no copies, the least similar first."""
    left, right = exact_duplicates[found.rows], exact_duplicates[found.nearest]
    chosen = (found.correlation >= NEAR_DUPLICATE_CORRELATION) & ((left < 0) | (left != right))
    order = np.flatnonzero(chosen)[np.argsort(found.correlation[chosen], kind="stable")]
    columns = (found.rows[order], found.nearest[order], found.correlation[order])
    return _downsample([_pair(*row) for row in zip(*columns, strict=True)], limit)


def list_exact_duplicates(exact_duplicates: Indices, limit: int) -> list[Pair]:
    """Pair two images of each set of copies."""
    sets = pd.Series(exact_duplicates).groupby(exact_duplicates).indices
    pairs = [_pair(rows[0], rows[1], 1.0) for name, rows in sets.items() if name >= 0]
    return _downsample(pairs, limit)


def _downsample(pairs: list[Pair], limit: int) -> list[Pair]:
    """Return at most `limit` pairs, evenly spaced."""
    if len(pairs) <= limit:
        return pairs
    return [pairs[at] for at in np.linspace(0, len(pairs) - 1, limit).round().astype(int)]
