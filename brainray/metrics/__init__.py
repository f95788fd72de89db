"""Scores of probabilities against labels, with intervals, and curves for plots.

Every score has one formula, which takes a weight for each image and works on many rows of weights
at a time. The value is the row whose weights are all 1. A bootstrap resample is a row that counts
how often each image was drawn. So a score and its interval cannot follow different definitions.
"""

from brainray.metrics.curves import compute_curves, compute_risk_coverage
from brainray.metrics.evaluation import compute_accuracy, compute_evaluation, summarise

__all__ = [
    "compute_accuracy",
    "compute_curves",
    "compute_evaluation",
    "compute_risk_coverage",
    "summarise",
]
