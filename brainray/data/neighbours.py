"""Close pairs and nearest rows among many unit vectors, without comparing all of them in full.

Two ways, and neither ever calls a pair close that is not, since every pair is checked at the end:

* *Exact.* A sketch of a few numbers stands for each vector, and the product of two sketches is
  never below that of the vectors (:func:`build_sketches`). Only pairs whose sketches come close
  are looked at in full. All pairs of sketches are still compared: quadratic, with an eighteenth
  of the arithmetic.
* *By cells*, beyond :data:`EXACT_PAIRS` [1]_. Each vector belongs to the cell of the centre
  nearest to it, one of about √N, and is compared with the vectors of the few cells nearest to
  it: N √N. A close pair may be missed;
  :func:`brainray.data.near_duplicates.measure_recall` says how many are.

Space-partitioning trees do not help: among scans' thumbnails a ball of the radius that a
correlation of 0.96 means (0.28) meets half of the leaves of a k-d tree.

References
----------
.. [1] Jégou, Douze and Schmid, "Product quantization for nearest neighbor search", IEEE
   TPAMI 33 (2011), section 4: the inverted file; here without quantising.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

FloatRows = NDArray[np.float32]
Indices = NDArray[np.int64]
Rows = Indices | slice
Block = tuple[Rows, Rows]
"""Rows that are compared with rows: all of the first with all of the second."""

Found = TypeVar("Found")


class RunBlocks(Protocol):
    """Does work on blocks, in one place or in several, and yields what each has found."""

    def __call__(
        self,
        work: Callable[..., Found],
        blocks: Sequence[Block],
        *shared: Any,  # noqa: ANN401 - whatever the work takes besides
    ) -> Iterator[Found]:
        """Call ``work(some_blocks, *shared)`` until every block was among some."""


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


def list_tiles(num_rows: int, num_columns: int, *, is_symmetric: bool = False) -> list[Block]:
    """List the blocks that hold every pair of a row and a column.

    Parameters
    ----------
    is_symmetric : bool
        Whether (i, j) need not be there where (j, i) is.
    """
    return [
        (slice(top, min(top + _BLOCK_ROWS, num_rows)), slice(start, start + width))
        for top in range(0, num_rows, _BLOCK_ROWS)
        for start in range(top if is_symmetric else 0, num_columns, _BLOCK_COLUMNS)
        if (width := min(_BLOCK_COLUMNS, num_columns - start))
    ]


def list_cells(queries: FloatRows, reference: FloatRows) -> list[Block]:
    """List, cell by cell, the queries that visit it and the reference rows in it.

    Parameters
    ----------
    queries, reference : ndarray of float32, shape (N, D) and (M, D)
        Sketches, of one and the same :func:`build_sketches`.
    """
    num_cells = max(1, round(len(reference) ** 0.5))
    rng = np.random.default_rng(0)
    centres = reference[rng.choice(len(reference), num_cells, replace=False)]
    members = _list_by_cell(_find_cells(reference, centres, 1), num_cells)
    visitors = _list_by_cell(_find_cells(queries, centres, NUM_PROBES), num_cells)
    return [pair for pair in zip(visitors, members, strict=True) if len(pair[0]) and len(pair[1])]


def count_products(blocks: Sequence[Block]) -> int:
    """Count the products that some blocks take."""
    return sum(_count(rows) * _count(columns) for rows, columns in blocks)


def _count(rows: Rows) -> int:
    return rows.stop - rows.start if isinstance(rows, slice) else len(rows)


def run_blocks_locally(
    work: Callable[..., Found], blocks: Sequence[Block], *shared: Any
) -> Iterator[Found]:
    """Do all of the work in this process: the least of what a :data:`RunBlocks` can do."""
    yield work(blocks, *shared)


def iterate_candidates(
    blocks: Sequence[Block], sketches: FloatRows, min_product: float
) -> Iterator[tuple[Indices, Indices]]:
    """Yield batches of pairs of rows, among them those of the blocks that reach a threshold.

    Parameters
    ----------
    blocks : sequence of Block
        From :func:`list_tiles` or :func:`list_cells`.
    sketches : ndarray of float32, shape (N, D)
        From :func:`build_sketches`, of vectors of length 1 (or 0).
    """
    bound = min_product - _BOUND_SLACK
    numbers = np.arange(len(sketches))
    waiting: list[tuple[Indices, Indices]] = []
    for rows, columns in blocks:
        left, right = _find_reaching(sketches[rows], sketches[columns], bound)
        left, right = numbers[rows][left], numbers[columns][right]
        waiting.append((left[left != right], right[left != right]))
        if sum(len(left) for left, _ in waiting) >= _BATCH_PAIRS:
            yield _concatenate(waiting)
            waiting = []
    if waiting:
        yield _concatenate(waiting)


def _concatenate(parts: list[tuple[Indices, Indices]]) -> tuple[Indices, Indices]:
    left, right = zip(*parts, strict=True)
    return np.concatenate(left), np.concatenate(right)


def _find_reaching(left: FloatRows, right: FloatRows, bound: float) -> tuple[Indices, Indices]:
    reaching = np.flatnonzero(left @ right.T >= bound)  # five times faster than nonzero in 2-D
    rows, columns = np.divmod(reaching, len(right))
    return rows, columns


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
    blocks: Sequence[Block], queries: FloatRows, reference: FloatRows
) -> tuple[Indices, FloatRows]:
    """Find each query's row of the reference with the largest product, within some blocks.

    Returns
    -------
    nearest : ndarray of int64, shape (N,)
        0 where a query is in none of the blocks.
    product : ndarray of float32, shape (N,)
        −inf where a query is in none of the blocks.
    """
    nearest = np.zeros(len(queries), np.int64)
    product = np.full(len(queries), -np.inf, np.float32)
    numbers = np.arange(max(len(queries), len(reference)))
    for rows, columns in blocks:
        products = queries[rows] @ reference[columns].T
        best = products.argmax(axis=1)
        reached = products[np.arange(len(products)), best]
        keep_nearer(nearest, product, numbers[rows], numbers[columns][best], reached)
    return nearest, product


def keep_nearer(
    nearest: Indices, product: FloatRows, rows: Indices, others: Indices, reached: FloatRows
) -> None:
    """Put in what is nearer to some rows than what they have."""
    nearer = reached > product[rows]
    nearest[rows[nearer]] = others[nearer]
    product[rows[nearer]] = reached[nearer]
