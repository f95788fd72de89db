"""Bootstrap intervals: the scores of the data as they are, and of resamples of their groups."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from brainray.errors import ConfigError
from brainray.metrics.scores import FloatArray, IntArray, Scorer, Values

_WEIGHTS_PER_CHUNK = 1_000_000
"""Entries (resamples times images) weighed at a time: 8 MB per array, a handful alive at once."""

_PER_CLASS_NAMES = ("precision", "sensitivity", "specificity", "f1", "auroc", "ap")
MACRO_OF = {
    "balanced_accuracy": "sensitivity",
    "macro_precision": "precision",
    "macro_sensitivity": "sensitivity",
    "macro_specificity": "specificity",
    "macro_f1": "f1",
    "macro_auroc": "auroc",
    "macro_ap": "ap",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Report:
    """Scores of the data as they are, and of resamples of them."""

    point: Values
    """One row."""
    resamples: Values | None
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

    def get_overall(self, values: Values, name: str) -> FloatArray:
        """Return the score under each row of weights, shape (R,).

        A macro average is over the classes that have a value in the data as they are, so
        that a resample which lacks one of them is undefined, not an average of the rest.
        """
        if name not in MACRO_OF:
            return values.overall[name]
        part = MACRO_OF[name]
        averaged = ~np.isnan(self.point.per_class[part][0])
        if not averaged.any():
            return np.full(values.per_class[part].shape[0], np.nan)
        return np.asarray(values.per_class[part][:, averaged].mean(axis=1), dtype=np.float64)


def resample(
    measure: Scorer, group_of: IntArray, num_groups: int, num_resamples: int, seed: int
) -> Report:
    """Score the data as they are, and ``num_resamples`` resamples of their groups."""
    if num_resamples < 0:
        raise ConfigError(
            f"Expected num_resamples of 0 or more, got {num_resamples}. 0 means no intervals."
        )
    point = measure(np.ones((1, group_of.size)))
    if num_resamples == 0:
        return Report(point=point, resamples=None)
    if num_groups == 1:  # says nothing of how groups differ
        return Report(point=point, resamples=_map(lambda rows: rows * np.nan, point))
    parts = [measure(w) for w in _draw_weights(group_of, num_groups, num_resamples, seed)]
    return Report(point=point, resamples=_map(lambda *rows: np.concatenate(rows), *parts))


def _map(function: Callable[..., FloatArray], *parts: Values) -> Values:
    """Apply a function to the arrays of each name."""
    overall = {name: function(*(part.overall[name] for part in parts)) for name in parts[0].overall}
    per_class = {
        name: function(*(part.per_class[name] for part in parts)) for name in parts[0].per_class
    }
    return Values(overall=overall, per_class=per_class)


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
