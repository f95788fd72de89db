"""Classify in bulk on Ray Data: one row for every scan, and only what is new.

A run is planned first (:mod:`brainray.inference.plan`), then predicted in waves. A wave is one
execution of Ray Data over some of the plan's shards::

    shard numbers -> read and decode (tasks) -> predict (actors) -> write (tasks) -> statistics

The slices of a shard's files pass through it as the rows of one block, which the worker that holds
the predictions writes as one file. The driver gets each shard's statistics, and no row. When all
waves are done, :mod:`brainray.inference.studies` puts slices together to series and studies.
"""

import logging
import pickle
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Annotated, Any, TypeVar
from uuid import uuid4

import ray
import ray.data
import tyro
from ray.exceptions import RayError, RayTaskError

from brainray import storage
from brainray.cluster import (
    Need,
    check_fits,
    connect_ray,
    describe_gpu_need,
    raise_own_errors,
    tell_waiting,
)
from brainray.data.scans import Place, find_places
from brainray.errors import (
    BrainrayError,
    ClassificationError,
    ConfigError,
    DataError,
    RejectedImage,
)
from brainray.images.preprocess import Preprocessing
from brainray.images.slices import LITTLE_TISSUE, ReadOptions
from brainray.inference.engine import Engine, EngineOptions, prepare_engine
from brainray.inference.labels import Labels, read_labels
from brainray.inference.plan import Plan, PlanOptions, make_plan
from brainray.inference.predict import EnginePool, PredictStage, plan_pool
from brainray.inference.report import build_metrics, write_report
from brainray.inference.series import SeriesRule
from brainray.inference.shards import (
    MAX_BLOCK_BYTES,
    OPENED_FILE,
    DoneShard,
    WaveTask,
    build_stream,
)
from brainray.inference.stats import (
    Progress,
    RunStats,
    count_rejected,
    watch_memory,
)
from brainray.inference.store import PredictionStore, Wave
from brainray.io.identifiers import Identifiers, hide_paths, open_identifiers
from brainray.io.lock import OutputLock, hold_output
from brainray.model.classifier import read_card
from brainray.model.shipped import find_default_classifier
from brainray.model.trust import LOW_CONFIDENCE

logger = logging.getLogger(__name__)

MAX_FAILURES = 3
"""Failures of a wave in a row, without a shard done between them, that end a run."""
SHARDS_PER_ENGINE = 128
"""Shards of a wave for each engine. The driver grows by some 10 kB for each block of an execution,
and gets that back with the next; starting an execution costs seconds."""
IMAGES_PER_THREAD_S = 25.0
"""Images of 224 px that a CPU thread is expected to predict in a second, in bf16 on Zen 4 or 5; it
only decides how many scans share a file."""
IMAGES_PER_GPU_S = 3_000.0
"""The same of a GPU."""
FIRST_SHARDS_PER_ENGINE = 16
"""Shards of the first wave for each engine. It is opened before the plan is made; every shard that
the plan has not costs a task."""

Say = Callable[[str], None]
Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True, slots=True)
class ClassifyJob:
    """One bulk run: which scans, by which classifier, to where."""

    scans_uri: tuple[str, ...]
    """Folder, glob, file, DICOMDIR, Parquet table with `image_bytes`, or a .txt or .csv list of
    URIs; local, s3:// or gs://. Or a search in a PACS, whose paths are always redacted:
    dicomweb+https://HOST/PATH/studies?StudyDate=20260101-&Modality=MR. May be given several
    times."""
    classifier_uri: str = field(default_factory=find_default_classifier)
    """A classifier bundle; `$BRAINRAY_CLASSIFIER`, else the one that comes with the project, if
    not given."""
    output_uri: str
    """Where predictions, metrics and report go. The same command classifies what is new since."""
    labels: str | None = None
    """Where the true classes are: `folder` (the name of a scan's folder is its class), or a CSV
    file with the columns scan_uri and label."""
    explain: bool = False
    """Write beside each prediction its class map: where the network found evidence."""
    max_rejected: str = "100%"
    """Exit with status 2, after everything is written, when more of the new slices than this
    were rejected: a share (5%) or a number (20). Slices with little tissue do not count."""
    engine: Annotated[EngineOptions, tyro.conf.arg(name="")] = EngineOptions()
    num_predictors: int | None = None
    """Processes that hold the classifier; one for each GPU, or for four CPUs, if not given."""
    gpus_per_predictor: float = 1.0
    """Share of a GPU that each takes, with --use-gpu."""
    num_decoders: int | None = None
    """Tasks that read and decode at a time; as many as CPUs are left, if not given."""
    part_s: float = 20.0
    """Seconds of work in one file, about: what a kill can cost."""
    reading: Annotated[ReadOptions, tyro.conf.arg(name="")] = ReadOptions()
    rule: SeriesRule = SeriesRule()
    """When the slices of a series give it a class."""
    id_key_file: str | None = None
    """File whose bytes, at least 16, are the key of the hashes that stand for patients, studies,
    series and objects. If not given, each output has a random key of its own beside the
    predictions."""
    redact_paths: bool = False
    """Write keyed hashes in the place of all paths of scans, which may hold names. The report then
    has no pictures."""


