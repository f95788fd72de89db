"""Search for a recipe's numbers with Ray Tune, scored on folds of groups.

Configurations are drawn at random and trained without the first fold, each a trial of Ray Tune that
is validated on that fold. ASHA ends those that are behind the others at the same share of their
epochs, since a run's score depends on how far its learning rate has fallen. Those that come to
their end are trained without each of the other folds too, and ranked by their mean score.
Scores of different folds are never compared with each other: one is easier than another.
Testing images have no part in it.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from statistics import fmean
from typing import Any

import numpy as np
import ray
from ray import tune as ray_tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from brainray import storage
from brainray.cluster import TASK_CPUS, check_fits, connect_ray
from brainray.data.splits import assign_folds
from brainray.errors import TrainingError
from brainray.evaluation.prepared import GroupedData, split_samples
from brainray.model.network import StateDict, fetch_weights
from brainray.reports.tune import render_tuning_report
from brainray.runlog import Log
from brainray.training.augment import LIMITS, Augmentation
from brainray.training.config import RANGES, SearchSpace, TrainConfig, TuneOptions
from brainray.training.crossval import find_training_samples
from brainray.training.fit import describe_training_needs, fit
from brainray.training.prepare import group_training_data
from brainray.training.run import RUN_FILE, TrainJob, check_run, describe_run, make_plain

logger = logging.getLogger(__name__)

TRIALS_FOLDER = "trials"
RESULT_FILE = "tune.json"
REPORT_FILE = "tune.html"
GREY_FIELDS = ("clahe", "gamma", "bias_field", "gain", "noise", "blur")
GEOMETRIC_FIELDS = ("rotation_deg", "zoom", "stretch", "shift")
MIN_PERCENT = 25
"""Share of a trial's epochs, in percent, before which it is not ended."""
REDUCTION = 2
"""Of so many trials one goes on past each rung."""

Parameters = dict[str, Any]


def tune(
    job: TrainJob, options: TuneOptions, *, log: Log = logger.info, verbose: bool = False
) -> dict[str, Any]:
    """Search, and write a table and a report; an earlier call of the same search is resumed.

    Parameters
    ----------
    job : TrainJob
        The recipe to begin with, the data and the output. The first configuration is the recipe, as
        far as it lies in the ranges.
    options : TuneOptions
        What is drawn, and how often.
    log : callable
        Takes a line for a person.
    verbose : bool
        Whether Ray's own lines are shown.

    Returns
    -------
    dict
        The content of tune.json: ``configurations``, the best first, each with its ``parameters``,
        ``score`` (the mean over folds of the best epoch's ``monitor``), ``scores`` of each fold
        (None where it was not trained without it) and ``percent_done``, of the epochs of all
        folds. Those that ASHA ended come last.

    Raises
    ------
    UserError
        The data, the options or the output cannot be used.
    TrainingError
        Not one configuration was trained on all folds.
    """
    plain = make_plain(asdict(options))
    if check_run(job, search=plain):
        log(f"Going on with the search in {job.output_uri}.")
    storage.write_json(job.at(RUN_FILE), describe_run(job) | {"search": plain})
    found = find_training_samples(replace(job, folds=options.num_folds))
    weights = fetch_weights(job.config.weights, job.config.weights_uri)
    connect_ray(verbose=verbose, with_dashboard=True)
    check_fits(describe_training_needs(job.scaling))
    data = group_training_data(found, job.config, job.scaling.loader)
    folds = assign_folds(
        data.labels[data.kept], data.groups, options.num_folds, seed=job.config.seed
    )
    log(
        f"Data: {len(data.kept):,} images in {len(set(data.groups.tolist())):,} groups, "
        f"{options.num_folds} folds. {options.num_configurations} configurations."
    )
    trial = ray_tune.with_parameters(run_trial, job=job, data=data, folds=folds, weights=weights)
    rows = search(job, options, trial)
    result = {
        "monitor": job.config.monitor,
        "recipe": job.recipe,
        "options": plain,
        "configurations": summarise_configurations(rows, options.num_folds),
    }
    if not any(one["percent_done"] == 100 for one in result["configurations"]):
        raise TrainingError(
            f"No configuration was trained to its end; see {job.at(TRIALS_FOLDER)}."
        )
    storage.write_bytes(job.at(REPORT_FILE), render_tuning_report(result).encode())
    storage.write_json(job.at(RESULT_FILE), result)
    return result


