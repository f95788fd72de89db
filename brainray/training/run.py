"""A training run: its identity, its data, and the files in its output folder."""

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

from brainray.cluster import Need, check_fits, connect_ray, list_nodes, share_cpus
from brainray.data.labelled import FoundSamples
from brainray.data.splits import assign_splits, hash_manifest
from brainray.errors import ConfigError
from brainray.evaluation.prepared import (
    MANIFEST_FILE,
    GroupedData,
    PreparedData,
    group_samples,
    split_samples,
)
from brainray.evaluation.scoring import METRICS_FILE
from brainray.io import storage
from brainray.io.provenance import collect_versions
from brainray.model.network import StateDict, fetch_weights
from brainray.runlog import Log
from brainray.training.config import (
    LoaderName,
    ScalingOptions,
    TrainConfig,
    TuneOptions,
    find_differences,
)

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


def make_plain(options: TrainConfig | TuneOptions) -> dict[str, Any]:
    """Return options as JSON returns them: tuples become lists."""
    return dict(json.loads(json.dumps(asdict(options))))


def describe_run(job: TrainJob) -> dict[str, Any]:
    """Return what must be equal for two calls to be the same run, ready for JSON."""
    return {
        "data_uri": job.data_uri,
        "folds": job.folds,
        "fold": job.fold,
        "config": make_plain(job.config),
    }


def check_run(job: TrainJob, **more: object) -> bool:
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


def find_finished(job: TrainJob, log: Log) -> dict[str, Any] | None:
    """Return the metrics of this run if it is finished; log whether it is finished or resumed."""
    is_resumed = check_run(job)
    if storage.exists(job.at(METRICS_FILE)):
        log(f"Already finished: {job.output_uri}. Give another --output-uri to train again.")
        return dict(storage.read_json(job.at(METRICS_FILE)))
    if is_resumed:
        log(f"Resuming the run in {job.output_uri}.")
    return None


def keep_manifest(job: TrainJob, data: PreparedData) -> None:
    """Write the run's identity and manifest; on resume, raise ConfigError if the data changed."""
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


# --------------------------------------------------------------------------------------------- data


def describe_training_needs(scaling: ScalingOptions) -> Need:
    """Return the resources that training needs at least."""
    others = {"GPU": 1.0} if scaling.use_gpu else {}
    return Need(
        bundle={"CPU": share_cpus(scaling.num_workers, list_nodes(), **others), **others},
        count=scaling.min_workers or scaling.num_workers,
        what="training worker",
        remedy="lower --num-workers, or allow fewer with --min-workers"
        + (", or drop --use-gpu" if scaling.use_gpu else ""),
    )


def open_data(
    job: TrainJob, found: FoundSamples, *, verbose: bool, with_dashboard: bool = False
) -> tuple[GroupedData, StateDict | None]:
    """Fetch the initial weights, connect to Ray, and scan and group the data set.

    Whatever can fail early comes first: weights, then resources, then the scans.
    """
    weights = fetch_weights(job.config.weights, job.config.weights_uri)
    connect_ray(verbose=verbose, with_dashboard=with_dashboard)
    check_fits(describe_training_needs(job.scaling))
    return group_training_data(found, job.config, job.scaling.loader), weights


def group_training_data(
    found: FoundSamples, config: TrainConfig, loader: LoaderName = "auto"
) -> GroupedData:
    """Scan and group a data set; unless it is streamed, pixels that fit stay in the object store.

    Raises
    ------
    DataError
        The folder is not a usable labelled data set.
    """
    return group_samples(
        found,
        config.classes,
        keep=() if loader == "stream" else (config.preprocessing,),
        reading=config.reading,
        min_correlation=config.group_correlation,
    )


def split_training_data(data: GroupedData, config: TrainConfig) -> PreparedData:
    """Split a data set by groups; splits that it has are kept."""
    splits = assign_splits(
        data.found.samples["split"].take(data.kept).to_pylist(),
        data.labels[data.kept],
        data.groups,
        val_fraction=config.val_fraction,
        test_fraction=config.test_fraction,
        seed=config.seed,
    )
    return split_samples(data, config.classes, splits)
