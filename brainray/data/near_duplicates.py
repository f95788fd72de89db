"""Find near-duplicate slices by their thumbnails, and group them.

Data sets of this kind spread neighbouring slices of a patient, and copies of an image, over their
splits, without patients' names. Two slices count as near duplicates if the correlation of their
standardised 24 x 24 thumbnails reaches a threshold. Correlations are products of unit vectors.
There are two ways to search them. Both compute the exact correlation of every pair they report:

* *Exact search.* Each vector has a short sketch, and the product of two sketches is an upper bound
  of the product of their vectors (:func:`build_sketches`). Only pairs above the threshold by their
  sketches are compared in full. All pairs of sketches are compared: quadratic, with an eighteenth
  of the arithmetic.
* *Search by cells*, above :data:`EXACT_PAIRS` [1]_. Each vector belongs to the cell of its nearest
  centre, of about √N, and is compared with the vectors of the few nearest cells: N √N. It may miss
  pairs; :func:`measure_recall` measures how many.

Space-partitioning trees do not help: among scans' thumbnails a ball of the radius that a
correlation of 0.96 means (0.28) meets half of the leaves of a k-d tree.

References
----------
.. [1] Jégou, Douze and Schmid, "Product quantization for nearest neighbor search", IEEE
   TPAMI 33 (2011), section 4: the inverted file; here without quantising.
"""

from collections.abc import Callable, Iterator, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
import pandas as pd
import ray
from numpy.typing import NDArray
from PIL import Image

FloatRows = NDArray[np.float32]
Indices = NDArray[np.int64]
Rows = Indices | slice
Block = tuple[Rows, Rows]
"""Rows to compare: all of the first with all of the second."""

THUMBNAIL_PX = 24
"""Side of a thumbnail, in pixels: coarse enough to ignore a JPEG's noise."""

NEAR_DUPLICATE_CORRELATION = 0.995
"""A test image with this correlation to a training image counts as its near duplicate.

Of the 1,311 official test images of the Kaggle brain-tumour set 37 % have one.
"""

EXACT_PAIRS = 2**34
"""Pairs up to which the search is exact: those of 185,000 images, under a minute on two cores."""

NUM_AXES = 32
"""Leading axes in a sketch. They have 66 % of the variance of the Kaggle set's thumbnails. For each
pair that reaches 0.96, 7 pairs are compared in full."""

NUM_PROBES = 12
"""Cells that each vector is compared with."""

MIN_RAY_PRODUCTS = 2**31
"""Products from which Ray tasks are used: every pair of 65,000 scans, some seconds on one core."""

PARTS_PER_CPU = 2
"""Tasks for each CPU, so that a slow CPU does not delay the others for long."""

_BOUND_SLACK = 1e-5  # float32 products of unit vectors err by about 1e-7
_SQUARE_SLACK = 1e-6  # the same error in a squared length, whose root is small
_AXES_ROWS = 16_384
_RECALL_ROWS = 16_384
_BLOCK_ROWS = 1024
_BLOCK_COLUMNS = 16_384
_BATCH_PAIRS = 1_000_000


# ---- thumbnails ----------------------------------------------------------------------------------


