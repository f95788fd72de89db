"""Audit a data set: copies, look-alikes, leaks between splits, label conflicts, shortcuts."""

import logging
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import tyro
from numpy.typing import NDArray

from brainray import storage
from brainray.cluster import check_fits, connect_ray
from brainray.data import findings
from brainray.data.expand import expand_files
from brainray.data.findings import Nearest, Pair
from brainray.data.fingerprint import PROPERTY_TYPES, fingerprint_samples
from brainray.data.labelled import FoundSamples, find_samples
from brainray.data.near_duplicates import (
    NEAR_DUPLICATE_CORRELATION,
    group_near_duplicates,
    is_exact,
    measure_recall,
    standardise_thumbnails,
)
from brainray.data.read import open_rows
from brainray.data.shortcuts import build_properties, evaluate_shortcuts
from brainray.data.splits import assign_folds, assign_splits, describe_balance
from brainray.errors import ConfigError, RejectedImage
from brainray.evaluation.prepared import check_usable, join_groups, stack_thumbnails
from brainray.images.heatmap import render_picture
from brainray.images.slices import ReadOptions, show_slice
from brainray.labels import BRAIN_TUMOUR_CLASSES, check_classes
from brainray.provenance import describe_versions, read_code_revision
from brainray.reports.audit import PicturedPair, render_audit
from brainray.runlog import Log

logger = logging.getLogger(__name__)

AUDIT_FILE = "audit.json"
GROUPS_FILE = "groups.parquet"
REPORT_FILE = "audit.html"
SPLIT_FILE = "split.parquet"
AUDIT_SCHEMA_VERSION = 1

NUM_PAIRS_SHOWN = 12
"""Pairs of pictures in each gallery of the report."""

NUM_SIZES_LISTED = 12
PLACES = ("path", "uri", "row_group", "row", "frame", "size_bytes")
"""Columns of a sample table that a manifest of places repeats."""

Numbers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditJob:
    """One audit: of what, to where."""

    data_uri: str
    """Class folders, alone or below Training/ and Testing/ (or train/, val/, test/), Parquet
    tables, or a manifest of places: whatever training reads. Local, s3:// or gs://. Pictures,
    DICOM and NIfTI files."""
    output_uri: str
    """Where audit.json, audit.html and groups.parquet go."""
    classes: tuple[str, ...] = BRAIN_TUMOUR_CLASSES
    """Class names in class order; also the names of the class folders."""
    group_correlation: float = 0.96
    """Slices whose thumbnails correlate at least this much are of one group (0 to 1)."""
    max_leak: str | None = None
    """Exit with status 3, after everything is written, when more of a held-out split than this
    has a near duplicate in training: a share, such as 5%. Nothing is checked unless it is given."""
    make_split: Literal["no", "grouped"] = "no"
    """`grouped` writes split.parquet, which training reads: a new train, val and test split
    and folds, stratified, that never part a group. Splits that the data have are ignored."""
    folds: int = 5
    """Folds that the train and val images of a new split are dealt into."""
    val_fraction: float = 0.15
    """Share of the training images that a new split holds out for validation, by groups."""
    test_fraction: float = 0.15
    """Share of all images that a new split holds out for testing, by groups."""
    seed: int = 0
    """Seeds the new split, and the folds in which shortcuts are judged."""
    reading: Annotated[ReadOptions, tyro.conf.arg(name="")] = ReadOptions()
    """How the files are read."""

    def __post_init__(self) -> None:
        check_classes(self.classes)
        if not 0 < self.group_correlation <= 1:
            raise ConfigError(f"group_correlation must be in (0, 1], got {self.group_correlation}.")
        if self.folds < 2:
            raise ConfigError(f"folds must be at least 2, got {self.folds}.")
        for name in ("val_fraction", "test_fraction"):
            if not 0 < getattr(self, name) <= 0.5:
                raise ConfigError(f"{name} must be in (0, 0.5], got {getattr(self, name)}.")
        parse_max_leak(self.max_leak)


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditedData:
    """What the audit knows of the images that could be opened, n of them."""

    kept: Numbers
    """Their sample numbers, shape (n,)."""
    labels: Numbers
    splits: NDArray[np.str_]
    """train, val, test, or empty where the data set has no splits."""
    standardised: NDArray[np.float32]
    """Thumbnails, shape (n, 576)."""
    exact_duplicates: Numbers
    """Number of each one's set of pixel-identical images; −1 for none."""
    near: Numbers
    """Group at the near duplicate's correlation."""
    groups: Numbers
    """Group at the job's correlation, joined with the data set's own groups and with patients."""
    nearest: dict[str, Nearest]
    """Of each held-out split."""


