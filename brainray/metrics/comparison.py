"""Compare two classifiers on the same images: differences with intervals, tests, verdicts."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.stats import binom, norm, rankdata

from brainray.errors import ConfigError
from brainray.metrics.evaluation import check_predictions, number_groups
from brainray.metrics.scores import (
    FloatArray,
    add_macro_averages,
    build_scorer,
    compute_interval,
    describe_score,
    resample,
)

Compared = Literal["accuracy", "balanced_accuracy", "macro_f1", "macro_auroc", "log_loss"]
COMPARED: tuple[Compared, ...] = get_args(Compared)
"""Scores that are compared, as :func:`brainray.metrics.compute_evaluation` defines them."""

LOWER_IS_BETTER = frozenset({"log_loss"})

_LEAST_VARIANCE = 1e-18
"""Below it a variance is rounding: standard errors of 1e-9 do not come from data."""

BETTER, WORSE, UNDECIDED = "better", "worse", "cannot tell"


def compare_predictions(
    y_true: ArrayLike,
    prob_a: ArrayLike,
    prob_b: ArrayLike,
    classes: Sequence[str],
    *,
    groups: ArrayLike | None = None,
    primary: str | None = None,
    num_resamples: int = 2000,
    seed: int = 0,
    alpha: float = 0.05,
) -> dict[str, Any]:
    """Compare two classifiers' predictions for the same images.

    Arguments and errors are those of :func:`brainray.metrics.compute_evaluation`, and:

    Parameters
    ----------
    primary : str, optional
        The one score of :data:`COMPARED` that gets a verdict. By default all do, and Holm's method
        [2]_ corrects their p-values.
    num_resamples : int
        At least 100.
    alpha : float
        Accepted probability of a wrong verdict, over all verdicts.

    Returns
    -------
    dict
        Ready for ``json.dump``; differences are B − A, and a verdict is on B.

        - ``n``, ``num_groups``, ``alpha``, ``correction`` (``holm`` or ``primary``), ``primary``.
        - ``scores``: for each name ``a``, ``b``, ``difference``, ``difference_ci95``,
          ``p_value``, ``p_adjusted`` and ``verdict``: better, worse, or cannot tell (None
          if another score is the primary one).
        - ``mcnemar``: see :func:`compute_mcnemar`.
        - ``auroc``: for each class what :func:`compute_delong_test` returns, with ``p_adjusted``
          (by Holm, over the classes) and ``verdict``; None where undefined.

    Notes
    -----
    Every resample draws the same groups for both classifiers [1]_, so that images that are hard
    for both cancel. The p-value is twice the smaller share of resamples in which the difference
    is on one side of 0, and so agrees with the interval. McNemar's and DeLong's tests take all
    images as independent. If groups are large, their p-values are too small: use the bootstrap.

    References
    ----------
    .. [1] Davison and Hinkley, "Bootstrap methods and their application" (1997), sections
       3.8 and 4.4.
    .. [2] Holm, "A simple sequentially rejective multiple test procedure", Scandinavian Journal
       of Statistics 6 (1979).
    """
    if primary is not None and primary not in COMPARED:
        raise ConfigError(f"Unknown score '{primary}'. Expected one of {', '.join(COMPARED)}.")
    if num_resamples < 100:
        raise ConfigError(f"Expected at least 100 resamples, got {num_resamples}.")
    if not 0 < alpha < 1:
        raise ConfigError(f"Expected alpha in (0, 1), got {alpha}.")
    y_true, given_a, names = check_predictions(y_true, prob_a, classes)
    _, given_b, _ = check_predictions(y_true, prob_b, classes)
    group_of = number_groups(groups, y_true.size)
    a, b = (
        add_macro_averages(resample(build_scorer(y_true, prob), group_of, num_resamples, seed))
        for prob in (given_a, given_b)
    )
    scores = {name: _compare_score(a[name], b[name]) for name in COMPARED}
    tested = {name: row for name, row in scores.items() if primary in (None, name)}
    add_verdicts(tested, alpha, LOWER_IS_BETTER)
    auroc = {
        name: compute_delong_test(y_true == k, np.stack([given_a[:, k], given_b[:, k]]))
        for k, name in enumerate(names)
    }
    add_verdicts({name: row for name, row in auroc.items() if row}, alpha)
    return {
        "n": y_true.size,
        "num_groups": int(group_of.max()) + 1,
        "num_resamples": num_resamples,
        "alpha": alpha,
        "correction": "holm" if primary is None else "primary",
        "primary": primary,
        "scores": scores,
        "mcnemar": compute_mcnemar(given_a.argmax(1) == y_true, given_b.argmax(1) == y_true),
        "auroc": auroc,
    }


def _compare_score(a: FloatArray, b: FloatArray) -> dict[str, Any]:
    """Compare the values of a score, shape (1 + R,), of the data and of R resamples."""
    difference = b - a
    interval = compute_interval(difference)
    defined = difference[1:][~np.isnan(difference[1:])]
    # Each side counts 0, and once more (Davison and Hinkley, section 4.4).
    smaller = min(int((defined <= 0).sum()), int((defined >= 0).sum())) + 1
    return {
        **describe_score("a", a[:1]),
        **describe_score("b", b[:1]),
        **describe_score("difference", difference[:1]),
        "difference_ci95": interval,
        "p_value": min(1.0, 2 * smaller / (defined.size + 1)) if interval else None,
        "p_adjusted": None,
        "verdict": None,
    }


def add_verdicts(
    tests: Mapping[Any, dict[str, Any]], alpha: float, lower_is_better: Collection[str] = ()
) -> None:
    """Add ``p_adjusted``, by Holm's method over the tests, and the ``verdict`` to each."""
    adjusted = adjust_holm([row["p_value"] for row in tests.values()])
    for (name, row), p in zip(tests.items(), adjusted, strict=True):
        difference, verdict = row["difference"], UNDECIDED
        if p is not None and p <= alpha and difference:
            verdict = BETTER if (difference > 0) != (name in lower_is_better) else WORSE
        row |= {"p_adjusted": p, "verdict": verdict}


