"""Fit the rule of slice evidence to labelled series, in folds of patients.

The score of a rule is the share of series that get the right class, minus the share that get a
wrong one, averaged over the classes; an indeterminate series counts 0. The reported scores are out
of fold: each series is answered by the rule that is best for the series of other patients.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise, product
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from brainray.errors import ConfigError, DataError
from brainray.evaluation.rows import list_classes
from brainray.inference.labels import read_label_table
from brainray.inference.series import INDETERMINATE, SeriesRule, decide_series, summarise_series
from brainray.inference.store import PREDICTIONS_FOLDER, PredictionStore
from brainray.io import storage
from brainray.metrics.scores import describe_score, resample
from brainray.runlog import Log

logger = logging.getLogger(__name__)

CALIBRATION_SCHEMA_VERSION = 1
THRESHOLDS = tuple(round(0.1 + 0.05 * step, 2) for step in range(17))
TOP_FRACTIONS = (0.05, 0.1, 0.2, 0.4)
MIN_RUNS = (1, 2, 3, 5)
MIN_PATIENTS = 10
"""Patients that each labelled class needs: with fewer, nearly every rule fits."""
LABELLED_BY = ("series", "study", "patient")
"""Columns of the label table that may identify what is labelled; the first that exists is used."""

_COLUMNS = (
    *("scan_uri", "reason", "classified_at", "frame", "patient", "study", "series"),
    *("sop_instance", "plane", "position_mm", "orientation", "flags"),
)

Answers = NDArray[np.int64]
"""Class of each series, as an index into the class order; -1 if it is indeterminate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrateSeriesJob:
    """The predictions, their labels, and the output."""

    predictions_uri: str
    """Output folder of `brainray classify --scans-uri`, whose rows have series."""
    labels: str
    """CSV file with the column label, and one of series, study and patient: the hashes that the
    predictions have. A label of a study or patient counts for each of its series."""
    output_uri: str
    """JSON file to write."""
    classifier_id: str | None = None
    """Classifier to use, if the folder has predictions of several."""
    rule: SeriesRule = SeriesRule()
    """Rule to compare the fitted rule with; its min_slices is kept."""
    folds: int = 5
    """Folds of patients."""
    num_resamples: int = 1000
    """Bootstrap resamples of patients."""
    seed: int = 0
    """Seed of folds and resamples."""

    def __post_init__(self) -> None:
        for name, least in (("folds", 2), ("num_resamples", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be at least {least}, got {getattr(self, name)}.")


@dataclass(frozen=True, slots=True)
class LabelledSeries:
    """The labelled series, n of them, and what the rules of the grid need of them."""

    labels: NDArray[np.int64]
    """Index into the class order, shape (n,)."""
    groups: NDArray[np.int64]
    """Patients from 0, shape (n,); without a known patient, studies, else series."""
    can_answer: NDArray[np.bool_]
    """False for localizers, and for series of too few slices, shape (n,)."""
    evidence: NDArray[np.float64]
    """For each of :data:`TOP_FRACTIONS`, shape (n, F, K)."""
    runs: NDArray[np.int64]
    """Longest runs for each of :data:`THRESHOLDS`, shape (n, T, K)."""
    answers_before: Answers
    """By the job's rule."""


def calibrate_series(job: CalibrateSeriesJob, *, log: Log = logger.info) -> dict[str, Any]:
    """Fit a rule, and write it with its scores before and after.

    Returns
    -------
    dict
        The content of the JSON file: ``rule``, the
        :class:`brainray.inference.series.SeriesRule` that is best for all series; ``rule_before``;
        ``before`` and ``after``, the scores of the job's rule, and out of fold of the fitted rules:
        ``score``, ``indeterminate`` (a share of all series), and ``per_class`` ``num_series``,
        ``sensitivity`` and ``specificity``, with 95 % intervals; ``fold_rules``; ``grid``; counts.

    Raises
    ------
    UserError
        The predictions or labels cannot be used, or are too few.
    """
    store = _open_predictions(job)
    classes, rows = store.classes, _read_series_rows(store)
    by, names = read_label_table(job.labels, LABELLED_BY, classes)
    chosen = [name in names for name in rows[by].to_pylist()]
    if not any(chosen):
        raise DataError(
            f"None of the {len(names)} labels in '{job.labels}' names a {by} of the predictions. "
            "Expected the hashes of this output: another key makes others."
        )
    log(f"Combining {sum(chosen):,} slices.")
    labels = {key: classes.index(name) for key, name in names.items()}
    labelled = _measure_series(rows.filter(pa.array(chosen)), by, labels, classes, job.rule)
    _check_enough(labelled, classes, job)
    rules = [
        replace(job.rule, threshold=threshold, top_fraction=top_fraction, min_run=min_run)
        for threshold, top_fraction, min_run in product(THRESHOLDS, TOP_FRACTIONS, MIN_RUNS)
    ]
    answers = np.stack([_answer_all(labelled, classes, rule) for rule in rules])
    best = _choose_rule(rules, answers, labelled.labels, job.rule)
    after, fold_rules = _answer_out_of_fold(rules, answers, labelled, job)
    document = {
        "schema_version": CALIBRATION_SCHEMA_VERSION,
        "classifier_id": store.classifier_id,
        "classes": list(classes),
        "labelled_by": by,
        "num_labels": len(labels),
        "num_series": len(labelled.labels),
        "num_patients": len(np.unique(labelled.groups)),
        "grid": {
            "threshold": list(THRESHOLDS),
            "top_fraction": list(TOP_FRACTIONS),
            "min_run": list(MIN_RUNS),
        },
        "rule_before": asdict(job.rule),
        "rule": asdict(rules[best]),
        "fold_rules": [asdict(rules[one]) for one in fold_rules],
        "before": _score_answers(labelled.answers_before, labelled, classes, job),
        "after": _score_answers(after, labelled, classes, job),
    }
    storage.write_json(job.output_uri, document)
    return document


def _open_predictions(job: CalibrateSeriesJob) -> PredictionStore:
    """Find the predictions of one classifier below a bulk job's output."""
    folder = storage.join(job.predictions_uri, PREDICTIONS_FOLDER)
    _, folders = storage.list_folder(folder, folder) if storage.is_folder(folder) else ([], [])
    found = [name.rpartition("classifier_id=")[2] for name in folders if "classifier_id=" in name]
    chosen = [name for name in found if job.classifier_id in (None, name)]
    if len(chosen) != 1:
        known = ", ".join(sorted(found)) or "none"
        raise ConfigError(
            f"Expected predictions of one classifier in '{job.predictions_uri}', found {known}. "
            "Give the output folder of `brainray classify --scans-uri`, and --classifier-id if "
            "it has several."
        )
    store = PredictionStore(output_uri=job.predictions_uri, classifier_id=chosen[0], classes=())
    files = store.list_files()
    if not files:
        raise ConfigError(f"No predictions in '{store.output_uri}'. Classify scans first.")
    filesystem, path = storage.resolve(files[0])
    names = pq.read_schema(path, filesystem=filesystem).names
    if not {"series", "patient"} <= set(names):
        raise ConfigError(
            f"The predictions in '{store.output_uri}' have no column series: an earlier "
            "version wrote them. Classify again into another output."
        )
    return replace(store, classes=list_classes(names))


def _read_series_rows(store: PredictionStore) -> pa.Table:
    """Read the slices that belong to a series; of a slice with several predictions, the last."""
    columns = [*_COLUMNS, *(f"prob_{name}" for name in store.classes)]
    tables = [store.read(uri, columns) for uri in store.list_files()]
    rows = pa.concat_tables([table.filter(pc.field("series").is_valid()) for table in tables])
    if not rows.num_rows:
        raise DataError(
            f"No slice of a series in '{store.output_uri}'. Classify DICOM files or NIfTI volumes "
            "first; pictures are of no series."
        )
    rows = rows.sort_by("classified_at")
    last = {uri: row for row, uri in enumerate(rows["scan_uri"].to_pylist())}
    return rows.take(pa.array(last.values()))


def _measure_series(
    rows: pa.Table, by: str, labels: dict[str, int], classes: Sequence[str], rule: SeriesRule
) -> LabelledSeries:
    """Summarise the slices of each series, whose column ``by`` is labelled, for the whole grid."""
    rows = rows.sort_by("series")
    names = np.array(rows["series"].to_pylist(), dtype=object)
    bounds = [*np.flatnonzero(np.append(True, names[1:] != names[:-1])).tolist(), rows.num_rows]
    series = []
    for start, end in pairwise(bounds):
        slices = rows.slice(start, end - start).to_pylist()
        first = slices[0]
        summary = summarise_series(slices, classes, rule)
        evidence, runs = _measure(slices, classes, rule)
        patient = first["patient"] or first["study"] or first["series"]
        can_answer = summary["reason"] not in ("localizer", "too_few_slices")
        before = _find_class(summary["answer"], classes)
        series.append((labels[first[by]], patient, can_answer, evidence, runs, before))
    labels_of, patients, *others = zip(*series, strict=True)
    groups = np.unique(patients, return_inverse=True)[1]
    return LabelledSeries(np.array(labels_of), groups, *map(np.array, others))


def _measure(
    slices: Sequence[dict[str, Any]], classes: Sequence[str], rule: SeriesRule
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return a series' evidence, (F, K), and longest runs, (T, K).

    Evidence depends on the fraction alone and runs on the threshold alone, so one pass over the
    thresholds covers both grids.
    """
    evidence = np.zeros((len(TOP_FRACTIONS), len(classes)))
    runs = np.zeros((len(THRESHOLDS), len(classes)), np.int64)
    for number, threshold in enumerate(THRESHOLDS):
        fraction = number % len(TOP_FRACTIONS)
        changed = replace(rule, threshold=threshold, top_fraction=TOP_FRACTIONS[fraction])
        summary = summarise_series(slices, classes, changed)
        evidence[fraction] = [summary["evidence"][name] for name in classes]
        runs[number] = [summary["longest_run"][name] for name in classes]
    return evidence, runs


def _find_class(answer: str, classes: Sequence[str]) -> int:
    return -1 if answer == INDETERMINATE else list(classes).index(answer)


def _check_enough(
    labelled: LabelledSeries, classes: Sequence[str], job: CalibrateSeriesJob
) -> None:
    """Raise a DataError unless two classes are labelled, each with enough patients."""
    needed = max(MIN_PATIENTS, job.folds)
    counts = {
        classes[label]: len(np.unique(labelled.groups[labelled.labels == label]))
        for label in np.unique(labelled.labels)
    }
    if len(counts) < 2 or min(counts.values()) < needed:
        found = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise DataError(
            f"Expected labelled series of at least two classes and {needed} patients of each, "
            f"found patients: {found}. Label more series."
        )


def _answer_all(labelled: LabelledSeries, classes: Sequence[str], rule: SeriesRule) -> Answers:
    """Answer every series by a rule of the grid, shape (n,)."""
    evidence = labelled.evidence[:, TOP_FRACTIONS.index(rule.top_fraction)]
    runs = labelled.runs[:, THRESHOLDS.index(rule.threshold)].tolist()
    answers = np.full(len(runs), -1)
    for row in np.flatnonzero(labelled.can_answer):
        answer, _ = decide_series(evidence[row], runs[row], rule.min_slices, classes, rule)
        answers[row] = _find_class(answer, classes)
    return answers


def _choose_rule(
    rules: Sequence[SeriesRule], answers: Answers, labels: NDArray[np.int64], before: SeriesRule
) -> int:
    """Return the number of the rule with the best score; of equals, the nearest to ``before``.

    ``answers`` has shape (R, n), a row for each rule, and ``labels`` has shape (n,).
    """

    def measure_change(rule: SeriesRule) -> float:
        return (
            abs(rule.threshold - before.threshold) / (THRESHOLDS[1] - THRESHOLDS[0])
            + abs(math.log2(rule.top_fraction / before.top_fraction))
            + abs(rule.min_run - before.min_run)
        )

    gains = np.where(answers == labels, 1.0, np.where(answers < 0, 0.0, -1.0))
    per_class = [gains[:, labels == label].mean(axis=1) for label in np.unique(labels)]
    scores = np.round(np.mean(per_class, axis=0), 9)
    best: list[int] = np.flatnonzero(scores == scores.max()).tolist()
    return min(best, key=lambda number: measure_change(rules[number]))


def _answer_out_of_fold(
    rules: Sequence[SeriesRule],
    answers: Answers,
    labelled: LabelledSeries,
    job: CalibrateSeriesJob,
) -> tuple[Answers, list[int]]:
    """Answer each series by the rule that is best for the series of other patients.

    ``answers`` has shape (R, n), a row for each rule. Return answers, shape (n,), and the number
    of the rule of each fold.
    """
    folds = StratifiedGroupKFold(n_splits=job.folds, shuffle=True, random_state=job.seed)
    labels = labelled.labels
    out_of_fold, chosen = np.full(len(labels), -1), []
    for others, fold in folds.split(labels, labels, labelled.groups):
        best = _choose_rule(rules, answers[:, others], labels[others], job.rule)
        out_of_fold[fold] = answers[best, fold]
        chosen.append(best)
    return out_of_fold, chosen


def _score_answers(
    answers: Answers, labelled: LabelledSeries, classes: Sequence[str], job: CalibrateSeriesJob
) -> dict[str, Any]:
    """Score answers, with 95 % intervals of a bootstrap over patients.

    For each class, the sensitivity is the share of its series that get it, and the specificity the
    share of other series that do not; None without such series.
    """
    labels = labelled.labels
    is_class = np.eye(len(classes))[labels]  # (n, K)
    gets_class = np.eye(len(classes) + 1)[answers][:, :-1]  # (n, K); -1 is the last column
    present = np.unique(labels)

    def score(weights: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
        with np.errstate(invalid="ignore"):
            sensitivity = (weights @ (gets_class * is_class)) / (weights @ is_class)
            specificity = (weights @ ((1 - gets_class) * (1 - is_class))) / (
                weights @ (1 - is_class)
            )
            answered = (weights @ (is_class * (answers >= 0)[:, None])) / (weights @ is_class)
        return {
            # right - wrong = right - (answered - right)
            "score": (2 * sensitivity - answered)[:, present].mean(axis=1),
            "indeterminate": (weights @ (answers < 0)) / weights.sum(axis=1),
            "sensitivity": sensitivity,
            "specificity": specificity,
        }

    scores = resample(score, labelled.groups, job.num_resamples, job.seed)
    return {
        **describe_score("score", scores["score"]),
        **describe_score("indeterminate", scores["indeterminate"]),
        "per_class": {
            name: {
                "num_series": int((labels == label).sum()),
                **describe_score("sensitivity", scores["sensitivity"][:, label]),
                **describe_score("specificity", scores["specificity"][:, label]),
            }
            for label, name in enumerate(classes)
        },
    }