def audit(job: AuditJob, *, log: Log = logger.info, verbose: bool = False) -> dict[str, Any]:
    """Audit a data set, and write what was found for a person and for programs.

    Returns
    -------
    dict
        The content of audit.json.

    Raises
    ------
    UserError
        The data or the output cannot be used, or ``max_leak`` was given for a data set
        without a held-out split.
    """
    started = time.monotonic()
    storage.check_writable(job.output_uri)
    found = find_samples(job.data_uri, job.classes)
    check_leak_can_be_measured(job, found)
    connect_ray(verbose=verbose)
    check_fits()
    found = expand_files(found, job.reading)
    log(f"Opening {found.samples.num_rows:,} scans.")
    scan = fingerprint_samples(found.samples, reading=job.reading, with_properties=True).table
    log("Comparing their thumbnails.")
    data = compare_images(found.samples, scan, job)
    document = describe_findings(job, found, scan, data)
    document["shortcuts"] = evaluate_shortcuts(
        build_properties(scan.take(data.kept)), data.labels, data.groups, seed=job.seed
    )
    if job.make_split == "grouped":
        document["split"] = write_split(job, found.samples, scan, data)
    storage.write_table(
        storage.join(job.output_uri, GROUPS_FILE), build_groups_table(job, found, scan, data)
    )
    document["audit_s"] = round(time.monotonic() - started, 1)
    storage.write_bytes(
        storage.join(job.output_uri, REPORT_FILE),
        render_report(job, found.samples, data, document).encode(),
    )
    storage.write_json(storage.join(job.output_uri, AUDIT_FILE), document)
    return document


def parse_max_leak(text: str | None) -> float | None:
    """Return the share of a held-out split that may have a near duplicate in training.

    Raises
    ------
    ConfigError
        The text is no share.
    """
    if text is None:
        return None
    number, is_percent = text.strip().removesuffix("%"), text.strip().endswith("%")
    try:
        share = float(number) / (100 if is_percent else 1)
    except ValueError:
        share = -1.0
    if not 0 <= share <= 1:
        raise ConfigError(f"Expected --max-leak to be a share such as 5% or 0.05, got '{text}'.")
    return share


def check_leak_can_be_measured(job: AuditJob, found: FoundSamples) -> None:
    """Refuse to promise what a data set without splits cannot show."""
    splits = set(found.samples["split"].to_pylist())
    if job.max_leak is not None and not ("train" in splits and splits & {"val", "test"}):
        raise ConfigError(
            f"Expected a train split and a val or test split in '{job.data_uri}' to check "
            f"--max-leak {job.max_leak}, found {', '.join(sorted(splits - {''})) or 'no splits'}. "
            "Leave --max-leak out, or make a split first: --make-split grouped."
        )


def compare_images(samples: pa.Table, scan: pa.Table, job: AuditJob) -> AuditedData:
    """Find the copies, near duplicates, groups and nearest training images of the usable scans."""
    every_label = samples["label"].to_numpy().astype(np.int64)
    kept = check_usable(every_label, scan, job.classes)
    splits = np.array(samples["split"].take(kept).to_pylist(), dtype="<U5")
    standardised = standardise_thumbnails(stack_thumbnails(scan["thumbnail"].take(kept)))
    near_duplicates, near = (
        group_near_duplicates(standardised, min_correlation=least)
        for least in (job.group_correlation, NEAR_DUPLICATE_CORRELATION)
    )
    return AuditedData(
        kept=kept,
        labels=every_label[kept],
        splits=splits,
        standardised=standardised,
        exact_duplicates=findings.number_exact_duplicates(
            scan["pixel_sha256"].take(kept).to_pylist()
        ),
        near=near,
        groups=join_groups(near_duplicates, samples, scan, kept),
        nearest=findings.find_nearest_references(splits, standardised),
    )


def describe_findings(
    job: AuditJob, found: FoundSamples, scan: pa.Table, data: AuditedData
) -> dict[str, Any]:
    """Put what was found into numbers, ready for JSON."""
    given_splits = found.samples["split"].to_pylist()
    return {
        "schema_version": AUDIT_SCHEMA_VERSION,
        "data_uri": job.data_uri,
        "classes": list(job.classes),
        "num_scans": found.samples.num_rows,
        "num_usable": len(data.kept),
        "passed_over": found.describe_skipped(),
        "unreadable": count_unreadable(scan["reason"].to_pylist(), given_splits),
        "class_balance": count_classes(data, job.classes),
        "exact_duplicates": findings.describe_groups(data.exact_duplicates, data.labels),
        "near_duplicates": {
            "min_correlation": NEAR_DUPLICATE_CORRELATION,
            **findings.describe_groups(data.near, data.labels),
        },
        "groups": {
            "min_correlation": job.group_correlation,
            **findings.describe_groups(data.groups, data.labels),
            "sizes": findings.count_sizes(data.groups),
            **describe_search(job, data),
        },
        "leaks": {
            split: findings.measure_leak(
                nearest,
                np.isin(data.splits, findings.REFERENCES[split]),
                data.exact_duplicates,
                data.groups,
                data.labels,
            )
            for split, nearest in data.nearest.items()
        },
        "max_leak": parse_max_leak(job.max_leak),
        "resolution": describe_resolution(scan.take(data.kept)),
    }


