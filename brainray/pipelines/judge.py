"""Judging a sealed classifier on scans whose class is known: predictions, metrics, report."""

import os
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import ray.data
import torch
from numpy.typing import NDArray
from ray.data import Dataset

from brainray import storage
from brainray.dataset.scan import ScanStore
from brainray.dataset.twins import NEAR_TWIN_CORRELATION
from brainray.errors import RejectedImage
from brainray.inference.engine import EngineOptions, open_engine
from brainray.metrics import (
    compute_accuracy,
    compute_curves,
    compute_evaluation,
    compute_risk_coverage,
)
from brainray.model.answer import find_status, open_scan
from brainray.model.classifier import Classifier, amend_card, load_classifier, read_card, read_trust
from brainray.model.explain import STRIDE_PX
from brainray.model.trust import Trust
from brainray.pipelines.data import PreparedData
from brainray.pipelines.modelcard import write_model_card
from brainray.pixels.decode import DecodeLimits
from brainray.pixels.picture import GALLERY_OVERLAY_PX, render_overlay, render_picture
from brainray.provenance import describe_versions, read_code_revision
from brainray.reporting.report import Mistake, render_report

BATCH_SIZE = 32
"""Images of one forward pass."""

ROWS_PER_TASK = 256
"""Images of one task: seconds of work on a CPU, beside which opening the classifier is little."""

NUM_MISTAKES_SHOWN = 24
METRICS_FILE = "metrics.json"
METRICS_SCHEMA_VERSION = 1

Say = Callable[[str], None]


@lru_cache(maxsize=1)
def _open_classifier(classifier_uri: str, classifier_id: str, use_gpu: bool) -> Classifier:  # noqa: ARG001
    """Open the classifier, once in each of Ray's processes; anew if another one is there."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))  # one task at a time has the node
    return load_classifier(classifier_uri, device="cuda" if use_gpu else "cpu")


def _answer_batch(
    batch: dict[str, NDArray[np.int64]],
    *,
    store: ScanStore,
    classifier_uri: str,
    classifier_id: str,
    limits: DecodeLimits,
    use_gpu: bool,
    with_features: bool,
) -> dict[str, NDArray[Any]]:
    """Decode some samples and run the network on them; runs as a Ray Data task."""
    classifier = _open_classifier(classifier_uri, classifier_id, use_gpu)
    images = store.load_images(batch["index"].tolist(), classifier.preprocessing, limits)
    parts = [
        classifier.compute_outputs(images[start : start + BATCH_SIZE])
        for start in range(0, len(images), BATCH_SIZE)
    ]
    features = np.concatenate([part.features for part in parts])
    return {
        "index": batch["index"],
        "logits": np.concatenate([part.logits for part in parts]),
        "distance": classifier.trust.compute_distances(features),
        **({"features": features} if with_features else {}),
    }


def open_answers(
    indices: NDArray[np.int64],
    store: ScanStore,
    classifier_uri: str,
    *,
    limits: DecodeLimits,
    use_gpu: bool,
    with_features: bool,
) -> Dataset:
    """Build the stream that :func:`compute_outputs` reads; nothing runs until then.

    Its rows have ``index``, ``logits``, ``distance`` and, if asked for, ``features``, each in the
    shape and meaning given there.
    """
    parts = [
        pa.table({"index": indices[start : start + ROWS_PER_TASK]})
        for start in range(0, len(indices), ROWS_PER_TASK)
    ]
    answers: Dataset = ray.data.from_arrow(parts).map_batches(
        _answer_batch,  # type: ignore[arg-type]  # Ray's hint knows no fn_kwargs
        batch_size=ROWS_PER_TASK,  # a part; with GPUs, Ray refuses None
        fn_kwargs={
            "store": store,
            "classifier_uri": classifier_uri,
            "classifier_id": read_card(classifier_uri)["classifier_id"],
            "limits": limits,
            "use_gpu": use_gpu,
            "with_features": with_features,
        },
        num_gpus=1 if use_gpu else 0,
        compute=ray.data.TaskPoolStrategy(size=1),
    )
    return answers


def compute_outputs(
    indices: NDArray[np.int64],
    store: ScanStore,
    classifier_uri: str,
    *,
    limits: DecodeLimits,
    use_gpu: bool,
    with_features: bool = False,
) -> dict[str, NDArray[np.float32]]:
    """Run a classifier's network on some samples, in Ray Data tasks.

    Parameters
    ----------
    indices : ndarray of int64, shape (n,)
        Sample numbers, none twice.
    with_features : bool
        Whether to return the features too: 14 kB for each sample.

    Returns
    -------
    dict of ndarray of float32
        In the order of ``indices``: ``logits``, shape (n, K), not calibrated; ``distance`` to the
        training images, shape (n,), 0 where the classifier knows none; ``features``, shape (n, C).
    """
    answers = open_answers(
        indices,
        store,
        classifier_uri,
        limits=limits,
        use_gpu=use_gpu,
        with_features=with_features,
    )
    place = {int(index): row for row, index in enumerate(indices)}
    rows: list[int] = []
    batches: list[dict[str, NDArray[np.float32]]] = []
    for batch in answers.iter_batches(batch_size=None, batch_format="numpy"):
        rows += [place[int(index)] for index in batch.pop("index")]
        batches.append(batch)
    assert sorted(rows) == list(range(len(indices))), "every sample has one answer"
    order = np.argsort(rows)
    return {
        name: np.asarray(np.concatenate([batch[name] for batch in batches])[order], np.float32)
        for name in batches[0]
    }


def build_predictions(
    data: PreparedData,
    indices: NDArray[np.int64],
    probs: NDArray[np.float32],
    reasons: Sequence[str | None],
    classes: Sequence[str],
    classifier_id: str,
) -> pa.Table:
    """Build the table of answers: a row for every scan judged, with its truth beside it.

    ``status`` and ``reason`` are what any door would answer; ``predicted_class`` is the most
    probable one all the same, for all are judged.
    """
    rows = data.manifest.take(pa.array(indices))
    top = probs.argmax(1)
    columns: dict[str, Any] = {
        name: rows[name]
        for name in ("path", "content_sha256", "split", "group", "nearest_correlation")
    }
    columns |= {
        "true_class": rows["label"],
        "status": [find_status(reason) for reason in reasons],
        "reason": pa.array(reasons, pa.string()),
        "predicted_class": [classes[k] for k in top],
        "confidence": probs[np.arange(len(top)), top],
        **{f"prob_{name}": probs[:, k] for k, name in enumerate(classes)},
        "classifier_id": [classifier_id] * len(top),
    }
    return pa.table(columns)


def judge_split(
    data: PreparedData,
    indices: NDArray[np.int64],
    probs: NDArray[np.float32],
    classes: Sequence[str],
) -> dict[str, Any]:
    """Compute a split's metrics, with what they must be read beside.

    Returns
    -------
    dict
        What :func:`brainray.metrics.compute_evaluation` gives; ``no_twin``, the same over
        images without a near-twin in training; and ``baseline_1nn``, the answers of the
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
    apart = correlation < NEAR_TWIN_CORRELATION
    metrics["twin_correlation"] = NEAR_TWIN_CORRELATION
    metrics["no_twin"] = _judge_part(labels, probs, classes, groups, apart)
    metrics["baseline_1nn"] = compute_accuracy(labels, nearest, groups=groups)
    metrics["baseline_1nn"]["no_twin"] = (
        compute_accuracy(labels[apart], nearest[apart], groups=groups[apart])
        if apart.any()
        else {"n": 0}
    )
    return metrics


