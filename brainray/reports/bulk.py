"""The report of a bulk classification run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from brainray.model.reasons import REASONS
from brainray.reports import charts
from brainray.reports.evaluation import Mistake, describe_part
from brainray.reports.html import render_page

_CUTS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # confidences below which scans are counted


@dataclass(frozen=True, kw_only=True, slots=True)
class UncertainScan:
    """A scan of the gallery of the least certain."""

    scan_uri: str
    """Any characters are shown safely."""
    predicted_class: str
    confidence: float
    """Probability of the predicted class, in [0, 1]."""
    second_class: str
    """The second most probable class."""
    second_confidence: float
    image_png: bytes
    """The scan as an encoded PNG."""
    overlay_png: bytes | None = None
    """The scan with its class activation map, as an encoded PNG."""


def render_bulk_report(
    *,
    title: str,
    metrics: Mapping[str, Any],
    uncertain: Sequence[UncertainScan],
    configuration: Mapping[str, Any],
    facts: Mapping[str, str],
    curves: Mapping[str, Any] | None = None,
    mistakes: Sequence[Mistake] = (),
) -> str:
    """Render the report of a bulk classification run as HTML.

    Parameters
    ----------
    metrics : mapping
        Content of ``metrics.json``: ``classifier_id``, ``classes``, ``runtime``, ``counts`` (of
        all rows of the output), ``run`` (of this run alone), ``confidence_histogram``; ``series``
        and ``studies``, where slices belong to some; and ``evaluation``, what
        :func:`brainray.metrics.compute_evaluation` returned, where labels are known.
    uncertain, mistakes : sequence
        In the order to show them; mistakes are shown beside an evaluation only.
    facts : mapping of str to str
        Short labels and values for the header.
    curves : mapping, optional
        What :func:`brainray.metrics.compute_curves` returned; shown beside an evaluation only.
    """
    classes, run = metrics["classes"], metrics["run"]
    evaluation, histogram = metrics.get("evaluation") or {}, metrics["confidence_histogram"]
    name = "scans of known class"
    parts = [describe_part(name, f"the {name}", evaluation, curves)] if evaluation.get("n") else []
    return render_page(
        "bulk.html.j2",
        title=title,
        facts={
            "Classifier": metrics["classifier_id"],
            "Runtime": metrics["runtime"].get("description"),
            "Started": _format_time(run["started_at"]),
            **facts,
        },
        finished_at=_format_time(run["finished_at"]),
        metrics=metrics,
        classes=classes,
        reasons=REASONS,
        uncertain=uncertain,
        tones={name: f"c{i % len(charts.DASHES)}" for i, name in enumerate(classes)},
        histogram=charts.draw_histogram(
            histogram["edges"],
            histogram["counts"],
            title="Number of scans by confidence of the predicted class",
            x_label="confidence of the predicted class",
        ),
        below=_count_below(histogram),
        progress=run["timeline"]
        and charts.draw_progress(run["timeline"], title="Scans done over time"),
        parts=parts,
        columns={part["name"].capitalize(): part["evaluation"] for part in parts},
        mistakes=mistakes,
        configuration=configuration,
    )


def _format_time(moment: str) -> str:
    """Cut an ISO 8601 time in UTC, as the run writes it, to seconds."""
    return f"{moment[:19].replace('T', ' ')} UTC"


def _count_below(histogram: Mapping[str, Any]) -> dict[float, int]:
    """Count the scans below each confidence that is an edge of the histogram."""
    uppers = histogram["edges"][1:]
    return {
        cut: sum(
            n for high, n in zip(uppers, histogram["counts"], strict=True) if high < cut + 1e-6
        )
        for cut in _CUTS
        if any(abs(high - cut) < 1e-6 for high in uppers)
    }