def list_excessive_leaks(document: dict[str, Any]) -> dict[str, float]:
    """Return the near duplicate share of each held-out split that exceeds what was allowed."""
    allowed = document["max_leak"]
    return {
        split: leak["share_near_duplicate"]
        for split, leak in document["leaks"].items()
        if allowed is not None and leak["share_near_duplicate"] > allowed
    }


def count_unreadable(reasons: list[str | None], splits: list[str]) -> list[dict[str, Any]]:
    """Count the scans that could not be opened, by reason and split; the commonest first."""
    counts = Counter(
        (reason, split) for reason, split in zip(reasons, splits, strict=True) if reason
    )
    totals = Counter(reason for reason in reasons if reason)
    return [
        {
            "reason": reason,
            "n": total,
            "by_split": {s: n for (r, s), n in sorted(counts.items()) if r == reason},
        }
        for reason, total in sorted(totals.items(), key=lambda item: (-item[1], item[0]))
    ]


def count_classes(data: AuditedData, classes: tuple[str, ...]) -> dict[str, dict[str, int]]:
    """Count the usable images by split (empty: no splits) and class."""
    order = [name for name in ("train", "val", "test", "") if (data.splits == name).any()]
    return {
        split: {
            name: int((data.labels[data.splits == split] == label).sum())
            for label, name in enumerate(classes)
        }
        for split in order
    }


def describe_search(job: AuditJob, data: AuditedData) -> dict[str, Any]:
    """Say whether every pair was compared, and how many were missed where not."""
    if is_exact(len(data.kept)):
        return {"search": "every pair"}
    recall = measure_recall(
        data.standardised, data.groups, min_correlation=job.group_correlation, seed=job.seed
    )
    return {"search": "by cells", "recall": recall}


def describe_resolution(scan: pa.Table) -> dict[str, Any]:
    """Count sizes, colour modes and file types."""
    sizes = Counter(zip(scan["width_px"].to_pylist(), scan["height_px"].to_pylist(), strict=True))
    listed = sizes.most_common(NUM_SIZES_LISTED)
    widths, heights = scan["width_px"].to_numpy(), scan["height_px"].to_numpy()
    return {
        "num_sizes": len(sizes),
        "sizes": [{"width_px": w, "height_px": h, "n": n} for (w, h), n in listed],
        "other_sizes": scan.num_rows - sum(n for _, n in listed),
        "width_px": _quartiles(widths),
        "height_px": _quartiles(heights),
        "aspect_ratio": _quartiles(widths / heights),
        "modes": dict(Counter(scan["mode"].to_pylist()).most_common()),
        "formats": dict(Counter(scan["format"].to_pylist()).most_common()),
    }


def _quartiles(values: NDArray[Any]) -> list[float]:
    """Return least, first quartile, median, third quartile and largest."""
    return [float(value) for value in np.percentile(values, [0, 25, 50, 75, 100])]


def build_groups_table(
    job: AuditJob, found: FoundSamples, scan: pa.Table, data: AuditedData
) -> pa.Table:
    """Build the table with a row for every scan, whether it could be opened or not."""
    samples, count = found.samples, found.samples.num_rows
    nearest = np.full(count, -1)
    correlation = np.full(count, np.nan)
    for one in data.nearest.values():
        nearest[data.kept[one.rows]] = data.kept[one.nearest]
        correlation[data.kept[one.rows]] = one.correlation
    alone = nearest < 0
    other = samples.take(pa.array(nearest, pa.int64(), mask=alone))
    labels = pa.array(job.classes)
    columns: dict[str, Any] = {
        "path": samples["path"],
        "uri": samples["uri"],
        "content_sha256": scan["content_sha256"],
        "pixel_sha256": scan["pixel_sha256"],
        "label": labels.take(samples["label"].combine_chunks()),
        "split": samples["split"],
        "reason": scan["reason"],
        "group": _spread_over(count, data.kept, data.groups),
        "near_duplicate_group": _spread_over(count, data.kept, data.near),
        "exact_duplicate_set": _spread_over(count, data.kept, data.exact_duplicates),
        "nearest_correlation": pa.array(correlation, pa.float32(), mask=alone),
        "nearest_path": other["path"],
        "nearest_label": labels.take(other["label"].combine_chunks()),
        **{name: scan[name] for name in PROPERTY_TYPES if name != "pixel_sha256"},
    }
    return pa.table(columns)


