"""Logging to MLflow: parameters once, and the scores of each epoch at its step."""

import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from brainray.errors import ConfigError
from brainray.training.config import ScalingOptions, TrainConfig
from brainray.training.mlflow_log import EXPERIMENT, open_log
from brainray.training.run import TrainJob

JOB = TrainJob(
    data_uri="/data",
    output_uri="/output",
    config=TrainConfig(num_epochs=3),
    scaling=ScalingOptions(),
    recipe="cpu",
)

needs_mlflow = pytest.mark.skipif(
    importlib.util.find_spec("mlflow") is None, reason="mlflow-skinny is not installed"
)


def make_record(epoch: int) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "num_epochs": 3,
        "val_accuracy": 0.25 * (epoch + 1),
        "is_best": True,
        "unix_time_s": 1.7e9 + epoch,
    }


def test_without_a_server_mlflow_is_not_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)  # an import would raise
    open_log(JOB)(make_record(0))


def test_the_error_for_a_missing_mlflow_names_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(ConfigError, match=r"pip install 'brainray\[mlflow\]'"):
        open_log(replace(JOB, mlflow_uri="http://127.0.0.1:1"))


@needs_mlflow
def test_a_server_that_fails_later_does_not_end_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from mlflow import MlflowClient
    from mlflow.exceptions import MlflowException

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    log_record = open_log(replace(JOB, mlflow_uri=(tmp_path / "mlruns").as_uri()))

    def fail(*_: object, **__: object) -> None:
        raise MlflowException("gone")

    monkeypatch.setattr(MlflowClient, "log_batch", fail)
    log_record(make_record(0))
    assert "Epoch 1 was not logged to MLflow: gone" in caplog.text


@needs_mlflow
def test_a_resumed_run_continues_its_mlflow_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    job = replace(JOB, mlflow_uri=(tmp_path / "mlruns").as_uri())
    open_log(job)(make_record(0))
    log_record = open_log(job)
    for epoch in (1, 2):
        log_record(make_record(epoch))
    open_log(replace(job, output_uri="/another"))
    client = MlflowClient(job.mlflow_uri)
    experiment = client.get_experiment_by_name(EXPERIMENT)
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], order_by=["attributes.start_time"])
    assert [run.data.tags["brainray.output_uri"] for run in runs] == ["/output", "/another"]
    first = runs[0]
    assert first.info.status == "FINISHED"
    assert first.data.params["optimisation.learning_rate"] == "0.001"
    assert first.data.params["recipe"] == "cpu"
    history = client.get_metric_history(first.info.run_id, "val_accuracy")
    assert [(m.step, m.value) for m in history] == [(1, 0.25), (2, 0.5), (3, 0.75)]
    assert set(first.data.metrics) == {"val_accuracy"}