def adjust_holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Adjust several p-values by Holm's method; None stays None."""
    given = sorted((p, at) for at, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    highest = 0.0
    for rank, (p, at) in enumerate(given):
        highest = max(highest, min(1.0, (len(given) - rank) * p))
        adjusted[at] = highest
    return adjusted


def compute_mcnemar(right_a: NDArray[np.bool_], right_b: NDArray[np.bool_]) -> dict[str, Any]:
    """Test whether two classifiers are right equally often, by McNemar's test.

    ``right_a`` and ``right_b``, shape (N,), tell whether each is right on each image. ``only_a``
    and ``only_b`` are the images on which only one is right; ``p_exact`` is two-sided binomial;
    ``p_mid`` has half of the observed outcome's probability, and keeps closer to its level [1]_.

    References
    ----------
    .. [1] Fagerland, Lydersen and Laake, "The McNemar test for binary matched-pairs data:
       mid-p and asymptotic are better than exact conditional", BMC Medical Research
       Methodology 13 (2013).
    """
    only_a, only_b = int((right_a & ~right_b).sum()), int((right_b & ~right_a).sum())
    fewer, total = min(only_a, only_b), only_a + only_b
    doubled = 2 * float(binom.cdf(fewer, total, 0.5))
    return {
        "only_a": only_a,
        "only_b": only_b,
        "p_exact": min(1.0, doubled),
        "p_mid": min(1.0, doubled - float(binom.pmf(fewer, total, 0.5))),
    }


def compute_delong_test(
    is_positive: NDArray[np.bool_], scores: FloatArray
) -> dict[str, Any] | None:
    """Test whether the AUROCs of the scores (2, N) of A and B differ, by DeLong's method.

    Return ``a``, ``b``, ``difference`` (B − A), ``difference_ci95``, ``z`` and ``p_value``
    (two-sided, normal). ``z`` is None where the difference has no variance; equal curves then have
    a p-value of 1, others None. None where there are fewer than two images of the class, or of the
    rest.

    References
    ----------
    .. [1] DeLong, DeLong and Clarke-Pearson, "Comparing the areas under two or more correlated
       receiver operating characteristic curves", Biometrics 44 (1988).
    .. [2] Sun and Xu, "Fast implementation of DeLong's algorithm", IEEE Signal Processing
       Letters 21 (2014): mid-ranks, N log N.
    """
    areas, covariance = compute_delong(is_positive, scores)
    if np.isnan(covariance).any():
        return None
    difference = float(areas[1] - areas[0])
    variance = float(covariance[0, 0] + covariance[1, 1] - 2 * covariance[0, 1])
    found: dict[str, Any] = {
        "a": float(areas[0]),
        "b": float(areas[1]),
        "difference": difference,
        "difference_ci95": None,
        "z": None,
        "p_value": 1.0 if difference == 0 else None,
    }
    if variance > _LEAST_VARIANCE:
        error = variance**0.5
        reach = float(norm.ppf(0.975)) * error
        found["difference_ci95"] = [difference - reach, difference + reach]
        found["z"] = difference / error
        found["p_value"] = float(2 * norm.sf(abs(difference) / error))
    return found


def compute_delong(
    is_positive: NDArray[np.bool_], scores: FloatArray
) -> tuple[FloatArray, FloatArray]:
    """Compute AUROCs of scores (C, N), shape (C,), and their covariance, shape (C, C).

    Both are NaN where there are fewer than two positives or negatives. A tie counts half.
    """
    num_positive, num_negative = int(is_positive.sum()), int((~is_positive).sum())
    count = len(scores)
    if min(num_positive, num_negative) < 2:
        return np.full(count, np.nan), np.full((count, count), np.nan)
    among_all = rankdata(scores, axis=1)  # mid-ranks
    among_positive = rankdata(scores[:, is_positive], axis=1)
    among_negative = rankdata(scores[:, ~is_positive], axis=1)
    beaten = (among_all[:, is_positive] - among_positive) / num_negative
    losing = 1 - (among_all[:, ~is_positive] - among_negative) / num_positive
    covariance = np.cov(beaten) / num_positive + np.cov(losing) / num_negative
    return beaten.mean(axis=1), np.reshape(covariance, (count, count))
