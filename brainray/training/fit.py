"""The fit: the training loop on Ray Train's workers, and what the person hears of it meanwhile."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.train import CheckpointConfig, FailureConfig, Result, RunConfig, ScalingConfig
from ray.train.torch import TorchTrainer
from ray.train.v2.api.exceptions import TrainingFailedError
from ray.util.queue import Empty, Queue

from brainray import runlog, storage
from brainray.cluster import Need, hears_notices, list_nodes, share_cpus, tell_waiting
from brainray.errors import TrainingError
from brainray.evaluation.judge import Say
from brainray.evaluation.prepared import PreparedData
from brainray.training.config import Placement
from brainray.training.loop import WorkerSetup
from brainray.training.run import CHECKPOINTS_FOLDER, RECORDS_FILE, Tick, TrainJob
from brainray.training.worker import train_worker


def describe_training_needs(placement: Placement) -> Need:
    """Say what training cannot do without."""
    least = placement.min_workers or placement.num_workers
    others = {"GPU": 1.0} if placement.use_gpu else {}
    return Need(
        bundle={"CPU": share_cpus(placement.num_workers, list_nodes(), **others), **others},
        count=least,
        what="training worker",
        remedy="lower --num-workers, or let it go on with fewer (--min-workers)"
        + (", or leave --use-gpu out" if placement.use_gpu else ""),
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
        train_loop_config={"setup": ray.put(setup)},
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