def search(
    job: TrainJob, options: TuneOptions, trial: Callable[[Parameters], None]
) -> list[dict[str, Any]]:
    """Train all configurations without the first fold, then the best without each other fold.

    Returns
    -------
    list of dict
        A row for each trial, see :func:`collect_rows`.
    """
    drawn = draw_configurations(job.config, options)
    asha = ASHAScheduler(
        time_attr="percent_done",
        max_t=100,
        grace_period=MIN_PERCENT,
        reduction_factor=REDUCTION,
        metric=job.config.monitor,
        mode="max",
    )
    first = [parameters | {"fold": 0} for parameters in drawn]
    rows = run_trials(job, options, trial, f"{TRIALS_FOLDER}-first-fold", first, asha)
    others = [
        row["parameters"] | {"fold": fold}
        for row in rows
        if row["percent_done"] == 100
        for fold in range(1, options.num_folds)
    ]
    if others:
        rows += run_trials(job, options, trial, f"{TRIALS_FOLDER}-other-folds", others)
    return rows


def run_trials(
    job: TrainJob,
    options: TuneOptions,
    trial: Callable[[Parameters], None],
    name: str,
    parameters: Sequence[Parameters],
    scheduler: TrialScheduler | None = None,
) -> list[dict[str, Any]]:
    """Run a trial for each of some parameters, or go on with those in the output."""
    filesystem, path = storage.resolve(job.output_uri)
    # The trial itself computes nothing: its workers do.
    trainable = ray_tune.with_resources(trial, {"cpu": TASK_CPUS})
    if ray_tune.Tuner.can_restore(f"{path}/{name}", storage_filesystem=filesystem):
        tuner = ray_tune.Tuner.restore(
            f"{path}/{name}",
            trainable,
            resume_unfinished=True,
            restart_errored=True,
            storage_filesystem=filesystem,
        )
    else:
        tuner = ray_tune.Tuner(
            trainable,
            param_space={"parameters": ray_tune.grid_search(list(parameters))},
            tune_config=ray_tune.TuneConfig(
                max_concurrent_trials=options.max_concurrent, scheduler=scheduler
            ),
            run_config=ray_tune.RunConfig(
                name=name, storage_path=path, storage_filesystem=filesystem, verbose=0
            ),
        )
    return collect_rows(tuner.fit(), job.config.monitor)


def draw_configurations(config: TrainConfig, options: TuneOptions) -> list[Parameters]:
    """Draw configurations; the first is the recipe, as far as it lies in the ranges."""
    space, rng = options.space, np.random.default_rng(config.seed)
    choices = space.num_epochs or (config.num_epochs,)
    drawn = [describe_recipe(config, space)]
    while len(drawn) < options.num_configurations:
        ends = {name: np.log(getattr(space, name)) for name in RANGES}
        numbers = {name: float(np.exp(rng.uniform(*pair))) for name, pair in ends.items()}
        drawn.append(numbers | {"num_epochs": int(rng.choice(choices))})
    return drawn


def describe_recipe(config: TrainConfig, space: SearchSpace) -> Parameters:
    """Return a recipe's own numbers, each brought into its range."""
    own = {
        "learning_rate": config.optimisation.learning_rate,
        "weight_decay": config.optimisation.weight_decay,
        "grey_strength": 1.0,
        "geometric_strength": 1.0,
    }
    limits = {name: getattr(space, name) for name in own}
    kept = {name: min(max(value, limits[name][0]), limits[name][1]) for name, value in own.items()}
    choices = space.num_epochs or (config.num_epochs,)
    nearest = min(choices, key=lambda number: abs(number - config.num_epochs))
    return kept | {"num_epochs": nearest}


