"""Checks of labels, probabilities and groups."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike

from brainray.errors import DataError
from brainray.labels import check_classes
from brainray.metrics.scores import FloatArray, IntArray

ROW_SUM_TOLERANCE = 1e-3
"""Largest distance of a row's sum from 1: enough for half precision, too little for logits."""


def check_predictions(
    y_true: ArrayLike, y_prob: ArrayLike, classes: Sequence[str]
) -> tuple[IntArray, FloatArray, tuple[str, ...]]:
    """Return labels, shape (N,), probabilities, shape (N, K), and the K names; or raise."""
    names = check_classes(classes)
    y_true = check_indices("y_true", y_true)
    if y_true.max() >= len(names):
        raise DataError(
            f"Expected y_true in [0, {len(names)}) for the classes {', '.join(names)}, "
            f"got {y_true.max()} at row {y_true.argmax()}. Check the class order."
        )
    prob = np.asarray(y_prob)
    if prob.dtype.kind not in "fiu":
        raise DataError(f"Expected y_prob to be numbers, got {prob.dtype}.")
    prob = prob.astype(np.float64)
    if prob.shape != (y_true.size, len(names)):
        raise DataError(
            f"Expected y_prob of shape {(y_true.size, len(names))}, one row per image of y_true "
            f"and one column per class, got {prob.shape}."
        )
    sums = prob.sum(axis=1)
    for bad, expected, remedy in (
        (~np.isfinite(prob).all(axis=1), "finite y_prob", ""),
        (
            ((prob < 0) | (prob > 1)).any(axis=1),
            "y_prob in [0, 1]",
            " Pass probabilities (after softmax), not logits.",
        ),
        (
            np.abs(sums - 1) > ROW_SUM_TOLERANCE,
            f"each row of y_prob to sum to 1 within {ROW_SUM_TOLERANCE}",
            " Pass the probabilities of all classes.",
        ),
    ):
        if bad.any():
            row = int(bad.argmax())
            raise DataError(
                f"Expected {expected}, got {prob[row].tolist()} (sum {sums[row]:.6g}) at row {row}."
                f"{remedy}"
            )
    return y_true, prob, names


def check_indices(name: str, given: ArrayLike, size: int | None = None) -> IntArray:
    """Return class indices as int64, shape (N,), N ≥ 1; or raise."""
    indices = np.asarray(given)
    if indices.size == 0:
        raise DataError(f"{name} is empty: expected at least one image to evaluate.")
    if indices.dtype.kind not in "iu" or indices.ndim != 1:
        raise DataError(
            f"Expected {name} to be integers of shape (N,), "
            f"got {indices.dtype} of shape {indices.shape}."
        )
    if size is not None and indices.size != size:
        raise DataError(f"Expected {name} to have {size} rows as y_true has, got {indices.size}.")
    if indices.min() < 0:
        raise DataError(
            f"Expected class indices of 0 or more in {name}, got {indices.min()} "
            f"at row {indices.argmin()}. Leave unlabelled images out."
        )
    return indices.astype(np.int64)


def number_groups(groups: ArrayLike | None, size: int) -> tuple[IntArray, int]:
    """Return each image's group as 0 … G − 1, shape (N,), and G; or raise."""
    if groups is None:
        return np.arange(size, dtype=np.int64), size
    given = np.asarray(groups)
    if given.dtype.kind not in "iu" or given.shape != (size,):
        raise DataError(
            f"Expected groups to be integers of shape {(size,)}, one per image, "
            f"got {given.dtype} of shape {given.shape}."
        )
    names, group_of = np.unique(given, return_inverse=True)
    return group_of.astype(np.int64), int(names.size)
