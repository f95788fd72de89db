"""Evaluation on labelled scans: metrics, comparison, audit."""
