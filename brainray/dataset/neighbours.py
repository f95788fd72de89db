"""Close pairs and nearest rows among many unit vectors, without comparing all of them in full.

Two ways, and neither ever calls a pair close that is not, since every pair is checked at the end:

* *Exact.* A sketch of a few numbers stands for each vector, and the product of two sketches is
  never below that of the vectors (:func:`build_sketches`). Only pairs whose sketches come close
  are looked at in full. All pairs of sketches are still compared: quadratic, with an eighteenth
  of the arithmetic.
* *By cells*, beyond :data:`EXACT_PAIRS` [1]_. Each vector belongs to the cell of the centre
  nearest to it, one of about √N, and is compared with the vectors of the few cells nearest to
  it: N √N. A close pair may be missed; :func:`brainray.dataset.twins.measure_recall` says how
  many are.

Space-partitioning trees do not help: among scans' thumbnails a ball of the radius that a
correlation of 0.96 means (0.28) meets half of the leaves of a k-d tree.

References
----------
.. [1] Jégou, Douze and Schmid, "Product quantization for nearest neighbor search", IEEE
   TPAMI 33 (2011), section 4: the inverted file; here without quantising.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

FloatRows = NDArray[np.float32]
Indices = NDArray[np.int64]

NUM_AXES = 32
"""Leading axes in a sketch. They hold 66 % of the variance of the Kaggle set's thumbnails, and
leave 7 pairs to look at for every one that reaches 0.96."""

NUM_PROBES = 12
"""Cells whose vectors each vector is compared with."""

EXACT_PAIRS = 2**34
"""Pairs up to which all are compared: those of 185,000 images, under a minute on two cores."""

_BOUND_SLACK = 1e-5
"""Room for the rounding of float32 in a bound: products of unit vectors err by about 1e-7."""
_AXES_ROWS = 16_384
_BLOCK_ROWS = 1024
_BLOCK_COLUMNS = 16_384
_BATCH_PAIRS = 1_000_000


def build_sketches(vectors: FloatRows, num_axes: int = NUM_AXES) -> FloatRows:
    """Shorten vectors so that products of sketches bound the products of vectors from above.

    A sketch is the vector's coordinates on the leading principal axes, and the length of what
    they leave: x·y = Px·Py + Rx·Ry ≤ Px·Py + |Rx| |Ry|, by Cauchy and Schwarz.

    Parameters
    ----------
    vectors : ndarray of float32, shape (N, D)

    Returns
    -------
    ndarray of float32, shape (N, min(num_axes, D) + 1)
    """
    sample = vectors[:: max(1, len(vectors) // _AXES_ROWS)]
    _, axes = np.linalg.eigh(sample.T @ sample)  # ascending; any orthonormal axes keep the bound
    leading = vectors @ axes[:, ::-1][:, :num_axes].astype(np.float32)
    squared = np.einsum("ij,ij->i", vectors, vectors) - np.einsum("ij,ij->i", leading, leading)
    return np.column_stack([leading, np.sqrt(np.maximum(squared, 0))])


def multiply_rows(vectors: FloatRows, left: Indices, right: Indices) -> FloatRows:
    """Compute the product of each pair of rows, shape (P,)."""
    products = np.empty(len(left), np.float32)
    for start in range(0, len(left), _BLOCK_COLUMNS):
        part = slice(start, start + _BLOCK_COLUMNS)
        np.einsum("ij,ij->i", vectors[left[part]], vectors[right[part]], out=products[part])
    return products


def iterate_candidates(
    vectors: FloatRows, min_product: float, *, exact: bool
) -> Iterator[tuple[Indices, Indices]]:
    """Yield batches of pairs of rows, among them those whose product reaches a threshold.

    Parameters
    ----------
    vectors : ndarray of float32, shape (N, D)
        Of length 1 (or 0).
    exact : bool
        Whether every pair that reaches the threshold must be among them.
    """
    sketches = build_sketches(vectors)
    bound = min_product - _BOUND_SLACK
    found = _compare_all(sketches, bound) if exact else _compare_cells(sketches, bound)
    waiting: list[tuple[Indices, Indices]] = []
    for pairs in found:
        waiting.append(pairs)
        if sum(len(left) for left, _ in waiting) >= _BATCH_PAIRS:
            yield _concatenate(waiting)
            waiting = []
    if waiting:
        yield _concatenate(waiting)


def _concatenate(parts: list[tuple[Indices, Indices]]) -> tuple[Indices, Indices]:
    left, right = zip(*parts, strict=True)
    return np.concatenate(left), np.concatenate(right)


def _compare_all(sketches: FloatRows, bound: float) -> Iterator[tuple[Indices, Indices]]:
    for top in range(0, len(sketches), _BLOCK_ROWS):
        block = sketches[top : top + _BLOCK_ROWS]
        for start in range(top, len(sketches), _BLOCK_COLUMNS):
            left, right = _find_reaching(block, sketches[start : start + _BLOCK_COLUMNS], bound)
            once = left + top < right + start
            yield left[once] + top, right[once] + start


def _compare_cells(sketches: FloatRows, bound: float) -> Iterator[tuple[Indices, Indices]]:
    for visitors, members in _iterate_cells(sketches, sketches):
        left, right = _find_reaching(sketches[visitors], sketches[members], bound)
        left, right = visitors[left], members[right]
        yield left[left != right], right[left != right]


def _find_reaching(left: FloatRows, right: FloatRows, bound: float) -> tuple[Indices, Indices]:
    reaching = np.flatnonzero(left @ right.T >= bound)  # five times faster than nonzero in 2-D
    rows, columns = np.divmod(reaching, len(right))
    return rows, columns


def _iterate_cells(queries: FloatRows, reference: FloatRows) -> Iterator[tuple[Indices, Indices]]:
    """Yield, cell by cell, the queries that visit it and the reference rows in it."""
    num_cells = max(1, round(len(reference) ** 0.5))
    rng = np.random.default_rng(0)
    centres = reference[rng.choice(len(reference), num_cells, replace=False)]
    members = _list_by_cell(_find_cells(reference, centres, 1), num_cells)
    visitors = _list_by_cell(_find_cells(queries, centres, NUM_PROBES), num_cells)
    for cell in range(num_cells):
        if len(visitors[cell]) and len(members[cell]):
            yield visitors[cell], members[cell]


def _find_cells(sketches: FloatRows, centres: FloatRows, count: int) -> Indices:
    """Return the cells of the nearest centres of each row, shape (N, ≤ count)."""
    count = min(count, len(centres))
    cells = np.empty((len(sketches), count), np.int64)
    for start in range(0, len(sketches), _BLOCK_COLUMNS):
        products = sketches[start : start + _BLOCK_COLUMNS] @ centres.T
        near = np.argpartition(products, len(centres) - count, axis=1)[:, len(centres) - count :]
        cells[start : start + _BLOCK_COLUMNS] = near
    return cells


def _list_by_cell(cells: Indices, num_cells: int) -> list[Indices]:
    """Return the rows of every cell, ascending."""
    order = np.argsort(cells, axis=None, kind="stable")
    ends = np.cumsum(np.bincount(cells.ravel(), minlength=num_cells))[:-1]
    return np.split(order // cells.shape[1], ends)


def find_nearest_rows(
    queries: FloatRows, reference: FloatRows, *, exact: bool
) -> tuple[Indices, FloatRows]:
    """Find each query's row of the reference with the largest product.

    Returns
    -------
    nearest : ndarray of int64, shape (N,)
    product : ndarray of float32, shape (N,)
    """
    nearest = np.zeros(len(queries), np.int64)
    product = np.full(len(queries), -np.inf, np.float32)
    if exact:
        for start in range(0, len(queries), _BLOCK_ROWS):
            part = np.arange(start, min(start + _BLOCK_ROWS, len(queries)))
            for first in range(0, len(reference), _BLOCK_COLUMNS):
                columns = np.arange(first, min(first + _BLOCK_COLUMNS, len(reference)))
                _keep_nearest(queries, reference, part, columns, nearest, product)
        return nearest, product
    sketches = build_sketches(np.concatenate([reference, queries]))
    for visitors, members in _iterate_cells(sketches[len(reference) :], sketches[: len(reference)]):
        _keep_nearest(queries, reference, visitors, members, nearest, product)
    return nearest, product


def _keep_nearest(
    queries: FloatRows,
    reference: FloatRows,
    rows: Indices,
    columns: Indices,
    nearest: Indices,
    product: FloatRows,
) -> None:
    """Compare some queries with some of the reference, and keep what is nearer than before."""
    products = queries[rows] @ reference[columns].T
    best = products.argmax(axis=1)
    reached = products[np.arange(len(rows)), best]
    nearer = reached > product[rows]
    nearest[rows[nearer]] = columns[best[nearer]]
    product[rows[nearer]] = reached[nearer]
