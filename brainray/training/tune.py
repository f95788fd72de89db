"""Hyperparameter search for a recipe with Ray Tune, scored on folds of groups.

Random configurations are trained without the first fold and validated on it, each as a trial of
Ray Tune. ASHA stops trials that are behind at the same share of their epochs, because a score
depends on how far the learning rate has decayed. The configurations that finish are trained without
each of the other folds too, and ranked by their mean score. Scores of different folds are not
compared with each other, because folds differ in difficulty. Test images are never used.
"""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import numpy as np
from ray import tune as ray_tune
from ray.tune.integration.ray_train import TuneReportCallback
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from brainray.cluster import TASK_CPUS
from brainray.data.splits import assign_folds
from brainray.errors import TrainingError
from brainray.evaluation.prepared import GroupedData, split_samples
from brainray.io import storage
from brainray.model.network import StateDict
from brainray.reports.tune import render_tuning_report
from brainray.runlog import Log
from brainray.training.augment import LIMITS
from brainray.training.config import RANGES, SearchSpace, TrainConfig, TuneOptions
from brainray.training.crossval import find_training_samples
from brainray.training.fit import fit
from brainray.training.run import (
    RUN_FILE,
    TrainJob,
    check_run,
    describe_run,
    make_plain,
    open_data,
)

logger = logging.getLogger(__name__)

TRIALS_FOLDER = "trials"
GREY_FIELDS = ("clahe", "gamma", "bias_field", "gain", "noise", "blur")
GEOMETRIC_FIELDS = ("rotation_deg", "zoom", "stretch", "shift")
MIN_PERCENT = 25
"""Percentage of a trial's epochs before which ASHA does not stop it."""
REDUCTION = 2
"""ASHA continues one of this many trials at each rung."""

Parameters = dict[str, Any]


def tune(
    job: TrainJob, options: TuneOptions, *, log: Log = logger.info, verbose: bool = False
) -> dict[str, Any]:
    """Search, and write the result and a report; resume an interrupted search.

    Parameters
    ----------
    job : TrainJob
        Recipe, data and output. The first configuration is the recipe, clipped to the ranges.
    options, log, verbose
        Size of the search; receives lines of progress; whether to show Ray's own log lines.

    Returns
    -------
    dict
        The content of tune.json: ``configurations``, the best first, each with its ``parameters``,
        ``score`` (mean over folds of the best epoch's ``monitor``), ``scores`` of the folds (None
        for folds that were not trained) and ``percent_done`` of the epochs of all folds. Those
        that ASHA stopped come last.

    Raises
    ------
    UserError
        The data, the options or the output cannot be used.
    TrainingError
        No configuration was trained on all folds.
    """
    plain = make_plain(options)
    if check_run(job, search=plain):
        log(f"Resuming the search in {job.output_uri}.")
    storage.write_json(job.at(RUN_FILE), describe_run(job) | {"search": plain})
    data, weights = open_data(job, find_training_samples(job), verbose=verbose, with_dashboard=True)
    folds = assign_folds(
        data.labels[data.kept], data.groups, options.num_folds, seed=job.config.seed
    )
    log(
        f"Data: {len(data.kept):,} images in {len(set(data.groups.tolist())):,} groups, "
        f"{options.num_folds} folds. {options.num_configurations} configurations."
    )
    trial = ray_tune.with_parameters(run_trial, job=job, data=data, folds=folds, weights=weights)
    rows = search(job, options, trial)
    result: dict[str, Any] = {
        "monitor": job.config.monitor,
        "recipe": job.recipe,
        "options": plain,
        "configurations": summarise_configurations(rows, options.num_folds),
    }
    if not any(one["percent_done"] == 100 for one in result["configurations"]):
        raise TrainingError(
            f"No configuration finished on all folds. See the errors in {job.at(TRIALS_FOLDER)}."
        )
    storage.write_bytes(job.at("tune.html"), render_tuning_report(result).encode())
    storage.write_json(job.at("tune.json"), result)
    return result


