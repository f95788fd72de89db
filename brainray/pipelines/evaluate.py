"""Judge a sealed classifier on a labelled data set, without training anything."""

import logging
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from brainray import storage
from brainray.dataset.scan import scan_samples
from brainray.dataset.source import FoundSamples, find_samples
from brainray.dataset.split import hash_manifest
from brainray.dataset.twins import find_nearest, group_twins, merge_groups, standardise_thumbnails
from brainray.errors import DataError
from brainray.model.classifier import Classifier, load_classifier
from brainray.pipelines.cluster import check_gpus, connect_ray
from brainray.pipelines.data import (
    MANIFEST_FILE,
    PreparedData,
    build_manifest,
    check_usable,
    stack_thumbnails,
    write_nearest,
)
from brainray.pipelines.judge import Say, judge_and_report
from brainray.pixels.decode import DecodeLimits

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluateJob:
    """One evaluation: which classifier, on what, to where."""

    data_uri: str
    """Labelled scans; where there are splits, the test split is judged."""
    classifier_uri: str
    """A sealed classifier folder."""
    output_uri: str
    """Where metrics, predictions and report go."""
    manifest_uri: str | None = None
    """Manifest of the training data, for near-twins and the baseline; looked for beside the
    classifier when not given."""
    group_correlation: float = 0.96
    """Slices whose thumbnails correlate at least this much are of one group (0 to 1)."""
    use_gpu: bool = False
    """Compute on a GPU."""
    limits: DecodeLimits = DecodeLimits()
    """What is too large to open."""


def evaluate(job: EvaluateJob, *, say: Say = logger.info, verbose: bool = False) -> dict[str, Any]:
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
    training = find_training_manifest(job, classifier.card, say)
    connect_ray(verbose=verbose)
    if job.use_gpu:
        check_gpus(1)
    data = prepare_evaluation_data(found, classifier, training, job)
    return judge_and_report(
        data,
        output_uri=job.output_uri,
        classifier_uri=job.classifier_uri,
        splits=("test",),
        limits=job.limits,
        use_gpu=job.use_gpu,
        title="brainray evaluation report",
        configuration=asdict(job),
        facts={"Data": job.data_uri},
        say=say,
    )


def find_training_manifest(job: EvaluateJob, card: dict[str, Any], say: Say) -> pa.Table | None:
    """Return the manifest of the data that a classifier was trained on, if it can be had.

    Raises
    ------
    DataError
        ``manifest_uri`` was given and is missing, or is another classifier's.
    """
    beside = storage.make_absolute(job.classifier_uri).rpartition("/")[0]
    uri = job.manifest_uri or storage.join(beside, MANIFEST_FILE)
    try:
        manifest = storage.read_table(uri)
    except FileNotFoundError:
        if job.manifest_uri:
            raise DataError(f"No manifest at '{uri}'. Check --manifest-uri.") from None
        say(f"No training manifest at {uri}: near-twins and the baseline are left out.")
        return None
    if hash_manifest(manifest) != card.get("data_manifest_sha256"):
        if job.manifest_uri:
            raise DataError(f"'{uri}' is not the manifest this classifier was trained with.")
        say(f"{uri} is another run's: near-twins and the baseline are left out.")
        return None
    return manifest


def prepare_evaluation_data(
    found: FoundSamples, classifier: Classifier, training: pa.Table | None, job: EvaluateJob
) -> PreparedData:
    """Scan and group the scans to judge, and look up their nearest training images."""
    samples, classes = found.samples, classifier.classes
    scan = scan_samples(samples, limits=job.limits, keep=[classifier.preprocessing])
    labels = samples["label"].to_numpy().astype(np.int64)
    kept = check_usable(labels, scan.table, classes)
    standardised = standardise_thumbnails(stack_thumbnails(scan.table["thumbnail"].take(kept)))
    groups = merge_groups(
        group_twins(standardised, min_correlation=job.group_correlation),
        samples["group"].take(kept).to_pylist(),
    )
    splits = np.full(len(labels), "rejected", dtype="<U8")
    splits[kept] = "test"
    manifest = build_manifest(found, scan.table, classes, kept, groups, splits)
    if training is not None:
        reference = training.filter(
            pa.array([split in ("train", "val") for split in training["split"].to_pylist()])
        )
        nearest, correlation = find_nearest(
            standardised, standardise_thumbnails(stack_thumbnails(reference["thumbnail"]))
        )
        manifest = write_nearest(
            manifest, kept, correlation, reference["label"].take(pa.array(nearest)).to_pylist()
        )
    return PreparedData(found, manifest, labels, splits, scan.store)
