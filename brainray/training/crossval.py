"""Cross-validation: each training image is predicted by a classifier that was not trained on it."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from brainray import runlog
from brainray.data.labelled import FoundSamples, find_samples
from brainray.data.splits import assign_folds, assign_splits
from brainray.evaluation.prepared import GroupedData, PreparedData, split_samples
from brainray.evaluation.rows import read_evaluation_rows
from brainray.evaluation.scoring import (
    METRICS_FILE,
    METRICS_SCHEMA_VERSION,
    draw_mistakes,
    evaluate_split,
)
from brainray.inference.schema import stack_lists
from brainray.io import storage
from brainray.io.provenance import describe_versions, read_code_revision
from brainray.metrics import compute_curves
from brainray.model.network import StateDict
from brainray.reports.evaluation import render_evaluation_report
from brainray.runlog import Log
from brainray.training.config import TrainConfig
from brainray.training.run import (
    OnStep,
    TrainJob,
    check_run,
    find_finished,
    keep_manifest,
    make_plain,
    open_data,
)
from brainray.training.train import log_plan, train_prepared

logger = logging.getLogger(__name__)

Numbers = NDArray[np.int64]

POOLED = "cv"
"""Name of the pooled predictions of all folds, used in place of a split's name."""

FOLD_SCORES = ("accuracy", "macro_f1", "macro_auroc")


def cross_validate(
    job: TrainJob,
    *,
    log: Log = logger.info,
    on_step: OnStep = lambda _: None,
    verbose: bool = False,
) -> dict[str, Any]:
    """Train once for each fold, and evaluate the pooled predictions of the held-out folds.

    The training images (and a val split's, if there is one) are divided into folds; no group is
    split between folds. Each fold is the test split of a run in a folder of its own. That run takes
    its validation split, which chooses the epoch, from the other folds. A test split of the data
    set is not used. An interrupted job is resumed. Parameters, with ``job.folds``, and errors are
    those of :func:`brainray.training.train.train`.

    Returns
    -------
    dict
        The content of metrics.json: ``folds``, a row for each; ``spread``, from
        :func:`summarise_folds`; and ``cv``, the pooled predictions' scores from
        :func:`brainray.evaluation.scoring.evaluate_split`.
    """
    assert job.folds is not None, "train() is for this"
    finished = find_finished(job, log)
    if finished is not None:
        return finished
    data, weights = open_data(job, find_training_samples(job), verbose=verbose)
    labels = data.labels[data.kept]
    folds = assign_folds(labels, data.groups, job.folds, seed=job.config.seed)
    splits = [  # all before the first training: an impossible split fails now
        split_fold(folds, number, labels, data.groups, job.config) for number in range(job.folds)
    ]
    names = [f"fold-{number}" for number in range(job.folds)]
    # In the manifest, each image's fold is its split, and its nearest image is of another fold.
    outside = {name: [other for other in names if other != name] for name in names}
    pooled = split_samples(data, job.config.classes, np.array(names)[folds], outside)
    log_plan(job, pooled, names, log)
    keep_manifest(job, pooled)
    runs = [replace(job, output_uri=job.at(name), fold=n) for n, name in enumerate(names)]
    results = [
        _train_fold(run, data, split, weights, log, on_step)
        for run, split in zip(runs, splits, strict=True)
    ]
    return _evaluate_folds(job, pooled, runs, results, log)


def find_training_samples(job: TrainJob) -> FoundSamples:
    """List the scans of all splits but test, without the names of their splits."""
    found = find_samples(job.data_uri, job.config.classes, splits=("train", "val", ""))
    column = found.samples.schema.get_field_index("split")
    unsaid = pa.array([""] * found.samples.num_rows, pa.string())
    samples = found.samples.set_column(column, found.samples.schema.field(column), unsaid)
    return replace(found, samples=samples)


def split_fold(
    folds: Numbers, number: int, labels: Numbers, groups: Numbers, config: TrainConfig
) -> NDArray[np.str_]:
    """Split images for the run that holds out a fold: "test", whole groups as "val", "train"."""
    return assign_splits(
        np.where(folds == number, "test", "train").tolist(),
        labels,
        groups,
        val_fraction=config.val_fraction,
        test_fraction=0.0,
        seed=config.seed,
    )


