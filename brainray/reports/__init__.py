"""Evaluation results turned into something a person reads."""
