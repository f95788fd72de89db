"""The report of a bulk classification run."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from brainray.model.reasons import REASONS
from brainray.reports import plots
from brainray.reports.evaluation import (
    Mistake,
    build_evaluated_split,
    describe_evaluation,
    list_contents,
)
from brainray.reports.page import format_moment, list_settings, render_page, select_sections

_STATUSES = {
    "classified": ("Classified", "The scan was given a class, with its probability."),
    "abstained": ("Abstained", "No class was probable enough to be given."),
    "rejected": (
        "Rejected",
        "The file is not an image that can be read, or is unlike what the classifier knows.",
    ),
}
_STAGES = {
    "read": "fetch their bytes",
    "decode": "turn bytes into pixels",
    "predict": "run the network",
    "write": "store the answers",
}
_CUTS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)  # confidences below which scans are counted


@dataclass(frozen=True, kw_only=True, slots=True)
class UncertainScan:
    """One scan of the gallery of the least certain."""

    scan_uri: str
    """Where the scan came from; may hold anything a file name may."""
    predicted_class: str
    """Name of the most probable class."""
    confidence: float
    """Probability of that class, in [0, 1]."""
    second_class: str
    """Name of the runner-up."""
    second_confidence: float
    """Probability of the runner-up, in [0, 1]."""
    image_png: bytes
    """The scan as an encoded PNG."""
    overlay_png: bytes | None = None
    """The same, and on it where the network saw the predicted class; None if that is not known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """A row of a table that counts scans."""

    name: str
    """What is counted, in words."""
    note: str = ""
    """More of it, in small print."""
    count: int
    """Scans of the whole set."""
    num_new: int = 0
    """Those among them that this run answered."""
    share: float | None
    """Part of what the table is about, in [0, 1]; None if that is nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SeriesAnswer:
    """A row of the table of series and studies."""

    answer: str
    """A class, or `indeterminate`."""
    num_series: int
    num_studies: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """A stage of the run, and how busy it was."""

    name: str
    """What the run calls it."""
    note: str
    """What it does; empty if that is not known."""
    busy_s: float | None
    """Seconds of work, summed over its processes."""
    busy_share: float | None
    """Share of the time its processes had, in [0, 1]."""
    is_busiest: bool
    """No stage has a larger share."""


def render_bulk_report(
    *,
    title: str,
    metrics: dict[str, Any],
    uncertain: Sequence[UncertainScan],
    configuration: dict[str, Any],
    facts: dict[str, str],
    curves: dict[str, Any] | None = None,
    mistakes: Sequence[Mistake] = (),
) -> str:
    """Render the report of a bulk classification run.

    Parameters
    ----------
    title : str
        Heading of the page.
    metrics : dict
        Content of ``metrics.json``: ``classifier_id``, ``classes``, ``runtime``, ``counts`` (of
        all rows of the set), ``run`` (of this run alone), ``confidence_histogram``; ``series`` and
        ``studies``, where slices belong to some; and ``evaluation``, what
        :func:`brainray.metrics.compute_evaluation` returned, where the classes of scans are known.
    uncertain : sequence of UncertainScan
        The least certain scans, in the order in which they are to be shown.
    configuration : dict
        The full configuration; may be nested.
    facts : dict of str to str
        Short labels and values for the header; they replace the page's own of the same label.
    curves : dict, optional
        What :func:`brainray.metrics.compute_curves` returned; shown beside an evaluation only.
    mistakes : sequence of Mistake
        The worst mistakes, in the order in which they are to be shown; shown beside an
        evaluation only.

    Returns
    -------
    str
        A whole HTML document, encodable as UTF-8 whatever the URIs hold.
    """
    classes, run = metrics["classes"], metrics["run"]
    evaluation = metrics.get("evaluation") or {}
    judged = (
        [
            build_evaluated_split(
                "scans of known class", "the scans of known class", evaluation, curves
            )
        ]
        if evaluation.get("n")
        else []
    )
    page: dict[str, Any] = {
        "title": title,
        "facts": _list_facts(metrics) | facts,
        "uncertain": uncertain,
        "tones": {name: i % len(plots.DASHES) for i, name in enumerate(classes)},
        "settings": list_settings({"Runtime": metrics["runtime"], "All settings": configuration}),
        "runtime": metrics["runtime"],
        "run": run,
        "stages": _list_stages(run),
        "progress": _draw_progress(run),
        "series": _list_series_answers(metrics),
        **_count_answers(metrics),
        **_describe_confidence(metrics["confidence_histogram"]),
        **describe_evaluation(
            judged,
            classes=classes,
            columns={part.name.capitalize(): part.evaluation for part in judged},
            mistakes=mistakes,
            splits={},
        ),
    }
    headings = {
        "short": (True, "In short"),
        "answers": (True, "Every scan has one answer"),
        "mix": (any(row.count for row in page["mix"]), "Classes found"),
        "series": (page["series"], "Series and studies"),
        "confidence": (page["histogram"], "Confidence"),
        "throughput": (True, "Throughput"),
        "uncertain": (uncertain, "Least certain scans"),
        "accuracy": (judged, "Accuracy where the class is known"),
        **list_contents(judged),
        "configuration": (page["settings"], "Settings"),
        "reading": (True, "How to read this"),
    }
    page["sections"] = select_sections(headings)
    return render_page("bulk.html.j2", page)


def _list_facts(metrics: Mapping[str, Any]) -> dict[str, str]:
    """List what the header says by itself."""
    facts = {
        "Classifier": metrics["classifier_id"],
        "Runtime": metrics["runtime"].get("description"),  # a run without new scans opens none
        "Started": format_moment(metrics["run"]["started_at"]),
    }
    return {name: value for name, value in facts.items() if value}


def _count_answers(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Count the scans by status, by reason and by class."""
    counts, new = metrics["counts"], metrics["run"]["new_counts"]
    reasons = {code: (sentence, code) for code, sentence in REASONS.items()}
    found = {code: n for code, n in counts["by_reason"].items() if n}
    by_reason = sorted(found, key=lambda code: (-found[code], code))
    classes = dict.fromkeys([*metrics["classes"], *counts["by_class"]])
    return {
        "total": counts["total"],
        "answers": _tally(
            dict.fromkeys([*_STATUSES, *counts["by_status"]]),
            _STATUSES,
            counts["by_status"],
            new["by_status"],
            counts["total"],
        ),
        "reasons": _tally(by_reason, reasons, found, new["by_reason"], counts["total"]),
        "mix": _tally(
            classes, {}, counts["by_class"], new["by_class"], sum(counts["by_class"].values())
        ),
    }