def _train_fold(
    run: TrainJob,
    data: GroupedData,
    splits: NDArray[np.str_],
    weights: StateDict | None,
    log: Log,
    on_step: OnStep,
) -> dict[str, Any]:
    """Train without a fold and evaluate on it, unless that is finished; return metrics.json."""
    assert run.fold is not None
    title = f"Fold {run.fold + 1} of {run.folds}"
    is_resumed = check_run(run)
    if storage.exists(run.at(METRICS_FILE)):
        log(f"{title} is finished.")
        return dict(storage.read_json(run.at(METRICS_FILE)))
    prepared = split_samples(data, run.config.classes, splits)
    test, val, train = (len(prepared.select(split)) for split in ("test", "val", "train"))
    log(
        f"{title}{', resumed' if is_resumed else ''}: {test:,} images held out, {train:,} for "
        f"training, {val:,} for validation."
    )
    keep_manifest(run, prepared)
    return train_prepared(run, prepared, weights, log, on_step)


def _evaluate_folds(
    job: TrainJob,
    data: PreparedData,
    runs: Sequence[TrainJob],
    results: Sequence[dict[str, Any]],
    log: Log,
) -> dict[str, Any]:
    """Evaluate the pooled predictions of all folds; write predictions, report and metrics.

    The intervals of ``cv`` resample groups of images. They do not include the variation from
    another division into folds or another seed. The AUROC of ``cv`` ranks probabilities of
    different classifiers together; it falls below the folds' mean AUROC where these are
    calibrated differently [1]_.

    References
    ----------
    .. [1] Forman and Scholz, "Apples-to-apples in cross-validation studies", ACM SIGKDD
       Explorations 12 (2010).
    """
    classes = job.config.classes
    predictions = pa.concat_tables(_read_predictions(run) for run in runs)
    log(f"Evaluating the pooled predictions of {predictions.num_rows:,} held-out images.")
    numbers = {path: number for number, path in enumerate(data.manifest["path"].to_pylist())}
    indices = np.array([numbers[path] for path in predictions["path"].to_pylist()], np.int64)
    usable = np.flatnonzero(data.splits != "rejected")
    assert np.array_equal(np.sort(indices), usable), "every image has exactly one prediction"
    probs = stack_lists(predictions["probs"])
    storage.write_table(job.at("predictions", f"{POOLED}.parquet"), predictions)
    folds = [_describe_fold(number, result) for number, result in enumerate(results)]
    metrics: dict[str, Any] = {
        "schema_version": METRICS_SCHEMA_VERSION,
        "classes": list(classes),
        "runtime": results[0]["runtime"],
        "folds": folds,
        "spread": summarise_folds(folds),
        POOLED: evaluate_split(data, indices, probs, classes) | {"rejected": data.count_rejected()},
    }
    time_s = sum(result["training"]["time_s"] for result in results)
    report = render_evaluation_report(
        title="brainray cross-validation report",
        metrics=metrics,
        epochs=(),
        curves={POOLED: compute_curves(data.labels[indices], probs, classes)},
        mistakes=draw_mistakes(data, predictions, classes, job.config.preprocessing),
        configuration=make_plain(job.config),
        facts={
            "Recipe": job.recipe,
            "Data": job.data_uri,
            "Folds": str(job.folds),
            "Engine": results[0]["runtime"]["description"],
            "Training time": runlog.format_duration(time_s),
            "Versions": describe_versions(),
            "Revision": read_code_revision(),
        },
    )
    storage.write_bytes(job.at("report.html"), report.encode())
    storage.write_json(job.at(METRICS_FILE), metrics)
    return metrics


def _read_predictions(run: TrainJob) -> pa.Table:
    """Read a fold's predictions, with a column ``fold`` in place of ``split``."""
    table = read_evaluation_rows(run.at("predictions", "test.parquet"))
    number = pa.array([run.fold] * table.num_rows, pa.int64())
    return table.set_column(table.column_names.index("split"), "fold", number)


def _describe_fold(number: int, result: dict[str, Any]) -> dict[str, Any]:
    """Return a fold's row in the report, from its metrics.json."""
    scores, training = result["test"], result["training"]
    names = [name for score in FOLD_SCORES for name in (score, f"{score}_ci95")]
    return {
        "fold": number,
        "n": scores["n"],
        **{name: scores[name] for name in names},
        "best_epoch": training["best_epoch"],
        "num_epochs": training["num_epochs"],
        "classifier_id": result["classifier_id"],
    }


def summarise_folds(folds: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Compute mean, standard deviation (with K − 1) and range of the folds' scores.

    They describe the K folds and are not a confidence interval: the folds share training images,
    and the variance of their mean has no unbiased estimator [1]_. Every fold has the same weight.

    References
    ----------
    .. [1] Bengio and Grandvalet, "No unbiased estimator of the variance of K-fold
       cross-validation", Journal of Machine Learning Research 5 (2004).
    """
    spread = {}
    for score in FOLD_SCORES:
        values = np.array([fold[score] for fold in folds], np.float64)
        spread[score] = {
            "mean": float(values.mean()),
            "sd": float(values.std(ddof=1)),
            "min": float(values.min()),
            "max": float(values.max()),
        }
    return spread
