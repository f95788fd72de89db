"""Counts and probabilities against truth: scores, their intervals, and curves for plots.

Every score is computed once, by code that takes a weight for each image and works on many
rows of weights at a time. The value itself is the row whose weights are all 1; a bootstrap
resample is a row that says how often each image was drawn. So a score and its interval
cannot follow different definitions.
"""

from brainray.metrics.checks import ROW_SUM_TOLERANCE
from brainray.metrics.curves import MAX_CURVE_POINTS, compute_curves
from brainray.metrics.evaluation import compute_accuracy, compute_evaluation, summarise
from brainray.metrics.scores import LOG_LOSS_FLOOR, NUM_RELIABILITY_BINS
from brainray.metrics.selective import compute_risk_coverage

__all__ = [
    "LOG_LOSS_FLOOR",
    "MAX_CURVE_POINTS",
    "NUM_RELIABILITY_BINS",
    "ROW_SUM_TOLERANCE",
    "compute_accuracy",
    "compute_curves",
    "compute_evaluation",
    "compute_risk_coverage",
    "summarise",
]
