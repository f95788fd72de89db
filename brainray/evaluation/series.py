"""Fit the rule of slice evidence to series whose class is known, grouped by patient.

A rule is scored by what it does to series of each class: the share that gets the right class, less
the share that gets a wrong one, averaged over the classes. An indeterminate series counts nothing.
The scores that are reported beside the rule are out of fold: each series is answered by the rule
that fits the series of other patients best.
"""

import csv
import io
import logging
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from sklearn.model_selection import StratifiedGroupKFold

from brainray import storage
from brainray.errors import ConfigError, DataError
from brainray.inference.series import INDETERMINATE, SeriesRule, decide_series, summarise_series
from brainray.inference.store import PREDICTIONS_FOLDER, PredictionStore
from brainray.runlog import Log

logger = logging.getLogger(__name__)

CALIBRATION_SCHEMA_VERSION = 1
THRESHOLDS = tuple(round(0.1 + 0.05 * step, 2) for step in range(17))
TOP_FRACTIONS = (0.05, 0.1, 0.2, 0.4)
MIN_RUNS = (1, 2, 3, 5)
MIN_PATIENTS = 10
"""Patients that each labelled class needs: with fewer, nearly every rule fits."""
LABELLED_BY = ("series", "study", "patient")
"""Columns of the labels that may say what a label is of; the first one found counts."""

_COLUMNS = (
    *("scan_uri", "reason", "classified_at", "frame", "patient", "study", "series"),
    *("sop_instance", "plane", "position_mm", "orientation", "flags"),
)

