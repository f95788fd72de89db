"""Log a run's records to MLflow, in addition to metrics.jsonl and TensorBoard."""

import logging
from collections.abc import Callable
from typing import Any

import pandas as pd

from brainray import runlog
from brainray.errors import ConfigError
from brainray.training.run import TrainJob, make_plain

logger = logging.getLogger(__name__)

EXPERIMENT = "brainray"
OUTPUT_TAG = "brainray.output_uri"
"""Tag by which a resumed run finds its MLflow run."""


def open_log(job: TrainJob) -> Callable[[runlog.Record], None]:
    """Open the MLflow run of a training run, and return a function that logs an epoch's record.

    Raises ConfigError if MLflow is asked for, and is not installed or does not answer.
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
        run_id = _find_run(client, job)
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


def _find_run(client: Any, job: TrainJob) -> str:  # noqa: ANN401 - an MlflowClient
    """Return the id of the job's MLflow run; create it, with its parameters, the first time."""
    from mlflow.entities import Param

    experiment = client.get_experiment_by_name(EXPERIMENT)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(EXPERIMENT)
    tagged = f"tags.`{OUTPUT_TAG}` = '{job.output_uri}'"
    for run in client.search_runs([experiment_id], tagged, max_results=1):
        return str(run.info.run_id)
    run = client.create_run(experiment_id, tags={OUTPUT_TAG: job.output_uri}, run_name=job.recipe)
    # Nested values are named by their path: ``optimisation.learning_rate``.
    (config,) = pd.json_normalize(make_plain(job.config)).to_dict("records")
    params = {"recipe": job.recipe, "data_uri": job.data_uri, **config}
    client.log_batch(run.info.run_id, params=[Param(k, str(v)) for k, v in params.items()])
    return str(run.info.run_id)
