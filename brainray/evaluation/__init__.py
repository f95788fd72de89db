"""Predictions beside the truth: metrics, comparison, audit."""
