"""Near-identical slices: found by their thumbnails, grouped, and looked up.

Neighbouring slices of one patient, and copies of one image, are spread over this kind of
data set without a patient's name. Two slices count as near-identical when the correlation
of their standardised 24 x 24 thumbnails reaches a threshold.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image

from brainray.data.neighbours import (
    EXACT_PAIRS,
    Block,
    RunBlocks,
    build_sketches,
    find_nearest_rows,
    iterate_candidates,
    keep_nearer,
    list_cells,
    list_tiles,
    multiply_rows,
    run_blocks_locally,
)

THUMBNAIL_PX = 24
"""Side of a thumbnail, in pixels: coarse enough to forgive a JPEG's noise."""

NEAR_DUPLICATE_CORRELATION = 0.995
"""From here on a test image counts as having a near duplicate in training.

On the 1,311 official test images of the Kaggle brain-tumour set 37 % have one.
"""

_RECALL_ROWS = 16_384


def compute_thumbnail(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Shrink grey pixels to a thumbnail.

    Parameters
    ----------
    pixels : ndarray of uint8, shape (height, width)

    Returns
    -------
    ndarray of uint8, shape (576,)
    """
    small = Image.fromarray(pixels).resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX)
    return np.asarray(small).reshape(-1)


def standardise_thumbnails(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Give each thumbnail zero mean and unit length, so that a dot product is a correlation.

    A thumbnail of one single grey becomes zeros: it correlates with nothing.

    Parameters
    ----------
    thumbnails : ndarray of uint8, shape (N, 576)

    Returns
    -------
    ndarray of float32, shape (N, 576)
    """
    centred = thumbnails.astype(np.float32)
    centred -= centred.mean(axis=1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    standardised = np.zeros_like(centred)
    np.divide(centred, length, out=standardised, where=length > 0)
    return standardised


def group_near_duplicates(
    standardised: NDArray[np.float32],
    *,
    min_correlation: float,
    exact_pairs: int = EXACT_PAIRS,
    run_blocks: RunBlocks = run_blocks_locally,
) -> NDArray[np.int64]:
    """Group near-identical slices by single linkage.

    Parameters
    ----------
    standardised : ndarray of float32, shape (N, 576)
        From :func:`standardise_thumbnails`.
    min_correlation : float
        Two slices at or above it are of one group, and so are the slices of a chain.
    exact_pairs : int
        Pairs of slices up to which none is missed; beyond it a few may be, see
        :func:`measure_recall`.
    run_blocks : Spread
        Where the work is done.

    Returns
    -------
    ndarray of int64, shape (N,)
        Group numbers from 0, in order of first appearance.
    """
    first, copy_of = _find_exact_duplicates(standardised)
    vectors = standardised[first]
    sketches = build_sketches(vectors)
    if is_exact(len(vectors), exact_pairs):
        blocks = list_tiles(len(vectors), len(vectors), is_symmetric=True)
    else:
        blocks = list_cells(sketches, sketches)
    groups = np.arange(len(vectors))
    for linked in run_blocks(_group_blocks, blocks, vectors, sketches, min_correlation):
        groups = _join(groups, np.arange(len(vectors)), linked)
    return _number_by_appearance(groups[copy_of])


def _group_blocks(
    blocks: Sequence[Block],
    vectors: NDArray[np.float32],
    sketches: NDArray[np.float32],
    min_correlation: float,
) -> NDArray[np.int64]:
    """Group what some blocks link; return the first slice of each one's group, shape (n,)."""
    groups = np.arange(len(vectors))
    for left, right in iterate_candidates(blocks, sketches, min_correlation):
        apart = groups[left] != groups[right]  # what a chain has joined needs no look
        left, right = left[apart], right[apart]
        close = multiply_rows(vectors, left, right) >= min_correlation
        groups = _join(groups, left[close], right[close])
    _, first, group_of = np.unique(groups, return_index=True, return_inverse=True)
    return np.asarray(first[group_of], dtype=np.int64)


def is_exact(num_images: int, exact_pairs: int = EXACT_PAIRS) -> bool:
    """Tell whether grouping so many images compares every pair."""
    return num_images * (num_images - 1) // 2 <= exact_pairs


def _find_exact_duplicates(
    standardised: NDArray[np.float32],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the first row of each kind, (n,), and the kind of each row, (N,).

    A thousand copies of one image would otherwise be half a million pairs. Rows of zeros
    correlate with nothing, and so not with one another.
    """
    rows = np.ascontiguousarray(standardised)
    if not rows.size:
        empty = np.zeros(0, np.int64)
        return empty, empty
    as_bytes = rows.view(np.dtype((np.void, rows.itemsize * rows.shape[1]))).ravel()
    _, first, kind = np.unique(as_bytes, return_index=True, return_inverse=True)
    first_copy = first[kind]
    blank = np.flatnonzero(~rows.any(axis=1))
    first_copy[blank] = blank
    distinct, copy_of = np.unique(first_copy, return_inverse=True)
    return distinct, copy_of


def _join(
    groups: NDArray[np.int64], left: NDArray[np.int64], right: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Join the groups of pairs of slices."""
    if not len(left):
        return groups
    size = int(groups.max()) + 1
    joined = find_components(groups[left], groups[right], size)
    return np.asarray(joined, dtype=np.int64)[groups]


def _number_by_appearance(groups: NDArray[np.int64]) -> NDArray[np.int64]:
    _, first, inverse = np.unique(groups, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first)).astype(np.int64)[inverse]


def measure_recall(
    standardised: NDArray[np.float32],
    groups: NDArray[np.int64],
    *,
    min_correlation: float,
    num_samples: int = 1000,
    seed: int = 0,
) -> dict[str, int]:
    """Measure, on a sample, how many near-identical pairs were put into one group.

    Parameters
    ----------
    standardised : ndarray of float32, shape (N, 576)
    groups : ndarray of int64, shape (N,)
        From :func:`group_near_duplicates`.
    num_samples : int
        Slices that are compared with all.

    Returns
    -------
    dict of str to int
        ``num_samples``; ``num_pairs``, pairs of a sampled slice and another that reach the
        threshold; ``num_grouped``, those of them in one group.
    """
    count = len(standardised)
    rng = np.random.default_rng(seed)
    sampled = np.sort(rng.choice(count, min(num_samples, count), replace=False))
    num_pairs = num_grouped = 0
    for start in range(0, count, _RECALL_ROWS):
        similarity = standardised[sampled] @ standardised[start : start + _RECALL_ROWS].T
        row, column = np.nonzero(similarity >= min_correlation)
        other = sampled[row] != column + start
        num_pairs += int(other.sum())
        num_grouped += int((groups[sampled[row]] == groups[column + start])[other].sum())
    return {"num_samples": len(sampled), "num_pairs": num_pairs, "num_grouped": num_grouped}


def find_nearest(
    standardised: NDArray[np.float32],
    reference: NDArray[np.float32],
    *,
    exact_pairs: int = EXACT_PAIRS,
    run_blocks: RunBlocks = run_blocks_locally,
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Find each slice's most similar slice of a reference set.

    Parameters
    ----------
    standardised : ndarray of float32, shape (N, 576)
    reference : ndarray of float32, shape (M, 576), M >= 1
    exact_pairs : int
        Pairs, N times M, up to which it is surely the most similar one; beyond, a slice may
        get the second best. The correlation is that of the slice named in any case.
    run_blocks : Spread
        Where the work is done.

    Returns
    -------
    nearest : ndarray of int64, shape (N,)
        Row of the reference.
    correlation : ndarray of float32, shape (N,)
        In [-1, 1].
    """
    count = len(standardised)
    if count * len(reference) <= exact_pairs:
        blocks = list_tiles(count, len(reference))
    else:
        sketches = build_sketches(np.concatenate([standardised, reference]))
        blocks = list_cells(sketches[:count], sketches[count:])
    nearest, correlation = np.zeros(count, np.int64), np.full(count, -np.inf, np.float32)
    for others, reached in run_blocks(find_nearest_rows, blocks, standardised, reference):
        keep_nearer(nearest, correlation, np.arange(count), others, reached)
    return nearest, correlation


def merge_groups(
    near_duplicates: NDArray[np.int64], given: Sequence[str | None]
) -> NDArray[np.int64]:
    """Join groups of near-identical slices that the user says belong together (a patient, say).

    Parameters
    ----------
    near_duplicates : ndarray of int64, shape (N,)
        From :func:`group_near_duplicates`.
    given : sequence of str or None, length N
        The user's own group of each image, or None.

    Returns
    -------
    ndarray of int64, shape (N,)
        Group numbers from 0.
    """
    if not len(near_duplicates):
        return near_duplicates
    names = {
        name: int(near_duplicates.max()) + 1 + i
        for i, name in enumerate(sorted({name for name in given if name}))
    }
    links = [
        (int(twin), names[name]) for twin, name in zip(near_duplicates, given, strict=True) if name
    ]
    size = int(near_duplicates.max()) + 1 + len(names)
    row, column = zip(*links, strict=True) if links else ((), ())
    return find_components(row, column, size)[near_duplicates]


def find_components(rows: ArrayLike, columns: ArrayLike, size: int) -> NDArray[np.int64]:
    """Return the connected component of each of ``size`` nodes, given the ends of the links."""
    from scipy.sparse import coo_array  # half a second, which who only decodes does without
    from scipy.sparse.csgraph import connected_components

    rows, columns = np.asarray(rows, np.int64), np.asarray(columns, np.int64)
    links = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(size, size))
    return np.asarray(connected_components(links, directed=False)[1], np.int64)
