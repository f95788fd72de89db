"""The report of a training or evaluation run."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from brainray.model.calibration import NO_CLASS_REASONS
from brainray.reports import plots
from brainray.reports.evaluation import (
    Mistake,
    build_evaluated_split,
    describe_evaluation,
    list_contents,
)
from brainray.reports.page import list_settings, render_page, select_sections

__all__ = ["Estimate", "Mistake", "render_report"]

_SPLITS = {  # name and place; the first one present makes the headline
    "cv": ("pooled", "the pooled folds"),
    "test": ("test", "the test set"),
    "val": ("validation", "the validation set"),
}
_FOLD_SCORES = {"accuracy": "Accuracy", "macro_f1": "Macro F1", "macro_auroc": "Macro AUROC"}
_SPREAD = {"mean": "Mean", "sd": "Standard deviation", "min": "Smallest", "max": "Largest"}


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
    """Render the report of a training or evaluation run, or of a cross-validation.

    Parameters
    ----------
    title : str
        Heading of the page.
    metrics : dict
        Content of ``metrics.json``: ``classes``, and per split (``test``, ``val``, ``cv``; each
        may be absent) what :func:`brainray.metrics.compute_evaluation` returned, with ``without_near_duplicates``,
        ``baseline_1nn``, ``calibration`` and ``rejected`` where known. ``training`` is shown as a table,
        and so are ``folds`` with their ``spread``.
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
    splits = {key: name for key, (name, _) in _SPLITS.items() if metrics.get(key)}
    judged = [
        build_evaluated_split(name, _SPLITS[split][1], metrics[split], curves.get(split))
        for split, name in splits.items()
    ]
    tables = {
        "What training recorded": metrics.get("training") or {},
        "All settings": configuration,
    }
    page: dict[str, Any] = {
        "title": title,
        "facts": facts,
        "history": _draw_histories(epochs),
        "folds": metrics.get("folds") or [],
        "spread": metrics.get("spread") or {},
        "fold_scores": _FOLD_SCORES,
        "spread_names": _SPREAD,
        "settings": list_settings(tables),
        **_describe_splits(metrics, splits),
        **describe_evaluation(
            judged,
            classes=metrics["classes"],
            columns=_build_columns(metrics, splits),
            mistakes=mistakes,
            splits=splits,
        ),
    }
    headings = {
        "headline": (judged, f"Accuracy on {judged[0].place}" if judged else ""),
        "folds": (page["folds"], "The folds"),
        "learning": (page["history"], "Learning curves"),
        **list_contents(judged),
        "confidence": (page["confidence"], "Calibration and abstention"),
        "rejected": (page["rejected"], "Rejected scans"),
        "configuration": (page["settings"], "Configuration"),
        "reading": (True, "How to read this"),
    }
    page["sections"] = select_sections(headings)
    return render_page("report.html.j2", page)


def _describe_splits(metrics: Mapping[str, Any], splits: Mapping[str, str]) -> dict[str, Any]:
    """Gather what the page says of the evaluated splits."""
    main = next(iter(splits), None)
    estimates = _build_estimates(metrics[main], _SPLITS[main][1]) if main else []
    return {
        "estimates": estimates,
        "forest": _build_forest_axis(estimates),
        "near_duplicate_correlation": metrics[main].get("near_duplicate_correlation")
        if main
        else None,
        "rejected": _count_rejected(metrics, splits),
        **_describe_calibration(
            {name: metrics[split].get("confidence") for split, name in splits.items()}
        ),
    }


def _describe_calibration(found: Mapping[str, Mapping[str, Any] | None]) -> dict[str, Any]:
    """Gather what the page says of calibration and abstention, by the split's name."""
    fitted = {name: confidence for name, confidence in found.items() if confidence}
    figures = {}
    for name, confidence in fitted.items():
        selective = confidence["selective"]
        curve = selective["curve"]
        figures[name] = plots.draw_risk_coverage(
            list(zip(curve["coverage"], curve["risk"], strict=True)),
            title=f"Risk over coverage, {name}",
            marked=(selective["coverage"], selective["risk"] or 0.0),
        )
    return {"confidence": fitted, "risk_coverage": figures, "reason_words": NO_CLASS_REASONS}


def _build_estimates(evaluation: Mapping[str, Any], place: str) -> list[Estimate]:
    """Build the accuracies that stand side by side: all scans, no twins, and the baseline's."""
    baseline = evaluation.get("baseline_1nn")
    where = f"scans of {place}"
    alone = "scans without a near duplicate in training"
    return [
        _build_estimate("Classifier, all scans", where, evaluation),
        _build_estimate(
            "Classifier, no near duplicate", alone, evaluation.get("without_near_duplicates")
        ),
        _build_estimate("Nearest neighbour, all scans", where, baseline),
        _build_estimate(
            "Nearest neighbour, no near duplicate",
            alone,
            (baseline or {}).get("without_near_duplicates"),
        ),
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
        if (evaluation.get("without_near_duplicates") or {}).get("n"):
            columns[f"{name.capitalize()}, no near duplicate"] = evaluation[
                "without_near_duplicates"
            ]
        if evaluation.get("baseline_1nn"):
            columns[f"{name.capitalize()}, nearest neighbour"] = evaluation["baseline_1nn"]
    return columns


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
        )
    return figures
