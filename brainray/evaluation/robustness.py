"""How well a classifier holds on shifted scans, beside the same scans as they are."""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from brainray.evaluation.shifts import SHIFTS, apply_shift
from brainray.images.preprocess import Preprocessing, preprocess_image
from brainray.inference.engine import Prediction
from brainray.metrics import compute_evaluation
from brainray.model.reasons import find_status

PLAIN = "plain"
"""Name of the scans as they are, in progress messages and tables."""
HIGH_CONFIDENCE = 0.9
"""Probability from which a wrong answer is counted as confidently wrong."""
BATCH_SIZE = 64
"""Images that are predicted at once."""
COLUMNS = {
    "accuracy": "accuracy",
    "relative_accuracy": "relative to plain",
    "ece": "calibration error",
    "confidently_wrong": f"wrong answers at {HIGH_CONFIDENCE:g} or more",
    "abstained": "abstained",
    "rejected": "rejected",
}
"""Score to what a table calls it."""


class Predictor(Protocol):
    """What is measured; an :class:`brainray.inference.engine.Engine` is one."""

    def predict(self, images: NDArray[np.uint8], /) -> Prediction:
        """Predict images, uint8 of shape (N, size_px, size_px)."""


def measure_robustness(
    engine: Predictor,
    preprocessing: Preprocessing,
    classes: Sequence[str],
    scans: Sequence[NDArray[np.uint8]],
    labels: ArrayLike,
    *,
    severity: int = 2,
    seed: int = 0,
    on_progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Score a classifier on scans as they are and under each of :data:`SHIFTS`.

    Parameters
    ----------
    engine : Predictor
        Gives probabilities and reasons.
    preprocessing : Preprocessing
        The classifier's.
    classes : sequence of str
        The K class names, in class order.
    scans : sequence of ndarray of uint8, each of shape (H, W)
        N decoded scans, each at its own size.
    labels : array-like of int, shape (N,)
        Class of each scan.
    severity : {1, 2, 3}
        Of every shift.
    seed : int
        Not negative. Scan number i is shifted with seed + i.
    on_progress : callable
        Given the name of each shift before it is measured.

    Returns
    -------
    dict
        Ready for JSON. ``num_images``, ``severity``, ``seed``; ``plain``, the scores of the scans
        as they are; ``shifts``, those under each shift, by name; ``mean``, their means over the
        shifts; ``worst``, the name of the shift with the lowest accuracy. The scores are those of
        :func:`score_predictions`, and ``relative_accuracy``: accuracy in units of the plain one
        (None where that is 0).

    Raises
    ------
    DataError
        There are no scans, or labels and scans do not match.
    ConfigError
        An unknown severity.
    """

    def score(name: str) -> dict[str, Any]:
        on_progress(name)

        def get_samples(index: int) -> NDArray[Any]:
            if name == PLAIN:
                return scans[index]
            return apply_shift(scans[index], name, severity, seed=seed + index)

        probs, reasons = _predict(engine, preprocessing, get_samples, len(scans))
        return score_predictions(labels, probs, reasons, classes)

    plain = score(PLAIN)
    shifted = {name: score(name) for name in SHIFTS}
    for scores in (plain, *shifted.values()):
        relative = scores["accuracy"] / plain["accuracy"] if plain["accuracy"] else None
        scores["relative_accuracy"] = relative
    return {
        "num_images": len(scans),
        "severity": severity,
        "seed": seed,
        "plain": plain,
        "shifts": shifted,
        "mean": _average(list(shifted.values())),
        "worst": min(shifted, key=lambda name: shifted[name]["accuracy"]),
    }


def _predict(
    engine: Predictor,
    preprocessing: Preprocessing,
    get_samples: Callable[[int], NDArray[Any]],
    count: int,
) -> tuple[NDArray[np.float32], list[str | None]]:
    """Return probabilities, shape (N, K), and reasons of the scans of numbers 0 to N - 1."""
    probs, reasons = [], []
    for start in range(0, count, BATCH_SIZE):
        numbers = range(start, min(start + BATCH_SIZE, count))
        images = np.stack([preprocess_image(get_samples(i), preprocessing) for i in numbers])
        predicted = engine.predict(images)
        probs.append(predicted.probs)
        reasons += predicted.reasons
    return np.concatenate(probs) if probs else np.zeros((0, 0), np.float32), reasons


def score_predictions(
    labels: ArrayLike,
    probs: NDArray[np.float32],
    reasons: Sequence[str | None],
    classes: Sequence[str],
) -> dict[str, Any]:
    """Compute the scores of one row of the table.

    Parameters
    ----------
    labels : array-like of int, shape (N,)
    probs : ndarray of float32, shape (N, K)
    reasons : sequence of str or None, length N
        Why an image gets no class, from :attr:`brainray.inference.engine.Prediction.reasons`.
    classes : sequence of str

    Returns
    -------
    dict of str to float
        Shares of all N images, each in [0, 1]: ``accuracy``, of the most probable class, whether it
        is given or not; ``ece``, the calibration error of the same; ``confidently_wrong``, those
        that are given a wrong class with a probability of 0.9 or more; ``abstained`` and
        ``rejected``, those that are given none.

    Raises
    ------
    DataError
        As :func:`brainray.metrics.compute_evaluation`.
    """
    metrics = compute_evaluation(labels, probs, classes, num_resamples=0)
    statuses = np.array([find_status(reason) for reason in reasons])
    is_wrong = (probs.argmax(axis=1) != np.asarray(labels)) & (statuses == "classified")
    return {
        "accuracy": metrics["accuracy"],
        "ece": metrics["ece"],
        "confidently_wrong": float((is_wrong & (probs.max(axis=1) >= HIGH_CONFIDENCE)).mean()),
        "abstained": float((statuses == "abstained").mean()),
        "rejected": float((statuses == "rejected").mean()),
    }


def _average(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    """Return the mean of each score; None where it is not defined."""
    columns = {name: [row[name] for row in rows] for name in COLUMNS}
    return {
        name: None if None in values else float(np.mean(values)) for name, values in columns.items()
    }


def render_robustness(found: dict[str, Any]) -> str:
    """Render what :func:`measure_robustness` found as a Markdown table."""
    worst = found["worst"]
    rows = {
        PLAIN: found["plain"],
        **found["shifts"],
        "**mean of the shifts**": found["mean"],
        f"**worst: {worst}**": found["shifts"][worst],
    }
    lines = [
        "| shift | " + " | ".join(COLUMNS.values()) + " |",
        "| --- |" + " --- |" * len(COLUMNS),
    ]
    for name, scores in rows.items():
        cells = ("–" if scores[key] is None else f"{scores[key]:.3f}" for key in COLUMNS)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