def compute_thumbnail(pixels: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Shrink grey pixels (height, width) to a thumbnail, uint8 of shape (576,)."""
    small = Image.fromarray(pixels).resize((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.BOX)
    return np.asarray(small).reshape(-1)


def standardise_thumbnails(thumbnails: NDArray[np.uint8]) -> NDArray[np.float32]:
    """Give thumbnails (N, 576) zero mean and unit length, so that products are correlations.

    A thumbnail of one grey level becomes zeros: it correlates with nothing.
    """
    centred = thumbnails.astype(np.float32)
    centred -= centred.mean(axis=1, keepdims=True)
    length = np.linalg.norm(centred, axis=1, keepdims=True)
    standardised = np.zeros_like(centred)
    np.divide(centred, length, out=standardised, where=length > 0)
    return standardised


# ---- groups --------------------------------------------------------------------------------------


def group_near_duplicates(
    standardised: FloatRows, *, min_correlation: float, exact_pairs: int = EXACT_PAIRS
) -> Indices:
    """Group near duplicates by single linkage: pairs of at least a correlation, and their chains.

    ``standardised`` is from :func:`standardise_thumbnails`. With more than ``exact_pairs`` pairs,
    the search is by cells. The numbers of the groups, shape (N,), count from 0 in order of first
    appearance.
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
    return np.asarray(pd.factorize(groups[copy_of])[0], np.int64)


def is_exact(num_images: int, exact_pairs: int = EXACT_PAIRS) -> bool:
    """Return whether grouping this many images uses the exact search."""
    return num_images * (num_images - 1) // 2 <= exact_pairs


def measure_recall(
    standardised: FloatRows,
    groups: Indices,
    *,
    min_correlation: float,
    num_samples: int = 1000,
    seed: int = 0,
) -> dict[str, int]:
    """Measure how many pairs of near duplicates are in one group, by comparing a sample with all.

    Return ``num_samples``; ``num_pairs``, pairs with a sampled slice that reach the threshold; and
    ``num_grouped``, those of them in one group.
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


def merge_groups(near_duplicates: Indices, given: Sequence[str | None]) -> Indices:
    """Join groups of near duplicates that share a given group, such as a patient; None is no group.

    The new numbers count from 0 and do not depend on the names.
    """
    is_named = np.array([bool(name) for name in given], np.bool_)
    names, _ = pd.factorize(np.array(given, dtype=object)[is_named])
    count = int(near_duplicates.max(initial=-1)) + 1
    links = near_duplicates[is_named], count + names
    return find_components(*links, count + len(near_duplicates))[near_duplicates]


def find_components(rows: Indices, columns: Indices, size: int) -> Indices:
    """Return the connected component of each of ``size`` nodes, by the two ends of each edge."""
    from scipy.sparse import coo_array  # takes half a second
    from scipy.sparse.csgraph import connected_components

    links = coo_array((np.ones(len(rows), np.int8), (rows, columns)), shape=(size, size))
    return np.asarray(connected_components(links, directed=False)[1], np.int64)


def _group_blocks(
    blocks: Sequence[Block], vectors: FloatRows, sketches: FloatRows, min_correlation: float
) -> Indices:
    """Group the pairs of some blocks; return the first slice of each one's group, shape (n,)."""
    groups = np.arange(len(vectors))
    for pairs in iterate_candidates(blocks, sketches, min_correlation):
        left, right = pairs
        apart = groups[left] != groups[right]  # others are in one group already
        left, right = left[apart], right[apart]
        close = multiply_rows(vectors, left, right) >= min_correlation
        groups = _join(groups, left[close], right[close])
    _, first, group_of = np.unique(groups, return_index=True, return_inverse=True)
    return np.asarray(first[group_of], dtype=np.int64)


def _find_exact_duplicates(standardised: FloatRows) -> tuple[Indices, Indices]:
    """Return the rows that differ, (n,), and for each row the index of its equal there, (N,).

    A thousand copies of one image would otherwise be half a million pairs. Rows of zeros correlate
    with nothing, so each counts as different.
    """
    keys = [
        sha256(row.tobytes()).digest() if row.any() else index.to_bytes(8)
        for index, row in enumerate(standardised)
    ]
    copy_of, _ = pd.factorize(np.array(keys, dtype=object))
    return np.unique(copy_of, return_index=True)[1], copy_of


def _join(groups: Indices, left: Indices, right: Indices) -> Indices:
    """Join the groups of pairs of slices."""
    if not len(left):
        return groups
    return find_components(groups[left], groups[right], int(groups.max()) + 1)[groups]


# ---- nearest -------------------------------------------------------------------------------------


def find_nearest(
    standardised: FloatRows, reference: FloatRows, *, exact_pairs: int = EXACT_PAIRS
) -> tuple[Indices, FloatRows]:
    """Find each slice's most similar slice of a reference set of at least one slice.

    Return its row and the correlation in [-1, 1], shape (N,) each. With more than ``exact_pairs``
    pairs, N times M, it may be the second most similar slice. The correlation is exact in any case.
    """
    count = len(standardised)
    if count * len(reference) <= exact_pairs:
        blocks = list_tiles(count, len(reference))
    else:
        sketches = build_sketches(np.concatenate([standardised, reference]))
        blocks = list_cells(sketches[:count], sketches[count:])
    nearest, correlation = np.zeros(count, np.int64), np.full(count, -np.inf, np.float32)
    for others, reached in run_blocks(find_nearest_rows, blocks, standardised, reference):
        nearest = np.where(reached > correlation, others, nearest)
        correlation = np.maximum(correlation, reached)
    return nearest, correlation


def find_nearest_rows(
    blocks: Sequence[Block], queries: FloatRows, reference: FloatRows
) -> tuple[Indices, FloatRows]:
    """Find each query's most similar row of the reference within some blocks.

    Returns row and product, shape (N,) each: 0 and −inf for a query in none of the blocks.
    """
    nearest = np.zeros(len(queries), np.int64)
    product = np.full(len(queries), -np.inf, np.float32)
    numbers = np.arange(max(len(queries), len(reference)))
    for rows, columns in blocks:
        products = queries[rows] @ reference[columns].T
        best = products.argmax(axis=1)
        reached = products[np.arange(len(products)), best]
        nearer = reached > product[rows]
        nearest[numbers[rows][nearer]] = numbers[columns][best][nearer]
        product[numbers[rows][nearer]] = reached[nearer]
    return nearest, product


# ---- blocks --------------------------------------------------------------------------------------


def run_blocks(
    work: Callable[..., Any],
    blocks: Sequence[Block],
    *shared: Any,  # noqa: ANN401 - any further arguments of the work
) -> Iterator[Any]:
    """Yield results of ``work(part, *shared)``, whose parts are all of the blocks.

    Large work is done in Ray tasks, where Ray is running; `shared` goes to each node once.
    """
    if not ray.is_initialized() or count_products(blocks) < MIN_RAY_PRODUCTS:
        yield work(blocks, *shared)
        return
    num_parts = PARTS_PER_CPU * max(1, int(ray.cluster_resources().get("CPU", 1)))
    task = ray.remote(work)
    stored = [ray.put(one) for one in shared]
    waiting = [task.remote(blocks[part::num_parts], *stored) for part in range(num_parts)]
    while waiting:
        (done,), waiting = ray.wait(waiting)
        yield ray.get(done)


def count_products(blocks: Sequence[Block]) -> int:
    """Count the products of vectors in some blocks."""
    return sum(_count(rows) * _count(columns) for rows, columns in blocks)


def _count(rows: Rows) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def list_tiles(num_rows: int, num_columns: int, *, is_symmetric: bool = False) -> list[Block]:
    """List blocks with every pair of a row and a column; if symmetric, one of (i, j) and (j, i)."""
    return [
        (slice(top, min(top + _BLOCK_ROWS, num_rows)), slice(start, start + width))
        for top in range(0, num_rows, _BLOCK_ROWS)
        for start in range(top if is_symmetric else 0, num_columns, _BLOCK_COLUMNS)
        if (width := min(_BLOCK_COLUMNS, num_columns - start))
    ]


def list_cells(queries: FloatRows, reference: FloatRows) -> list[Block]:
    """List for each cell the queries that are compared with it, and its reference rows."""
    num_cells = max(1, round(len(reference) ** 0.5))
    rng = np.random.default_rng(0)
    centres = reference[rng.choice(len(reference), num_cells, replace=False)]
    members = _list_by_cell(_find_cells(reference, centres, 1), num_cells)
    visitors = _list_by_cell(_find_cells(queries, centres, NUM_PROBES), num_cells)
    return [pair for pair in zip(visitors, members, strict=True) if len(pair[0]) and len(pair[1])]


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


# ---- pairs ---------------------------------------------------------------------------------------


def build_sketches(vectors: FloatRows, num_axes: int = NUM_AXES) -> FloatRows:
    """Shorten vectors (N, D) to sketches, whose products are upper bounds of the vectors' products.

    A sketch has the vector's coordinates on the leading principal axes, and the length of the rest:
    ``x·y = Px·Py + Rx·Ry ≤ Px·Py + |Rx| |Ry|``, by Cauchy and Schwarz.
    Shape (N, min(num_axes, D) + 1).
    """
    sample = vectors[:: max(1, len(vectors) // _AXES_ROWS)]
    _, axes = np.linalg.eigh(sample.T @ sample)  # ascending; any orthonormal axes keep the bound
    leading = vectors @ axes[:, ::-1][:, :num_axes].astype(np.float32)
    squared = np.einsum("ij,ij->i", vectors, vectors) - np.einsum("ij,ij->i", leading, leading)
    return np.column_stack([leading, np.sqrt(np.maximum(squared, 0) + _SQUARE_SLACK)])


def multiply_rows(vectors: FloatRows, left: Indices, right: Indices) -> FloatRows:
    """Compute the product of each pair of rows, shape (P,)."""
    products = np.empty(len(left), np.float32)
    for start in range(0, len(left), _BLOCK_COLUMNS):
        part = slice(start, start + _BLOCK_COLUMNS)
        np.einsum("ij,ij->i", vectors[left[part]], vectors[right[part]], out=products[part])
    return products


def iterate_candidates(
    blocks: Sequence[Block], sketches: FloatRows, min_product: float
) -> Iterator[Indices]:
    """Yield batches of pairs, shape (2, P), that may reach a threshold, by their sketches."""
    bound = min_product - _BOUND_SLACK
    numbers = np.arange(len(sketches))
    waiting: list[Indices] = []
    for rows, columns in blocks:
        products = sketches[rows] @ sketches[columns].T
        # The flat search is five times faster than nonzero in two dimensions.
        left, right = np.divmod(np.flatnonzero(products >= bound), products.shape[1])
        left, right = numbers[rows][left], numbers[columns][right]
        waiting.append(np.stack([left, right])[:, left != right])
        if sum(pairs.shape[1] for pairs in waiting) >= _BATCH_PAIRS:
            yield np.concatenate(waiting, axis=1)
            waiting = []
    if waiting:
        yield np.concatenate(waiting, axis=1)
