"""Search for a recipe's numbers with Ray Tune, scored on folds of groups.

A configuration is drawn at random and trained once for each fold, each time validated on that fold:
one trial of Ray Tune for each pair. ASHA ends the trials that are behind the others at the same
share of their epochs, since a run's score depends on how far its learning rate has fallen.
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
from ray.tune.schedulers import ASHAScheduler
from ray.tune.search.basic_variant import BasicVariantGenerator

from brainray import storage
from brainray.cluster import TASK_CPUS, check_fits, connect_ray
from brainray.data.splits import assign_folds
from brainray.errors import TrainingError
from brainray.evaluation.judge import Say
from brainray.evaluation.prepared import GroupedData, split_samples
from brainray.model.network import StateDict, fetch_weights
from brainray.reports.tune import render_tuning
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
    job: TrainJob, options: TuneOptions, *, say: Say = logger.info, verbose: bool = False
) -> dict[str, Any]:
    """Search, and write a table and a report; an earlier call of the same search is resumed.

    Parameters
    ----------
    job : TrainJob
        The recipe to begin with, the data and the output. The first configuration is the recipe, as
        far as it lies in the ranges.
    options : TuneOptions
        What is drawn, and how often.
    say : callable
        Takes a line for a person.
    verbose : bool
        Whether Ray's own lines are shown.

    Returns
    -------
    dict
        The content of tune.json: ``configurations``, the best first, each with its ``parameters``,
        ``score`` (the mean over folds of the best epoch's ``monitor``), ``scores`` of each fold and
        ``percent_done``, the least of any fold. Those that ASHA ended come last.

    Raises
    ------
    UserError
        The data, the options or the output cannot be used.
    TrainingError
        Not one configuration was trained on all folds.
    """
    plain = make_plain(asdict(options))
    if check_run(job, search=plain):
        say(f"Going on with the search in {job.output_uri}.")
    storage.write_json(job.at(RUN_FILE), describe_run(job) | {"search": plain})
    found = find_training_samples(replace(job, folds=options.num_folds))
    weights = fetch_weights(job.config.weights, job.config.weights_uri)
    connect_ray(verbose=verbose)
    check_fits(describe_training_needs(job.scaling))
    data = group_training_data(found, job.config, job.scaling.loader)
    folds = assign_folds(
        data.labels[data.kept], data.groups, options.num_folds, seed=job.config.seed
    )
    say(
        f"Data: {len(data.kept):,} images in {len(set(data.groups.tolist())):,} groups, "
        f"{options.num_folds} folds. {options.num_configurations} configurations."
    )
    trial = ray_tune.with_parameters(run_trial, job=job, data=data, folds=folds, weights=weights)
    tuner = build_tuner(job, options, trial)
    rows = collect_rows(tuner.fit(), job.config.monitor)
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
    storage.write_bytes(job.at(REPORT_FILE), render_tuning(result).encode())
    storage.write_json(job.at(RESULT_FILE), result)
    return result


def build_tuner(
    job: TrainJob, options: TuneOptions, trial: Callable[[Parameters], None]
) -> ray_tune.Tuner:
    """Build Ray Tune's search, or go on with the one in the output."""
    filesystem, path = storage.resolve(job.output_uri)
    # The trial itself computes nothing: its workers do.
    trainable = ray_tune.with_resources(trial, {"cpu": TASK_CPUS})
    if ray_tune.Tuner.can_restore(f"{path}/{TRIALS_FOLDER}", storage_filesystem=filesystem):
        return ray_tune.Tuner.restore(
            f"{path}/{TRIALS_FOLDER}",
            trainable,
            resume_unfinished=True,
            restart_errored=True,
            storage_filesystem=filesystem,
        )
    return ray_tune.Tuner(
        trainable,
        param_space=build_param_space(job.config, options),
        tune_config=ray_tune.TuneConfig(
            num_samples=options.num_configurations,
            search_alg=BasicVariantGenerator(
                constant_grid_search=True,  # each draw is tried on every fold
                max_concurrent=options.max_concurrent,
                points_to_evaluate=[describe_recipe(job.config, options.space)],
                random_state=job.config.seed,
            ),
            scheduler=ASHAScheduler(
                time_attr="percent_done",
                max_t=100,
                grace_period=MIN_PERCENT,
                reduction_factor=REDUCTION,
                metric=job.config.monitor,
                mode="max",
            ),
        ),
        run_config=ray_tune.RunConfig(
            name=TRIALS_FOLDER, storage_path=path, storage_filesystem=filesystem, verbose=0
        ),
    )


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


def build_param_space(config: TrainConfig, options: TuneOptions) -> Parameters:
    """Say to Ray Tune what to draw."""
    space = options.space
    drawn: Parameters = {name: _draw(*getattr(space, name)) for name in RANGES}
    drawn["num_epochs"] = ray_tune.choice(list(space.num_epochs or (config.num_epochs,)))
    drawn["fold"] = ray_tune.grid_search(list(range(options.num_folds)))
    return drawn


def _draw(low: float, high: float) -> Any:  # noqa: ANN401 - a number, or Ray Tune's domain
    return low if low == high else ray_tune.loguniform(low, high)


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
    parameters: Parameters,
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
    config = apply_parameters(job.config, parameters)
    run = replace(job, config=config, output_uri=job.at("runs", name_trial(parameters)))
    splits = np.where(folds == parameters["fold"], "val", "train")
    prepared = split_samples(data, config.classes, splits)
    fit(
        run,
        prepared,
        ray.put(weights),
        say=logger.info,
        tick=_ignore,
        callbacks=[TuneReportCallback()],
    )


def _ignore(_: object) -> None:
    """Take progress within an epoch: nobody watches it."""


def name_trial(parameters: Parameters) -> str:
    """Return the name of a trial's folder: its parameters."""
    return "-".join(f"{name}={parameters[name]:.4g}" for name in sorted(parameters))


def collect_rows(results: ray_tune.ResultGrid, monitor: str) -> list[dict[str, Any]]:
    """Return a row for each trial that has finished an epoch."""
    rows = []
    for number in range(len(results)):
        result = results[number]
        history = result.metrics_dataframe
        if history is None or monitor not in history or result.config is None:
            continue
        last = history.iloc[-1]
        rows.append(
            {
                "parameters": dict(result.config),
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
        is_whole = len(scores) == num_folds
        parameters = {k: v for k, v in trials[0]["parameters"].items() if k != "fold"}
        found.append(
            {
                "parameters": parameters,
                "score": fmean(scores.values()),
                "scores": [scores.get(fold) for fold in range(num_folds)],
                "percent_done": min(one["percent_done"] for one in trials) if is_whole else 0,
                "time_s": math.fsum(one["time_s"] for one in trials),
            }
        )
    return sorted(found, key=lambda one: (-one["percent_done"], -one["score"]))