def apply_parameters(config: TrainConfig, parameters: Parameters) -> TrainConfig:
    """Return a recipe with the numbers of a configuration."""
    return replace(
        config,
        num_epochs=int(parameters["num_epochs"]),
        optimisation=replace(
            config.optimisation,
            learning_rate=parameters["learning_rate"],
            weight_decay=parameters["weight_decay"],
        ),
        augmentation=scale_augmentation(
            scale_augmentation(config.augmentation, GREY_FIELDS, parameters["grey_strength"]),
            GEOMETRIC_FIELDS,
            parameters["geometric_strength"],
        ),
    )


def scale_augmentation(
    augmentation: Augmentation, names: Sequence[str], factor: float
) -> Augmentation:
    """Multiply some ranges, each up to its limit."""
    changes = {
        name: min(LIMITS.get(name, 1.0), factor * getattr(augmentation, name)) for name in names
    }
    return replace(augmentation, **changes)


def run_trial(
    trial: Parameters,
    *,
    job: TrainJob,
    data: GroupedData,
    folds: np.ndarray[Any, np.dtype[np.int64]],
    weights: StateDict | None,
) -> None:
    """Train a configuration without one fold, validated on it; Ray Tune calls this.

    The run lies below the output under a name made of its parameters. When the search is resumed,
    it goes on from its last epoch.
    """
    parameters = trial["parameters"]
    config = apply_parameters(job.config, parameters)
    run = replace(job, config=config, output_uri=job.at("runs", name_trial(parameters)))
    splits = np.where(folds == parameters["fold"], "val", "train")
    prepared = split_samples(data, config.classes, splits)
    fit(
        run,
        prepared,
        ray.put(weights),
        log=logger.info,
        on_step=_ignore,
        callbacks=[TuneReportCallback()],
    )


def _ignore(_: object) -> None:
    """Take progress within an epoch: nobody watches it."""


def name_trial(parameters: Parameters) -> str:
    """Return the name of a trial's folder: its parameters."""
    return "-".join(f"{name}={parameters[name]:.4g}" for name in sorted(parameters))


def collect_rows(results: ray_tune.ResultGrid, monitor: str) -> list[dict[str, Any]]:
    """Return a row for each trial that has finished an epoch.

    ``parameters``, with the ``fold``; ``score``, of its best epoch; ``percent_done`` of its epochs;
    and ``time_s``.
    """
    rows = []
    for number in range(len(results)):
        result = results[number]
        history = result.metrics_dataframe
        if history is None or monitor not in history or result.config is None:
            continue
        last = history.iloc[-1]
        rows.append(
            {
                "parameters": dict(result.config["parameters"]),
                "score": float(history[monitor].max()),
                "percent_done": int(last["percent_done"]),
                "time_s": float(last["time_s"]),
            }
        )
    return rows


def summarise_configurations(
    rows: Sequence[dict[str, Any]], num_folds: int
) -> list[dict[str, Any]]:
    """Bring the folds of each configuration together; the best whole one comes first."""
    by_configuration: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        shared = {k: v for k, v in row["parameters"].items() if k != "fold"}
        by_configuration.setdefault(name_trial(shared), []).append(row)
    found = []
    for trials in by_configuration.values():
        scores = {int(one["parameters"]["fold"]): one["score"] for one in trials}
        parameters = {k: v for k, v in trials[0]["parameters"].items() if k != "fold"}
        found.append(
            {
                "parameters": parameters,
                "score": fmean(scores.values()),
                "scores": [scores.get(fold) for fold in range(num_folds)],
                "percent_done": sum(one["percent_done"] for one in trials) // num_folds,
                "time_s": math.fsum(one["time_s"] for one in trials),
            }
        )
    return sorted(found, key=lambda one: (-one["percent_done"], -one["score"]))
