"""Judging a classifier on scans whose class is known: predictions, metrics, report."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from brainray import storage
from brainray.data.near_duplicates import NEAR_DUPLICATE_CORRELATION
from brainray.errors import RejectedImage
from brainray.evaluation.modelcard import write_model_card
from brainray.evaluation.prepared import PreparedData
from brainray.evaluation.rows import add_labels, find_mistakes
from brainray.images.preprocess import Preprocessing
from brainray.inference.engine import EngineOptions
from brainray.inference.gallery import draw_scan
from brainray.inference.predict import PredictStage, plan_pool
from brainray.inference.samples import predict_samples
from brainray.inference.schema import stack_lists
from brainray.metrics import (
    compute_accuracy,
    compute_curves,
    compute_evaluation,
    compute_risk_coverage,
)
from brainray.model.calibration import Calibration
from brainray.model.classifier import (
    amend_classifier_metadata,
    read_calibration,
    read_classifier_metadata,
)
from brainray.provenance import describe_versions, read_code_revision
from brainray.reports.report import Mistake, render_report
from brainray.runlog import Log

NUM_MISTAKES_SHOWN = 24
METRICS_FILE = "metrics.json"
METRICS_SCHEMA_VERSION = 2
"""2 added ``runtime``: what computed the predictions."""


def evaluate_split(
    data: PreparedData,
    indices: NDArray[np.int64],
    probs: NDArray[np.float32],
    classes: Sequence[str],
) -> dict[str, Any]:
    """Compute a split's metrics, with what they must be read beside.

    Returns
    -------
    dict
        What :func:`brainray.metrics.compute_evaluation` gives; ``without_near_duplicates``, the same over
        images without a near duplicate in training; and ``baseline_1nn``, the answers of the
        nearest training thumbnail. The last two are absent where the training images are
        not known.
    """
    rows = data.manifest.take(pa.array(indices))
    labels, groups = data.labels[indices], rows["group"].to_numpy()
    metrics = compute_evaluation(labels, probs, classes, groups=groups)
    correlation = rows["nearest_correlation"].to_numpy(zero_copy_only=False)
    if np.isnan(correlation.astype(np.float64)).any():
        return metrics
    nearest = np.array([classes.index(name) for name in rows["nearest_label"].to_pylist()])
    apart = correlation < NEAR_DUPLICATE_CORRELATION
    metrics["near_duplicate_correlation"] = NEAR_DUPLICATE_CORRELATION
    metrics["without_near_duplicates"] = _evaluate_part(labels, probs, classes, groups, apart)
    metrics["baseline_1nn"] = compute_accuracy(labels, nearest, groups=groups)
    metrics["baseline_1nn"]["without_near_duplicates"] = (
        compute_accuracy(labels[apart], nearest[apart], groups=groups[apart])
        if apart.any()
        else {"n": 0}
    )
    return metrics


def _evaluate_part(
    labels: NDArray[np.int64],
    probs: NDArray[np.float32],
    classes: Sequence[str],
    groups: NDArray[np.int64],
    part: NDArray[np.bool_],
) -> dict[str, Any]:
    if not part.any():
        return {"n": 0}
    return compute_evaluation(labels[part], probs[part], classes, groups=groups[part])


def evaluate_calibration(
    labels: NDArray[np.int64],
    logits: NDArray[np.float32],
    reasons: Sequence[str | None],
    calibration: Calibration,
    classes: Sequence[str],
) -> dict[str, Any]:
    """Judge what a classifier says of its own answers.

    Returns
    -------
    dict
        ``calibration``: log loss, Brier score and calibration error ``before`` (of the plain
        softmax) and ``after``; ``selective``: what
        :func:`brainray.metrics.compute_risk_coverage` gives at the sealed threshold;
        ``by_reason``: how many images any door would give no class.
    """
    plain, probs = (
        Calibration.identity(len(classes)).calibrate(logits),
        calibration.calibrate(logits),
    )
    scores = {
        name: compute_evaluation(labels, values, classes, num_resamples=0)
        for name, values in (("before", plain), ("after", probs))
    }
    without_class = [reason for reason in reasons if reason]
    return {
        "calibration": {
            "method": calibration.facts.get("method", "none"),
            **{
                name: {score: found[score] for score in ("log_loss", "brier", "ece")}
                for name, found in scores.items()
            },
        },
        "selective": compute_risk_coverage(
            labels, probs, classes, min_confidence=calibration.min_confidence
        ),
        "by_reason": {reason: without_class.count(reason) for reason in sorted(set(without_class))},
    }


def add_class_maps(
    rows: pa.Table,
    stage: PredictStage,
    data: PreparedData,
    indices: NDArray[np.int64],
) -> pa.Table:
    """Fill the column ``class_map`` of an evaluation table for the mistakes that reports show.

    Parameters
    ----------
    stage : PredictStage
        What predicted the rows.
    indices : ndarray of int64, shape (n,)
        Sample numbers of the rows.
    """
    worst = find_mistakes(rows, stage.classes, NUM_MISTAKES_SHOWN)
    if not len(worst):
        return rows
    explain = replace(stage, outputs=("class_maps",), pool=replace(stage.pool, num_engines=1))
    try:
        explained, _ = predict_samples(explain, data.store, data.scans, indices[worst])
    except RejectedImage:  # vanished since it was predicted
        return rows
    class_maps: list[list[float] | None] = [None] * len(rows)
    for row, class_map in zip(worst, explained["class_map"].to_pylist(), strict=True):
        class_maps[row] = class_map
    field = rows.schema.field("class_map")
    column = rows.schema.get_field_index("class_map")
    return rows.set_column(column, field, pa.array(class_maps, field.type))


def collect_mistakes(
    data: PreparedData,
    rows: pa.Table,
    split: str,
    classes: Sequence[str],
    preprocessing: Preprocessing,
) -> list[Mistake]:
    """Draw the most confident mistakes of an evaluation table, and their class maps."""
    numbers = {path: number for number, path in enumerate(data.manifest["path"].to_pylist())}
    mistakes = []
    for row in rows.take(find_mistakes(rows, classes, NUM_MISTAKES_SHOWN)).to_pylist():
        try:
            ((file, index),) = data.store.open_slices([numbers[row["path"]]])
            image_png, overlay_png = draw_scan(file, index, row["class_map"], preprocessing)
        except RejectedImage:  # vanished since it was predicted
            continue
        top = int(np.argmax(row["probs"]))
        mistakes.append(
            Mistake(
                path=row["path"],
                true_class=row["true_class"],
                predicted_class=classes[top],
                confidence=row["probs"][top],
                image_png=image_png,
                overlay_png=overlay_png,
                split=split,
            )
        )
    return mistakes


def evaluate_and_report(
    data: PreparedData,
    *,
    output_uri: str,
    classifier_uri: str,
    splits: Sequence[str],
    engine: EngineOptions,
    title: str,
    configuration: dict[str, Any],
    facts: dict[str, str],
    log: Log,
    training: dict[str, Any] | None = None,
    records: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Predict, judge, and write predictions, report and metrics, in this order.

    Parameters
    ----------
    splits : sequence of str
        Splits to judge, the most telling last; the report's pictures are of that one.
    engine : EngineOptions
        What predicts.
    title, configuration, facts, training, records
        For the report; ``training`` goes into the metrics too.

    Returns
    -------
    dict
        The content of metrics.json, whose presence says that all is done.
    """
    metadata = read_classifier_metadata(classifier_uri)
    classes = tuple(metadata["classes"])
    calibration = read_calibration(metadata, classifier_uri)
    members = {split: data.select(split) for split in splits if len(data.select(split))}
    log("Predicting " + " and ".join(f"{len(m):,} {s} images" for s, m in members.items()) + ".")
    stage = PredictStage.open(classifier_uri, plan_pool(engine), outputs=("logits",))
    rows, runtime = predict_samples(
        stage, data.store, data.scans, np.concatenate(list(members.values()))
    )
    metrics: dict[str, Any] = {
        "schema_version": METRICS_SCHEMA_VERSION,
        "classifier_id": metadata["classifier_id"],
        "classes": list(classes),
        "runtime": runtime,
    }
    if training is not None:
        metrics["training"] = training
    curves: dict[str, Any] = {}
    mistakes: list[Mistake] = []
    for split, indices in members.items():
        table = add_labels(rows.slice(0, len(indices)), data, indices, calibration)
        rows = rows.slice(len(indices))
        if split == list(members)[-1]:
            table = add_class_maps(table, stage, data, indices)
            mistakes = collect_mistakes(data, table, split, classes, stage.preprocessing)
        storage.write_table(storage.join(output_uri, "predictions", f"{split}.parquet"), table)
        labels, probs = data.labels[indices], stack_lists(table["probs"])
        metrics[split] = evaluate_split(data, indices, probs, classes)
        metrics[split]["rejected"] = data.count_rejected(split)
        metrics[split]["confidence"] = evaluate_calibration(
            labels, stack_lists(table["logits"]), table["reason"].to_pylist(), calibration, classes
        )
        curves[split] = compute_curves(labels, probs, classes)
    report = render_report(
        title=title,
        metrics=metrics,
        epochs=records,
        curves=curves,
        mistakes=mistakes,
        configuration=configuration,
        facts={
            "Classifier": metadata["classifier_id"],
            "Engine": runtime["description"],
            **facts,
            "Versions": describe_versions(),
            "Revision": read_code_revision(),
        },
    )
    storage.write_bytes(storage.join(output_uri, "report.html"), report.encode())
    if training is not None:
        amend_classifier_metadata(
            classifier_uri, {"metrics": {split: metrics[split] for split in curves}}
        )
        write_model_card(classifier_uri, data, metrics, data_uri=facts["Data"])
    storage.write_json(storage.join(output_uri, METRICS_FILE), metrics)
    return metrics