def _list_series_answers(metrics: Mapping[str, Any]) -> list[SeriesAnswer]:
    """Count series and studies by answer: classes first, in class order."""
    found = [metrics.get(name, {}).get("by_answer", {}) for name in ("series", "studies")]
    if not any(found):
        return []
    series, studies = found
    return [
        SeriesAnswer(
            answer=answer,
            num_series=series.get(answer, 0),
            num_studies=studies.get(answer, 0),
        )
        for answer in dict.fromkeys([*metrics["classes"], *series, *studies])
    ]


def _tally(
    codes: Iterable[str],
    words: Mapping[str, tuple[str, str]],
    counts: Mapping[str, int],
    new_counts: Mapping[str, int],
    total: int,
) -> list[Tally]:
    """Build a row for each code; one without words is shown as it is."""
    rows = []
    for code in codes:
        name, note = words.get(code, (code, ""))
        count = counts.get(code, 0)
        rows.append(
            Tally(
                name=name,
                note=note,
                count=count,
                num_new=new_counts.get(code, 0),
                share=count / total if total else None,
            )
        )
    return rows


def _describe_confidence(histogram: Mapping[str, Any]) -> dict[str, Any]:
    """Draw the confidences, and count the scans below some; no figure if no scan has one."""
    edges, counts = histogram["edges"], histogram["counts"]
    total = sum(counts)
    bins = list(zip(edges[:-1], edges[1:], counts, strict=True))
    below = []
    for cut in _CUTS:
        if any(abs(edge - cut) < 1e-6 for edge in edges):
            count = sum(n for _, high, n in bins if high < cut + 1e-6)
            share = count / total if total else None
            below.append(Tally(name=f"below {cut:.2f}", count=count, share=share))
    figure = plots.draw_histogram(
        edges,
        counts,
        title="Number of scans by confidence of the predicted class",
        x_label="confidence of the predicted class",
    )
    return {"histogram": figure if total else None, "bins": bins, "below": below}


def _list_stages(run: Mapping[str, Any]) -> list[Stage]:
    """List the stages in the order of the run's own list."""
    seconds, shares = run["stages_s"], run["stages_busy"]
    highest = max(shares.values(), default=0)
    return [
        Stage(
            name=name,
            note=_STAGES.get(name, ""),
            busy_s=seconds.get(name),
            busy_share=shares.get(name),
            is_busiest=bool(highest) and shares.get(name) == highest,
        )
        for name in dict.fromkeys([*seconds, *shares])
    ]


def _draw_progress(run: Mapping[str, Any]) -> Markup | None:
    """Draw the scans done over time; None if nothing was noted."""
    points = [(seconds, done) for seconds, done in run["timeline"]]
    if not points:
        return None
    return plots.draw_progress(points, title="Scans done over the time of the run")
