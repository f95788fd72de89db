"""The main job: from a folder of scans to a sealed classifier with its metrics and report."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.train import CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.queue import Empty, Queue

from brainray import runlog, storage
from brainray.dataset.scan import ScanStore
from brainray.dataset.source import find_samples
from brainray.dataset.split import hash_manifest
from brainray.errors import ConfigError, TrainingError
from brainray.model.calibration import MIN_IMAGES, fit_trust
from brainray.model.classifier import save_classifier
from brainray.model.network import (
    STAGE_WIDTHS,
    StateDict,
    build_network,
    fetch_weights,
    measure_statistics,
)
from brainray.model.trust import Outputs, Trust
from brainray.pipelines.checkpoint import load_network_weights
from brainray.pipelines.cluster import (
    check_fits,
    connect_ray,
    describe_training_needs,
    hears_notices,
    tell_waiting,
)
from brainray.pipelines.config import Placement, TrainConfig, find_differences
from brainray.pipelines.data import MANIFEST_FILE, PreparedData, prepare_training_data
from brainray.pipelines.judge import METRICS_FILE, Say, compute_outputs, judge_and_report
from brainray.pipelines.loop import WorkerSetup, train_worker
from brainray.pixels.preprocess import normalise_images
from brainray.provenance import collect_versions, read_code_revision

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
RECORDS_FILE = "metrics.jsonl"
CLASSIFIER_FOLDER = "classifier"
CHECKPOINTS_FOLDER = "checkpoints"

MAX_LIKENESS_IMAGES = 4000
"""Training images whose features say where such images lie; more would only take time."""

MAX_STATISTICS_IMAGES = 2048
"""Training images that give the sealed network its statistics; a mean over so many is settled."""
STATISTICS_BATCH_SIZE = 128
"""Of as many images is each of the variances that are averaged."""

Tick = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainJob:
    """One training run: what, from where, to where, on what."""

    data_uri: str
    output_uri: str
    config: TrainConfig
    placement: Placement
    recipe: str = "custom"
    folds: int | None = None
    """Folds of the cross-validation that this is; None for a run of its own."""
    fold: int | None = None
    """Which of them it holds out, from 0; None for all of them, one after the other."""

    def __post_init__(self) -> None:
        if self.folds is not None and self.folds < 2:
            raise ConfigError(f"folds must be at least 2, got {self.folds}.")

    def at(self, *parts: str) -> str:
        """Return a place below the output."""
        return storage.join(self.output_uri, *parts)


def train(
    job: TrainJob,
    *,
    say: Say = logger.info,
    tick: Tick = lambda _: None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Train, seal, judge and report; go on where an earlier call of the same job stopped.

    Parameters
    ----------
    job : TrainJob
        What to train.
    say : callable
        Takes a line for a person.
    tick : callable
        Takes progress within an epoch: ``epoch``, ``step``, ``num_steps``.
    verbose : bool
        Whether Ray's own lines are shown.

    Returns
    -------
    dict
        The content of metrics.json.

    Raises
    ------
    UserError
        Something the user can mend; nothing is lost.
    TrainingError
        The workers failed more often than ``max_failures``.
    """
    assert job.folds is None, "cross_validate() is for this"
    finished = find_finished(job, say)
    if finished is not None:
        return finished
    found = find_samples(job.data_uri, job.config.classes)
    weights = fetch_weights(job.config.weights, job.config.weights_uri)
    connect_ray(verbose=verbose)
    check_fits(describe_training_needs(job.placement))
    data = prepare_training_data(found, job.config)
    describe_plan(job, data, ("train", "val", "test"), say)
    keep_manifest(job, data)
    return train_prepared(job, data, ray.put(weights), say, tick)


def train_prepared(
    job: TrainJob,
    data: PreparedData,
    weights: "ray.ObjectRef[Any]",
    say: Say,
    tick: Tick,
) -> dict[str, Any]:
    """Train, seal, judge and report, on data that are split and on weights that are fetched."""
    result = fit(job, data, weights, say, tick)
    seal(job, data, result, say)
    return judge(job, data, say)


def find_finished(job: TrainJob, say: Say) -> dict[str, Any] | None:
    """Return the metrics of this very run if it is finished; say where it stands.

    Raises
    ------
    ConfigError, StorageError
        As :func:`check_run`.
    """
    going_on = check_run(job)
    if storage.exists(job.at(METRICS_FILE)):
        say(f"Already finished: {job.output_uri}. Give another --output-uri to train anew.")
        return dict(storage.read_json(job.at(METRICS_FILE)))
    if going_on:
        say(f"Going on with the run in {job.output_uri}.")
    return None


