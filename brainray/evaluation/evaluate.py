"""Evaluate a classifier on a labelled data set."""

import logging
from dataclasses import asdict, dataclass, field, replace
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import tyro

from brainray.cluster import check_fits, connect_ray, describe_gpu_need, report_waiting
from brainray.data.labelled import FoundSamples, find_samples
from brainray.data.near_duplicates import (
    find_nearest,
    group_near_duplicates,
    merge_groups,
    standardise_thumbnails,
)
from brainray.data.splits import hash_manifest
from brainray.errors import DataError
from brainray.evaluation.prepared import (
    MANIFEST_FILE,
    PreparedData,
    group_samples,
    split_samples,
    stack_thumbnails,
    write_nearest,
)
from brainray.evaluation.scoring import evaluate_and_report
from brainray.images.slices import ReadOptions
from brainray.inference.engine import EngineOptions
from brainray.io import storage
from brainray.model.classifier import Classifier, find_default_classifier, load_classifier
from brainray.runlog import Log

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateJob:
    """The classifier to evaluate, the data, and the output."""

    data_uri: str
    """Labelled scans. If they have splits, the test split is used."""
    classifier_uri: str = field(default_factory=find_default_classifier)
    """A classifier bundle. The default is `$BRAINRAY_CLASSIFIER`, else the one that comes with
    the project."""
    output_uri: str
    """Folder for metrics, predictions and report."""
    manifest_uri: str | None = None
    """Manifest of the training data, for near duplicates and the baseline. The default is the one
    beside the classifier."""
    group_correlation: float = 0.96
    """Slices whose thumbnails correlate at least this much are of one group (0 to 1)."""
    engine: Annotated[EngineOptions, tyro.conf.arg(name="")] = EngineOptions()
    reading: Annotated[ReadOptions, tyro.conf.arg(name="")] = ReadOptions()
    """How the files are read."""


def evaluate(job: EvaluateJob, *, log: Log = logger.info, verbose: bool = False) -> dict[str, Any]:
    """Predict every test scan, and write metrics, predictions and report.

    Returns
    -------
    dict
        The content of metrics.json.

    Raises
    ------
    UserError
        The classifier, the data or the output cannot be used.
    """
    storage.check_writable(job.output_uri)
    classifier = load_classifier(job.classifier_uri)
    found = find_samples(job.data_uri, classifier.classes, splits=("test",))
    training = _find_training_manifest(job, classifier.metadata, log)
    connect_ray(verbose=verbose)
    needs = [describe_gpu_need()] if job.engine.use_gpu else []
    check_fits(*needs)
    data = _prepare_evaluation_data(found, classifier, training, job)
    with report_waiting(needs, log):
        return evaluate_and_report(
            data,
            output_uri=job.output_uri,
            classifier_uri=job.classifier_uri,
            splits=("test",),
            engine=job.engine,
            title="brainray evaluation report",
            configuration=asdict(job),
            facts={"Data": job.data_uri},
            log=log,
        )


def _find_training_manifest(
    job: EvaluateJob, metadata: dict[str, Any], log: Log
) -> pa.Table | None:
    """Return the manifest of the classifier's training data, if there is one."""
    beside = storage.make_absolute(job.classifier_uri).rpartition("/")[0]
    uri = job.manifest_uri or storage.join(beside, MANIFEST_FILE)
    try:
        manifest = storage.read_table(uri)
    except FileNotFoundError:
        if job.manifest_uri:
            raise DataError(f"No manifest at '{uri}'. Check --manifest-uri.") from None
        log(f"No training manifest at {uri}: near duplicates and the baseline are left out.")
        return None
    if hash_manifest(manifest) != metadata.get("data_manifest_sha256"):
        if job.manifest_uri:
            raise DataError(f"'{uri}' is not the manifest this classifier was trained with.")
        log(f"{uri} is of another run: near duplicates and the baseline are left out.")
        return None
    return manifest


def _prepare_evaluation_data(
    found: FoundSamples, classifier: Classifier, training: pa.Table | None, job: EvaluateJob
) -> PreparedData:
    """Scan and group the data, and find the nearest training image of each scan.

    Scans are grouped as if they were in one data set with the training images: two that are similar
    to one training image get one group, as in a training run that evaluates its own test split.
    Both give the same intervals. Patients in both data sets are not detected, because the training
    manifest names none.
    """
    data = group_samples(
        found,
        classifier.classes,
        keep=[classifier.preprocessing],
        reading=job.reading,
        min_correlation=job.group_correlation,
    )
    splits = np.full(len(data.kept), "test")
    if training is None:
        return split_samples(data, classifier.classes, splits)
    reference = training.filter(pc.is_in(training["split"], pa.array(["train", "val"])))
    known = standardise_thumbnails(stack_thumbnails(reference["thumbnail"]))
    near_duplicates = group_near_duplicates(
        np.concatenate([data.standardised, known]), min_correlation=job.group_correlation
    )
    names = [f"own {group}" for group in data.groups]
    names += [f"known {group}" for group in reference["group"].to_pylist()]
    groups = merge_groups(near_duplicates, names)[: len(data.groups)]
    prepared = split_samples(replace(data, groups=groups), classifier.classes, splits)
    nearest, correlation = find_nearest(data.standardised, known)
    labels = reference["label"].take(pa.array(nearest)).to_pylist()
    manifest = write_nearest(prepared.manifest, data.kept, correlation, labels)
    return replace(prepared, manifest=manifest)
