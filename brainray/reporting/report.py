"""A run's report: one HTML file that opens offline, in light, dark and print.

The page holds no script and loads nothing: its style, figures and pictures are in it.
"""

import base64
import json
import math
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from brainray.reporting import plots

MISSING = "\N{EN DASH}"
"""Shown for a value that is unknown or undefined."""

_NBSP = "\N{NO-BREAK SPACE}"
_SPLITS = {"test": "test", "val": "validation"}  # the first one present makes the headline
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
    split: str
    """The split it is from: ``val`` or ``test``."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Estimate:
    """An accuracy of the headline, with its interval and how it is to be read."""

    label: str
    """What was measured."""
    note: str
    """On what, or why it is unknown."""
    value: float | None
    """Accuracy in [0, 1]; None if unknown."""
    interval: tuple[float, float] | None
    """95 % interval; None if unknown."""


def render_report(
    *,
    title: str,
    metrics: dict[str, Any],
    epochs: Sequence[dict[str, Any]],
    curves: dict[str, dict[str, Any]],
    mistakes: Sequence[Mistake],
    configuration: dict[str, Any],
    facts: dict[str, str],
) -> str:
    """Render the report of a training or evaluation run.

    Parameters
    ----------
    title : str
        Heading of the page.
    metrics : dict
        Content of ``metrics.json``: ``classes``, and per split (``test``, ``val``; either may
        be absent) what :func:`brainray.metrics.compute_evaluation` returned, with ``no_twin``,
        ``baseline_1nn`` and ``rejected`` where known. ``training`` is shown as a table.
    epochs : sequence of dict
        Records of ``metrics.jsonl``; empty for an evaluation. Of an epoch recorded twice, as
        after a resume, the later record counts.
    curves : dict
        What :func:`brainray.metrics.compute_curves` returned, by split.
    mistakes : sequence of Mistake
        The worst mistakes, in the order in which they are to be shown.
    configuration : dict
        The full configuration; may be nested.
    facts : dict of str to str
        Short labels and values for the header.

    Returns
    -------
    str
        A whole HTML document, encodable as UTF-8 whatever the paths hold.
    """
    splits = {key: name for key, name in _SPLITS.items() if metrics.get(key)}
    page: dict[str, Any] = {
        "title": title,
        "facts": facts,
        "history": _draw_histories(epochs),
        "curves": {s: _draw_curves(curves[s], splits[s]) for s in splits if curves.get(s)},
        "mistakes": mistakes,
        "settings": _list_settings(metrics.get("training") or {}, configuration),
        "dashes": plots.DASHES,
        **_describe_splits(metrics, splits),
    }
    page["sections"] = _name_sections(page)
    return _build_environment().get_template("report.html.j2").render(page)


def format_number(value: float | None, digits: int = 3) -> str:
    """Format a metric; :data:`MISSING` for None or a value that is not finite."""
    if value is None or not math.isfinite(value):
        return MISSING
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:.{digits}f}".replace("-", "\N{MINUS SIGN}")


def format_percent(value: float | None) -> str:
    """Format a fraction as a percentage with one decimal."""
    number = format_number(None if value is None else 100.0 * value, 1)
    return number if number == MISSING else f"{number}{_NBSP}%"


def format_interval(interval: Sequence[float | None] | None, *, percent: bool = False) -> str:
    """Format a 95 % interval as ``low–high``; empty if either end is unknown."""
    if interval is None:
        return ""
    scale, digits = (100.0, 1) if percent else (1.0, 3)
    ends = [format_number(None if end is None else scale * end, digits) for end in interval]
    return "" if MISSING in ends else "\N{EN DASH}".join(ends) + (f"{_NBSP}%" if percent else "")


def format_text(text: object) -> object:
    """Make text safe to show and to encode; leave anything else as it is.

    Line breaks, control characters, lone surrogates (undecodable file names) and characters
    that reorder text are written as escapes, so that a path cannot look like another one.
    """
    if text is None:
        return MISSING
    if not isinstance(text, str) or isinstance(text, Markup):
        return text
    return "".join(
        c
        if c.isprintable() or unicodedata.category(c) == "Zs"
        else c.encode("unicode_escape").decode()
        for c in text
    )


def _build_environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("brainray", "reporting"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=format_text,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        number=format_number,
        percent=format_percent,
        interval=format_interval,
        base64=lambda data: base64.b64encode(data).decode("ascii"),
    )
    return environment


def _describe_splits(metrics: Mapping[str, Any], splits: Mapping[str, str]) -> dict[str, Any]:
    """Gather what the page says of the evaluated splits."""
    main = next(iter(splits), None)
    estimates = _build_estimates(metrics[main], splits[main]) if main else []
    return {
        "classes": metrics["classes"],
        "splits": splits,
        "evaluations": {split: metrics[split] for split in splits},
        "estimates": estimates,
        "forest": _build_forest_axis(estimates),
        "twin_correlation": metrics[main].get("twin_correlation") if main else None,
        "columns": _build_columns(metrics, splits),
        "metric_names": _METRICS,
        "lower_is_better": _LOWER_IS_BETTER,
        "class_metric_names": _CLASS_METRICS,
        "rejected": _count_rejected(metrics, splits),
    }


def _build_estimates(evaluation: Mapping[str, Any], split: str) -> list[Estimate]:
    """Build the accuracies that stand side by side: all scans, no twins, and the baseline's."""
    baseline = evaluation.get("baseline_1nn")
    where = f"scans of the {split} set"
    alone = "scans without a near-twin in training"
    return [
        _build_estimate("Classifier, all scans", where, evaluation),
        _build_estimate("Classifier, no near-twin", alone, evaluation.get("no_twin")),
        _build_estimate("Nearest neighbour, all scans", where, baseline),
        _build_estimate("Nearest neighbour, no near-twin", alone, (baseline or {}).get("no_twin")),
    ]


