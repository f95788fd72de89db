"""Near-identical slices: found by their thumbnails, grouped, and looked up.

Neighbouring slices of one patient, and copies of one image, are spread over this kind of
data set without a patient's name. Two slices count as near-identical when the correlation
of their standardised 24 x 24 thumbnails reaches a threshold.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

THUMBNAIL_PX = 24
"""Side of a thumbnail, in pixels: coarse enough to forgive a JPEG's noise."""

NEAR_TWIN_CORRELATION = 0.995
"""From here on a test image counts as having a near-twin in training.

On the 1,311 official test images of the Kaggle brain-tumour set 37 % have one.
"""

_BLOCK_ROWS = 2048


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


def group_twins(standardised: NDArray[np.float32], *, min_correlation: float) -> NDArray[np.int64]:
    """Group near-identical slices by single linkage.

    Parameters
    ----------
    standardised : ndarray of float32, shape (N, 576)
        From :func:`standardise_thumbnails`.
    min_correlation : float
        Two slices at or above it are of one group, and so are the slices of a chain.

    Returns
    -------
    ndarray of int64, shape (N,)
        Group numbers from 0, in order of first appearance.
    """
    count = len(standardised)
    rows, columns = [], []
    for start in range(0, count, _BLOCK_ROWS):
        block = standardised[start : start + _BLOCK_ROWS]
        row, column = np.nonzero(block @ standardised[start:].T >= min_correlation)
        rows.append(row + start)
        columns.append(column + start)
    row, column = (np.concatenate(part or [np.zeros(0, np.int64)]) for part in (rows, columns))
    links = coo_array((np.ones(len(row), np.int8), (row, column)), shape=(count, count))
    _, groups = connected_components(links, directed=False)
    return np.asarray(groups, dtype=np.int64)


def find_nearest(
    standardised: NDArray[np.float32], reference: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """Find each slice's most similar slice of a reference set.

    Parameters
    ----------
    standardised : ndarray of float32, shape (N, 576)
    reference : ndarray of float32, shape (M, 576), M >= 1

    Returns
    -------
    nearest : ndarray of int64, shape (N,)
        Row of the reference.
    correlation : ndarray of float32, shape (N,)
        In [-1, 1].
    """
    nearest = np.empty(len(standardised), np.int64)
    correlation = np.empty(len(standardised), np.float32)
    for start in range(0, len(standardised), _BLOCK_ROWS):
        part = slice(start, start + _BLOCK_ROWS)
        similarity = standardised[part] @ reference.T
        nearest[part] = similarity.argmax(axis=1)
        correlation[part] = similarity.max(axis=1)
    return nearest, correlation


def merge_groups(twins: NDArray[np.int64], given: Sequence[str | None]) -> NDArray[np.int64]:
    """Join groups of near-identical slices that the user says belong together (a patient, say).

    Parameters
    ----------
    twins : ndarray of int64, shape (N,)
        From :func:`group_twins`.
    given : sequence of str or None, length N
        The user's own group of each image, or None.

    Returns
    -------
    ndarray of int64, shape (N,)
        Group numbers from 0.
    """
    if not len(twins):
        return twins
    names = {
        name: int(twins.max()) + 1 + i
        for i, name in enumerate(sorted({name for name in given if name}))
    }
    links = [(int(twin), names[name]) for twin, name in zip(twins, given, strict=True) if name]
    size = int(twins.max()) + 1 + len(names)
    row, column = zip(*links, strict=True) if links else ((), ())
    graph = coo_array((np.ones(len(links), np.int8), (row, column)), shape=(size, size))
    _, merged = connected_components(graph, directed=False)
    return np.asarray(merged, dtype=np.int64)[twins]