Answers = NDArray[np.int64]
"""Class of each series, as an index into the class order; -1 where it is indeterminate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrateSeriesJob:
    """One fit: of the rule to what, and where it goes."""

    predictions_uri: str
    """Output folder of `brainray classify --scans-uri`, whose rows have series."""
    labels: str
    """CSV file with the column label, and one of series, study and patient: the hashes that the
    predictions have. A label of a study or patient counts for each of its series."""
    output_uri: str
    """JSON file to write."""
    classifier_id: str | None = None
    """Whose predictions, where the folder has those of several classifiers."""
    rule: SeriesRule = SeriesRule()
    """What the fitted rule is compared with; its min_slices is kept."""
    folds: int = 5
    """Folds of patients."""
    num_resamples: int = 1000
    """Bootstrap resamples of patients."""
    seed: int = 0
    """Seeds folds and resamples."""

    def __post_init__(self) -> None:
        if self.folds < 2:
            raise ConfigError(f"folds must be at least 2, got {self.folds}.")


@dataclass(frozen=True, slots=True)
class LabelledSeries:
    """Series whose class is known, n of them, and what rules need of them."""

    labels: NDArray[np.int64]
    """Index into the class order, shape (n,)."""
    groups: NDArray[np.int64]
    """Patients from 0, shape (n,); where no patient is known, studies, else series."""
    can_answer: NDArray[np.bool_]
    """False for localizers, and for series of too few slices, shape (n,)."""
    evidence: NDArray[np.float64]
    """For each of :data:`TOP_FRACTIONS`, shape (n, F, K)."""
    runs: NDArray[np.int64]
    """For each of :data:`THRESHOLDS`, shape (n, T, K)."""
    answers_before: Answers
    """By the given rule."""


def calibrate_series(job: CalibrateSeriesJob, *, log: Log = logger.info) -> dict[str, Any]:
    """Fit a rule, and write it with its scores before and after.

    Returns
    -------
    dict
        The content of the JSON file: ``rule``, the values of
        :class:`brainray.inference.series.SeriesRule` that fit all series best; ``rule_before``;
        ``before`` and ``after``, what :func:`score_answers` gives of the given rule, and of the
        fitted ones out of fold; ``fold_rules``; ``grid``; and what was counted.

    Raises
    ------
    UserError
        The predictions or labels cannot be used, or are too few.
    """
    store = open_predictions(job)
    classes, rows = store.classes, read_series_rows(store)
    by, labels = read_series_labels(job.labels, classes)
    chosen = [name in labels for name in rows[by].to_pylist()]
    if not any(chosen):
        raise DataError(
            f"None of the {len(labels)} labels in '{job.labels}' names a {by} of the predictions. "
            "Expected the hashes of this output: another key makes others."
        )
    log(f"Putting together {sum(chosen):,} slices.")
    labelled = measure_all(rows.filter(pa.array(chosen)), by, labels, classes, job.rule)
    check_enough(labelled, classes, job)
    rules = list_rules(job.rule)
    answers = np.stack([answer_all(labelled, classes, rule) for rule in rules])
    best = choose_rule(rules, answers, labelled.labels, job.rule)
    after, fold_rules = answer_out_of_fold(rules, answers, labelled, job)
    before = np.array(labelled.answers_before)
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
        "before": score_answers(before, labelled, classes, job),
        "after": score_answers(after, labelled, classes, job),
    }
    storage.write_json(job.output_uri, document)
    return document


# ---- predictions and labels ----------------------------------------------------------------------


def open_predictions(job: CalibrateSeriesJob) -> PredictionStore:
    """Find the predictions of one classifier below a bulk job's output.

    Raises
    ------
    ConfigError
        There are none, or those of several classifiers, or of an older schema.
    """
    folder = storage.join(job.predictions_uri, PREDICTIONS_FOLDER)
    _, folders = storage.list_folder(folder, folder) if storage.is_folder(folder) else ([], [])
    found = [name.rpartition("classifier_id=")[2] for name in folders if "classifier_id=" in name]
    chosen = [name for name in found if job.classifier_id in (None, name)]
    if len(chosen) != 1:
        known = ", ".join(sorted(found)) or "none"
        raise ConfigError(
            f"Expected predictions of one classifier in '{job.predictions_uri}', found {known}. "
            "Give the output folder of `brainray classify --scans-uri`, and --classifier-id where "
            "it has several."
        )
    store = PredictionStore(output_uri=job.predictions_uri, classifier_id=chosen[0], classes=())
    return _read_classes(store)


def _read_classes(store: PredictionStore) -> PredictionStore:
    """Return the same predictions, with their classes."""
    for uri in store.list_files():
        filesystem, path = storage.resolve(uri)
        names = pq.read_schema(path, filesystem=filesystem).names
        if not {"series", "patient"} <= set(names):
            raise ConfigError(
                f"The predictions in '{store.output_uri}' have no column series: an earlier "
                "version wrote them. Classify again into another output."
            )
        return replace(store, classes=tuple(n[5:] for n in names if n.startswith("prob_")))
    raise ConfigError(f"No predictions in '{store.output_uri}'. Classify scans first.")


def read_series_rows(store: PredictionStore) -> pa.Table:
    """Read the slices that are of a series, each once: the answer that was given last.

    Raises
    ------
    DataError
        There are none.
    """
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


def read_series_labels(labels_uri: str, classes: Sequence[str]) -> tuple[str, dict[str, int]]:
    """Read the classes of series, studies or patients.

    Returns
    -------
    by : str
        Which of :data:`LABELLED_BY` is labelled.
    labels : dict of str to int
        Hash to index into the class order.

    Raises
    ------
    DataError
        A column is missing, a class is unknown, or one hash has two labels.
    """
    try:
        text = storage.read_bytes(labels_uri).decode("utf-8-sig")
    except FileNotFoundError:
        raise DataError(f"No labels at '{labels_uri}'. Check --labels.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"Expected UTF-8 text in '{labels_uri}': {error}") from error
    reader = csv.DictReader(io.StringIO(text, newline=""))
    names = reader.fieldnames or ()
    by = next((name for name in LABELLED_BY if name in names), None)
    if by is None or "label" not in names:
        raise DataError(
            f"Expected the column label and one of {', '.join(LABELLED_BY)} in '{labels_uri}', "
            f"found {', '.join(names) or 'none'}."
        )
    labels: dict[str, int] = {}
    for number, row in enumerate(reader, 2):
        if row["label"] not in classes:
            raise DataError(
                f"Unknown class '{row['label']}' in line {number} of '{labels_uri}'. "
                f"Expected one of {', '.join(classes)}."
            )
        label = classes.index(row["label"])
        if labels.setdefault(row[by], label) != label:
            raise DataError(
                f"Line {number} of '{labels_uri}' gives a {by} another label than a line before. "
                "Give each one label."
            )
    return by, labels


# ---- what rules need of series -------------------------------------------------------------------


def measure_all(
    rows: pa.Table,
    by: str,
    labels: dict[str, int],
    classes: Sequence[str],
    rule: SeriesRule,
) -> LabelledSeries:
    """Put the slices of each series together, once for each threshold of the grid.

    Parameters
    ----------
    rows : Table
        Slices whose column ``by`` is among the labels.
    rule : SeriesRule
        Gives ``min_slices``.
    """
    rows = rows.sort_by("series")
    names = np.array(rows["series"].to_pylist(), dtype=object)
    starts = np.flatnonzero(np.append(True, names[1:] != names[:-1])).tolist()
    ends = [*starts[1:], rows.num_rows]
    measured, classes_of, patients, can_answer, before = [], [], [], [], []
    for start, end in zip(starts, ends, strict=True):
        slices = rows.slice(start, end - start).to_pylist()
        first = slices[0]
        summary = summarise_series(slices, classes, rule)
        measured.append(_measure(slices, classes, rule))
        classes_of.append(labels[first[by]])
        patients.append(first["patient"] or first["study"] or first["series"])
        can_answer.append(summary["reason"] not in ("localizer", "too_few_slices"))
        before.append(_find_class(summary["answer"], classes))
    return LabelledSeries(
        labels=np.array(classes_of, np.int64),
        groups=np.unique(patients, return_inverse=True)[1].astype(np.int64),
        can_answer=np.array(can_answer),
        evidence=np.stack([evidence for evidence, _ in measured]),
        runs=np.stack([runs for _, runs in measured]),
        answers_before=np.array(before, np.int64),
    )


def _measure(
    slices: Sequence[dict[str, Any]], classes: Sequence[str], rule: SeriesRule
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Return a series' evidence, (F, K), and longest runs, (T, K).

    Evidence depends on the fraction alone and runs on the threshold alone, so that both grids are
    walked at once.
    """
    evidence = np.zeros((len(TOP_FRACTIONS), len(classes)))
    runs = np.zeros((len(THRESHOLDS), len(classes)), np.int64)
    for number, threshold in enumerate(THRESHOLDS):
        place = number % len(TOP_FRACTIONS)
        changed = replace(rule, threshold=threshold, top_fraction=TOP_FRACTIONS[place])
        summary = summarise_series(slices, classes, changed)
        evidence[place] = [summary["evidence"][name] for name in classes]
        runs[number] = [summary["longest_run"][name] for name in classes]
    return evidence, runs


