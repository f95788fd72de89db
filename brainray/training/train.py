"""The main job: from a folder of scans to a calibrated classifier with its metrics and report."""

import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.train import Result
from torch.optim.swa_utils import update_bn

from brainray import runlog
from brainray.data.labelled import find_samples
from brainray.data.scan_store import ScanStore
from brainray.data.splits import hash_manifest
from brainray.errors import TrainingError
from brainray.evaluation.prepared import PreparedData
from brainray.evaluation.scoring import evaluate_and_report
from brainray.inference.engine import EngineOptions
from brainray.inference.predict import PredictStage, plan_pool
from brainray.inference.samples import predict_samples
from brainray.inference.schema import stack_lists
from brainray.io.provenance import collect_versions, read_code_revision
from brainray.model.calibration import Calibration, Outputs
from brainray.model.classifier import save_classifier
from brainray.model.fit_calibration import fit_calibration
from brainray.model.network import (
    STAGE_WIDTHS,
    StateDict,
    build_network,
    normalise_images,
    round_weights,
)
from brainray.model.precision import Precision
from brainray.runlog import Log
from brainray.training.checkpoint import load_network_weights
from brainray.training.config import TrainConfig
from brainray.training.fit import fit
from brainray.training.run import (
    CLASSIFIER_FOLDER,
    RECORDS_FILE,
    OnStep,
    TrainJob,
    find_finished,
    keep_manifest,
    make_plain,
    open_data,
    split_training_data,
)

logger = logging.getLogger(__name__)

MIN_IMAGES = 100
"""With fewer training or validation images, no calibration is fitted."""
MAX_OOD_IMAGES = 4000
"""Training images that the out-of-distribution detector is fitted to; more only take time."""
MAX_STATISTICS_IMAGES = 2048
"""Training images that the exported batch-norm statistics are estimated from."""
STATISTICS_BATCH_SIZE = 128
"""Images of each batch whose statistics are averaged."""