def check_run(job: TrainJob) -> bool:
    """Tell whether the output holds this run already, begun or finished.

    Raises
    ------
    ConfigError
        The output belongs to a run of another configuration.
    StorageError
        The output cannot be written.
    """
    given = describe_run(job)
    try:
        saved = storage.read_json(job.at(RUN_FILE))
    except FileNotFoundError:
        storage.check_writable(job.output_uri)
        return False
    different = find_differences({name: saved.get(name) for name in given}, given)
    if different:
        raise ConfigError(
            f"'{job.output_uri}' holds a run of another configuration: "
            f"{'; '.join(line.removeprefix('config.') for line in different)}. "
            "Give the same values to go on with it, or another --output-uri."
        )
    return True


def describe_run(job: TrainJob) -> dict[str, Any]:
    """Return what makes two calls the same run, ready for JSON."""
    return {
        "data_uri": job.data_uri,
        "folds": job.folds,
        "fold": job.fold,
        "config": _plain(asdict(job.config)),
    }


def _plain(value: Any) -> Any:  # noqa: ANN401 - any configuration value
    """Return a configuration value as JSON will give it back: tuples become lists."""
    if isinstance(value, dict):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple | list) else value


def describe_plan(job: TrainJob, data: PreparedData, splits: Sequence[str], say: Say) -> None:
    """Say what the data set holds, and what of the recipe is left out."""
    say(describe_data(data, splits))
    if job.config.head_epochs and not job.config.starts_with_head:
        say("No weights to start from: the head-only epochs are left out.")


def describe_data(data: PreparedData, splits: Sequence[str]) -> str:
    """Say in one line what the data set holds."""
    counts = ", ".join(f"{len(data.select(split)):,} {split}" for split in splits)
    groups = len(set(data.manifest["group"].to_pylist()))
    line = f"Data: {counts} images in {groups:,} groups of near-identical slices"
    rejected = data.count_rejected()
    if rejected:
        line += "; rejected " + ", ".join(f"{n} {reason}" for reason, n in rejected.items())
    passed_over = data.found.describe_passed_over()
    if passed_over:
        line += f"; passed over {passed_over}"
    held = "held in the object store" if data.store.in_object_store else "streamed from storage"
    return f"{line}; bytes {held}."


def keep_manifest(job: TrainJob, data: PreparedData) -> None:
    """Claim the output for this run; on going on, check that the data set is still the same.

    Raises
    ------
    ConfigError
        The data set has changed since the run began.
    """
    uri = job.at(MANIFEST_FILE)
    try:
        saved = storage.read_table(uri)
    except FileNotFoundError:
        about = {"recipe": job.recipe, "versions": collect_versions()}
        storage.write_json(job.at(RUN_FILE), describe_run(job) | about)
        storage.write_table(uri, data.manifest)  # last: without it, both are written again
        return
    if hash_manifest(saved) != hash_manifest(data.manifest):
        raise ConfigError(
            f"The data at '{job.data_uri}' are not those that the run in '{job.output_uri}' "
            f"began with ({saved.num_rows} scans then, {data.manifest.num_rows} now, or other "
            "content). Restore them, or give another --output-uri."
        )


def fit(
    job: TrainJob,
    data: PreparedData,
    weights: "ray.ObjectRef[Any]",
    say: Say,
    tick: Tick,
) -> Result:
    """Run the training loop on Ray Train's workers.

    Raises
    ------
    TrainingError
        The workers failed more often than ``max_failures``.
    """
    need = describe_training_needs(job.placement)
    with relay_messages(say, tick) as messages, tell_waiting([need], say):
        setup = WorkerSetup(
            config=job.config,
            train_indices=data.select("train"),
            val_indices=data.select("val"),
            labels=data.labels,
            row_groups=number_row_groups(data) if not data.store.in_object_store else None,
            store=data.store,
            weights=weights,
            checkpoints_uri=job.at(CHECKPOINTS_FOLDER),
            records_uri=job.at(RECORDS_FILE),
            tensorboard_uri=job.at("tensorboard"),
            cpus_per_worker=need.bundle["CPU"],
            use_gpu=job.placement.use_gpu,
            heeds_notices=hears_notices(),
            messages=messages,
        )
        trainer = build_trainer(job, setup)
        on_interrupt = signal.getsignal(signal.SIGINT)
        try:
            return trainer.fit()
        except TrainingFailedError as error:
            raise TrainingError(f"Training failed: {_find_cause(error)}") from error
        except SystemExit as stop:  # Ray Train's own handler of Ctrl-C ends so (2.60)
            raise KeyboardInterrupt from stop
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, on_interrupt)