def _find_class(answer: str, classes: Sequence[str]) -> int:
    return -1 if answer == INDETERMINATE else list(classes).index(answer)


def check_enough(labelled: LabelledSeries, classes: Sequence[str], job: CalibrateSeriesJob) -> None:
    """Refuse to fit a rule to a few patients.

    Raises
    ------
    DataError
        One class alone is labelled, or one has too few patients.
    """
    needed = max(MIN_PATIENTS, job.folds)
    present = np.unique(labelled.labels)
    counts = {
        classes[label]: len(np.unique(labelled.groups[labelled.labels == label]))
        for label in present
    }
    if len(counts) < 2 or min(counts.values()) < needed:
        found = ", ".join(f"{count} of {name}" for name, count in counts.items())
        raise DataError(
            f"Expected labelled series of at least two classes and {needed} patients of each, "
            f"found patients: {found}. Label more series."
        )


# ---- rules ---------------------------------------------------------------------------------------


def list_rules(rule: SeriesRule) -> list[SeriesRule]:
    """Return the rules that are tried: all combinations of the grid."""
    return [
        replace(rule, threshold=threshold, top_fraction=top_fraction, min_run=min_run)
        for threshold, top_fraction, min_run in product(THRESHOLDS, TOP_FRACTIONS, MIN_RUNS)
    ]


def answer_all(labelled: LabelledSeries, classes: Sequence[str], rule: SeriesRule) -> Answers:
    """Answer every series by a rule of the grid, shape (n,)."""
    evidence = labelled.evidence[:, TOP_FRACTIONS.index(rule.top_fraction)]
    runs = labelled.runs[:, THRESHOLDS.index(rule.threshold)].tolist()
    answers = np.full(len(runs), -1)
    for place in np.flatnonzero(labelled.can_answer):
        answer, _ = decide_series(evidence[place], runs[place], rule.min_slices, classes, rule)
        answers[place] = _find_class(answer, classes)
    return answers