def classify(
    job: ClassifyJob,
    *,
    say: Say = logger.info,
    on_progress: Callable[[Progress], None] = lambda _: None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Classify every new scan, and write predictions, metrics and report.

    Parameters
    ----------
    job : ClassifyJob
        What to classify.
    say, on_progress : callable
        Take a line for a person, and how far the run is.
    verbose : bool
        Whether Ray's own lines are shown.

    Returns
    -------
    dict
        The content of metrics.json.

    Raises
    ------
    UserError
        The scans, the classifier or the output cannot be used; or, when all is written, more
        was rejected than ``max_rejected`` allows.
    ClassificationError
        The stream failed :data:`MAX_FAILURES` times in a row without a shard done.
    LockLostError
        Another run took the output over.
    """
    if any(map(storage.is_dicomweb, job.scans_uri)):
        job = replace(job, redact_paths=True)  # UIDs, and the keys of a search, identify patients
    if job.redact_paths:
        return _classify_unseen(job, say, on_progress, verbose)
    return _classify(job, say, on_progress, verbose)


def _classify_unseen(
    job: ClassifyJob, say: Say, on_progress: Callable[[Progress], None], verbose: bool
) -> dict[str, Any]:
    """Classify, and say and raise nothing that holds a path of a scan."""
    paths = [path for path in (*job.scans_uri, job.labels, job.id_key_file) if path]
    hidden: Exception
    try:
        return _classify(job, lambda line: say(hide_paths(line, paths)), on_progress, verbose)
    except BrainrayError as error:
        kind = ClassificationError if isinstance(error, RejectedImage) else type(error)
        hidden = kind(hide_paths(str(error), paths))
    except Exception as error:
        hidden = ClassificationError(
            f"The run failed with {type(error).__name__}. Its message may hold paths, which are "
            "not to be seen. This is a defect of brainray; please report it."
        )
    raise hidden  # outside of the except block, so that the first error does not hang on it


def _classify(
    job: ClassifyJob, say: Say, on_progress: Callable[[Progress], None], verbose: bool
) -> dict[str, Any]:
    max_rejected = parse_max_rejected(job.max_rejected)
    card = read_card(job.classifier_uri)
    labels = read_labels(job.labels, tuple(card["classes"]))
    places = find_places(job.scans_uri)
    with hold_output(job.output_uri) as lock, raise_own_errors():
        store = PredictionStore.of(job.output_uri, card)
        identifiers = open_identifiers(
            job.output_uri, job.id_key_file, redact_paths=job.redact_paths
        )
        run = _Run(job, card, store, identifiers, lock, say, on_progress)
        run.close_previous()
        # Importing torch and exporting the network takes about as long as starting Ray.
        engine = start_thread(prepare_engine, job.classifier_uri, job.engine)
        connect_ray(verbose=verbose)
        needs = describe_needs(job)
        check_fits(*needs)
        with watch_memory() as peak, tell_waiting(needs, say):
            labels = labels and labels.rename(identifiers.name)
            run.classify(places, engine.result(), labels)
        metrics = build_metrics(card, run.progress, run.pool, run.num_decoders, peak.bytes)
        write_report(job, card, store, identifiers, run.id, run.progress.new, labels, metrics)
    _check_rejected(run.progress.new, max_rejected, job.max_rejected)
    return metrics


def start_thread(function: Callable[..., Result], *arguments: object) -> "Future[Result]":
    """Call a function in a thread that does not keep the process from ending."""
    future: Future[Result] = Future()

    def run() -> None:
        try:
            future.set_result(function(*arguments))
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, daemon=True, name=function.__name__).start()
    return future


def parse_max_rejected(text: str) -> Callable[[int], float]:
    """Return what turns a number of scans into the number that may be rejected.

    Raises
    ------
    ConfigError
        The text is neither a share nor a number.
    """
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


def describe_needs(job: ClassifyJob) -> list[Need]:
    """Say what the run cannot do without, besides a CPU."""
    if not job.engine.use_gpu:
        return []
    return [describe_gpu_need(job.gpus_per_predictor, job.num_predictors or 1)]


def choose_shard_rows(pool: EnginePool, size_px: int, part_s: float) -> int:
    """Choose how many slices share a file: about what one engine predicts in ``part_s`` seconds."""
    if pool.gpus:
        rate = IMAGES_PER_GPU_S * pool.gpus
    else:
        rate = IMAGES_PER_THREAD_S * (pool.options.num_threads or 1) * (224 / size_px) ** 2
    return max(1, min(int(rate * part_s), MAX_BLOCK_BYTES // size_px**2))


class _Run:
    """One run: its plan, its waves, and what came of them."""

    pool: EnginePool
    num_decoders: int

    def __init__(
        self,
        job: ClassifyJob,
        card: dict[str, Any],
        store: PredictionStore,
        identifiers: Identifiers,
        lock: OutputLock,
        say: Say,
        on_progress: Callable[[Progress], None],
    ) -> None:
        self._job, self._card, self._store, self._lock = job, card, store, lock
        self._identifiers = identifiers
        self._say, self._on_progress = say, on_progress
        self.id = f"{datetime.now(UTC):%Y%m%dT%H%M%S}-{uuid4().hex[:6]}"
        self._is_over = False
        self.progress = Progress()

    @property
    def _opened_uri(self) -> str:
        return self._store.name_plan(self.id, OPENED_FILE)

    def close_previous(self) -> None:
        """Close what a run left that was cut short."""
        num_missing = self._store.close(self._lock.state)
        if num_missing:
            self._say(f"The last run was cut short; {num_missing:,} of its files are left empty.")
        self._lock.update({})
        storage.delete_folder(self._store.plan_uri)

    def classify(
        self, places: list[Place], engine: Callable[[], Engine], labels: Labels | None
    ) -> None:
        """Plan and predict."""
        job = self._job
        self.pool = pool = plan_pool(
            job.engine, num_engines=job.num_predictors, gpus_per_engine=job.gpus_per_predictor
        )
        free = ray.cluster_resources().get("CPU", 1.0) - pool.num_engines * pool.cpus
        self.num_decoders = job.num_decoders or max(1, round(free))
        preprocessing = Preprocessing(**self._card["preprocessing"])
        self._wave_size = SHARDS_PER_ENGINE * pool.num_engines
        storage.write_json(self._opened_uri, None)
        planned = start_thread(
            self._plan,
            PlanOptions(
                places=tuple(places),
                store=self._store,
                run=self.id,
                max_shard_rows=choose_shard_rows(pool, preprocessing.size_px, job.part_s),
                num_engines=pool.num_engines,
                identifiers=self._identifiers,
            ),
        )
        self._stage = PredictStage.of(
            self._card, engine, pool, ["class_maps"] if job.explain else []
        )
        self._task = WaveTask(
            store=self._store,
            run=self.id,
            preprocessing=preprocessing,
            reading=job.reading,
            key=self._identifiers.key,
            labels=ray.put(labels),
        )
        try:
            self._predict_all(planned)
        finally:
            self._is_over = True
        self._lock.update({})
        storage.delete_folder(self._store.plan_uri)

    def _predict_all(self, planned: "Future[tuple[Plan, int]]") -> None:
        # The first wave starts its engines while the plan is being made.
        first_size = FIRST_SHARDS_PER_ENGINE * self.pool.num_engines
        todo = self._predict(Wave(self.id, 0, 0, first_size), is_first=True)
        plan, num_opened = planned.result()
        if not plan.num_listed:
            names = map(self._identifiers.name, self._job.scans_uri)
            raise DataError(f"No scans at {', '.join(names)}: there is not one visible file.")
        _check_complete(todo.intersection(range(num_opened)))
        for part, num_shards in enumerate(plan.num_shards):
            for first in range(0 if part else num_opened, num_shards, self._wave_size):
                wave = Wave(self.id, part, first, min(self._wave_size, num_shards - first))
                self._open(wave)
                _check_complete(self._predict(wave))
        if plan.num_hidden:
            self._say(f"Skipped {plan.num_hidden:,} hidden files.")
        if plan.num_indices:
            self._say(
                f"Skipped {plan.num_indices:,} DICOMDIR: the files beside them are scans by "
                "themselves."
            )
        self._on_progress(self.progress)

    def _plan(self, options: PlanOptions) -> tuple[Plan, int]:
        """Plan, and open the first wave; runs in a thread beside it.

        Returns
        -------
        Plan
        int
            Shards of the first wave. Where a plan has several parts it is empty, and over before
            they are gathered: that needs the CPUs that the engines hold.
        """

        def end_first_wave(num_parts: int) -> None:
            if num_parts > 1:
                storage.write_json(self._opened_uri, 0)

        num_opened = 0
        try:
            plan = make_plan(options, end_first_wave)
            self.progress.total = plan.num_scans
            if len(plan.num_shards) == 1 and not self._is_over:
                size = min(FIRST_SHARDS_PER_ENGINE * options.num_engines, plan.num_shards[0])
                self._open(Wave(self.id, 0, 0, size))
                num_opened = size  # where the lock is lost, nothing may be written
            return plan, num_opened
        finally:
            try:
                storage.write_json(self._opened_uri, num_opened)
            except BaseException:  # as on a full disk: the first wave waits while the file is there
                storage.delete_file(self._opened_uri)
                raise

    def _open(self, wave: Wave) -> None:
        """Put a wave into the lock, before anything of it is written."""
        self._lock.update(self._store.describe_wave(wave))

    def _predict(self, wave: Wave, *, is_first: bool = False) -> set[int]:
        """Predict a wave; what a failure left over is begun again under the same names.

        Returns
        -------
        set of int
            Shards that nothing came of.
        """
        todo = set(wave.list_shards())
        failures = 0
        while True:
            before = len(todo)
            try:
                for shard in self._stream(wave.part, sorted(todo), is_first):
                    self._lock.check()
                    todo.discard(shard.number)
                    self._take(shard)
                return todo
            except RayTaskError:  # it would fail again
                self._lock.check()  # where the output is lost, that is why
                raise
            except RayError as error:
                failures = 1 if len(todo) < before else failures + 1
                if failures == MAX_FAILURES:
                    raise ClassificationError(
                        f"The stream broke {failures} times without a new prediction: "
                        f"{_first_line(error)} What was predicted is written."
                    ) from error
                self._say(f"A process was lost ({_first_line(error)}); going on with what is left.")

    def _stream(self, part: int, shards: list[int], is_first: bool) -> "Iterator[DoneShard]":
        if not shards:
            return
        stream = build_stream(
            self._task, self._stage, part, shards, self.num_decoders, is_first=is_first
        )
        batches: Any = stream.iter_batches(batch_size=None, batch_format="pyarrow")
        for batch in batches:
            for value in batch["done"].to_pylist():
                yield pickle.loads(value)  # our own worker's

    def _take(self, shard: "DoneShard") -> None:
        if self.progress.runtime is None and shard.runtime is not None:
            self._say(f"Predicting with {shard.runtime['description']}.")
            if "int8_cost" in shard.runtime:
                self._say(shard.runtime["int8_cost"])
        self.progress.add(
            shard.stats, shard.num_files, shard.num_known, shard.stages_s, shard.runtime
        )
        self._on_progress(self.progress)


def _check_complete(todo: set[int]) -> None:
    if todo:
        raise ClassificationError(
            f"Ray Data lost {len(todo):,} shards. Give the same command again; "
            "this is a defect of brainray, please report it."
        )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
