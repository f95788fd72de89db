"""The metrics and the report of a bulk run, made from the statistics of its files."""

import pickle
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import ray
import ray.data

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
    Progress,
    RunStats,
    compute_statistics,
    find_bottleneck,
)
from brainray.inference.store import PredictionStore
from brainray.inference.studies import write_series
from brainray.io import storage
from brainray.io.identifiers import REDACTED, Identifiers
from brainray.io.provenance import describe_versions, read_code_revision
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
    capacity = dict.fromkeys(STAGES, num_decoders) | {"predict": pool.num_engines}
    busy = progress.compute_busy(capacity)
    bottleneck = find_bottleneck(busy) if progress.warm_s else "too few new scans to measure"
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
            "bottleneck": bottleneck,
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

    The run has the statistics ``new``; those of earlier runs are read from files.
    """
    stats = RunStats()
    stats.add(new)
    for earlier in _read_statistics(store, run, labels):
        stats.add(earlier)
    edges = np.linspace(0.0, 1.0, NUM_BINS + 1).tolist()
    metrics["counts"] = stats.describe_counts()
    metrics["confidence_histogram"] = {"edges": edges, "counts": stats.histogram.tolist()}
    curves = None
    if stats.labelled is not None and len(stats.labelled.y_true):
        from brainray.metrics import compute_curves, compute_evaluation  # a second of imports

        sample = stats.labelled
        evaluation = compute_evaluation(sample.y_true, sample.y_prob, store.classes)
        evaluation["num_labelled"] = sample.total
        evaluation["num_without_truth"] = sample.num_unlabelled
        metrics["evaluation"] = evaluation
        curves = compute_curves(sample.y_true, sample.y_prob, store.classes)
    metrics |= write_series(store, job.rule, stats.num_in_series)
    gallery = Gallery(store.classes, Preprocessing(**metadata["preprocessing"]), job.reading)
    page = render_bulk_report(
        title="brainray classification report",
        metrics=metrics,
        uncertain=list(gallery.draw_uncertain(stats.least_certain)),
        configuration=_describe_job(job, identifiers),
        curves=curves,
        mistakes=list(gallery.draw_mistakes(stats.mistakes)),
        facts={
            "Classifier": metadata["classifier_id"],
            "Scans": ", ".join(map(identifiers.name, job.scans_uri)),
            "Versions": describe_versions(),
            "Revision": read_code_revision(),
        },
    )
    storage.write_bytes(storage.join(job.output_uri, REPORT_FILE), page.encode())
    storage.write_json(storage.join(job.output_uri, METRICS_FILE), metrics)


def _describe_job(job: "ClassifyJob", identifiers: Identifiers) -> dict[str, Any]:
    """Return a job's options for the report, with hashes in place of paths if they are redacted."""
    options = asdict(job)
    if identifiers.redact_paths:
        options["scans_uri"] = [identifiers.name(uri) for uri in job.scans_uri]
        for name in ("classifier_uri", "output_uri", "labels", "id_key_file"):
            options[name] = options[name] and identifiers.name(options[name])
        uri = job.engine.calibration_uri
        options["engine"]["calibration_uri"] = uri and identifiers.name(uri)
    return options


def _read_statistics(
    store: PredictionStore, except_run: str, labels: Labels | None
) -> Iterator[RunStats]:
    """Read the statistics of other runs' files, on the workers."""
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
    """Read them from a file's metadata; if there are labels, compute them again."""
    if labels is None:
        about = store.read_metadata(uri)
        return RunStats() if about.get("closed") else RunStats.from_json(about["statistics"])
    probs = [f"prob_{name}" for name in store.classes]
    rows = store.read(uri, [*STATISTICS_COLUMNS, *probs])
    return compute_statistics(rows, store.classes, labels)


@dataclass(frozen=True, slots=True)
class Gallery:
    """Draws the scans of statistics, without those that cannot be read or are redacted."""

    classes: tuple[str, ...]
    preprocessing: Preprocessing
    reading: ReadOptions

    def _draw(
        self, scans: Iterable[dict[str, Any]]
    ) -> Iterator[tuple[dict[str, Any], tuple[bytes, bytes | None]]]:
        for scan in scans:
            if scan["scan_uri"].startswith(REDACTED):
                continue
            with suppress(RejectedImage):
                file, index = open_named_slice(scan["scan_uri"], self.reading)
                yield scan, draw_scan(file, index, scan["class_map"], self.preprocessing)

    def draw_uncertain(self, scans: Iterable[dict[str, Any]]) -> Iterator[UncertainScan]:
        """Draw the least certain scans."""
        for scan, (image_png, overlay_png) in self._draw(scans):
            first, second = np.argsort(scan["probs"])[::-1][:2]
            yield UncertainScan(
                scan_uri=scan["scan_uri"],
                predicted_class=self.classes[first],
                confidence=scan["probs"][first],
                second_class=self.classes[second],
                second_confidence=scan["probs"][second],
                image_png=image_png,
                overlay_png=overlay_png,
            )

    def draw_mistakes(self, scans: Iterable[dict[str, Any]]) -> Iterator[Mistake]:
        """Draw the most confident mistakes."""
        for scan, (image_png, overlay_png) in self._draw(scans):
            top = int(np.argmax(scan["probs"]))
            yield Mistake(
                path=scan["scan_uri"],
                true_class=scan["true_class"],
                predicted_class=self.classes[top],
                confidence=scan["probs"][top],
                image_png=image_png,
                overlay_png=overlay_png,
            )