def choose_rule(
    rules: Sequence[SeriesRule], answers: Answers, labels: NDArray[np.int64], before: SeriesRule
) -> int:
    """Return which rule has the best score; of equals, the one nearest to the rule before.

    Parameters
    ----------
    rules : sequence of SeriesRule, length R
    answers : ndarray of int64, shape (R, n)
    labels : ndarray of int64, shape (n,)
    before : SeriesRule
    """

    def measure_change(rule: SeriesRule) -> float:
        return (
            abs(rule.threshold - before.threshold) / (THRESHOLDS[1] - THRESHOLDS[0])
            + abs(math.log2(rule.top_fraction / before.top_fraction))
            + abs(rule.min_run - before.min_run)
        )

    scores = np.round(_compute_scores(answers, labels), 9)
    best: list[int] = np.flatnonzero(scores == scores.max()).tolist()
    return min(best, key=lambda place: measure_change(rules[place]))


def _compute_scores(answers: Answers, labels: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return each rule's share of right less wrong answers, averaged over classes, shape (R,)."""
    gains = np.where(answers == labels, 1.0, np.where(answers < 0, 0.0, -1.0))
    per_class = [gains[:, labels == label].mean(axis=1) for label in np.unique(labels)]
    scores: NDArray[np.float64] = np.mean(per_class, axis=0)
    return scores


def answer_out_of_fold(
    rules: Sequence[SeriesRule],
    answers: Answers,
    labelled: LabelledSeries,
    job: CalibrateSeriesJob,
) -> tuple[Answers, list[int]]:
    """Answer each series by the rule that fits the series of other patients best.

    Parameters
    ----------
    answers : ndarray of int64, shape (R, n)
        Of each rule.

    Returns
    -------
    answers : ndarray of int64, shape (n,)
    chosen : list of int
        Number of the rule of each fold.
    """
    folds = StratifiedGroupKFold(n_splits=job.folds, shuffle=True, random_state=job.seed)
    labels = labelled.labels
    out_of_fold, chosen = np.full(len(labels), -1), []
    for others, fold in folds.split(labels, labels, labelled.groups):
        best = choose_rule(rules, answers[:, others], labels[others], job.rule)
        out_of_fold[fold] = answers[best, fold]
        chosen.append(best)
    return out_of_fold, chosen


# ---- scores --------------------------------------------------------------------------------------


def score_answers(
    answers: Answers, labelled: LabelledSeries, classes: Sequence[str], job: CalibrateSeriesJob
) -> dict[str, Any]:
    """Score answers, with 95 % intervals over patients.

    Returns
    -------
    dict
        ``score``, ``indeterminate`` (a share of all series), and ``per_class``: for each class
        ``num_series``, ``sensitivity`` (share of its series that get it) and ``specificity`` (share
        of the others that do not), None where there are no such series; each with ``_ci95``, the
        percentiles of resamples of whole patients.
    """
    rng = np.random.default_rng(job.seed)
    num_groups = int(labelled.groups.max()) + 1
    draws = rng.multinomial(num_groups, np.full(num_groups, 1 / num_groups), job.num_resamples)
    weights = np.vstack([np.ones(len(answers)), draws[:, labelled.groups]])
    labels = labelled.labels

    def share(holds: NDArray[np.bool_], among: NDArray[np.bool_]) -> NDArray[np.float64]:
        with np.errstate(invalid="ignore"):
            shares: NDArray[np.float64] = (weights @ (holds & among)) / (weights @ among)
        return shares

    right, wrong = answers == labels, (answers >= 0) & (answers != labels)
    nets = [
        share(right, labels == label) - share(wrong, labels == label) for label in np.unique(labels)
    ]
    everything = np.ones(len(labels), np.bool_)
    return {
        **_describe("score", np.mean(nets, axis=0)),
        **_describe("indeterminate", share(answers < 0, everything)),
        "per_class": {
            name: {
                "num_series": int((labels == label).sum()),
                **_describe("sensitivity", share(answers == label, labels == label)),
                **_describe("specificity", share(answers != label, labels != label)),
            }
            for label, name in enumerate(classes)
        },
    }


def _describe(name: str, values: NDArray[np.float64]) -> dict[str, Any]:
    """Return a score and its interval; ``values`` begins with the score of the data as they are."""
    if np.isnan(values[0]):
        return {name: None, f"{name}_ci95": None}
    drawn = values[1:][~np.isnan(values[1:])]
    interval = np.percentile(drawn, [2.5, 97.5]).tolist() if len(drawn) else None
    return {name: float(values[0]), f"{name}_ci95": interval}