def build_trainer(job: TrainJob, setup: WorkerSetup) -> TorchTrainer:
    """Say to Ray Train what runs where, and what is kept of it."""
    placement = job.placement
    filesystem, path = storage.resolve(job.output_uri)
    resources = {"CPU": setup.cpus_per_worker} | ({"GPU": 1.0} if placement.use_gpu else {})
    return TorchTrainer(
        train_worker,
        train_loop_config={"setup": setup},
        scaling_config=ScalingConfig(
            num_workers=placement.worker_range,  # type: ignore[arg-type]  # Ray takes a range
            use_gpu=placement.use_gpu,
            resources_per_worker=resources,
            # On a CPU, a worker computes with all cores of its node.
            placement_strategy="PACK" if placement.use_gpu else "SPREAD",
        ),
        run_config=RunConfig(
            name=CHECKPOINTS_FOLDER,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=placement.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=1,  # the best; Ray Train keeps the last as well
                checkpoint_score_attribute=job.config.monitor,
            ),
        ),
    )


def number_row_groups(data: PreparedData) -> NDArray[np.int64] | None:
    """Give a number to the Parquet row group of every training image; None for image files."""
    rows = data.found.samples.take(data.select("train"))
    if (rows["row_group"].to_numpy() < 0).all():
        return None
    keys = [
        f"{u}#{g}"
        for u, g in zip(rows["uri"].to_pylist(), rows["row_group"].to_pylist(), strict=True)
    ]
    return np.unique(keys, return_inverse=True)[1].astype(np.int64)


