"""What a classifier risks if it answers only where it is sure."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike
from scipy.stats import binomtest

from brainray.metrics.checks import check_predictions
from brainray.metrics.curves import downsample_curve


def compute_risk_coverage(
    y_true: ArrayLike,
    y_prob: ArrayLike,
    classes: Sequence[str],
    *,
    min_confidence: float = 0.0,
) -> dict[str, Any]:
    """Compute the risk–coverage curve, and the risk at a threshold.

    Coverage is the share of images that are given their most probable class, risk the share of
    these that are wrong. Images of equal confidence are answered all or none.

    Parameters
    ----------
    y_true, y_prob, classes
        As in :func:`compute_evaluation`.
    min_confidence : float
        Probability below which no class is given.

    Returns
    -------
    dict
        Ready for ``json.dump``.

        - ``min_confidence``, and there: ``coverage``, ``num_answered``, ``risk`` (None if nothing
          is answered) and ``risk_ci95`` (Wilson's interval, as if no two images were of one
          group).
        - ``aurc``: area under the curve [1]_, the mean risk over all numbers of images answered;
          ``aurc_oracle``: that of the same answers if every right one were surer than any wrong.
        - ``curve``: ``coverage`` and ``risk``, lists of at most 200 points, coverage rising.

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
    best = np.maximum(count - (y_true.size - is_wrong.sum()), 0) / count
    thin_coverage, thin_risk = downsample_curve(coverage, risk)
    return {
        "min_confidence": min_confidence,
        "coverage": answered / y_true.size,
        "num_answered": answered,
        "risk": errors / answered if answered else None,
        "risk_ci95": _interval(errors, answered),
        "aurc": float((risk * widths).sum()),
        "aurc_oracle": float(best.mean()),
        "curve": {"coverage": thin_coverage.tolist(), "risk": thin_risk.tolist()},
    }


def _interval(errors: int, answered: int) -> list[float] | None:
    if not answered:
        return None
    found = binomtest(errors, answered).proportion_ci(0.95, method="wilson")
    return [float(found.low), float(found.high)]
