"""The driver's side of training: start Ray Train's trainer and relay progress from its workers."""

import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    Result,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    UserCallback,
)
from ray.train.torch import TorchTrainer
from ray.util.queue import Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from brainray import runlog
from brainray.cluster import Bundle, report_waiting
from brainray.errors import TrainingError
from brainray.evaluation.prepared import PreparedData
from brainray.io import storage
from brainray.model.network import StateDict
from brainray.runlog import Log
from brainray.training.loader import (
    TRAIN_DATASET,
    LoaderSetup,
    build_data_config,
    build_train_dataset,
    choose_loader,
)
from brainray.training.loop import WorkerSetup
from brainray.training.mlflow_log import open_log
from brainray.training.run import (
    CHECKPOINTS_FOLDER,
    RECORDS_FILE,
    OnStep,
    TrainJob,
    describe_training_needs,
)


def fit(
    job: TrainJob,
    data: PreparedData,
    weights: StateDict | None,
    log: Log,
    on_step: OnStep,
    callbacks: Sequence[UserCallback] = (),
) -> Result:
    """Run the training loop on Ray Train's workers.

    ``callbacks`` are Ray Train's ``UserCallback``, called after each epoch.

    Raises
    ------
    ConfigError
        The requested loader cannot hold these images.
    TrainingError
        The workers failed more often than ``max_failures``.
    """
    need = describe_training_needs(job.scaling)
    loader = _plan_loader(job, data, need.bundle["CPU"], log)
    with _relay_progress(job, log, on_step) as messages, report_waiting([need], log):
        setup = WorkerSetup(
            config=job.config,
            loader=loader,
            weights=weights,
            records_uri=job.at(RECORDS_FILE),
            tensorboard_uri=job.at("tensorboard"),
            messages=messages,
        )
        trainer = _build_trainer(job, setup, need.bundle, callbacks)
        on_interrupt = signal.getsignal(signal.SIGINT)
        try:
            return trainer.fit()
        except TrainingFailedError as error:
            raise TrainingError(f"Training failed: {_find_cause(error)}") from error
        except SystemExit as stop:  # Ray Train's handler of Ctrl-C exits this way (2.60)
            raise KeyboardInterrupt from stop
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGINT, on_interrupt)


def _plan_loader(
    job: TrainJob, data: PreparedData, cpus_per_worker: float, log: Log
) -> LoaderSetup:
    """Choose how the workers load images; a stream decodes on the CPUs that they do not use."""
    preprocessing = job.config.preprocessing
    free_cpus = ray.cluster_resources()["CPU"] - job.scaling.num_workers * cpus_per_worker
    loader = LoaderSetup(
        kind=choose_loader(job.scaling.loader, data.store, preprocessing),
        train_ids=data.select("train"),
        val_ids=data.select("val"),
        labels=data.labels,
        store=data.store,
        preprocessing=preprocessing,
        global_batch_size=job.config.global_batch_size,
        seed=job.config.seed,
        num_tasks=max(1, int(free_cpus)),
    )
    num_images = len(loader.train_ids) + len(loader.val_ids)
    mebibytes = num_images * preprocessing.size_px**2 / 2**20
    log(
        f"Loader: {loader.kind}; {mebibytes:,.0f} MiB of pixels at {preprocessing.size_px} px "
        + (
            "in the object store."
            if loader.kind == "resident"
            else f"decoded in each epoch by {loader.num_tasks} concurrent tasks."
        )
    )
    return loader


def _build_trainer(
    job: TrainJob, setup: WorkerSetup, bundle: Bundle, callbacks: Sequence[UserCallback]
) -> TorchTrainer:
    """Build Ray Train's trainer: workers, resources, failure and checkpoint policy."""

    # A nested function is pickled as a whole. Of a module's, Ray Train's controller would import
    # the module, and with it torch and torchvision, for nothing.
    def train_worker(loop_config: dict[str, Any]) -> None:
        from brainray.training.loop import Worker

        Worker(ray.get(loop_config["setup"])).run()

    scaling, is_stream = job.scaling, setup.loader.kind == "stream"
    filesystem, path = storage.resolve(job.output_uri)
    fewest = scaling.min_workers or scaling.num_workers
    is_elastic = fewest < scaling.num_workers
    return TorchTrainer(
        train_worker,
        train_loop_config={"setup": ray.put(setup)},
        datasets={TRAIN_DATASET: build_train_dataset(setup.loader)} if is_stream else None,
        dataset_config=build_data_config() if is_stream else None,
        scaling_config=ScalingConfig(
            num_workers=(fewest, scaling.num_workers) if is_elastic else scaling.num_workers,  # type: ignore[arg-type]  # Ray takes a range
            use_gpu=scaling.use_gpu,
            resources_per_worker=bundle,
            # A CPU worker uses all cores of its node.
            placement_strategy="PACK" if scaling.use_gpu else "SPREAD",
        ),
        run_config=RunConfig(
            name=CHECKPOINTS_FOLDER,
            storage_path=path,
            storage_filesystem=filesystem,
            failure_config=FailureConfig(max_failures=scaling.max_failures),
            checkpoint_config=CheckpointConfig(
                num_to_keep=1,  # the best; Ray Train also keeps the last
                checkpoint_score_attribute=job.config.monitor,
            ),
            callbacks=list(callbacks),  # type: ignore[arg-type]  # Ray annotates its internal type
        ),
    )


def _find_cause(error: TrainingFailedError) -> str:
    failures = getattr(error, "worker_failures", None) or {}
    first = next(iter(failures.values()), error)
    lines = [line for line in str(first).strip().splitlines() if line.strip()]
    return lines[-1] if lines else type(first).__name__


@contextmanager
def _relay_progress(job: TrainJob, log: Log, on_step: OnStep) -> Iterator[Queue]:
    """Relay messages of rank 0 to ``log`` and ``on_step``, and its records to MLflow."""
    log_record = open_log(job)
    # On the driver's node, so that it is not lost with a worker's.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    messages = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})

    def relay() -> None:
        while True:
            try:
                message = messages.get()
            except ray.exceptions.RayError:
                return
            if message is None:
                return
            if "record" in message:
                log(runlog.format_epoch(message["record"]))
                log_record(message["record"])
            elif "line" in message:
                log(message["line"])
            else:
                on_step(message)

    thread = threading.Thread(target=relay, name="relay", daemon=True)
    thread.start()
    timeout_s: float | None = 5
    try:
        yield messages
        timeout_s = None  # until all is relayed
    finally:
        with suppress(ray.exceptions.RayError):  # the queue may be lost with its node
            messages.put(None)
        thread.join(timeout_s)
        messages.shutdown(grace_period_s=0)
