"""Evaluate a classifier on a prepared data set: predictions, metrics, report, model card."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from brainray.data.near_duplicates import NEAR_DUPLICATE_CORRELATION
from brainray.errors import RejectedImage
from brainray.evaluation.prepared import PreparedData
from brainray.evaluation.rows import add_labels, find_mistakes
from brainray.images.preprocess import Preprocessing
from brainray.inference.engine import EngineOptions
from brainray.inference.gallery import draw_scan
from brainray.inference.predict import PredictStage, plan_pool
from brainray.inference.samples import predict_samples
from brainray.inference.schema import stack_lists
from brainray.io import storage
from brainray.io.provenance import describe_versions, read_code_revision
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
from brainray.reports.card import build_model_card, render_model_card
from brainray.reports.evaluation import Mistake, render_evaluation_report
from brainray.runlog import Log

NUM_MISTAKES_SHOWN = 24
METRICS_FILE = "metrics.json"
METRICS_SCHEMA_VERSION = 2
MODEL_CARD_FILE = "MODEL_CARD.md"


def evaluate_split(
    data: PreparedData,
    indices: NDArray[np.int64],
    probs: NDArray[np.float32],
    classes: Sequence[str],
) -> dict[str, Any]:
    """Compute a split's metrics, and the leak accounting that belongs to them.

    Returns
    -------
    dict
        What :func:`brainray.metrics.compute_evaluation` returns; ``without_near_duplicates``, the
        same over images without a near duplicate in training; and ``baseline_1nn``, the scores of
        the nearest training thumbnail. The last two are absent if the training images are unknown.
    """
    rows = data.manifest.take(pa.array(indices))
    labels, groups = data.labels[indices], rows["group"].to_numpy()
    metrics = compute_evaluation(labels, probs, classes, groups=groups)
    correlation = rows["nearest_correlation"].to_numpy(zero_copy_only=False)
    if np.isnan(correlation.astype(np.float64)).any():
        return metrics
    nearest = np.array([classes.index(name) for name in rows["nearest_label"].to_pylist()])
    baseline = compute_accuracy(labels, nearest, groups=groups)
    without: dict[str, Any] = {"n": 0}
    baseline_without: dict[str, Any] = {"n": 0}
    apart = correlation < NEAR_DUPLICATE_CORRELATION
    if apart.any():
        labels, groups = labels[apart], groups[apart]
        without = compute_evaluation(labels, probs[apart], classes, groups=groups)
        baseline_without = compute_accuracy(labels, nearest[apart], groups=groups)
    return metrics | {
        "near_duplicate_correlation": NEAR_DUPLICATE_CORRELATION,
        "without_near_duplicates": without,
        "baseline_1nn": baseline | {"without_near_duplicates": baseline_without},
    }


def evaluate_calibration(
    labels: NDArray[np.int64],
    logits: NDArray[np.float32],
    reasons: Sequence[str | None],
    calibration: Calibration,
    classes: Sequence[str],
) -> dict[str, Any]:
    """Evaluate calibration and selective prediction.

    Returns
    -------
    dict
        ``calibration``: log loss, Brier score and calibration error ``before`` (of the plain
        softmax) and ``after``; ``selective``: what
        :func:`brainray.metrics.compute_risk_coverage` returns at the classifier's threshold;
        ``by_reason``: counts of images that get no class.
    """
    scores = {}
    for name, scaling in (("before", Calibration.identity(len(classes))), ("after", calibration)):
        probs = scaling.calibrate(logits)
        found = compute_evaluation(labels, probs, classes, num_resamples=0)
        scores[name] = {score: found[score] for score in ("log_loss", "brier", "ece")}
    without_class = Counter(reason for reason in reasons if reason)
    return {
        "calibration": {"method": calibration.facts.get("method", "none"), **scores},
        "selective": compute_risk_coverage(
            labels, probs, classes, min_confidence=calibration.min_confidence
        ),
        "by_reason": dict(sorted(without_class.items())),
    }


def _add_class_maps(
    rows: pa.Table, stage: PredictStage, data: PreparedData, indices: NDArray[np.int64]
) -> pa.Table:
    """Fill the column ``class_map`` for the mistakes that reports show."""
    worst = find_mistakes(rows, stage.classes, NUM_MISTAKES_SHOWN)
    if not len(worst):
        return rows
    explain = replace(stage, outputs=("class_maps",), pool=replace(stage.pool, num_engines=1))
    try:
        explained, _ = predict_samples(explain, data.store, data.scans, indices[worst])
    except RejectedImage:  # the file is gone
        return rows
    class_maps: list[list[float] | None] = [None] * len(rows)
    for row, class_map in zip(worst, explained["class_map"].to_pylist(), strict=True):
        class_maps[row] = class_map
    field = rows.schema.field("class_map")
    column = rows.column_names.index("class_map")
    return rows.set_column(column, field, pa.array(class_maps, field.type))


def draw_mistakes(
    data: PreparedData, rows: pa.Table, classes: Sequence[str], preprocessing: Preprocessing
) -> list[Mistake]:
    """Draw the most confident mistakes of an evaluation table, with their class maps."""
    numbers = {path: number for number, path in enumerate(data.manifest["path"].to_pylist())}
    mistakes = []
    for row in rows.take(find_mistakes(rows, classes, NUM_MISTAKES_SHOWN)).to_pylist():
        try:
            ((file, index),) = data.store.open_slices([numbers[row["path"]]])
            image_png, overlay_png = draw_scan(file, index, row["class_map"], preprocessing)
        except RejectedImage:  # the file is gone
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
    """Predict and evaluate; write predictions, report, model card and metrics, in this order.

    Parameters
    ----------
    splits : sequence of str
        Splits to evaluate; the report shows mistakes of the last one.
    title, configuration, facts, records
        As in :func:`brainray.reports.evaluation.render_evaluation_report`.
    training : dict, optional
        Summary of the training that just ended; the classifier bundle then gets metrics and a
        model card.

    Returns
    -------
    dict
        The content of metrics.json, which is written last: its presence marks a finished run.
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
            table = _add_class_maps(table, stage, data, indices)
            mistakes = draw_mistakes(data, table, classes, stage.preprocessing)
        storage.write_table(storage.join(output_uri, "predictions", f"{split}.parquet"), table)
        labels, probs = data.labels[indices], stack_lists(table["probs"])
        metrics[split] = evaluate_split(data, indices, probs, classes)
        metrics[split]["rejected"] = data.count_rejected(split)
        metrics[split]["confidence"] = evaluate_calibration(
            labels, stack_lists(table["logits"]), table["reason"].to_pylist(), calibration, classes
        )
        curves[split] = compute_curves(labels, probs, classes)
    report = render_evaluation_report(
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
        scores = {split: metrics[split] for split in curves}
        amend_classifier_metadata(classifier_uri, {"metrics": scores})
        write_model_card(classifier_uri, data, metrics, data_uri=facts["Data"])
    storage.write_json(storage.join(output_uri, METRICS_FILE), metrics)
    return metrics


def write_model_card(
    classifier_uri: str, data: PreparedData, metrics: dict[str, Any], *, data_uri: str
) -> None:
    """Write a trained classifier's model card into its bundle; of the data's URI, the last name."""
    metadata = read_classifier_metadata(classifier_uri)
    counted = {"name": storage.get_name(data_uri), **summarise_data(data, metadata["classes"])}
    model_card = build_model_card(metadata, metrics, counted)
    text = render_model_card(model_card).encode()
    storage.write_bytes(storage.join(classifier_uri, MODEL_CARD_FILE), text)
    amend_classifier_metadata(classifier_uri, {"model_card": model_card})


def summarise_data(data: PreparedData, classes: Sequence[str]) -> dict[str, Any]:
    """Count a data set's images by split, class and group.

    Returns
    -------
    dict
        ``num_scans``; ``rejected``, counts by reason, and ``rejected_per_class``; ``num_groups``;
        ``num_shared_groups``, those that lie in more than one split; ``num_named``, scans whose
        group or patient the data set names; and ``splits``: for each that has images ``n``,
        ``num_groups``, ``per_class``, and ``given``, whether the data set gives the split.
    """
    groups, samples = data.manifest["group"].to_numpy(), data.found.samples
    given = set(samples["split"].to_pylist())
    members = {split: data.select(split) for split in ("train", "val", "test")}
    found = {split: np.unique(groups[rows]) for split, rows in members.items() if len(rows)}
    _, counts = np.unique(np.concatenate(list(found.values())), return_counts=True)

    def count_classes(split: str) -> list[int]:
        labels = data.labels[data.select(split)]
        return list(np.bincount(labels, minlength=len(classes)).tolist())

    return {
        "num_scans": samples.num_rows,
        "rejected": data.count_rejected(),
        "rejected_per_class": count_classes("rejected"),
        "num_groups": len(counts),
        "num_shared_groups": int((counts > 1).sum()),
        "num_named": data.num_named,
        "splits": {
            split: {
                "n": len(members[split]),
                "num_groups": len(numbers),
                "per_class": count_classes(split),
                "given": split in given,
            }
            for split, numbers in found.items()
        },
    }
