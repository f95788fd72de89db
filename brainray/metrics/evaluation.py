"""Evaluations of a classifier: all scores with intervals, or a few without."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from brainray.metrics.bootstrap import describe_score, resample
from brainray.metrics.checks import check_indices, check_predictions, number_groups
from brainray.metrics.scores import (
    MACRO_OF,
    FloatArray,
    Scores,
    add_macro_averages,
    build_scorer,
    compute_count_scores,
    count_columns,
)

OVERALL_SCORES = ("accuracy", *MACRO_OF, "mcc", "log_loss", "brier", "ece")
CLASS_SCORES = ("precision", "sensitivity", "specificity", "f1", "auroc", "ap")


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
    DataError
        Shapes do not match, there are no images, a label is out of range, or a row of
        ``y_prob`` is not a distribution.
    ConfigError
        ``classes`` has fewer than two different names, or ``num_resamples`` < 0.

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
    group_of, num_groups = number_groups(groups, y_true.size)
    scorer = build_scorer(y_true, prob)
    scores = add_macro_averages(resample(scorer, group_of, num_groups, num_resamples, seed))

    cells = np.bincount(y_true * len(names) + prob.argmax(axis=1), minlength=len(names) ** 2)
    confusion = cells.reshape(len(names), len(names))
    document: dict[str, Any] = {"n": int(y_true.size), "num_groups": num_groups}
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

    For a baseline without probabilities. Definitions, intervals and undefined values are those
    of :func:`compute_evaluation`; the classes are the numbers in either array.

    Parameters
    ----------
    y_true, y_pred : array-like of int, shape (N,)
        True and predicted class index of each image, not negative.
    groups, num_resamples, seed
        As in :func:`compute_evaluation`.

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
    group_of, num_groups = number_groups(groups, y_true.size)

    counts = count_columns(y_true, predicted, seen.size)

    def score(weights: FloatArray) -> Scores:
        return compute_count_scores(weights @ counts)

    scores = add_macro_averages(resample(score, group_of, num_groups, num_resamples, seed))
    document: dict[str, Any] = {"n": int(y_true.size), "num_groups": num_groups}
    for name in ("accuracy", "balanced_accuracy", "macro_f1"):
        document |= describe_score(name, scores[name])
    return document


def summarise(y_true: ArrayLike, y_prob: ArrayLike, classes: Sequence[str]) -> dict[str, float]:
    """Compute the scores that training logs after each epoch; no intervals.

    Returns
    -------
    dict of str to float
        ``loss`` (log loss, nats), ``accuracy``, ``balanced_accuracy``, ``macro_f1``,
        ``macro_auroc``. Only the last can be undefined (all images of one class): NaN.
    """
    y_true, prob, _ = check_predictions(y_true, y_prob, classes)
    scores = add_macro_averages(build_scorer(y_true, prob)(np.ones((1, y_true.size))))
    names = {"loss": "log_loss"} | {
        name: name for name in ("accuracy", "balanced_accuracy", "macro_f1", "macro_auroc")
    }
    return {name: float(scores[score][0]) for name, score in names.items()}