def search(
    job: TrainJob, options: TuneOptions, trial: Callable[[Parameters], None]
) -> list[dict[str, Any]]:
    """Train all configurations without the first fold, then the best without each other fold.

    Returns a row for each trial that finished an epoch: ``parameters`` (with the ``fold``),
    ``score`` of the best epoch, ``percent_done`` and ``time_s``.
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
    rows = _run_trials(job, options, trial, f"{TRIALS_FOLDER}-first-fold", first, asha)
    others = [
        row["parameters"] | {"fold": fold}
        for row in rows
        if row["percent_done"] == 100
        for fold in range(1, options.num_folds)
    ]
    if others:
        rows += _run_trials(job, options, trial, f"{TRIALS_FOLDER}-other-folds", others)
    return rows


def _run_trials(
    job: TrainJob,
    options: TuneOptions,
    trial: Callable[[Parameters], None],
    name: str,
    parameters: Sequence[Parameters],
    scheduler: TrialScheduler | None = None,
) -> list[dict[str, Any]]:
    """Run a trial for each of some parameters, or resume those in the output."""
    filesystem, path = storage.resolve(job.output_uri)
    # The trial only waits for its training workers.
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
    results, monitor = tuner.fit(), job.config.monitor
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


def draw_configurations(config: TrainConfig, options: TuneOptions) -> list[Parameters]:
    """Draw configurations; the first is the recipe, clipped to the ranges."""
    space, rng = options.space, np.random.default_rng(config.seed)
    choices = space.num_epochs or (config.num_epochs,)
    drawn = [describe_recipe(config, space)]
    while len(drawn) < options.num_configurations:
        ends = {name: np.log(getattr(space, name)) for name in RANGES}
        numbers = {name: float(np.exp(rng.uniform(*pair))) for name, pair in ends.items()}
        drawn.append(numbers | {"num_epochs": int(rng.choice(choices))})
    return drawn


def describe_recipe(config: TrainConfig, space: SearchSpace) -> Parameters:
    """Return the recipe's values, clipped to the ranges."""
    own = {
        "learning_rate": config.optimisation.learning_rate,
        "weight_decay": config.optimisation.weight_decay,
        "grey_strength": 1.0,
        "geometric_strength": 1.0,
    }
    kept = {name: float(np.clip(value, *getattr(space, name))) for name, value in own.items()}
    choices = space.num_epochs or (config.num_epochs,)
    nearest = min(choices, key=lambda number: abs(number - config.num_epochs))
    return kept | {"num_epochs": nearest}


def apply_parameters(config: TrainConfig, parameters: Parameters) -> TrainConfig:
    """Return the recipe with the values of a configuration; ranges stay within their limits."""
    factors = dict.fromkeys(GREY_FIELDS, parameters["grey_strength"]) | dict.fromkeys(
        GEOMETRIC_FIELDS, parameters["geometric_strength"]
    )
    augmentation = {
        name: min(LIMITS.get(name, 1.0), factor * getattr(config.augmentation, name))
        for name, factor in factors.items()
    }
    return replace(
        config,
        num_epochs=int(parameters["num_epochs"]),
        optimisation=replace(
            config.optimisation,
            learning_rate=parameters["learning_rate"],
            weight_decay=parameters["weight_decay"],
        ),
        augmentation=replace(config.augmentation, **augmentation),
    )


def run_trial(
    trial: Parameters,
    *,
    job: TrainJob,
    data: GroupedData,
    folds: np.ndarray[Any, np.dtype[np.int64]],
    weights: StateDict | None,
) -> None:
    """Train a configuration without one fold, and validate on it; Ray Tune calls this.

    The run's folder is named after its parameters, so a resumed search resumes it from its last
    checkpoint.
    """
    parameters = trial["parameters"]
    config = apply_parameters(job.config, parameters)
    run = replace(job, config=config, output_uri=job.at("runs", name_trial(parameters)))
    splits = np.where(folds == parameters["fold"], "val", "train")
    prepared = split_samples(data, config.classes, splits)
    callbacks = [TuneReportCallback()]
    fit(run, prepared, weights, log=logger.info, on_step=lambda _: None, callbacks=callbacks)


def name_trial(parameters: Parameters) -> str:
    """Return the name of a trial's folder: its parameters."""
    return "-".join(f"{name}={parameters[name]:.4g}" for name in sorted(parameters))


def summarise_configurations(
    rows: Sequence[dict[str, Any]], num_folds: int
) -> list[dict[str, Any]]:
    """Combine the folds of each configuration; complete ones come first, the best at the top."""
    by_configuration: dict[str, tuple[Parameters, list[dict[str, Any]]]] = {}
    for row in rows:
        parameters = {name: v for name, v in row["parameters"].items() if name != "fold"}
        by_configuration.setdefault(name_trial(parameters), (parameters, []))[1].append(row)
    found = []
    for parameters, trials in by_configuration.values():
        scores = {int(one["parameters"]["fold"]): one["score"] for one in trials}
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
