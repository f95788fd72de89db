"""The metrics and the report of a bulk run, made from the statistics of its files."""

import pickle
from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

from brainray import storage
from brainray.cluster import TASK_CPUS
from brainray.data.read import open_named_slice
from brainray.errors import RejectedImage
from brainray.images.preprocess import Preprocessing
from brainray.images.slices import ReadOptions
from brainray.inference.gallery import draw_scan
from brainray.inference.labels import Labels
from brainray.inference.predict import EnginePool
from brainray.inference.stats import (
    IDLE,
    NUM_BINS,
    STAGES,
    STATISTICS_COLUMNS,
    LabelledSample,
    Progress,
    RunStats,
    compute_statistics,
    find_bottleneck,
)
from brainray.inference.store import PredictionStore
from brainray.inference.studies import write_series
from brainray.io.identifiers import REDACTED, Identifiers
from brainray.provenance import describe_versions, read_code_revision
from brainray.reports.bulk import UncertainScan, render_bulk_report
from brainray.reports.evaluation import Mistake

if TYPE_CHECKING:
    from brainray.inference.options import ClassifyJob

METRICS_FILE = "metrics.json"
REPORT_FILE = "report.html"
METRICS_SCHEMA_VERSION = 2


def build_metrics(
    metadata: dict[str, Any],
    progress: Progress,
    pool: EnginePool,
    num_decoders: int,
    memory_peak_bytes: int,
) -> dict[str, Any]:
    """Build the part of metrics.json about this run; :func:`write_report` adds the rest."""
    new, wall_s = progress.new, progress.elapsed_s
    busy = progress.compute_busy(
        dict.fromkeys(STAGES, num_decoders) | {"predict": pool.num_engines}
    )
    idle = {"backend": "none", "precision": "none", "description": IDLE}
    return {
        "schema_version": METRICS_SCHEMA_VERSION,
        "classifier_id": metadata["classifier_id"],
        "classes": metadata["classes"],
        "runtime": {**(progress.runtime or idle), "num_predictors": pool.num_engines},
        "run": {
            "started_at": progress.started_at.isoformat(),
            "finished_at": datetime.now(UTC).isoformat(),
            "wall_s": round(wall_s, 3),
            "num_new": new.num_rows,
            "num_known": progress.num_known,
            "new_counts": new.describe_counts(),
            "images_per_s": round(new.num_rows / wall_s, 3),
            "images_per_s_warm": progress.rate and round(progress.rate, 3),
            "stages_s": {name: round(spent, 3) for name, spent in progress.stages_s.items()},
            "stages_busy": busy,
            "bottleneck": find_bottleneck(busy)
            if progress.warm_s
            else "too few new scans to measure",
            "memory_peak_bytes": memory_peak_bytes,
            "timeline": [list(point) for point in progress.timeline],
        },
    }


def write_report(
    job: "ClassifyJob",
    metadata: dict[str, Any],
    store: PredictionStore,
    identifiers: Identifiers,
    run: str,
    new: RunStats,
    labels: Labels | None,
    metrics: dict[str, Any],
) -> None:
    """Add the statistics of all predictions of this classifier; write tables, report and metrics.

    Parameters
    ----------
    run : str
        Name of this run, with the statistics ``new``; those of earlier runs are read from files.
    """
    stats = RunStats()
    stats.add(new)
    for earlier in read_statistics(store, run, labels):
        stats.add(earlier)
    edges = np.linspace(0.0, 1.0, NUM_BINS + 1).tolist()
    metrics["counts"] = stats.describe_counts()
    metrics["confidence_histogram"] = {"edges": edges, "counts": stats.histogram.tolist()}
    curves = None
    if stats.labelled is not None and len(stats.labelled.y_true):
        metrics["evaluation"], curves = _evaluate(stats.labelled, store.classes)
    metrics |= write_series(store, job.rule, stats.num_in_series)
    preprocessing = Preprocessing(**metadata["preprocessing"])
    page = render_bulk_report(
        title="brainray classification report",
        metrics=metrics,
        uncertain=list(_draw_least_certain(stats, store.classes, preprocessing, job.reading)),
        configuration=describe_job(job, identifiers),
        curves=curves,
        mistakes=list(_draw_mistakes(stats, store.classes, preprocessing, job.reading)),
        facts={
            "Classifier": metadata["classifier_id"],
            "Scans": ", ".join(map(identifiers.name, job.scans_uri)),
            "Versions": describe_versions(),
            "Revision": read_code_revision(),
        },
    )
    storage.write_bytes(storage.join(job.output_uri, REPORT_FILE), page.encode())
    storage.write_json(storage.join(job.output_uri, METRICS_FILE), metrics)