def _find_cause(error: BaseException) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    first = next(iter(failures.values()), error)
    lines = [line for line in str(first).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(first).__name__


@contextmanager
def relay_messages(say: Say, tick: Tick) -> Iterator[Queue]:
    """Show what rank 0 says while the driver waits for it."""
    messages = Queue(actor_options={"num_cpus": 0})
    stopped = threading.Event()

    def relay() -> None:
        while not stopped.is_set():
            try:
                message = messages.get(timeout=1.0)
            except Empty:
                continue
            except ray.exceptions.RayError:
                return
            if "record" in message:
                say(runlog.format_epoch(message["record"]))
            elif "line" in message:
                say(message["line"])
            else:
                tick(message)

    thread = threading.Thread(target=relay, name="relay", daemon=True)
    thread.start()
    try:
        yield messages
        while not messages.empty() and thread.is_alive():
            time.sleep(0.05)
    finally:
        stopped.set()
        thread.join(timeout=5)
        messages.shutdown(grace_period_s=0)


def seal(job: TrainJob, data: PreparedData, result: Result, say: Say) -> None:
    """Seal the weights of the best epoch, then with them what their answers are worth."""
    best = result.get_best_checkpoint(job.config.monitor, "max")
    if best is None:
        raise TrainingError("Training ended without a checkpoint.")
    with best.as_directory() as folder:
        state = load_network_weights(Path(folder))
    if job.config.batch_norm != "frozen":
        state = settle_statistics(job, data, state, say)
    save = partial(
        save_classifier,
        job.at(CLASSIFIER_FOLDER),
        state,
        classes=job.config.classes,
        preprocessing=job.config.preprocessing,
        provenance={
            "training": {
                "recipe": job.recipe,
                "config": _plain(asdict(job.config)),
                "num_train_images": len(data.select("train")),
            },
            "data_manifest_sha256": hash_manifest(data.manifest),
            "versions": collect_versions(),
            "code_revision": read_code_revision(),
        },
    )
    save()
    trust = fit_trust_on(job, data, say)
    if trust is not None:
        save(trust=trust)


def settle_statistics(job: TrainJob, data: PreparedData, state: StateDict, say: Say) -> StateDict:
    """Give the network the statistics of training images as any door will show them.

    Those of the training are of augmented images, which are smoother: on the Kaggle set's
    validation images (`cpu` recipe, seed 0) they cost 2.8 points of accuracy.
    """
    train = data.select("train")
    dice = np.random.default_rng(job.config.seed)
    chosen = dice.permutation(train)[:MAX_STATISTICS_IMAGES]
    say(f"Measuring the normalisation's statistics on {len(chosen):,} images as they are.")
    use_gpu = job.placement.use_gpu
    task = ray.remote(num_cpus=1, num_gpus=1 if use_gpu else 0)(_measure_statistics)
    settled: StateDict = ray.get(task.remote(state, chosen, data.store, job.config, use_gpu))
    return settled


def _measure_statistics(
    state: StateDict,
    indices: NDArray[np.int64],
    store: ScanStore,
    config: TrainConfig,
    use_gpu: bool,
) -> StateDict:
    """Return the weights with new statistics; runs as a Ray task."""
    device = torch.device("cuda" if use_gpu else "cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    network = build_network(len(config.classes), weights=state)
    network = network.to(device).to(memory_format=torch.channels_last)
    images = store.load_images(indices.tolist(), config.preprocessing, config.limits)
    batches = (
        normalise_images(torch.from_numpy(part).to(device), config.preprocessing)
        for part in np.array_split(images, -(-len(images) // STATISTICS_BATCH_SIZE))
    )
    bf16 = config.precision == "bf16"
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=bf16):
        measure_statistics(network, batches)
    return {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}


def fit_trust_on(job: TrainJob, data: PreparedData, say: Say) -> Trust | None:
    """Fit what the sealed classifier says of its own answers; None where there is too little."""
    train, val = data.select("train"), data.select("val")
    if min(len(train), len(val)) < MIN_IMAGES:
        say(
            f"Fewer than {MIN_IMAGES} training or validation images: no calibration, no threshold, "
            "no rejection of foreign images."
        )
        return None
    dice = np.random.default_rng(job.config.seed)
    chosen = np.sort(dice.choice(train, min(len(train), MAX_LIKENESS_IMAGES), replace=False))
    say(f"Calibrating on {len(val):,} val images, beside {len(chosen):,} of train.")
    train_outputs, val_outputs = (
        Outputs(found["logits"], found["features"])
        for found in (
            compute_outputs(
                indices,
                data.store,
                job.at(CLASSIFIER_FOLDER),
                limits=job.config.limits,
                use_gpu=job.placement.use_gpu,
                with_features=True,
            )
            for indices in (chosen, val)
        )
    )
    groups = data.manifest["group"].take(val).to_numpy()
    return fit_trust(
        train_outputs,
        data.labels[chosen],
        val_outputs,
        data.labels[val],
        groups,
        job.config.trust,
        widths=STAGE_WIDTHS,
    )


def summarise_training(job: TrainJob, records: list[runlog.Record]) -> dict[str, Any]:
    """Say what the training itself took and brought."""
    best = max(records, key=lambda record: (record[job.config.monitor], -record["epoch"]))
    return {
        "recipe": job.recipe,
        "num_epochs": len(records),
        "best_epoch": best["epoch"],
        "monitor": job.config.monitor,
        "best_score": best[job.config.monitor],
        "time_s": records[-1]["time_s"],
        "images_per_s": sum(r["num_train_images"] for r in records) / records[-1]["time_s"],
        "world_size": records[-1]["world_size"],
        "hardware": records[-1].get("hardware"),  # a run that began with an older version has none
    }


def judge(job: TrainJob, data: PreparedData, say: Say) -> dict[str, Any]:
    """Judge the sealed classifier on validation and test, and write the report."""
    records = runlog.read_records(job.at(RECORDS_FILE))
    training = summarise_training(job, records)
    device = "GPU" if job.placement.use_gpu else "CPU"
    return judge_and_report(
        data,
        output_uri=job.output_uri,
        classifier_uri=job.at(CLASSIFIER_FOLDER),
        splits=("val", "test"),
        limits=job.config.limits,
        use_gpu=job.placement.use_gpu,
        title="brainray training report",
        configuration=_plain(asdict(job.config)),
        facts={
            "Recipe": job.recipe,
            "Data": job.data_uri,
            "Workers": f"{training['world_size']} ({device})",
            "Training time": runlog.format_duration(training["time_s"]),
            "Sealed epoch": f"{training['best_epoch'] + 1} of {training['num_epochs']}",
        },
        say=say,
        training=training,
        records=records,
    )
