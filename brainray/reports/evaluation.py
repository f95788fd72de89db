"""The report of a training run, an evaluation or a cross-validation."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from brainray.model.calibration import NO_CLASS_REASONS
from brainray.reports import charts
from brainray.reports.html import render_page

_SPLITS = {  # name, and how a sentence calls it; the first that is present makes the headline
    "cv": ("pooled", "the pooled folds"),
    "test": ("test", "the test set"),
    "val": ("validation", "the validation set"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Mistake:
    """A wrongly classified scan of a report's gallery; a path may have any characters."""

    path: str
    true_class: str
    predicted_class: str
    confidence: float
    """Probability of the predicted class."""
    image_png: bytes
    overlay_png: bytes | None = None
    """The scan with its class activation map."""


def render_evaluation_report(
    *,
    title: str,
    metrics: Mapping[str, Any],
    epochs: Sequence[Mapping[str, Any]],
    curves: Mapping[str, Mapping[str, Any]],
    mistakes: Sequence[Mistake],
    configuration: Mapping[str, Any],
    facts: Mapping[str, str],
) -> str:
    """Render the report of a training run, an evaluation or a cross-validation as HTML.

    Parameters
    ----------
    metrics : mapping
        Content of ``metrics.json``: ``classes``, and at least one of ``test``, ``val`` and ``cv``,
        from :func:`brainray.evaluation.scoring.evaluate_split`. ``training`` is shown as a table,
        as are ``folds`` with their ``spread``.
    epochs : sequence of mapping
        Records of ``metrics.jsonl``; empty for an evaluation. Of an epoch recorded twice, as
        after a resume, the later record counts.
    curves : mapping
        What :func:`brainray.metrics.compute_curves` returned, by split.
    mistakes : sequence of Mistake
        In the order to show them.
    facts : mapping of str to str
        Short labels and values for the header.
    """
    parts = [
        describe_part(*names, metrics[split], curves.get(split))
        for split, names in _SPLITS.items()
        if metrics.get(split)
    ]
    estimates = _list_estimates(parts[0])
    rejected = [(part["evaluation"].get("rejected") or {}).items() for part in parts]
    return render_page(
        "evaluation.html.j2",
        title=title,
        facts=facts,
        metrics=metrics,
        classes=metrics["classes"],
        parts=parts,
        estimates=estimates,
        axis=_build_accuracy_axis(
            [end for e in estimates for end in (e["value"], *(e["interval"] or ())[:1])]
        ),
        columns=dict(column for part in parts for column in _list_columns(part)),
        history=_draw_histories(epochs),
        reasons=NO_CLASS_REASONS,
        rejected=sorted({reason for found in rejected for reason, count in found if count}),
        mistakes=mistakes,
        configuration=configuration,
    )


def describe_part(
    name: str, phrase: str, evaluation: Mapping[str, Any], curves: Mapping[str, Any] | None
) -> dict[str, Any]:
    """Describe an evaluated split for ``scores.html.j2``, with its figures.

    ``name`` and ``phrase`` are what the page calls it, alone and in a sentence: ``test``, ``the
    test set``. The evaluation and the curves, if any, are those of :mod:`brainray.metrics`.
    """
    figures = _draw_curves(curves, phrase) if curves else {}
    if evaluation.get("confidence"):
        figures["risk"] = charts.draw_risk_coverage(
            evaluation["confidence"]["selective"], title=f"Risk over coverage on {phrase}"
        )
    return {
        "name": name,
        "phrase": phrase,
        "evaluation": {"confidence": None, **evaluation},
        "figures": figures,
        "has_curves": bool(curves),
    }


def _draw_curves(found: Mapping[str, Any], phrase: str) -> dict[str, Markup]:
    def pair(curve: str, x: str, y: str) -> dict[str, charts.Points]:
        return {
            name: list(zip(one[curve][x], one[curve][y], strict=True))
            for name, one in found["per_class"].items()
        }

    return {
        "roc": charts.draw_unit_curves(
            pair("roc", "fpr", "tpr"),
            title=f"ROC curve of each class on {phrase}",
            x_label="1 \N{MINUS SIGN} specificity (false-positive rate)",
            y_label="sensitivity (recall)",
            zoom_left=True,
            chance=True,
        ),
        "pr": charts.draw_unit_curves(
            pair("pr", "recall", "precision"),
            title=f"Precision-recall curve of each class on {phrase}",
            x_label="sensitivity (recall)",
            y_label="precision",
            zoom_left=False,
        ),
        "reliability": charts.draw_reliability(
            found["reliability"], title=f"Accuracy against confidence on {phrase}"
        ),
    }


def _list_estimates(part: Mapping[str, Any]) -> list[dict[str, Any]]:
    """List the accuracies of classifier and baseline, with and without near duplicates."""
    evaluation = part["evaluation"]
    rows = []
    for name, scores, css in (
        ("Classifier", evaluation, ""),
        ("Nearest neighbour", evaluation.get("baseline_1nn") or {}, "base"),
    ):
        apart = scores.get("without_near_duplicates")
        for label, found, where, weight in (
            ("all scans", scores, f"scans of {part['phrase']}", ""),
            ("no near duplicate", apart, "scans without a near duplicate in training", " hollow"),
        ):
            unknown = "unknown: the training images were not available"
            rows.append(
                {
                    "label": f"{name}, {label}",
                    "where": f"{found['n']:,} {where}" if found else unknown,
                    "note": "",
                    "value": found.get("accuracy") if found else None,
                    "interval": found.get("accuracy_ci95") if found else None,
                    "css": css + weight,
                }
            )
    return rows


def _list_columns(part: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """List headings and scores of the table of all metrics."""
    name, evaluation = part["name"].capitalize(), part["evaluation"]
    yield name, evaluation
    keys = {"no near duplicate": "without_near_duplicates", "nearest neighbour": "baseline_1nn"}
    for label, key in keys.items():
        if (evaluation.get(key) or {}).get("n"):
            yield f"{name}, {label}", evaluation[key]


def _build_accuracy_axis(values: Sequence[float | None]) -> charts.Axis:
    """Build an axis that covers the values and ends at 1."""
    return charts.build_axis(min([0.9, *(value for value in values if value is not None)]), 1.0)


def _draw_histories(epochs: Sequence[Mapping[str, Any]]) -> dict[str, Markup]:
    """Draw the learning curves that the records have values for, by caption."""
    records = {record["epoch"] + 1: record for record in epochs}
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
        if values:
            figures[quantity.capitalize()] = charts.draw_history(
                series,
                title=f"{quantity.capitalize()} of training and validation over the epochs",
                y_axis=charts.build_axis(0.0, max(values))
                if quantity == "loss"
                else _build_accuracy_axis(values),
            )
    return figures