def _build_estimate(label: str, where: str, found: Mapping[str, Any] | None) -> Estimate:
    if found is None:
        note = "not known: the training images were not at hand"
        return Estimate(label=label, note=note, value=None, interval=None)
    interval = found.get("accuracy_ci95")
    return Estimate(
        label=label,
        note=f"{found['n']:,} {where}",
        value=found.get("accuracy"),
        interval=(interval[0], interval[1]) if interval else None,
    )


def _build_forest_axis(estimates: Sequence[Estimate]) -> plots.Axis:
    """Build the axis that the headline's accuracies share; it ends at 1."""
    values = [estimate.value for estimate in estimates if estimate.value is not None]
    values += [estimate.interval[0] for estimate in estimates if estimate.interval]
    return plots.build_axis(min([*values, 0.9]), 1.0)


def _build_columns(
    metrics: Mapping[str, Any], splits: Mapping[str, str]
) -> dict[str, dict[str, Any]]:
    """Build the columns of the table of all metrics, by heading."""
    columns: dict[str, dict[str, Any]] = {}
    for split, name in splits.items():
        evaluation = metrics[split]
        columns[name.capitalize()] = evaluation
        if (evaluation.get("no_twin") or {}).get("n"):
            columns[f"{name.capitalize()}, no near-twin"] = evaluation["no_twin"]
        if evaluation.get("baseline_1nn"):
            columns[f"{name.capitalize()}, nearest neighbour"] = evaluation["baseline_1nn"]
    return columns


def _name_sections(page: Mapping[str, Any]) -> dict[str, str]:
    """Name the sections that have content: anchor to heading, in page order."""
    splits = page["splits"]
    headings = {
        "headline": (splits, f"Accuracy on the {next(iter(splits.values()), '')} set"),
        "learning": (page["history"], "Learning curves"),
        "confusion": (splits, "Confusion matrix"),
        "classes": (splits, "Each class"),
        "metrics": (splits, "All metrics"),
        "curves": (page["curves"], "ROC and precision-recall"),
        "reliability": (page["curves"], "Reliability of the confidence"),
        "mistakes": (splits, "Worst mistakes"),
        "rejected": (page["rejected"], "Rejected scans"),
        "configuration": (page["settings"], "Configuration"),
        "reading": (True, "How to read this"),
    }
    return {anchor: heading for anchor, (content, heading) in headings.items() if content}


def _list_settings(
    training: Mapping[str, Any], configuration: Mapping[str, Any]
) -> dict[str, dict[str, str]]:
    """List names and values, by caption; what is empty is left out."""
    tables = {"What training recorded": _flatten(training), "All settings": _flatten(configuration)}
    return {caption: values for caption, values in tables.items() if values}


def _count_rejected(
    metrics: Mapping[str, Any], splits: Mapping[str, str]
) -> dict[str, dict[str, int]]:
    """Count the rejected scans by reason and split; empty if there is none."""
    counts = {split: metrics[split].get("rejected") or {} for split in splits}
    reasons = sorted({reason for found in counts.values() for reason, n in found.items() if n})
    return {reason: {s: counts[s].get(reason, 0) for s in splits} for reason in reasons}


def _draw_histories(epochs: Sequence[Mapping[str, Any]]) -> dict[str, Markup]:
    """Draw the learning curves that the records have values for, by caption."""
    records = {record["epoch"] + 1: record for record in epochs}
    sizes: list[tuple[int, int]] = []
    for epoch, record in sorted(records.items()):
        size_px = record.get("size_px")
        if size_px is not None and (not sizes or sizes[-1][1] != size_px):
            sizes.append((epoch, size_px))
    figures = {}
    for quantity in ("loss", "accuracy"):
        series = {
            name: [
                (epoch, record[key])
                for epoch, record in sorted(records.items())
                if record.get(key) is not None and math.isfinite(record[key])
            ]
            for name, key in (("validation", f"val_{quantity}"), ("training", f"train_{quantity}"))
        }
        values = [value for points in series.values() for _, value in points]
        if not values:
            continue
        low, high = (0.0, max(values)) if quantity == "loss" else (min([*values, 0.9]), 1.0)
        figures[quantity.capitalize()] = plots.draw_history(
            series,
            title=f"{quantity.capitalize()} of training and validation over the epochs",
            y_axis=plots.build_axis(low, high),
            sizes=sizes,
        )
    return figures


def _draw_curves(found: Mapping[str, Any], split: str) -> dict[str, Markup]:
    """Draw the ROC, PR and reliability figures of one split."""
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
            title=f"ROC curve of each class on the {split} set",
            x_label="1 \N{MINUS SIGN} specificity (false-positive rate)",
            y_label="sensitivity (recall)",
            zoom_left=True,
            chance=True,
        ),
        "pr": plots.draw_unit_curves(
            pr,
            title=f"Precision-recall curve of each class on the {split} set",
            x_label="sensitivity (recall)",
            y_label="precision",
            zoom_left=False,
        ),
        "reliability": plots.draw_reliability(
            reliability["confidence"],
            reliability["accuracy"],
            reliability["count"],
            title=f"Accuracy against confidence on the {split} set",
        ),
    }


def _flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested mappings to dotted names and values as text."""
    flat: dict[str, str] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            flat[f"{prefix}{key}"] = value
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, default=str, ensure_ascii=False)
    return flat
