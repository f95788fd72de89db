"""Scores under many rows of image weights at once."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

FloatArray: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.int64]

NUM_RELIABILITY_BINS = 15
"""Equal-width confidence bins of the calibration error; the number in Guo et al. (2017)."""

LOG_LOSS_FLOOR = float(np.finfo(np.float64).eps)
"""Least probability whose logarithm is taken; scikit-learn's value for float64 input."""


Scores: TypeAlias = dict[str, FloatArray]
"""Name to values under R rows of weights: shape (R,), or (R, K) for scores of each class. NaN where
undefined."""

MACRO_OF = {
    "balanced_accuracy": "sensitivity",
    "macro_precision": "precision",
    "macro_sensitivity": "sensitivity",
    "macro_specificity": "specificity",
    "macro_f1": "f1",
    "macro_auroc": "auroc",
    "macro_ap": "ap",
}
"""Macro average to the score of each class that it averages."""


def build_scorer(y_true: IntArray, prob: FloatArray) -> Callable[[FloatArray], Scores]:
    """Return a function from weights, shape (R, N), not negative, to scores.

    What does not depend on the weights is computed once.
    """
    num_classes = prob.shape[1]
    predicted, confidence = prob.argmax(axis=1), prob.max(axis=1)
    bins = np.eye(NUM_RELIABILITY_BINS)[find_bins(confidence)]
    columns = [
        count_columns(y_true, predicted, num_classes),
        _compute_image_losses(y_true, prob),
        bins * ((y_true == predicted) - confidence)[:, None],
    ]
    ends = np.cumsum([block.shape[1] for block in columns])[:-1]
    stacked = np.hstack(columns)
    rankings = [rank(y_true == k, prob[:, k]) for k in range(num_classes)]

    def score(weights: FloatArray) -> Scores:
        counts, losses, gaps = np.split(weights @ stacked, ends, axis=1)
        total = weights.sum(axis=1)
        areas = np.array([compute_areas(ranking, weights) for ranking in rankings])
        auroc, ap = areas.transpose(1, 2, 0)
        return compute_count_scores(counts) | {
            "log_loss": losses[:, 0] / total,
            "brier": losses[:, 1] / total,
            # Σ_b (n_b / n) |accuracy_b − confidence_b|; the n_b cancel.
            "ece": np.abs(gaps).sum(axis=1) / total,
            "auroc": auroc,
            "ap": ap,
        }

    return score


def add_macro_averages(scores: Scores) -> Scores:
    """Add the macro averages of the scores of each class.

    They are over the classes whose score is defined in row 0, the data themselves. So a resample
    that lacks one of these classes is undefined, and not an average of the others.
    """
    averages = {}
    for name, part in MACRO_OF.items():
        if part in scores:
            defined = ~np.isnan(scores[part][0])
            averages[name] = (
                scores[part][:, defined].mean(axis=1)
                if defined.any()
                else np.full(len(scores[part]), np.nan)
            )
    return scores | averages


def count_columns(y_true: IntArray, predicted: IntArray, num_classes: int) -> FloatArray:
    """Return indicator columns, shape (N, 3 K): hit, true class, predicted class."""
    eye = np.eye(num_classes)
    is_true, is_predicted = eye[y_true], eye[predicted]
    return np.hstack([is_true * is_predicted, is_true, is_predicted])


def compute_count_scores(counts: FloatArray) -> Scores:
    """Compute the scores that need only weighted :func:`count_columns`, shape (R, 3 K)."""
    hits, support, predicted = np.split(counts, 3, axis=1)
    total = support.sum(axis=1, keepdims=True)
    precision = _divide(hits, predicted)
    precision[(predicted == 0) & (support > 0)] = 0.0
    rest = total - support

    # Gorodkin (2004), written with marginal sums as scikit-learn does.
    squared = total[:, 0] ** 2
    variance_true = squared - (support**2).sum(axis=1)
    variance_predicted = squared - (predicted**2).sum(axis=1)
    agreement = hits.sum(axis=1) * total[:, 0] - (support * predicted).sum(axis=1)
    mcc = _divide(agreement, np.sqrt(variance_true * variance_predicted))
    mcc[(variance_predicted == 0) & (variance_true > 0)] = 0.0
    return {
        "accuracy": hits.sum(axis=1) / total[:, 0],
        "mcc": mcc,
        "precision": precision,
        "sensitivity": _divide(hits, support),
        "specificity": _divide(rest - predicted + hits, rest),
        "f1": _divide(2 * hits, support + predicted),
    }


