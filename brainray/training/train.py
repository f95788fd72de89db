"""The main job: from a folder of scans to a classifier with its metrics and report."""

import logging
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import ray

from brainray import runlog
from brainray.cluster import check_fits, connect_ray
from brainray.data.labelled import find_samples
from brainray.evaluation.prepared import PreparedData
from brainray.evaluation.scoring import evaluate_and_report
from brainray.inference.engine import EngineOptions
from brainray.model.network import fetch_weights
from brainray.runlog import Log
from brainray.training.finalize import export_classifier
from brainray.training.fit import describe_training_needs, fit
from brainray.training.prepare import prepare_training_data
from brainray.training.run import (
    CLASSIFIER_FOLDER,
    RECORDS_FILE,
    OnStep,
    TrainJob,
    find_finished,
    keep_manifest,
    make_plain,
)

logger = logging.getLogger(__name__)


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
    found = find_samples(job.data_uri, job.config.classes)
    weights = fetch_weights(job.config.weights, job.config.weights_uri)
    connect_ray(verbose=verbose)
    check_fits(describe_training_needs(job.scaling))
    data = prepare_training_data(found, job.config, job.scaling.loader)
    describe_plan(job, data, ("train", "val", "test"), log)
    keep_manifest(job, data)
    return train_prepared(job, data, ray.put(weights), log, on_step)


def train_prepared(
    job: TrainJob,
    data: PreparedData,
    weights: "ray.ObjectRef[Any]",
    log: Log,
    on_step: OnStep,
) -> dict[str, Any]:
    """Train on data that are already split, export the classifier and evaluate it."""
    result = fit(job, data, weights, log, on_step)
    export_classifier(job, data, result, log)
    return evaluate_classifier(job, data, log)


def describe_plan(job: TrainJob, data: PreparedData, splits: Sequence[str], log: Log) -> None:
    """Log the size of each split, and which part of the recipe is skipped."""
    log(describe_data(data, splits))
    if job.config.head_epochs and not job.config.starts_with_head:
        log("Head-only epochs are skipped: they need pretrained weights.")


def describe_data(data: PreparedData, splits: Sequence[str]) -> str:
    """Describe the data set in one line."""
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
    return f"{line}; bytes {held}."


def summarise_training(job: TrainJob, records: list[runlog.Record]) -> dict[str, Any]:
    """Summarise the run's time, speed and best epoch for metrics.json."""
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
        "hardware": records[-1]["hardware"],
        "precision": records[-1]["precision"],
    }


def evaluate_classifier(job: TrainJob, data: PreparedData, log: Log) -> dict[str, Any]:
    """Evaluate the classifier on validation and test images, and write the report."""
    records = runlog.read_records(job.at(RECORDS_FILE))
    training = summarise_training(job, records)
    device = "GPU" if job.scaling.use_gpu else "CPU"
    return evaluate_and_report(
        data,
        output_uri=job.output_uri,
        classifier_uri=job.at(CLASSIFIER_FOLDER),
        splits=("val", "test"),
        engine=EngineOptions(use_gpu=job.scaling.use_gpu),
        title="brainray training report",
        configuration=make_plain(asdict(job.config)),
        facts={
            "Recipe": job.recipe,
            "Data": job.data_uri,
            "Workers": f"{training['world_size']} ({device}, {training['precision']})",
            "Training time": runlog.format_duration(training["time_s"]),
            "Exported epoch": f"{training['best_epoch'] + 1} of {training['num_epochs']}",
        },
        log=log,
        training=training,
        records=records,
    )