def _spread_over(count: int, rows: Numbers, values: Numbers) -> pa.Array:
    """Return values in the places of their rows; null elsewhere, and for −1."""
    spread = np.full(count, -1)
    spread[rows] = values
    return pa.array(spread, pa.int64(), mask=spread < 0)


def write_split(
    job: AuditJob, samples: pa.Table, scan: pa.Table, data: AuditedData
) -> dict[str, Any]:
    """Write a new split that parts no group, as a manifest that training reads.

    Returns
    -------
    dict
        ``uri`` of the manifest, and what is left of imbalance in ``splits`` and ``folds``.
    """
    count = len(data.kept)
    splits = assign_splits(
        [""] * count,
        data.labels,
        data.groups,
        val_fraction=job.val_fraction,
        test_fraction=job.test_fraction,
        seed=job.seed,
    )
    dealt = splits != "test"
    folds = np.full(count, -1)
    folds[dealt] = assign_folds(data.labels[dealt], data.groups[dealt], job.folds, seed=job.seed)
    rows = samples.take(pa.array(data.kept))
    manifest = pa.table(
        {
            **{name: rows[name] for name in PLACES},
            "label": pa.array(job.classes).take(rows["label"].combine_chunks()),
            "split": pa.array(splits.tolist()),
            "group": pa.array([str(group) for group in data.groups]),
            "fold": pa.array(folds, pa.int64(), mask=~dealt),
            "content_sha256": scan["content_sha256"].take(pa.array(data.kept)),
        }
    )
    uri = storage.join(job.output_uri, SPLIT_FILE)
    storage.write_table(uri, manifest)
    num_classes, fold_names = len(job.classes), [str(number) for number in range(job.folds)]
    in_folds = folds[dealt].astype(str)
    return {
        "uri": uri,
        "num_groups": len(np.unique(data.groups)),
        "splits": describe_balance(splits, ("train", "val", "test"), data.labels, num_classes),
        "folds": describe_balance(in_folds, fold_names, data.labels[dealt], num_classes),
    }


def render_report(
    job: AuditJob, samples: pa.Table, data: AuditedData, document: dict[str, Any]
) -> str:
    """Render audit.html, with pictures of the pairs that tell most."""
    return render_audit(
        title="brainray data audit",
        document=document,
        galleries={
            name: picture_pairs(pairs, samples, data, job)
            for name, pairs in choose_pairs(data).items()
        },
        configuration=asdict(job),
        facts={
            "Data": job.data_uri,
            "Time": f"{document['audit_s']:.0f} s",
            "Versions": describe_versions(),
            "Revision": read_code_revision(),
        },
    )


def choose_pairs(data: AuditedData) -> dict[str, list[Pair]]:
    """Choose the pairs to be shown: across splits where there are some, and those in conflict."""
    chosen: dict[str, list[Pair]] = {}
    held_out = next((split for split in findings.REFERENCES if split in data.nearest), None)
    if held_out is None:
        chosen["exact_duplicates"] = findings.list_exact_duplicates(
            data.exact_duplicates, NUM_PAIRS_SHOWN
        )
    else:
        nearest = data.nearest[held_out]
        references = np.isin(data.splits, findings.REFERENCES[held_out])
        chosen["exact"] = findings.list_crossing_exact_duplicates(
            data.exact_duplicates, nearest, references, NUM_PAIRS_SHOWN
        )
        chosen["near"] = findings.list_crossing_near_duplicates(
            data.exact_duplicates, nearest, NUM_PAIRS_SHOWN
        )
    conflicts = findings.find_conflicts(data.groups, data.labels, data.standardised)
    chosen["conflicts"] = conflicts[:NUM_PAIRS_SHOWN]
    return chosen


def picture_pairs(
    pairs: list[Pair], samples: pa.Table, data: AuditedData, job: AuditJob
) -> list[PicturedPair]:
    """Fetch the pictures of some pairs; a pair whose file has vanished meanwhile is left out."""
    pictured = []
    for pair in pairs:
        rows = samples.take(pa.array(data.kept[[pair.left, pair.right]]))
        try:
            opened = open_rows(rows, job.reading)
            left, right = (render_picture(show_slice(file, index)) for file, index in opened)
        except RejectedImage:
            continue
        labels = [job.classes[label] for label in rows["label"].to_pylist()]
        paths, splits = rows["path"].to_pylist(), rows["split"].to_pylist()
        pictured.append(
            PicturedPair(
                paths=(paths[0], paths[1]),
                labels=(labels[0], labels[1]),
                splits=(splits[0], splits[1]),
                images_png=(left, right),
                correlation=pair.correlation,
                is_copy=bool(data.exact_duplicates[pair.left] >= 0)
                and bool(data.exact_duplicates[pair.left] == data.exact_duplicates[pair.right]),
            )
        )
    return pictured
