"""Evaluations of a classifier: all scores with intervals, or a few without."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from brainray.errors import DataError
from brainray.labels import check_classes
from brainray.metrics.scores import (
    MACRO_OF,
    FloatArray,
    IntArray,
    add_macro_averages,
    build_scorer,
    compute_count_scores,
    count_columns,
    describe_score,
    resample,
)

OVERALL_SCORES = ("accuracy", *MACRO_OF, "mcc", "log_loss", "brier", "ece")
CLASS_SCORES = ("precision", "sensitivity", "specificity", "f1", "auroc", "ap")

ROW_SUM_TOLERANCE = 1e-3
"""Largest distance of a row's sum from 1: enough for half precision, too little for logits."""


def compute_evaluation(
    y_true: ArrayLike,
    y_prob: ArrayLike,
    classes: Sequence[str],
    *,
    groups: ArrayLike | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compute every score of a probabilistic classifier, with 95 % intervals.

    Parameters
    ----------
    y_true : array-like of int, shape (N,)
        Class index of each image, in [0, K).
    y_prob : array-like of float, shape (N, K)
        Class probabilities, in class order. Rows sum to 1 within 1e-3 and are used as given.
        The prediction is the largest; of equal ones, the first.
    classes : sequence of str
        The K class names, in class order.
    groups : array-like of int, shape (N,), optional
        Images of one group (near duplicates, one patient) share a number and are resampled
        together. By default every image is its own group.
    num_resamples : int
        Bootstrap resamples; 0 leaves every ``*_ci95`` key out.
    seed : int
        Seed of the resampling.

    Returns
    -------
    dict
        Ready for ``json.dump``; None is an undefined value.

        - ``n``, ``num_groups``.
        - :data:`OVERALL_SCORES`, each also as ``<name>_ci95``: [low, high] or None.
        - ``confusion``: K × K counts; a row for each true class, a column for each predicted one.
        - ``per_class``: for each name ``n`` (its images), and :data:`CLASS_SCORES` against the
          rest, each also as ``<name>_ci95``.

    Raises
    ------
    DataError, ConfigError
        What does not fit: shapes, labels, rows that are not distributions, class names.

    Notes
    -----
    *Undefined values.* A class without images has no sensitivity, AUROC or average precision; if
    it is also never predicted, no precision or F1. A class with images that is never predicted has
    precision 0, as in scikit-learn. Macro averages are plain means over the classes with a defined
    value. The Matthews coefficient [4]_ is undefined if all images are of one class, and 0 if all
    predictions are.

    *Scores.* AUROC counts a tie as half [1]_. Average precision is scikit-learn's step sum over
    distinct thresholds. The Brier score sums squared differences over classes (0 to 2) and
    averages over images. The calibration error [2]_ has 15 bins of equal width, closed on the
    right, of the predicted class's probability.

    *Intervals.* Percentiles 2.5 and 97.5 over resamples of whole groups [3]_. Resamples with an
    undefined value are left out; if they are more than half, or there is a single group, the
    interval is None. The percentile bootstrap cannot see past the sample: without any error the
    interval of accuracy is [1, 1]. Resampling adds noise that the calibration error counts as
    error, so in small, well calibrated data the interval of ``ece`` may lie above the value.

    References
    ----------
    .. [1] Fawcett, "An introduction to ROC analysis", Pattern Recognition Letters 27 (2006).
    .. [2] Guo et al., "On calibration of modern neural networks", ICML (2017).
    .. [3] Field and Welsh, "Bootstrapping clustered data", J. R. Statist. Soc. B 69 (2007).
    .. [4] Gorodkin, "Comparing two K-category assignments by a K-category correlation
       coefficient", Computational Biology and Chemistry 28 (2004).
    """
    y_true, prob, names = check_predictions(y_true, y_prob, classes)
    group_of = number_groups(groups, y_true.size)
    scorer = build_scorer(y_true, prob)
    scores = add_macro_averages(resample(scorer, group_of, num_resamples, seed))
    cells = np.bincount(y_true * len(names) + prob.argmax(axis=1), minlength=len(names) ** 2)
    confusion = cells.reshape(len(names), len(names))
    document: dict[str, Any] = {"n": y_true.size, "num_groups": int(group_of.max()) + 1}
    for score in OVERALL_SCORES:
        document |= describe_score(score, scores[score])
    document["confusion"] = confusion.tolist()
    document["per_class"] = {name: {"n": int(confusion[k].sum())} for k, name in enumerate(names)}
    for k, name in enumerate(names):
        for score in CLASS_SCORES:
            document["per_class"][name] |= describe_score(score, scores[score][:, k])
    return document


def compute_accuracy(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compute the scores that need only hard predictions, with 95 % intervals.

    For a baseline without probabilities: ``y_true`` and ``y_pred`` are class indices, shape (N,).
    Definitions, intervals and undefined values are those of :func:`compute_evaluation`; the classes
    are the numbers in either array.

    Returns
    -------
    dict
        ``n``, ``num_groups``, ``accuracy``, ``balanced_accuracy``, ``macro_f1``, and each score's
        ``<name>_ci95``: [low, high] or None.
    """
    y_true = check_indices("y_true", y_true)
    predicted = check_indices("y_pred", y_pred, size=y_true.size)
    seen, ranks = np.unique(np.concatenate([y_true, predicted]), return_inverse=True)
    y_true, predicted = np.split(ranks.astype(np.int64), 2)
    group_of = number_groups(groups, y_true.size)
    counts = count_columns(y_true, predicted, seen.size)
    drawn = resample(lambda w: compute_count_scores(w @ counts), group_of, num_resamples, seed)
    scores = add_macro_averages(drawn)
    document: dict[str, Any] = {"n": y_true.size, "num_groups": int(group_of.max()) + 1}
    for name in ("accuracy", "balanced_accuracy", "macro_f1"):
        document |= describe_score(name, scores[name])
    return document


def summarise(y_true: ArrayLike, y_prob: ArrayLike, classes: Sequence[str]) -> dict[str, float]:
    """Compute the scores that training logs after each epoch; no intervals.

    ``loss`` is the log loss, in nats. Only ``macro_auroc`` can be undefined (all images of one
    class): NaN.
    """
    y_true, prob, _ = check_predictions(y_true, y_prob, classes)
    scores = add_macro_averages(build_scorer(y_true, prob)(np.ones((1, y_true.size))))
    scores["loss"] = scores["log_loss"]
    names = ("loss", "accuracy", "balanced_accuracy", "macro_f1", "macro_auroc")
    return {name: float(scores[name][0]) for name in names}


# ---- checks --------------------------------------------------------------------------------------


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


def number_groups(groups: ArrayLike | None, size: int) -> IntArray:
    """Return each image's group as 0 … G − 1, shape (N,); or raise."""
    given = np.arange(size) if groups is None else np.asarray(groups)
    if given.dtype.kind not in "iu" or given.shape != (size,):
        raise DataError(
            f"Expected groups to be integers of shape {(size,)}, one per image, "
            f"got {given.dtype} of shape {given.shape}."
        )
    return np.unique(given, return_inverse=True)[1].astype(np.int64)
