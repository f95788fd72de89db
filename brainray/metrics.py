"""Counts and probabilities against truth: scores, their intervals, and curves for plots.

Every score is computed once, by code that takes a weight for each image and works on many
rows of weights at a time. The value itself is the row whose weights are all 1; a bootstrap
resample is a row that says how often each image was drawn. So a score and its interval
cannot follow different definitions.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray
from sklearn.metrics import precision_recall_curve, roc_curve

from brainray.errors import ConfigError, DataError
from brainray.labels import check_classes

__all__ = ["compute_accuracy", "compute_curves", "compute_evaluation", "summarise"]

FloatArray: TypeAlias = NDArray[np.float64]
IntArray: TypeAlias = NDArray[np.int64]

NUM_RELIABILITY_BINS = 15
"""Equal-width confidence bins of the calibration error; the number in Guo et al. (2017)."""

MAX_CURVE_POINTS = 200
"""Most points per plotted curve: about one for every two pixels of a small figure."""

ROW_SUM_TOLERANCE = 1e-3
"""How far a row of probabilities may sum from 1: room for half precision, not for logits."""

LOG_LOSS_FLOOR = float(np.finfo(np.float64).eps)
"""Least probability whose logarithm is taken; scikit-learn's value for float64 input."""

_WEIGHTS_PER_CHUNK = 1_000_000
"""Entries (resamples times images) weighed at a time: 8 MB per array, a handful alive at once."""

_PER_CLASS_NAMES = ("precision", "sensitivity", "specificity", "f1", "auroc", "ap")
_OVERALL_NAMES = ("mcc", "log_loss", "brier", "ece")
_MACRO_OF = {
    "balanced_accuracy": "sensitivity",
    "macro_precision": "precision",
    "macro_sensitivity": "sensitivity",
    "macro_specificity": "specificity",
    "macro_f1": "f1",
    "macro_auroc": "auroc",
    "macro_ap": "ap",
}