def _judge_part(
    labels: NDArray[np.int64],
    probs: NDArray[np.float32],
    classes: Sequence[str],
    groups: NDArray[np.int64],
    part: NDArray[np.bool_],
) -> dict[str, Any]:
    if not part.any():
        return {"n": 0}
    return compute_evaluation(labels[part], probs[part], classes, groups=groups[part])


def judge_trust(
    labels: NDArray[np.int64],
    logits: NDArray[np.float32],
    reasons: Sequence[str | None],
    trust: Trust,
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
    plain, probs = Trust.nothing(len(classes)).calibrate(logits), trust.calibrate(logits)
    scores = {
        name: compute_evaluation(labels, values, classes, num_resamples=0)
        for name, values in (("before", plain), ("after", probs))
    }
    without_class = [reason for reason in reasons if reason]
    return {
        "calibration": {
            "method": trust.facts.get("method", "none"),
            **{
                name: {score: found[score] for score in ("log_loss", "brier", "ece")}
                for name, found in scores.items()
            },
        },
        "selective": compute_risk_coverage(
            labels, probs, classes, min_confidence=trust.min_confidence
        ),
        "by_reason": {reason: without_class.count(reason) for reason in sorted(set(without_class))},
    }


def collect_mistakes(
    data: PreparedData,
    predictions: pa.Table,
    split: str,
    classifier_uris: Mapping[str, str],
    limits: DecodeLimits,
) -> list[Mistake]:
    """Collect the most confident mistakes of a split, and where the network saw what is not there.

    They are few: the maps are computed here, on the CPU.

    Parameters
    ----------
    classifier_uris : mapping
        Where the classifier of each ``classifier_id`` in the predictions is.
    """
    wrong = predictions.filter(
        pc.not_equal(predictions["true_class"], predictions["predicted_class"])
    )
    worst = wrong.sort_by([("confidence", "descending")]).slice(0, NUM_MISTAKES_SHOWN)
    numbers = {path: i for i, path in enumerate(data.manifest["path"].to_pylist())}
    mistakes: list[Mistake] = []
    if not worst.num_rows:
        return mistakes
    classifiers = {
        name: load_classifier(classifier_uris[name])
        for name in pc.unique(worst["classifier_id"]).to_pylist()
    }
    options = EngineOptions(backend="torch", precision="fp32")
    runtimes = {name: open_engine(found, options) for name, found in classifiers.items()}
    for row in worst.to_pylist():
        classifier = classifiers[row["classifier_id"]]
        try:
            (content,) = data.store.read([numbers[row["path"]]])
            scan = open_scan(content, classifier.preprocessing, limits)
        except RejectedImage:  # vanished since it was judged
            continue
        maps = runtimes[row["classifier_id"]].explain(scan.image[None]).maps
        assert maps is not None
        class_map = maps[0, classifier.classes.index(row["predicted_class"])]
        mistakes.append(
            Mistake(
                path=row["path"],
                true_class=row["true_class"],
                predicted_class=row["predicted_class"],
                confidence=row["confidence"],
                image_png=render_picture(content, limits),
                overlay_png=render_overlay(
                    class_map,
                    scan.pixels,
                    classifier.preprocessing,
                    STRIDE_PX,
                    shown_px=GALLERY_OVERLAY_PX,
                ),
                split=split,
            )
        )
    return mistakes


def judge_and_report(
    data: PreparedData,
    *,
    output_uri: str,
    classifier_uri: str,
    splits: Sequence[str],
    limits: DecodeLimits,
    use_gpu: bool,
    title: str,
    configuration: dict[str, Any],
    facts: dict[str, str],
    say: Say,
    training: dict[str, Any] | None = None,
    records: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Predict, judge, and write predictions, report and metrics, in this order.

    Parameters
    ----------
    splits : sequence of str
        Splits to judge, the most telling last; the report's pictures are of that one.
    title, configuration, facts, training, records
        For the report; ``training`` goes into the metrics too.

    Returns
    -------
    dict
        The content of metrics.json, whose presence says that all is done.
    """
    card = read_card(classifier_uri)
    classes = tuple(card["classes"])
    trust = read_trust(card, classifier_uri)
    metrics: dict[str, Any] = {
        "schema_version": METRICS_SCHEMA_VERSION,
        "classifier_id": card["classifier_id"],
        "classes": list(classes),
    }
    if training is not None:
        metrics["training"] = training
    curves: dict[str, Any] = {}
    for split in (name for name in splits if len(data.select(name))):
        indices = data.select(split)
        say(f"Judging {len(indices):,} {split} images.")
        outputs = compute_outputs(
            indices, data.store, classifier_uri, limits=limits, use_gpu=use_gpu
        )
        probs = trust.calibrate(outputs["logits"])
        reasons = trust.find_reasons(probs, outputs["distance"])
        predictions = build_predictions(
            data, indices, probs, reasons, classes, card["classifier_id"]
        )
        storage.write_table(
            storage.join(output_uri, "predictions", f"{split}.parquet"), predictions
        )
        metrics[split] = judge_split(data, indices, probs, classes)
        metrics[split]["rejected"] = data.count_rejected(split)
        metrics[split]["trust"] = judge_trust(
            data.labels[indices], outputs["logits"], reasons, trust, classes
        )
        curves[split] = compute_curves(data.labels[indices], probs, classes)
    mistakes: list[Mistake] = []
    if curves:  # of the last split
        classifier_uris = {card["classifier_id"]: classifier_uri}
        mistakes = collect_mistakes(data, predictions, split, classifier_uris, limits)
    report = render_report(
        title=title,
        metrics=metrics,
        epochs=records,
        curves=curves,
        mistakes=mistakes,
        configuration=configuration,
        facts={
            "Classifier": card["classifier_id"],
            **facts,
            "Versions": describe_versions(),
            "Revision": read_code_revision(),
        },
    )
    storage.write_bytes(storage.join(output_uri, "report.html"), report.encode())
    if training is not None:
        amend_card(classifier_uri, {"metrics": {split: metrics[split] for split in curves}})
        write_model_card(classifier_uri, data, metrics, data_uri=facts["Data"])
    storage.write_json(storage.join(output_uri, METRICS_FILE), metrics)
    return metrics
