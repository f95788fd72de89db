"""Bootstrap over groups: scores of the data, and of resamples of their groups."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from brainray.errors import ConfigError
from brainray.metrics.scores import FloatArray, IntArray, Scores

WEIGHTS_PER_CHUNK = 1_000_000
"""Resamples times images weighed at a time: 8 MB per array, of which about six exist at once."""


def resample(
    score: Callable[[FloatArray], Scores],
    group_of: IntArray,
    num_groups: int,
    num_resamples: int,
    seed: int,
) -> Scores:
    """Score the data, and resamples of their groups.

    Parameters
    ----------
    score : callable
        Takes weights of the images, shape (R, N), and returns scores with R rows.
    group_of : ndarray of int64, shape (N,)
        Group of each image, 0 to G − 1.
    num_groups, num_resamples, seed : int

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
    if num_resamples and num_groups == 1:
        chunks.append({name: values * np.nan for name, values in chunks[0].items()})
    elif num_resamples:
        chunks += map(score, draw_weights(group_of, num_groups, num_resamples, seed))
    return {name: np.concatenate([chunk[name] for chunk in chunks]) for name in chunks[0]}


def draw_weights(
    group_of: IntArray, num_groups: int, num_resamples: int, seed: int
) -> Iterator[FloatArray]:
    """Yield image weights, shape (≤ R, N): how often each image's group was drawn.

    Whole groups are drawn with replacement, as many as there are [1]_ [2]_.

    References
    ----------
    .. [1] Field and Welsh, "Bootstrapping clustered data", J. R. Statist. Soc. B 69 (2007).
    .. [2] Davison and Hinkley, "Bootstrap methods and their application" (1997), section 3.8.
    """
    rng = np.random.default_rng(seed)
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