# --------------------------------------------------------------------------------------
# What the doors call
# --------------------------------------------------------------------------------------


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
        True class index of each image, in [0, K).
    y_prob : array-like of float, shape (N, K)
        Class probabilities, in class order. Rows sum to 1 within 1e-3 and are used as given.
        The prediction is the largest; of equal ones, the first.
    classes : sequence of str
        The K class names, in class order.
    groups : array-like of int, shape (N,), optional
        Images of one group (near-duplicates, one patient) share a number and are resampled
        together. By default every image is its own group.
    num_resamples : int
        Bootstrap resamples; 0 leaves every ``*_ci95`` key out.
    seed : int
        Seed of the resampling. Same data in the same order and same seed, same intervals.

    Returns
    -------
    dict
        Ready for ``json.dump``: floats, ints, lists, and None for what is undefined.

        - ``n``, ``num_groups``.
        - ``accuracy``, ``balanced_accuracy``, ``macro_precision``, ``macro_sensitivity``,
          ``macro_specificity``, ``macro_f1``, ``macro_auroc``, ``macro_ap``, ``mcc``,
          ``log_loss``, ``brier``, ``ece``, each also as ``<name>_ci95``: [lo, hi] or None.
        - ``confusion``: K × K counts; row is the true class, column the predicted one.
        - ``per_class``: for each name ``n`` (its images), and ``precision``,
          ``sensitivity`` (recall), ``specificity``, ``f1``, ``auroc``, ``ap`` (one class
          against the rest), each also as ``<name>_ci95``.

    Raises
    ------
    DataError
        Shapes do not match, there are no images, a label is out of range, or a row of
        ``y_prob`` is not a distribution.
    ConfigError
        ``classes`` is no list of at least two different names, or ``num_resamples`` < 0.

    Notes
    -----
    *Undefined values.* A class with no images has no sensitivity, AUROC or average
    precision; one that is also never predicted has no precision or F1 either. A class that
    has images and is never predicted has precision 0 (scikit-learn's default). Macro
    averages are plain means over the classes for which the value is defined. The Matthews
    coefficient [4]_ is undefined where all images are of one class, and 0 where all
    predictions are.

    *Scores.* AUROC counts a tie as half [1]_. Average precision is scikit-learn's step sum
    over distinct thresholds. The Brier score sums the squared differences over classes
    (0 to 2) and averages over images. The calibration error [2]_ has 15 equal-width bins,
    closed on the right, on the probability of the predicted class.

    *Intervals.* Percentiles 2.5 and 97.5 over resamples of whole groups, drawn with
    replacement [3]_. A resample in which a value is undefined (for a macro average: the
    value of any class it averages) is left out; where that is more than half, or where
    there is a single group, the interval is None. The percentile bootstrap cannot see past
    the sample: with no errors at all the interval of accuracy is [1, 1]. Resampling adds
    noise that the calibration error counts as error, so in small, well calibrated data the
    interval of ``ece`` leans high and may even lie above the value.

    References
    ----------
    .. [1] Fawcett, "An introduction to ROC analysis", Pattern Recognition Letters 27 (2006).
    .. [2] Guo et al., "On calibration of modern neural networks", ICML (2017).
    .. [3] Field and Welsh, "Bootstrapping clustered data", J. R. Statist. Soc. B 69 (2007).
    .. [4] Gorodkin, "Comparing two K-category assignments by a K-category correlation
       coefficient", Computational Biology and Chemistry 28 (2004).
    """
    truth, prob, names = _check_predictions(y_true, y_prob, classes)
    group_of, num_groups = _number_groups(groups, truth.size)
    measure = _build_scorer(truth, prob)
    report = _resample(measure, group_of, num_groups, num_resamples, seed)

    predicted = prob.argmax(axis=1)
    num_classes = len(names)
    cells = np.bincount(truth * num_classes + predicted, minlength=num_classes**2)
    confusion = cells.reshape(num_classes, num_classes)
    return {
        "n": int(truth.size),
        "num_groups": num_groups,
        **report.report_overall(["accuracy", *_MACRO_OF, *_OVERALL_NAMES]),
        "confusion": confusion.tolist(),
        "per_class": {
            name: {"n": int(confusion[k].sum()), **report.report_class(k)}
            for k, name in enumerate(names)
        },
    }


def compute_accuracy(
    y_true: ArrayLike,
    y_pred: ArrayLike,
    *,
    groups: ArrayLike | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
) -> dict[str, Any]:
    """Compute the scores that need only hard predictions, with 95 % intervals.

    For a baseline that gives no probabilities. Definitions, intervals and undefined values
    are those of :func:`compute_evaluation`; classes are the numbers found in either array.

    Parameters
    ----------
    y_true, y_pred : array-like of int, shape (N,)
        True and predicted class index of each image, not negative.
    groups, num_resamples, seed
        As in :func:`compute_evaluation`.

    Returns
    -------
    dict
        ``n``, ``num_groups``, ``accuracy``, ``balanced_accuracy``, ``macro_f1``, and each
        score's ``<name>_ci95``: [lo, hi] or None.

    Raises
    ------
    DataError
        Shapes do not match, there are no images, or a class index is negative.
    ConfigError
        ``num_resamples`` < 0.
    """
    truth = _check_indices("y_true", y_true)
    predicted = _check_indices("y_pred", y_pred, size=truth.size)
    seen, ranks = np.unique(np.concatenate([truth, predicted]), return_inverse=True)
    truth, predicted = np.split(ranks.astype(np.int64), 2)
    group_of, num_groups = _number_groups(groups, truth.size)

    counts = _count_columns(truth, predicted, seen.size)

    def measure(weights: FloatArray) -> "_Values":
        return _compute_count_scores(weights @ counts)

    report = _resample(measure, group_of, num_groups, num_resamples, seed)
    names = ["accuracy", "balanced_accuracy", "macro_f1"]
    return {"n": int(truth.size), "num_groups": num_groups, **report.report_overall(names)}


def compute_curves(y_true: ArrayLike, y_prob: ArrayLike, classes: Sequence[str]) -> dict[str, Any]:
    """Compute ROC, precision–recall and reliability curves, thin enough to plot.

    Parameters
    ----------
    y_true, y_prob, classes
        As in :func:`compute_evaluation`.

    Returns
    -------
    dict
        Ready for ``json.dump``.

        - ``per_class``: for each name ``roc`` (``fpr``, ``tpr``) and ``pr`` (``recall``,
          ``precision``), lists of at most 200 points, the abscissa not decreasing. Lists
          are empty where the curve is undefined: a class without images, and for ROC also
          a class that is all the images.
        - ``reliability``: for each of 15 bins ``edges`` (16 numbers), ``count``,
          ``confidence`` (mean probability of the predicted class) and ``accuracy``; the
          last two None in an empty bin. The bins are those of the calibration error.

    Raises
    ------
    DataError, ConfigError
        As in :func:`compute_evaluation`.

    References
    ----------
    .. [1] Fawcett, "An introduction to ROC analysis", Pattern Recognition Letters 27 (2006).
    .. [2] Guo et al., "On calibration of modern neural networks", ICML (2017), section 2.
    """
    truth, prob, names = _check_predictions(y_true, y_prob, classes)
    return {
        "per_class": {name: _trace_class(truth == k, prob[:, k]) for k, name in enumerate(names)},
        "reliability": _build_reliability(truth, prob),
    }


def summarise(y_true: ArrayLike, y_prob: ArrayLike, classes: Sequence[str]) -> dict[str, float]:
    """Compute the few numbers worth a line per epoch; no intervals.

    Parameters
    ----------
    y_true, y_prob, classes
        As in :func:`compute_evaluation`.

    Returns
    -------
    dict of str to float
        ``loss`` (log loss, nats), ``accuracy``, ``balanced_accuracy``, ``macro_f1``,
        ``macro_auroc``. Only the last can be undefined (all images of one class): NaN.

    Raises
    ------
    DataError, ConfigError
        As in :func:`compute_evaluation`.
    """
    truth, prob, _ = _check_predictions(y_true, y_prob, classes)
    point = _build_scorer(truth, prob)(np.ones((1, truth.size)))
    report = _Report(point=point, resamples=None)
    names = ("log_loss", "accuracy", "balanced_accuracy", "macro_f1", "macro_auroc")
    loss, *scores = (float(report.get_overall(point, name)[0]) for name in names)
    return {"loss": loss, **dict(zip(names[1:], scores, strict=True))}


# --------------------------------------------------------------------------------------
# Scores for many rows of weights at once
# --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Values:
    """Scores under R rows of weights; NaN where undefined."""

    overall: dict[str, FloatArray]
    """Name to shape (R,)."""
    per_class: dict[str, FloatArray]
    """Name to shape (R, K)."""


_Scorer: TypeAlias = Callable[[FloatArray], _Values]
"""Weights of shape (R, N), not negative, to scores."""


def _build_scorer(truth: IntArray, prob: FloatArray) -> _Scorer:
    """Prepare what does not depend on the weights; return a function of them."""
    num_classes = prob.shape[1]
    predicted = prob.argmax(axis=1)
    columns = [
        _count_columns(truth, predicted, num_classes),
        _compute_image_losses(truth, prob),
        _spread_over_bins(prob.max(axis=1), (truth == predicted) - prob.max(axis=1)),
    ]
    ends = np.cumsum([block.shape[1] for block in columns])[:-1]
    stacked = np.hstack(columns)
    rankings = [_rank(truth == k, prob[:, k]) for k in range(num_classes)]

    def score(weights: FloatArray) -> _Values:
        counts, losses, gaps = np.split(weights @ stacked, ends, axis=1)
        total = weights.sum(axis=1)
        values = _compute_count_scores(counts)
        areas = np.array([_compute_areas(ranking, weights) for ranking in rankings])
        auroc, ap = areas.transpose(1, 2, 0)
        overall = {
            "log_loss": losses[:, 0] / total,
            "brier": losses[:, 1] / total,
            # Σ_b (n_b / n) |accuracy_b − confidence_b|; the n_b cancel.
            "ece": np.abs(gaps).sum(axis=1) / total,
        }
        return _Values(
            overall=values.overall | overall,
            per_class=values.per_class | {"auroc": auroc, "ap": ap},
        )

    return score


def _count_columns(truth: IntArray, predicted: IntArray, num_classes: int) -> FloatArray:
    """Return indicator columns, shape (N, 3 K): hit, true class, predicted class."""
    eye = np.eye(num_classes)
    is_true, is_predicted = eye[truth], eye[predicted]
    return np.hstack([is_true * is_predicted, is_true, is_predicted])


def _compute_count_scores(counts: FloatArray) -> _Values:
    """Turn weighed :func:`_count_columns`, shape (R, 3 K), into scores.

    Hits, images and predictions of each class are all that these scores need of a confusion
    matrix.
    """
    hits, support, predicted = np.split(counts, 3, axis=1)
    total = support.sum(axis=1, keepdims=True)
    precision = _divide(hits, predicted)
    precision[(predicted == 0) & (support > 0)] = 0.0
    rest = total - support

    # Gorodkin (2004), written with marginal sums as scikit-learn does.
    squared = total[:, 0] ** 2
    spread_true = squared - (support**2).sum(axis=1)
    spread_predicted = squared - (predicted**2).sum(axis=1)
    agreement = hits.sum(axis=1) * total[:, 0] - (support * predicted).sum(axis=1)
    mcc = _divide(agreement, np.sqrt(spread_true * spread_predicted))
    mcc[(spread_predicted == 0) & (spread_true > 0)] = 0.0
    return _Values(
        overall={"accuracy": hits.sum(axis=1) / total[:, 0], "mcc": mcc},
        per_class={
            "precision": precision,
            "sensitivity": _divide(hits, support),
            "specificity": _divide(rest - predicted + hits, rest),
            "f1": _divide(2 * hits, support + predicted),
        },
    )


def _compute_image_losses(truth: IntArray, prob: FloatArray) -> FloatArray:
    """Return each image's log loss and Brier score, shape (N, 2)."""
    own = np.clip(prob[np.arange(truth.size), truth], LOG_LOSS_FLOOR, 1 - LOG_LOSS_FLOOR)
    brier = ((prob - np.eye(prob.shape[1])[truth]) ** 2).sum(axis=1)
    return np.column_stack([-np.log(own), brier])


def _find_bins(confidence: FloatArray) -> IntArray:
    """Return the reliability bin of each confidence, shape (N,); bins are closed above."""
    inner = np.linspace(0, 1, NUM_RELIABILITY_BINS + 1)[1:-1]
    return np.searchsorted(inner, confidence, side="left").astype(np.int64)


def _spread_over_bins(confidence: FloatArray, values: FloatArray) -> FloatArray:
    """Return values in the column of their image's bin, shape (N, 15); 0 elsewhere."""
    return np.eye(NUM_RELIABILITY_BINS)[_find_bins(confidence)] * values[:, None]


@dataclass(frozen=True, kw_only=True, slots=True)
class _Ranking:
    """One class's scores, sorted once, for AUROC and average precision.

    Both are sums over the distinct scores ("steps") that at least one image of the class
    has, so other scores are not kept. Bounds are half-open ranges of ranks.
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


def _rank(is_positive: NDArray[np.bool_], scores: FloatArray) -> _Ranking:
    order = np.argsort(-scores, kind="stable")
    negated, positive = -scores[order], is_positive[order]
    steps, counts = np.unique(negated[positive], return_counts=True)
    return _Ranking(
        order=order,
        first=np.searchsorted(negated, steps, side="left"),
        last=np.searchsorted(negated, steps, side="right"),
        positives=order[positive],
        positive_bounds=np.concatenate([[0], np.cumsum(counts)]),
    )


def _compute_areas(ranking: _Ranking, weights: FloatArray) -> tuple[FloatArray, FloatArray]:
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

    # A step that no drawn image reaches gains nothing: its precision may be anything.
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


# --------------------------------------------------------------------------------------
# Intervals
# --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True, slots=True)
class _Report:
    """Scores of the data as they are, and of resamples of them."""

    point: _Values
    """One row."""
    resamples: _Values | None
    """One row per resample; None where no intervals are wanted."""

    def report_overall(self, names: Sequence[str]) -> dict[str, Any]:
        """Return scores of the whole, macro averages among them, each with its interval."""
        entry: dict[str, Any] = {}
        for name in names:
            drawn = None if self.resamples is None else self.get_overall(self.resamples, name)
            entry |= _describe(name, self.get_overall(self.point, name)[0], drawn)
        return entry

    def report_class(self, k: int) -> dict[str, Any]:
        """Return scores of class ``k`` against the rest, each with its interval."""
        entry: dict[str, Any] = {}
        for name in _PER_CLASS_NAMES:
            drawn = None if self.resamples is None else self.resamples.per_class[name][:, k]
            entry |= _describe(name, self.point.per_class[name][0, k], drawn)
        return entry

    def get_overall(self, values: _Values, name: str) -> FloatArray:
        """Return the score under each row of weights, shape (R,).

        A macro average is over the classes that have a value in the data as they are, so
        that a resample which lacks one of them is undefined, not an average of the rest.
        """
        if name not in _MACRO_OF:
            return values.overall[name]
        part = _MACRO_OF[name]
        averaged = ~np.isnan(self.point.per_class[part][0])
        if not averaged.any():
            return np.full(values.per_class[part].shape[0], np.nan)
        return np.asarray(values.per_class[part][:, averaged].mean(axis=1), dtype=np.float64)


def _resample(
    measure: _Scorer, group_of: IntArray, num_groups: int, num_resamples: int, seed: int
) -> _Report:
    """Score the data as they are, and ``num_resamples`` resamples of their groups."""
    if num_resamples < 0:
        raise ConfigError(
            f"Expected num_resamples of 0 or more, got {num_resamples}. 0 means no intervals."
        )
    point = measure(np.ones((1, group_of.size)))
    if num_resamples == 0:
        return _Report(point=point, resamples=None)
    if num_groups == 1:  # says nothing of how groups differ
        return _Report(point=point, resamples=_map(lambda rows: rows * np.nan, point))
    parts = [measure(w) for w in _draw_weights(group_of, num_groups, num_resamples, seed)]
    return _Report(point=point, resamples=_map(lambda *rows: np.concatenate(rows), *parts))


def _map(function: Callable[..., FloatArray], *parts: _Values) -> _Values:
    """Apply a function to the arrays of each name."""
    overall = {name: function(*(part.overall[name] for part in parts)) for name in parts[0].overall}
    per_class = {
        name: function(*(part.per_class[name] for part in parts)) for name in parts[0].per_class
    }
    return _Values(overall=overall, per_class=per_class)


def _draw_weights(
    group_of: IntArray, num_groups: int, num_resamples: int, seed: int
) -> Iterator[FloatArray]:
    """Yield image weights, shape (≤ R, N): how often each image's group was drawn.

    Whole groups are drawn with replacement, as many as there are; see Field and Welsh
    (2007), or Davison and Hinkley, "Bootstrap methods and their application" (1997),
    section 3.8.
    """
    rng = np.random.default_rng(seed)
    step = max(1, _WEIGHTS_PER_CHUNK // group_of.size)
    for start in range(0, num_resamples, step):
        size = min(step, num_resamples - start)
        picks = rng.integers(num_groups, size=(size, num_groups))
        picks += num_groups * np.arange(size)[:, None]
        counts = np.bincount(picks.ravel(), minlength=size * num_groups)
        yield counts.reshape(size, num_groups)[:, group_of].astype(np.float64)


def _describe(name: str, point: float, drawn: FloatArray | None) -> dict[str, Any]:
    """Return a score's JSON entries; ``drawn`` holds its value in each resample, (R,)."""
    entry: dict[str, Any] = {name: None if np.isnan(point) else float(point)}
    if drawn is not None:
        defined = drawn[~np.isnan(drawn)]
        enough = not np.isnan(point) and 2 * defined.size >= drawn.size
        interval = np.percentile(defined, [2.5, 97.5]).tolist() if enough else None
        entry[f"{name}_ci95"] = interval
    return entry


# --------------------------------------------------------------------------------------
# Curves
# --------------------------------------------------------------------------------------


def _trace_class(is_positive: NDArray[np.bool_], scores: FloatArray) -> dict[str, Any]:
    """Return one class's ROC and precision–recall points."""
    none: FloatArray = np.empty(0)
    fpr, tpr, recall, precision = none, none, none, none
    if is_positive.any():
        precision, recall, _ = precision_recall_curve(is_positive, scores, drop_intermediate=True)
        recall, precision = _thin(recall[::-1], precision[::-1])
        if not is_positive.all():
            fpr, tpr = _thin(*roc_curve(is_positive, scores)[:2])
    return {
        "roc": {"fpr": fpr.tolist(), "tpr": tpr.tolist()},
        "pr": {"recall": recall.tolist(), "precision": precision.tolist()},
    }


def _thin(x: FloatArray, y: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Keep at most 200 points, evenly spaced along the curve, both ends among them.

    Along the curve, not by rank: a steep rise has few points in x and needs them all.
    """
    if x.size <= MAX_CURVE_POINTS:
        return x, y
    travelled = np.concatenate([[0.0], np.cumsum(np.abs(np.diff(x)) + np.abs(np.diff(y)))])
    stops = np.linspace(0, travelled[-1], MAX_CURVE_POINTS)
    kept = np.unique(np.searchsorted(travelled, stops, side="left"))
    return x[kept], y[kept]


def _build_reliability(truth: IntArray, prob: FloatArray) -> dict[str, Any]:
    """Return count, mean confidence and accuracy of each bin.

    Not :func:`sklearn.calibration.calibration_curve`, which leaves empty bins out and gives
    no counts; the bins are the same.
    """
    confidence = prob.max(axis=1)
    bins = _find_bins(confidence)
    correct = truth == prob.argmax(axis=1)
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


# --------------------------------------------------------------------------------------
# Checks
# --------------------------------------------------------------------------------------


def _check_predictions(
    y_true: ArrayLike, y_prob: ArrayLike, classes: Sequence[str]
) -> tuple[IntArray, FloatArray, tuple[str, ...]]:
    names = check_classes(classes)
    truth = _check_indices("y_true", y_true)
    if truth.max() >= len(names):
        raise DataError(
            f"Expected y_true in [0, {len(names)}) for the classes {', '.join(names)}, "
            f"got {truth.max()} at row {truth.argmax()}. Check the class order."
        )
    prob = np.asarray(y_prob)
    if prob.dtype.kind not in "fiu":
        raise DataError(f"Expected y_prob to be numbers, got {prob.dtype}.")
    prob = prob.astype(np.float64)
    if prob.shape != (truth.size, len(names)):
        raise DataError(
            f"Expected y_prob of shape {(truth.size, len(names))}, one row per image of y_true "
            f"and one column per class, got {prob.shape}."
        )
    _check_distributions(prob)
    return truth, prob, names


def _check_distributions(prob: FloatArray) -> None:
    row = _find_first(~np.isfinite(prob).all(axis=1))
    if row is not None:
        raise DataError(f"Expected finite y_prob, got {prob[row].tolist()} at row {row}.")
    row = _find_first(((prob < 0) | (prob > 1)).any(axis=1))
    if row is not None:
        raise DataError(
            f"Expected y_prob in [0, 1], got {prob[row].tolist()} at row {row}. "
            "Pass probabilities (after softmax), not logits."
        )
    sums = prob.sum(axis=1)
    row = _find_first(np.abs(sums - 1) > ROW_SUM_TOLERANCE)
    if row is not None:
        raise DataError(
            f"Expected each row of y_prob to sum to 1 within {ROW_SUM_TOLERANCE}, got "
            f"{sums[row]:.6g} at row {row}. Pass the probabilities of all classes."
        )


def _find_first(bad: ArrayLike) -> int | None:
    """Return the first row marked bad, if any."""
    rows = np.flatnonzero(bad)
    return int(rows[0]) if rows.size else None


def _check_indices(name: str, given: ArrayLike, size: int | None = None) -> IntArray:
    """Return class indices as int64, shape (N,), N ≥ 1."""
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


def _number_groups(groups: ArrayLike | None, size: int) -> tuple[IntArray, int]:
    """Return each image's group as 0 … G − 1, shape (N,), and G."""
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
