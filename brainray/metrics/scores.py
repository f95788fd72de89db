"""Scores under many rows of image weights at once, and the bootstrap that draws the rows."""

from collections.abc import Callable, Iterator
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from brainray.errors import ConfigError

FloatArray: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.int64]

NUM_RELIABILITY_BINS = 15
"""Equal-width confidence bins of the calibration error; the number in Guo et al. (2017)."""

LOG_LOSS_FLOOR = float(np.finfo(np.float64).eps)
"""Least probability whose logarithm is taken; scikit-learn's value for float64 input."""

WEIGHTS_PER_CHUNK = 1_000_000
"""Resamples times images weighed at a time: 8 MB per array, of which about six exist at once."""

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
    own = np.clip(prob[np.arange(y_true.size), y_true], LOG_LOSS_FLOOR, 1 - LOG_LOSS_FLOOR)
    brier = ((prob - np.eye(num_classes)[y_true]) ** 2).sum(axis=1)
    bins = np.eye(NUM_RELIABILITY_BINS)[find_bins(confidence)]
    columns = [
        count_columns(y_true, predicted, num_classes),
        np.column_stack([-np.log(own), brier]),
        bins * ((y_true == predicted) - confidence)[:, None],
    ]
    ends = np.cumsum([block.shape[1] for block in columns])[:-1]
    stacked = np.hstack(columns)
    area_scorers = [build_area_scorer(y_true == k, prob[:, k]) for k in range(num_classes)]

    def score(weights: FloatArray) -> Scores:
        counts, losses, gaps = np.split(weights @ stacked, ends, axis=1)
        total = weights.sum(axis=1)
        areas = np.array([score_areas(weights) for score_areas in area_scorers])
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
            defined = scores[part][:, ~np.isnan(scores[part][0])]
            empty = np.full(len(defined), np.nan)
            averages[name] = defined.mean(axis=1) if defined.shape[1] else empty
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


def find_bins(confidence: FloatArray) -> IntArray:
    """Return the reliability bin of each confidence, shape (N,); bins are closed above."""
    inner = np.linspace(0, 1, NUM_RELIABILITY_BINS + 1)[1:-1]
    return np.searchsorted(inner, confidence, side="left").astype(np.int64)


def build_area_scorer(
    is_positive: NDArray[np.bool_], scores: FloatArray
) -> Callable[[FloatArray], tuple[FloatArray, FloatArray]]:
    """Return a function from weights to AUROC and average precision of one class, shape (R,) each.

    Both are sums over the distinct scores ("steps") that at least one image of the class has.

    References
    ----------
    .. [1] Fawcett, Pattern Recognition Letters 27 (2006), section 7 (trapezoids, so that
       ties count half).
    """
    order = np.argsort(-scores, kind="stable")
    negated, positive = -scores[order], is_positive[order]
    steps, counts = np.unique(negated[positive], return_counts=True)
    # Half-open ranges of ranks of each step: among all images, and among those of the class.
    first = np.searchsorted(negated, steps, side="left")
    last = np.searchsorted(negated, steps, side="right")
    bounds = np.concatenate([[0], np.cumsum(counts)])

    def score_areas(weights: FloatArray) -> tuple[FloatArray, FloatArray]:
        above = _accumulate(weights[:, order])
        hits = _accumulate(weights[:, order[positive]])[:, bounds]
        num_positive, total = hits[:, -1], above[:, -1]
        gained = np.diff(hits, axis=1)
        false_before = above[:, first] - hits[:, :-1]
        false_after = above[:, last] - hits[:, 1:]
        num_negative = total - num_positive
        beaten = num_negative[:, None] - (false_before + false_after) / 2
        auroc = _divide((gained * beaten).sum(axis=1), num_positive * num_negative)
        # A step that no drawn image reaches gains nothing: its precision does not matter.
        precision = _divide(hits[:, 1:], above[:, last], otherwise=0.0)
        return auroc, _divide((gained * precision).sum(axis=1), num_positive)

    return score_areas


def _accumulate(weights: FloatArray) -> FloatArray:
    """Return sums over the first 0, 1, … N columns, shape (R, N + 1)."""
    return np.pad(np.cumsum(weights, axis=1), ((0, 0), (1, 0)))


def _divide(over: FloatArray, under: FloatArray, otherwise: float = np.nan) -> FloatArray:
    """Divide; where the divisor is 0, ``otherwise``."""
    quotient: FloatArray = np.full(over.shape, otherwise)
    np.divide(over, under, out=quotient, where=under != 0)
    return quotient


# ---- bootstrap -----------------------------------------------------------------------------------


def resample(
    score: Callable[[FloatArray], Scores], group_of: IntArray, num_resamples: int, seed: int
) -> Scores:
    """Score the data, and resamples of their groups.

    Parameters
    ----------
    score : callable
        Takes weights of the images, shape (R, N), and returns scores with R rows.
    group_of : ndarray of int64, shape (N,)
        Group of each image, 0 to G − 1.

    Returns
    -------
    dict of str to ndarray
        Row 0 is the data's own score; then a row for each resample. A single group has no
        differences between groups to resample: then there is one row of NaN.

    Raises
    ------
    ConfigError
        ``num_resamples`` is negative.
    """
    if num_resamples < 0:
        raise ConfigError(
            f"Expected num_resamples of 0 or more, got {num_resamples}. 0 means no intervals."
        )
    chunks = [score(np.ones((1, group_of.size)))]
    if num_resamples and not group_of.any():
        chunks.append({name: values * np.nan for name, values in chunks[0].items()})
    elif num_resamples:
        chunks += map(score, draw_weights(group_of, num_resamples, seed))
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def draw_weights(group_of: IntArray, num_resamples: int, seed: int) -> Iterator[FloatArray]:
    """Yield image weights, shape (≤ R, N): how often each image's group was drawn.

    Whole groups are drawn with replacement, as many as there are [1]_ [2]_.

    References
    ----------
    .. [1] Field and Welsh, "Bootstrapping clustered data", J. R. Statist. Soc. B 69 (2007).
    .. [2] Davison and Hinkley, "Bootstrap methods and their application" (1997), section 3.8.
    """
    rng = np.random.default_rng(seed)
    num_groups = int(group_of.max()) + 1
    step = max(1, WEIGHTS_PER_CHUNK // group_of.size)
    for start in range(0, num_resamples, step):
        size = min(step, num_resamples - start)
        picks = rng.integers(num_groups, size=(size, num_groups))
        picks += num_groups * np.arange(size)[:, None]
        counts = np.bincount(picks.ravel(), minlength=size * num_groups)
        yield counts.reshape(size, num_groups)[:, group_of].astype(np.float64)


def compute_interval(values: FloatArray) -> list[float] | None:
    """Return the 95 % interval of a score that :func:`resample` gave, shape (1 + R,).

    Undefined resamples (NaN) are left out. None if they are more than half, or if the score of
    the data is undefined.
    """
    drawn = values[1:]
    defined = drawn[~np.isnan(drawn)]
    if np.isnan(values[0]) or not defined.size or 2 * defined.size < drawn.size:
        return None
    low, high = np.percentile(defined, [2.5, 97.5])
    return [float(low), float(high)]


def describe_score(name: str, values: FloatArray) -> dict[str, Any]:
    """Return a score, None if undefined, and its ``<name>_ci95``, ready for JSON.

    Without resamples there is no interval.
    """
    entry: dict[str, Any] = {name: None if np.isnan(values[0]) else float(values[0])}
    if len(values) > 1:
        entry[f"{name}_ci95"] = compute_interval(values)
    return entry