def _compute_image_losses(y_true: IntArray, prob: FloatArray) -> FloatArray:
    """Return each image's log loss and Brier score, shape (N, 2)."""
    own = np.clip(prob[np.arange(y_true.size), y_true], LOG_LOSS_FLOOR, 1 - LOG_LOSS_FLOOR)
    brier = ((prob - np.eye(prob.shape[1])[y_true]) ** 2).sum(axis=1)
    return np.column_stack([-np.log(own), brier])


def find_bins(confidence: FloatArray) -> IntArray:
    """Return the reliability bin of each confidence, shape (N,); bins are closed above."""
    inner = np.linspace(0, 1, NUM_RELIABILITY_BINS + 1)[1:-1]
    return np.searchsorted(inner, confidence, side="left").astype(np.int64)


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranking:
    """Sorted scores of one class, for AUROC and average precision.

    Both are sums over the distinct scores ("steps") that at least one image of the class has.
    Bounds are half-open ranges of ranks.
    """

    order: IntArray
    """Images by falling score, shape (N,)."""
    first: IntArray
    last: IntArray
    """Rank range of each step among all images, shape (S,)."""
    positives: IntArray
    """Images of the class by falling score, shape (P,)."""
    positive_bounds: IntArray
    """Rank bounds of the steps among images of the class, shape (S + 1,)."""


def rank(is_positive: NDArray[np.bool_], scores: FloatArray) -> Ranking:
    """Sort the scores of one class, shape (N,)."""
    order = np.argsort(-scores, kind="stable")
    negated, positive = -scores[order], is_positive[order]
    steps, counts = np.unique(negated[positive], return_counts=True)
    return Ranking(
        order=order,
        first=np.searchsorted(negated, steps, side="left"),
        last=np.searchsorted(negated, steps, side="right"),
        positives=order[positive],
        positive_bounds=np.concatenate([[0], np.cumsum(counts)]),
    )


def compute_areas(ranking: Ranking, weights: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Compute AUROC and average precision under each row of weights, both shape (R,).

    References
    ----------
    .. [1] Fawcett, Pattern Recognition Letters 27 (2006), section 7 (trapezoids, so that
       ties count half).
    """
    above = _accumulate(weights[:, ranking.order])
    hits = _accumulate(weights[:, ranking.positives])[:, ranking.positive_bounds]
    num_positive, total = hits[:, -1], above[:, -1]
    gained = np.diff(hits, axis=1)

    above_after = above[:, ranking.last]
    false_before = above[:, ranking.first] - hits[:, :-1]
    false_after = above_after - hits[:, 1:]
    num_negative = total - num_positive
    beaten = num_negative[:, None] - (false_before + false_after) / 2
    auroc = _divide((gained * beaten).sum(axis=1), num_positive * num_negative)

    # A step that no drawn image reaches gains nothing: its precision does not matter.
    precision = _divide(hits[:, 1:], above_after, otherwise=0.0)
    return auroc, _divide((gained * precision).sum(axis=1), num_positive)


def _accumulate(weights: FloatArray) -> FloatArray:
    """Return sums over the first 0, 1, … N columns, shape (R, N + 1)."""
    sums = np.zeros((weights.shape[0], weights.shape[1] + 1))
    np.cumsum(weights, axis=1, out=sums[:, 1:])
    return sums


def _divide(over: FloatArray, under: FloatArray, otherwise: float = np.nan) -> FloatArray:
    """Divide; where the divisor is 0, ``otherwise``."""
    quotient: FloatArray = np.full(over.shape, otherwise)
    np.divide(over, under, out=quotient, where=under != 0)
    return quotient
