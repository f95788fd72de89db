"""A training run: its identity, and the files in its output folder."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from brainray import storage
from brainray.data.splits import hash_manifest
from brainray.errors import ConfigError
from brainray.evaluation.prepared import MANIFEST_FILE, PreparedData
from brainray.evaluation.scoring import METRICS_FILE
from brainray.provenance import collect_versions
from brainray.runlog import Log
from brainray.training.config import ScalingOptions, TrainConfig, find_differences

RUN_FILE = "run.json"
RECORDS_FILE = "metrics.jsonl"
CLASSIFIER_FOLDER = "classifier"
CHECKPOINTS_FOLDER = "checkpoints"

OnStep = Callable[[dict[str, Any]], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainJob:
    """One training run: configuration, data, output and scaling."""

    data_uri: str
    output_uri: str
    config: TrainConfig
    scaling: ScalingOptions
    recipe: str = "custom"
    mlflow_uri: str | None = None
    """MLflow tracking server, or folder, that the run is also logged to."""
    folds: int | None = None
    """Number of folds of a cross-validation; None for a single run."""
    fold: int | None = None
    """Held-out fold, from 0; None for a single run, and for the whole cross-validation."""

    def __post_init__(self) -> None:
        if self.folds is not None and self.folds < 2:
            raise ConfigError(f"folds must be at least 2, got {self.folds}.")

    def at(self, *parts: str) -> str:
        """Return a URI below the output."""
        return storage.join(self.output_uri, *parts)


def find_finished(job: TrainJob, log: Log) -> dict[str, Any] | None:
    """Return the metrics of this run if it is finished; log whether it is finished or resumed.

    Raises
    ------
    ConfigError, StorageError
        As :func:`check_run`.
    """
    is_resumed = check_run(job)
    if storage.exists(job.at(METRICS_FILE)):
        log(f"Already finished: {job.output_uri}. Give another --output-uri to train again.")
        return dict(storage.read_json(job.at(METRICS_FILE)))
    if is_resumed:
        log(f"Resuming the run in {job.output_uri}.")
    return None


def check_run(job: TrainJob, **more: Any) -> bool:  # noqa: ANN401 - ready for JSON
    """Return whether the output holds this run already, interrupted or finished.

    ``more`` extends what :func:`describe_run` compares.

    Raises
    ------
    ConfigError
        The output belongs to a run of another configuration.
    StorageError
        The output cannot be written.
    """
    given = describe_run(job) | more
    try:
        saved = storage.read_json(job.at(RUN_FILE))
    except FileNotFoundError:
        storage.check_writable(job.output_uri)
        return False
    different = find_differences({name: saved.get(name) for name in given}, given)
    if different:
        raise ConfigError(
            f"'{job.output_uri}' holds a run with another configuration: "
            f"{'; '.join(line.removeprefix('config.') for line in different)}. "
            "Give the same values to resume it, or another --output-uri."
        )
    return True


def describe_run(job: TrainJob) -> dict[str, Any]:
    """Return what must be equal for two calls to be the same run, ready for JSON."""
    return {
        "data_uri": job.data_uri,
        "folds": job.folds,
        "fold": job.fold,
        "config": make_plain(asdict(job.config)),
    }


def make_plain(value: Any) -> Any:  # noqa: ANN401 - any configuration value
    """Return a configuration value as JSON returns it: tuples become lists."""
    if isinstance(value, dict):
        return {name: make_plain(item) for name, item in value.items()}
    return [make_plain(item) for item in value] if isinstance(value, tuple | list) else value


def keep_manifest(job: TrainJob, data: PreparedData) -> None:
    """Write the run's identity and manifest; on resume, check that the data set is the same.

    Raises
    ------
    ConfigError
        The data set has changed since the run began.
    """
    uri = job.at(MANIFEST_FILE)
    try:
        saved = storage.read_table(uri)
    except FileNotFoundError:
        about = {"recipe": job.recipe, "versions": collect_versions()}
        storage.write_json(job.at(RUN_FILE), describe_run(job) | about)
        storage.write_table(uri, data.manifest)  # last: if it is missing, both are written again
        return
    if hash_manifest(saved) != hash_manifest(data.manifest):
        raise ConfigError(
            f"The data at '{job.data_uri}' have changed since the run in '{job.output_uri}' "
            f"started ({saved.num_rows} scans then, {data.manifest.num_rows} now, or other "
            "content). Restore them, or give another --output-uri."
        )
