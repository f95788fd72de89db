"""What the pages show of an evaluation: scores, curves and mistakes (``evaluation.html.j2``)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from brainray.reports import plots

_METRICS = {
    "accuracy": "Accuracy",
    "balanced_accuracy": "Balanced accuracy",
    "macro_precision": "Macro precision",
    "macro_sensitivity": "Macro sensitivity (recall)",
    "macro_specificity": "Macro specificity",
    "macro_f1": "Macro F1",
    "macro_auroc": "Macro AUROC",
    "macro_ap": "Macro average precision",
    "mcc": "Matthews correlation",
    "log_loss": "Log loss",
    "brier": "Brier score",
    "ece": "Expected calibration error",
}
_LOWER_IS_BETTER = ("log_loss", "brier", "ece")
_CLASS_METRICS = {
    "precision": "Precision",
    "sensitivity": "Sensitivity (recall)",
    "specificity": "Specificity",
    "f1": "F1",
    "auroc": "AUROC",
    "ap": "AP",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Mistake:
    """One wrongly classified scan, to be shown as a picture."""

    path: str
    """Where the scan came from; may hold anything a file name may."""
    true_class: str
    """Name of the class it belongs to."""
    predicted_class: str
    """Name of the class it was taken for."""
    confidence: float
    """Probability of the predicted class, in [0, 1]."""
    image_png: bytes
    """The scan as an encoded PNG."""
    overlay_png: bytes | None = None
    """The same, and on it where the network saw the predicted class; None if that is not known."""
    split: str = ""
    """The split it is from: ``val`` or ``test``; empty where there are no splits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluatedSplit:
    """Scans whose class is known, judged together."""

    name: str
    """What the page calls them: ``test``."""
    place: str
    """The same within a sentence: ``the test set``."""
    evaluation: Mapping[str, Any]
    """What :func:`brainray.metrics.compute_evaluation` returned."""
    figures: Mapping[str, Markup]
    """The figures ``roc``, ``pr`` and ``reliability``; empty if there are no curves."""


def build_evaluated_split(
    name: str, place: str, evaluation: Mapping[str, Any], curves: Mapping[str, Any] | None
) -> EvaluatedSplit:
    """Bring an evaluation together with the drawings of its curves.

    Parameters
    ----------
    name, place, evaluation
        As in :class:`EvaluatedSplit`.
    curves : mapping or None
        What :func:`brainray.metrics.compute_curves` returned, where known.
    """
    figures = _draw_curves(curves, place) if curves else {}
    return EvaluatedSplit(name=name, place=place, evaluation=evaluation, figures=figures)


def describe_evaluation(
    judged: Sequence[EvaluatedSplit],
    *,
    classes: Sequence[str],
    columns: Mapping[str, Mapping[str, Any]],
    mistakes: Sequence[Mistake],
    splits: Mapping[str, str],
) -> dict[str, Any]:
    """Gather the variables of ``evaluation.html.j2``.

    Parameters
    ----------
    judged : sequence of EvaluatedSplit
        The most telling first; may be empty.
    classes : sequence of str
        Class names, in class order.
    columns : mapping of str to mapping
        Columns of the table of all metrics, by heading.
    mistakes : sequence of Mistake
        The worst mistakes, in the order in which they are to be shown.
    splits : mapping of str to str
        What the page calls the splits of the mistakes; empty where there are none.
    """
    return {
        "judged": judged,
        "splits": splits,
        "classes": classes,
        "columns": columns,
        "mistakes": mistakes,
        "metric_names": _METRICS,
        "lower_is_better": _LOWER_IS_BETTER,
        "class_metric_names": _CLASS_METRICS,
    }


def list_contents(judged: Sequence[EvaluatedSplit]) -> dict[str, tuple[object, str]]:
    """Give content and heading of the sections of ``evaluation.html.j2``, by anchor."""
    figures = any(part.figures for part in judged)
    return {
        "confusion": (judged, "Confusion matrix"),
        "classes": (judged, "Each class"),
        "metrics": (judged, "All metrics"),
        "curves": (figures, "ROC and precision-recall"),
        "reliability": (figures, "Reliability of the confidence"),
        "mistakes": (judged, "Worst mistakes"),
    }


def _draw_curves(found: Mapping[str, Any], place: str) -> dict[str, Markup]:
    """Draw the ROC, PR and reliability figures."""
    classes = found["per_class"]
    roc = {
        name: list(zip(c["roc"]["fpr"], c["roc"]["tpr"], strict=True))
        for name, c in classes.items()
    }
    pr = {
        name: list(zip(c["pr"]["recall"], c["pr"]["precision"], strict=True))
        for name, c in classes.items()
    }
    reliability = found["reliability"]
    return {
        "roc": plots.draw_unit_curves(
            roc,
            title=f"ROC curve of each class on {place}",
            x_label="1 \N{MINUS SIGN} specificity (false-positive rate)",
            y_label="sensitivity (recall)",
            zoom_left=True,
            chance=True,
        ),
        "pr": plots.draw_unit_curves(
            pr,
            title=f"Precision-recall curve of each class on {place}",
            x_label="sensitivity (recall)",
            y_label="precision",
            zoom_left=False,
        ),
        "reliability": plots.draw_reliability(
            reliability["confidence"],
            reliability["accuracy"],
            reliability["count"],
            title=f"Accuracy against confidence on {place}",
        ),
    }
