"""Log a run's records to MLflow, in addition to metrics.jsonl and TensorBoard."""

import logging
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

from brainray import runlog
from brainray.errors import ConfigError
from brainray.training.run import TrainJob, make_plain

logger = logging.getLogger(__name__)

EXPERIMENT = "brainray"
OUTPUT_TAG = "brainray.output_uri"
"""Tag by which a resumed run finds its MLflow run."""


def open_log(job: TrainJob) -> Callable[[runlog.Record], None]:
    """Open the MLflow run of a training run, and return a function that logs an epoch's record.

    Parameters are logged once, when the MLflow run is created.

    Raises
    ------
    ConfigError
        ``job.mlflow_uri`` is given, and MLflow is not installed or does not answer.
    """
    if job.mlflow_uri is None:
        return lambda _: None
    try:
        from mlflow import MlflowClient
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException
    except ImportError as error:
        raise ConfigError(
            f"--mlflow-uri needs MLflow, which is not installed ({error}). "
            "Install it: pip install 'brainray[mlflow]'."
        ) from error
    try:
        client = MlflowClient(job.mlflow_uri)
        run_id = _find_run(client, job) or _create_run(client, job)
    except MlflowException as error:
        raise ConfigError(f"MLflow at '{job.mlflow_uri}' cannot be used: {error}") from error

    def log_record(record: runlog.Record) -> None:
        time_ms = int(record["unix_time_s"] * 1000)
        scalars = runlog.scalars_of(record).items()
        metrics = [Metric(name, value, time_ms, record["epoch"] + 1) for name, value in scalars]
        try:
            client.log_batch(run_id, metrics=metrics)
            if record["epoch"] + 1 == record["num_epochs"]:
                client.set_terminated(run_id)
        except MlflowException as error:  # training continues; metrics.jsonl has the record
            logger.warning("Epoch %d was not logged to MLflow: %s", record["epoch"] + 1, error)

    return log_record


def _find_run(client: Any, job: TrainJob) -> str | None:  # noqa: ANN401 - an MlflowClient
    experiment = client.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        return None
    runs = client.search_runs(
        [experiment.experiment_id], f"tags.`{OUTPUT_TAG}` = '{job.output_uri}'", max_results=1
    )
    return runs[0].info.run_id if runs else None


def _create_run(client: Any, job: TrainJob) -> str:  # noqa: ANN401
    from mlflow.entities import Param

    experiment = client.get_experiment_by_name(EXPERIMENT)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT)
    run = client.create_run(experiment_id, tags={OUTPUT_TAG: job.output_uri}, run_name=job.recipe)
    params = {
        "recipe": job.recipe,
        "data_uri": job.data_uri,
        **_flatten(make_plain(asdict(job.config))),
    }
    client.log_batch(run.info.run_id, params=[Param(k, str(v)) for k, v in params.items()])
    return str(run.info.run_id)


def _flatten(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Name nested values by their path: ``optimisation.learning_rate``."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        nested = isinstance(value, dict)
        flat |= _flatten(value, f"{prefix}{name}.") if nested else {f"{prefix}{name}": value}
    return flat