def train(
    job: TrainJob,
    *,
    log: Log = logger.info,
    on_step: OnStep = lambda _: None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Train a classifier, evaluate it and write its report; resume an interrupted run.

    Parameters
    ----------
    job : TrainJob
        What to train.
    log : callable
        Called with each line of progress.
    on_step : callable
        Called within an epoch with ``epoch``, ``step`` and ``num_steps``.
    verbose : bool
        Show Ray's own log lines.

    Returns
    -------
    dict
        The content of metrics.json.

    Raises
    ------
    UserError
        The user can fix it; the run so far is kept.
    TrainingError
        The workers failed more often than ``max_failures``.
    """
    assert job.folds is None, "cross_validate() is for this"
    finished = find_finished(job, log)
    if finished is not None:
        return finished
    grouped, weights = open_data(
        job, find_samples(job.data_uri, job.config.classes), verbose=verbose
    )
    data = split_training_data(grouped, job.config)
    log_plan(job, data, ("train", "val", "test"), log)
    keep_manifest(job, data)
    return train_prepared(job, data, weights, log, on_step)


def log_plan(job: TrainJob, data: PreparedData, splits: Sequence[str], log: Log) -> None:
    """Log the data set with the size of each split, and which part of the recipe is skipped."""
    counts = ", ".join(f"{len(data.select(split)):,} {split}" for split in splits)
    groups = len(set(data.manifest["group"].to_pylist()))
    line = f"Data: {counts} images in {groups:,} groups of near-identical slices"
    if data.num_named:
        line += f" and of patients ({data.num_named:,} images name a group or a patient)"
    rejected = data.count_rejected()
    if rejected:
        line += "; rejected " + ", ".join(f"{n} {reason}" for reason, n in rejected.items())
    skipped = data.found.describe_skipped()
    if skipped:
        line += f"; skipped {skipped}"
    held = "held in the object store" if data.store.in_object_store else "streamed from storage"
    log(f"{line}; bytes {held}.")
    if job.config.head_epochs and not job.config.starts_with_head:
        log("Head-only epochs are skipped: they need pretrained weights.")


def train_prepared(
    job: TrainJob,
    data: PreparedData,
    weights: StateDict | None,
    log: Log,
    on_step: OnStep,
) -> dict[str, Any]:
    """Train on data that are already split, export the classifier, evaluate it and report."""
    _export_classifier(job, data, fit(job, data, weights, log, on_step), log)
    records = runlog.read_records(job.at(RECORDS_FILE))
    monitor, last = job.config.monitor, records[-1]
    best = max(records, key=lambda record: (record[monitor], -record["epoch"]))
    device = "GPU" if job.scaling.use_gpu else "CPU"
    return evaluate_and_report(
        data,
        output_uri=job.output_uri,
        classifier_uri=job.at(CLASSIFIER_FOLDER),
        splits=("val", "test"),
        engine=EngineOptions(use_gpu=job.scaling.use_gpu),
        title="brainray training report",
        configuration=make_plain(job.config),
        facts={
            "Recipe": job.recipe,
            "Data": job.data_uri,
            "Workers": f"{last['world_size']} ({device}, {last['precision']})",
            "Training time": runlog.format_duration(last["time_s"]),
            "Exported epoch": f"{best['epoch'] + 1} of {len(records)}",
        },
        log=log,
        training={
            "recipe": job.recipe,
            "num_epochs": len(records),
            "best_epoch": best["epoch"],
            "monitor": monitor,
            "best_score": best[monitor],
            "time_s": last["time_s"],
            "images_per_s": sum(r["num_train_images"] for r in records) / last["time_s"],
            "world_size": last["world_size"],
            "hardware": last["hardware"],
            "precision": last["precision"],
        },
        records=records,
    )


def _export_classifier(job: TrainJob, data: PreparedData, result: Result, log: Log) -> None:
    """Save the best epoch's weights as a classifier bundle, then add its calibration."""
    best = result.get_best_checkpoint(job.config.monitor, "max")
    if best is None:
        raise TrainingError("Training ended without a checkpoint.")
    with best.as_directory() as folder:
        state = round_weights(load_network_weights(Path(folder)))
    precision: Precision = runlog.read_records(job.at(RECORDS_FILE))[-1]["precision"]
    if job.config.batch_norm != "frozen":
        rng, train = np.random.default_rng(job.config.seed), data.select("train")
        chosen = rng.permutation(train)[:MAX_STATISTICS_IMAGES]
        log(f"Estimating batch-norm statistics on {len(chosen):,} unaugmented images.")
        use_gpu = job.scaling.use_gpu
        measure = ray.remote(num_cpus=1, num_gpus=1 if use_gpu else 0)(_measure_statistics)
        state = ray.get(measure.remote(state, chosen, data.store, job.config, precision, use_gpu))
    save = partial(
        save_classifier,
        job.at(CLASSIFIER_FOLDER),
        round_weights(state),
        classes=job.config.classes,
        preprocessing=job.config.preprocessing,
        provenance={
            "training": {
                "recipe": job.recipe,
                "config": make_plain(job.config),
                "num_train_images": len(data.select("train")),
                "precision": precision,
            },
            "data_manifest_sha256": hash_manifest(data.manifest),
            "versions": collect_versions(),
            "code_revision": read_code_revision(),
        },
    )
    save()
    calibration = calibrate_classifier(job, data, log)
    if calibration is not None:
        save(calibration=calibration)


def _measure_statistics(
    state: StateDict,
    indices: NDArray[np.int64],
    store: ScanStore,
    config: TrainConfig,
    precision: Precision,
    use_gpu: bool,
) -> StateDict:
    """Return the weights with batch-norm statistics of unaugmented images; runs as a Ray task.

    The running statistics are of augmented images. On the Kaggle set's validation images (`cpu`
    recipe, seed 0) they cost 2.8 points of accuracy.
    """
    device = torch.device("cuda" if use_gpu else "cpu")
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    network = build_network(len(config.classes), weights=state)
    network = network.to(device).to(memory_format=torch.channels_last)
    images = store.load_images(indices.tolist(), config.preprocessing)
    batches = (
        normalise_images(torch.from_numpy(part).to(device), config.preprocessing)
        for part in np.array_split(images, -(-len(images) // STATISTICS_BATCH_SIZE))
    )
    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=precision == "bf16"):
        update_bn(batches, network)
    return {name: tensor.cpu().contiguous() for name, tensor in network.state_dict().items()}


def calibrate_classifier(job: TrainJob, data: PreparedData, log: Log) -> Calibration | None:
    """Fit the calibration to predictions of the engine that inference uses.

    Its ``facts`` name engine and precision. Returns None if there are too few images.
    """
    train, val = data.select("train"), data.select("val")
    if min(len(train), len(val)) < MIN_IMAGES:
        log(
            f"Fewer than {MIN_IMAGES} training or validation images: no calibration, no "
            "abstention, no out-of-distribution detection."
        )
        return None
    rng = np.random.default_rng(job.config.seed)
    chosen = np.sort(rng.choice(train, min(len(train), MAX_OOD_IMAGES), replace=False))
    log(f"Calibrating on {len(val):,} validation and {len(chosen):,} training images.")
    pool = plan_pool(EngineOptions(use_gpu=job.scaling.use_gpu))
    stage = PredictStage.open(job.at(CLASSIFIER_FOLDER), pool, outputs=("logits", "features"))
    rows, runtime = predict_samples(stage, data.store, data.scans, np.concatenate([chosen, val]))
    logits, features = stack_lists(rows["logits"]), stack_lists(rows["features"])
    count = len(chosen)
    calibration = fit_calibration(
        Outputs(logits[:count], features[:count]),
        data.labels[chosen],
        Outputs(logits[count:], features[count:]),
        data.labels[val],
        data.manifest["group"].take(val).to_numpy(),
        job.config.calibration,
        widths=STAGE_WIDTHS,
    )
    fitted_with = {"engine": runtime["backend"], "precision": runtime["precision"]}
    return replace(calibration, facts=calibration.facts | fitted_with)
