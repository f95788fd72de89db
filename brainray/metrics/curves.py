"""Curves to plot: ROC, precision–recall, reliability, risk–coverage."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binomtest
from sklearn.metrics import precision_recall_curve, roc_curve

from brainray.metrics.evaluation import check_predictions
from brainray.metrics.scores import NUM_RELIABILITY_BINS, FloatArray, IntArray, find_bins

MAX_CURVE_POINTS = 200
"""Most points of a curve: about one for every two pixels of a small figure."""


def compute_curves(y_true: ArrayLike, y_prob: ArrayLike, classes: Sequence[str]) -> dict[str, Any]:
    """Compute ROC, precision–recall and reliability curves of at most 200 points.

    Arguments are as in :func:`compute_evaluation`.

    Returns
    -------
    dict
        Ready for ``json.dump``.

        - ``per_class``: for each name ``roc`` (``fpr``, ``tpr``) and ``pr`` (``recall``,
          ``precision``), the abscissa not decreasing. Lists are empty where the curve is undefined:
          a class without images, and for ROC also a class that is all the images.
        - ``reliability``: for each of 15 bins, those of the calibration error, ``edges``
          (16 numbers), ``count``, ``confidence`` (mean probability of the predicted class) and
          ``accuracy``; the last two None in an empty bin.

    References
    ----------
    .. [1] Fawcett, "An introduction to ROC analysis", Pattern Recognition Letters 27 (2006).
    .. [2] Guo et al., "On calibration of modern neural networks", ICML (2017), section 2.
    """
    y_true, prob, names = check_predictions(y_true, y_prob, classes)
    return {
        "per_class": {name: _trace_class(y_true == k, prob[:, k]) for k, name in enumerate(names)},
        "reliability": _build_reliability(y_true, prob),
    }


def _trace_class(is_positive: NDArray[np.bool_], scores: FloatArray) -> dict[str, Any]:
    """Return one class's ROC and precision–recall points."""
    fpr = tpr = recall = precision = np.empty(0)
    if is_positive.any():
        precision, recall, _ = precision_recall_curve(is_positive, scores, drop_intermediate=True)
        recall, precision = downsample_curve(recall[::-1], precision[::-1])
        if not is_positive.all():
            fpr, tpr = downsample_curve(*roc_curve(is_positive, scores)[:2])
    return {
        "roc": {"fpr": fpr.tolist(), "tpr": tpr.tolist()},
        "pr": {"recall": recall.tolist(), "precision": precision.tolist()},
    }


def downsample_curve(x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Keep at most 200 points, evenly spaced along the curve, both ends among them.

    Along the curve, not by rank: a steep rise has few points in x and needs them all.
    """
    if x.size <= MAX_CURVE_POINTS:
        return x, y
    travelled = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
    stops = np.linspace(0, travelled[-1], MAX_CURVE_POINTS)
    kept = np.unique(np.searchsorted(travelled, stops, side="left"))
    return x[kept], y[kept]


def _build_reliability(y_true: IntArray, prob: FloatArray) -> dict[str, Any]:
    """Return count, mean confidence and accuracy of each bin.

    Not :func:`sklearn.calibration.calibration_curve`, which leaves empty bins out and gives
    no counts; the bins are the same.
    """
    confidence = prob.max(axis=1)
    bins = find_bins(confidence)
    correct = y_true == prob.argmax(axis=1)
    count = np.bincount(bins, minlength=NUM_RELIABILITY_BINS)

    def average(values: FloatArray) -> list[float | None]:
        sums = np.bincount(bins, weights=values, minlength=NUM_RELIABILITY_BINS)
        return [float(s / n) if n else None for s, n in zip(sums, count, strict=True)]

    return {
        "edges": np.linspace(0, 1, NUM_RELIABILITY_BINS + 1).tolist(),
        "count": count.tolist(),
        "confidence": average(confidence),
        "accuracy": average(correct.astype(np.float64)),
    }


def compute_risk_coverage(
    y_true: ArrayLike,
    y_prob: ArrayLike,
    classes: Sequence[str],
    *,
    min_confidence: float = 0.0,
) -> dict[str, Any]:
    """Compute the risk–coverage curve of selective prediction, and the risk at a threshold.

    Coverage is the share of images that get their most probable class. Risk is the share of these
    that is wrong. Images of equal confidence all get a class, or none does.

    Arguments are as in :func:`compute_evaluation`. An image whose confidence is below
    ``min_confidence`` gets no class.

    Returns
    -------
    dict
        Ready for ``json.dump``.

        - ``min_confidence``, and there: ``coverage``, ``num_answered``, ``risk`` (None if no
          image gets a class) and ``risk_ci95`` (Wilson's interval, which takes all images as
          independent).
        - ``aurc``: area under the curve [1]_, the mean risk over all coverages;
          ``aurc_oracle``: the same if every right prediction had more confidence than any wrong.
        - ``curve``: ``coverage`` and ``risk``, lists of at most 200 points by rising coverage.

    References
    ----------
    .. [1] Geifman, Uziel and El-Yaniv, Bias-reduced uncertainty estimation for deep neural
       classifiers, ICLR 2019.
    """
    y_true, prob, _ = check_predictions(y_true, y_prob, classes)
    confidence = prob.max(axis=1)
    is_wrong = prob.argmax(axis=1) != y_true
    order = np.argsort(-confidence, kind="stable")
    falling, count = confidence[order], np.arange(1, y_true.size + 1)
    last = np.append(np.flatnonzero(falling[:-1] > falling[1:]), y_true.size - 1)
    wrong = np.cumsum(is_wrong[order])[last]
    risk, coverage = wrong / count[last], count[last] / y_true.size
    widths = np.diff(coverage, prepend=0.0)

    is_answered = confidence >= min_confidence
    answered, errors = int(is_answered.sum()), int(is_wrong[is_answered].sum())
    wilson = binomtest(errors, max(answered, 1)).proportion_ci(0.95, method="wilson")
    best = np.maximum(count - (y_true.size - is_wrong.sum()), 0) / count
    sampled_coverage, sampled_risk = downsample_curve(coverage, risk)
    return {
        "min_confidence": min_confidence,
        "coverage": answered / y_true.size,
        "num_answered": answered,
        "risk": errors / answered if answered else None,
        "risk_ci95": [float(wilson.low), float(wilson.high)] if answered else None,
        "aurc": float((risk * widths).sum()),
        "aurc_oracle": float(best.mean()),
        "curve": {"coverage": sampled_coverage.tolist(), "risk": sampled_risk.tolist()},
    }