def describe_job(job: "ClassifyJob", identifiers: Identifiers) -> dict[str, Any]:
    """Return a job's options for the report, with hashes in place of paths if they are redacted."""
    options = asdict(job)
    if identifiers.redact_paths:
        options["scans_uri"] = [identifiers.name(uri) for uri in job.scans_uri]
        for name in ("classifier_uri", "output_uri", "labels", "id_key_file"):
            options[name] = options[name] and identifiers.name(options[name])
        uri = job.engine.calibration_uri
        options["engine"]["calibration_uri"] = uri and identifiers.name(uri)
    return options


def _evaluate(
    sample: LabelledSample, classes: tuple[str, ...]
) -> tuple[dict[str, Any], dict[str, Any]]:
    from brainray.metrics import compute_curves, compute_evaluation  # a second of imports

    evaluation = compute_evaluation(sample.y_true, sample.y_prob, classes)
    evaluation["num_labelled"] = sample.total
    evaluation["num_without_truth"] = sample.num_unlabelled
    return evaluation, compute_curves(sample.y_true, sample.y_prob, classes)


def read_statistics(
    store: PredictionStore, except_run: str, labels: Labels | None
) -> Iterator[RunStats]:
    """Read the statistics of other runs' files, on the workers.

    They are in the files' metadata; if there are labels, they are computed again.
    """
    files = [uri for uri in store.list_files() if f"/{except_run}-" not in uri]
    if not files:
        return
    shared = ray.put(labels)

    def read(batch: dict[str, Any]) -> pa.Table:
        known = ray.get(shared)
        joined = RunStats()
        for uri in batch["item"]:
            joined.add(_read_file_statistics(store, str(uri), known))
        return pa.table({"statistics": pa.array([pickle.dumps(joined)], pa.binary())})

    stream = ray.data.from_items(files).map_batches(read, batch_size=64, num_cpus=TASK_CPUS)
    for row in stream.iter_rows():
        yield pickle.loads(row["statistics"])  # pickled by our own task


def _read_file_statistics(store: PredictionStore, uri: str, labels: Labels | None) -> RunStats:
    if labels is None:
        about = store.read_metadata(uri)
        return RunStats() if about.get("closed") else RunStats.from_json(about["statistics"])
    probs = [f"prob_{name}" for name in store.classes]
    rows = store.read(uri, [*STATISTICS_COLUMNS, *probs])
    return compute_statistics(rows, store.classes, labels)


def _draw(
    scan: dict[str, Any], preprocessing: Preprocessing, reading: ReadOptions
) -> tuple[bytes, bytes | None] | None:
    """Draw a scan and its class map; None if it cannot be read or its path is redacted."""
    if scan["scan_uri"].startswith(REDACTED):
        return None
    try:
        file, index = open_named_slice(scan["scan_uri"], reading)
        return draw_scan(file, index, scan["class_map"], preprocessing)
    except RejectedImage:
        return None


def _draw_least_certain(
    stats: RunStats, classes: tuple[str, ...], preprocessing: Preprocessing, reading: ReadOptions
) -> Iterator[UncertainScan]:
    for scan in stats.least_certain:
        drawn = _draw(scan, preprocessing, reading)
        if drawn is None:
            continue
        first, second = np.argsort(scan["probs"])[::-1][:2]
        yield UncertainScan(
            scan_uri=scan["scan_uri"],
            predicted_class=classes[first],
            confidence=scan["probs"][first],
            second_class=classes[second],
            second_confidence=scan["probs"][second],
            image_png=drawn[0],
            overlay_png=drawn[1],
        )


def _draw_mistakes(
    stats: RunStats, classes: tuple[str, ...], preprocessing: Preprocessing, reading: ReadOptions
) -> Iterator[Mistake]:
    for scan in stats.mistakes:
        drawn = _draw(scan, preprocessing, reading)
        if drawn is None:
            continue
        top = int(np.argmax(scan["probs"]))
        yield Mistake(
            path=scan["scan_uri"],
            true_class=scan["true_class"],
            predicted_class=classes[top],
            confidence=scan["probs"][top],
            image_png=drawn[0],
            overlay_png=drawn[1],
        )
