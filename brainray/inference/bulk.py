"""Classify in bulk on Ray Data: write one row for every scan, and classify only new scans.

A run makes a plan (:mod:`brainray.inference.plan`), which assigns scan files to shards, and then
predicts in waves. A wave is one execution of Ray Data over some shards::

    shard numbers -> read and decode (tasks) -> predict (actors) -> write (tasks) -> statistics

The slices of a shard are the rows of one block, which the last task writes as one file. The driver
receives the statistics of each shard, and no rows. After all waves
:mod:`brainray.inference.studies` summarises series and studies.
"""

import logging
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any
from uuid import uuid4

import ray
from ray.exceptions import RayError, RayTaskError

from brainray.cluster import (
    check_fits,
    connect_ray,
    describe_gpu_need,
    raise_own_errors,
    report_waiting,
)
from brainray.data.scans import find_sources
from brainray.errors import (
    BrainrayError,
    ClassificationError,
    ConfigError,
    DataError,
    RejectedImage,
)
from brainray.images.preprocess import Preprocessing
from brainray.images.slices import LITTLE_TISSUE
from brainray.inference.engine import Output, prepare_engine
from brainray.inference.labels import read_labels
from brainray.inference.options import ClassifyJob
from brainray.inference.plan import Plan, PlanOptions, make_plan
from brainray.inference.predict import (
    MAX_FAILURES,
    EnginePool,
    PredictStage,
    plan_pool,
    retry_lost,
)
from brainray.inference.report import build_metrics, write_report
from brainray.inference.shards import MAX_BLOCK_BYTES, WaveTask, build_stream
from brainray.inference.stats import Progress, RunStats, count_rejected, watch_memory
from brainray.inference.store import PredictionStore, Wave
from brainray.io import storage
from brainray.io.identifiers import hide_paths, open_identifiers
from brainray.io.lock import OutputLock, hold_output
from brainray.model.calibration import LOW_CONFIDENCE
from brainray.model.classifier import read_classifier_metadata
from brainray.runlog import Log

logger = logging.getLogger(__name__)

SHARDS_PER_ENGINE = 128
"""Shards of a wave, per engine. The driver grows by some 10 kB for each block of an execution and
reuses that memory in the next one; starting an execution takes seconds."""
IMAGES_PER_THREAD_S = 25.0
"""Expected images of 224 px per second and CPU thread (bf16, Zen 4 and 5); it only determines how
many scans share a file."""
IMAGES_PER_GPU_S = 3_000.0
"""Expected images per second and GPU, likewise."""


def classify(
    job: ClassifyJob,
    *,
    log: Log = logger.info,
    on_progress: Callable[[Progress], None] = lambda _: None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Classify all new scans, and write predictions, metrics and a report.

    Parameters
    ----------
    job : ClassifyJob
    log, on_progress : callable
        Receive a line of text, and the progress after each shard.
    verbose : bool
        Whether to show Ray's log.

    Returns
    -------
    dict
        The content of metrics.json.

    Raises
    ------
    UserError
        The scans, the classifier or the output cannot be used. Or everything was written, and more
        scans were rejected than ``max_rejected`` allows.
    ClassificationError
        Ray failed several times in a row without completing a shard.
    LockLostError
        Another run took over the output.
    """
    if any(map(storage.is_dicomweb, job.scans_uri)):
        job = replace(job, redact_paths=True)  # UIDs, and the keys of a search, identify patients
    if job.redact_paths:
        return _classify_redacted(job, log, on_progress, verbose)
    return _classify(job, log, on_progress, verbose)


def _classify_redacted(
    job: ClassifyJob, log: Log, on_progress: Callable[[Progress], None], verbose: bool
) -> dict[str, Any]:
    """Classify without a path of a scan in any line of the log and any error."""
    paths = [path for path in (*job.scans_uri, job.labels, job.id_key_file) if path]
    redacted: Exception
    try:
        return _classify(job, lambda line: log(hide_paths(line, paths)), on_progress, verbose)
    except BrainrayError as error:
        kind = ClassificationError if isinstance(error, RejectedImage) else type(error)
        redacted = kind(hide_paths(str(error), paths))
    except Exception as error:
        redacted = ClassificationError(
            f"The run failed with {type(error).__name__}. Its message is withheld, since it may "
            "contain paths. This is a defect of brainray; please report it."
        )
    raise redacted  # outside the except block, so that it has no reference to the first error


def _classify(
    job: ClassifyJob, log: Log, on_progress: Callable[[Progress], None], verbose: bool
) -> dict[str, Any]:
    max_rejected = parse_max_rejected(job.max_rejected)
    metadata = read_classifier_metadata(job.classifier_uri)
    labels = read_labels(job.labels, tuple(metadata["classes"]))
    sources = tuple(find_sources(job.scans_uri))
    progress = Progress()
    with hold_output(job.output_uri) as lock, raise_own_errors():
        store = PredictionStore.of(job.output_uri, metadata)
        identifiers = open_identifiers(
            job.output_uri, job.id_key_file, redact_paths=job.redact_paths
        )
        if num_missing := store.close(lock.state):
            log(f"The last run was interrupted; {num_missing:,} of its files are left empty.")
        lock.update({})
        storage.delete_folder(store.plan_uri)
        # Not in a thread beside connect_ray: Ray sets environment variables when it starts, and
        # another thread that reads one in C at that time, such as an S3 client's, can crash.
        engine = prepare_engine(job.classifier_uri, job.engine)
        connect_ray(verbose=verbose)
        needs = []
        if job.engine.use_gpu:
            needs = [describe_gpu_need(job.gpus_per_predictor, job.num_predictors or 1)]
        check_fits(*needs)
        with watch_memory() as get_peak_bytes, report_waiting(needs, log):
            labels = labels and labels.rename(identifiers.name)
            pool = plan_pool(
                job.engine, num_engines=job.num_predictors, gpus_per_engine=job.gpus_per_predictor
            )
            preprocessing = Preprocessing(**metadata["preprocessing"])
            run = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid4().hex[:6]}"
            plan = make_plan(
                PlanOptions(
                    sources=sources,
                    store=store,
                    run=run,
                    max_shard_rows=choose_shard_rows(pool, preprocessing.size_px, job.part_s),
                    num_engines=pool.num_engines,
                    identifiers=identifiers,
                )
            )
            _check_plan(plan, [identifiers.name(uri) for uri in job.scans_uri], log)
            progress.total = plan.num_scans
            free_cpus = ray.cluster_resources().get("CPU", 1.0) - pool.num_engines * pool.cpus
            num_decoders = job.num_decoders or max(1, round(free_cpus))
            task = WaveTask(
                store=store,
                run=run,
                preprocessing=preprocessing,
                reading=job.reading,
                key=identifiers.key,
                labels=ray.put(labels),
            )
            outputs: list[Output] = ["class_maps"] if job.explain else []
            stage = PredictStage.of(metadata, engine, pool, outputs)
            predictor = WavePredictor(task, stage, num_decoders, lock, progress, log, on_progress)
            for wave in plan.list_waves(run, SHARDS_PER_ENGINE * pool.num_engines):
                predictor.predict(wave)
            lock.update({})
            storage.delete_folder(store.plan_uri)
            on_progress(progress)
        metrics = build_metrics(metadata, progress, pool, num_decoders, get_peak_bytes())
        write_report(job, metadata, store, identifiers, run, progress.new, labels, metrics)
    _check_rejected(progress.new, max_rejected, job.max_rejected)
    return metrics


def _check_plan(plan: Plan, scans: list[str], log: Log) -> None:
    if not plan.num_listed:
        raise DataError(f"No scans at {', '.join(scans)}: there is no visible file.")
    if plan.num_hidden:
        log(f"Skipped {plan.num_hidden:,} hidden files.")
    if plan.num_indices:
        log(f"Skipped {plan.num_indices:,} DICOMDIR, since the files beside them are listed.")


def parse_max_rejected(text: str) -> Callable[[int], float]:
    """Return a function from the number of scans to the number that may be rejected."""
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        value = -1.0
    if not 0 <= value < float("inf") or (text.endswith("%") and value > 100):
        raise ConfigError(f"Expected --max-rejected as 5% or 20, got '{text}'.")
    return (lambda n: n * value / 100) if text.endswith("%") else (lambda _: value)


def _check_rejected(new: RunStats, limit: Callable[[int], float], text: str) -> None:
    # Every volume has slices above and below the head.
    expected = new.reasons[LITTLE_TISSUE]
    rejected, total = count_rejected(new.reasons) - expected, new.num_rows - expected
    if rejected > limit(total):
        reasons = ", ".join(
            f"{count:,} {reason}"
            for reason, count in new.reasons.most_common()
            if reason not in (LOW_CONFIDENCE, LITTLE_TISSUE)
        )
        raise DataError(
            f"{rejected:,} of {total:,} new scans were rejected ({reasons}), more than "
            f"--max-rejected {text} allows. All predictions are written."
        )


def choose_shard_rows(pool: EnginePool, size_px: int, part_s: float) -> int:
    """Return how many slices share a file: about ``part_s`` seconds of work for one engine."""
    if pool.gpus:
        rate = IMAGES_PER_GPU_S * pool.gpus
    else:
        rate = IMAGES_PER_THREAD_S * (pool.options.num_threads or 1) * (224 / size_px) ** 2
    return max(1, min(int(rate * part_s), MAX_BLOCK_BYTES // size_px**2))


@dataclass(frozen=True, slots=True)
class WavePredictor:
    """Predicts the waves of a run, and counts what they wrote."""

    task: WaveTask
    stage: PredictStage
    num_decoders: int
    lock: OutputLock
    progress: Progress
    log: Log
    on_progress: Callable[[Progress], None]

    def predict(self, wave: Wave) -> None:
        """Predict a wave; after a failure, continue with the shards that are not done."""
        # The next run closes the wave that it finds in the lock. So it must be there before the
        # first file of the wave is written.
        self.lock.update(self.task.store.describe_wave(wave))
        todo = set(wave.list_shards())
        try:
            for shard, counts in retry_lost(lambda: self.stream(wave.part, sorted(todo)), self.log):
                self.lock.check()
                todo.discard(shard)
                self._count(counts)
        except RayTaskError:
            self.lock.check()  # the task may have failed because the lock is lost
            raise
        except RayError as error:
            first_line = str(error).strip().partition("\n")[0]
            raise ClassificationError(
                f"Ray failed {MAX_FAILURES} times in a row without a new prediction: "
                f"{first_line} Predictions made so far are written."
            ) from error
        if todo:
            raise ClassificationError(
                f"Ray Data lost {len(todo):,} shards. Give the same command again; "
                "this is a defect of brainray, please report it."
            )

    def stream(self, part: int, shards: list[int]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield the shards of one part of the plan as they are done, and what is counted."""
        if not shards:
            return
        stream = build_stream(self.task, self.stage, part, shards, self.num_decoders)
        batches: Any = stream.iter_batches(batch_size=None, batch_format="pyarrow")
        for batch in batches:
            for value in batch["done"].to_pylist():
                yield pickle.loads(value)  # pickled by our own task

    def _count(self, counts: dict[str, Any]) -> None:
        runtime = counts["runtime"]
        if self.progress.runtime is None and runtime is not None:
            self.log(f"Predicting with {runtime['description']}.")
            if "int8_cost" in runtime:
                self.log(runtime["int8_cost"])
        self.progress.add(**counts)
        self.on_progress(self.progress)
