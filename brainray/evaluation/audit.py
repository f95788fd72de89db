"""Audit a data set: duplicates, leaks across splits, label conflicts, shortcuts."""

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Literal

import numpy as np
import pandas as pd
import pyarrow as pa
import tyro
from numpy.typing import NDArray

from brainray.cluster import check_fits, connect_ray
from brainray.data import findings
from brainray.data.findings import Nearest, Pair
from brainray.data.fingerprint import PROPERTY_TYPES
from brainray.data.labelled import find_samples
from brainray.data.near_duplicates import (
    NEAR_DUPLICATE_CORRELATION,
    group_near_duplicates,
    is_exact,
    measure_recall,
)
from brainray.data.shortcuts import build_properties, evaluate_shortcuts
from brainray.data.splits import assign_folds, assign_splits, describe_balance
from brainray.errors import ConfigError, RejectedImage
from brainray.evaluation.prepared import GroupedData, group_samples
from brainray.images.heatmap import render_picture
from brainray.images.slices import ReadOptions, show_slice
from brainray.io import storage
from brainray.io.provenance import describe_versions, read_code_revision
from brainray.labels import BRAIN_TUMOUR_CLASSES, check_classes
from brainray.reports.audit import PicturedPair, render_audit_report
from brainray.runlog import Log

logger = logging.getLogger(__name__)

AUDIT_FILE = "audit.json"
GROUPS_FILE = "groups.parquet"
REPORT_FILE = "audit.html"
SPLIT_FILE = "split.parquet"
AUDIT_SCHEMA_VERSION = 1

NUM_PAIRS_SHOWN = 12
"""Pairs in each gallery of the report."""

NUM_SIZES_LISTED = 12
LOCATION_COLUMNS = ("path", "uri", "row_group", "row", "frame", "size_bytes")
"""Columns of a sample table that the manifest of a new split repeats."""

Numbers = NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditJob:
    """The data set to audit, and the output."""

    data_uri: str
    """Labelled scans, as `brainray train` reads them: class folders, alone or below Training/ and
    Testing/ (or train/, val/, test/), Parquet tables, or a manifest. Local, s3:// or gs://."""
    output_uri: str
    """Folder for audit.json, audit.html and groups.parquet."""
    classes: tuple[str, ...] = BRAIN_TUMOUR_CLASSES
    """Class names in class order; also the names of the class folders."""
    group_correlation: float = 0.96
    """Slices whose thumbnails correlate at least this much are of one group (0 to 1)."""
    max_leak: str | None = None
    """Largest share of a held-out split that may have a near duplicate in training, such as 5%. If
    it is exceeded, the exit status is 3. All files are written before."""
    make_split: Literal["no", "grouped"] = "no"
    """`grouped` writes split.parquet, which training reads: a new, stratified train, val and test
    split, and folds, that keep every group whole. Splits of the data set are ignored."""
    folds: int = 5
    """Folds of the train and val images of a new split."""
    val_fraction: float = 0.15
    """Share of the training images that a new split holds out for validation, by groups."""
    test_fraction: float = 0.15
    """Share of all images that a new split holds out for testing, by groups."""
    seed: int = 0
    """Seed of the new split, and of the folds for shortcuts."""
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
    """A grouped data set, n of whose images are readable, and their duplicates."""

    grouped: GroupedData
    samples: pa.Table
    """Every sample, readable or not, as are the rows of ``scan``."""
    scan: pa.Table
    kept: Numbers
    """Sample numbers of the readable images, as are the following, shape (n,)."""
    labels: Numbers
    groups: Numbers
    """At the job's correlation, with the data set's own groups and with patients."""
    splits: NDArray[np.str_]
    """train, val, test, or empty if the data set has no splits."""
    exact_duplicates: Numbers
    """Number of each image's set of pixel-identical images; −1 for none."""
    near: Numbers
    """Groups at the near duplicates' correlation."""
    nearest: dict[str, Nearest]
    """By held-out split."""


def audit(job: AuditJob, *, log: Log = logger.info, verbose: bool = False) -> dict[str, Any]:
    """Audit a data set, and write the findings as a report, JSON and Parquet.

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
    splits = set(found.samples["split"].to_pylist())
    if job.max_leak is not None and not ("train" in splits and splits & {"val", "test"}):
        raise ConfigError(
            f"Expected a train split and a val or test split in '{job.data_uri}' to check "
            f"--max-leak {job.max_leak}, found {', '.join(sorted(splits - {''})) or 'no splits'}. "
            "Leave --max-leak out, or make a split first: --make-split grouped."
        )
    connect_ray(verbose=verbose)
    check_fits()
    log("Opening the scans, and comparing their thumbnails.")
    grouped = group_samples(
        found,
        job.classes,
        keep=(),
        reading=job.reading,
        min_correlation=job.group_correlation,
        with_properties=True,
    )
    data = _find_duplicates(grouped)
    document = _describe_findings(job, data)
    document["shortcuts"] = evaluate_shortcuts(
        build_properties(data.scan.take(data.kept)), data.labels, data.groups, seed=job.seed
    )
    if job.make_split == "grouped":
        document["split"] = _write_split(job, data)
    storage.write_table(storage.join(job.output_uri, GROUPS_FILE), _build_groups_table(job, data))
    document["audit_s"] = round(time.monotonic() - started, 1)
    report = render_audit_report(
        title="brainray data audit",
        document=document,
        galleries={
            name: _draw_pairs(pairs, data, job.classes)
            for name, pairs in _choose_pairs(data).items()
        },
        configuration=asdict(job),
        facts={
            "Data": job.data_uri,
            "Time": f"{document['audit_s']:.0f} s",
            "Versions": describe_versions(),
            "Revision": read_code_revision(),
        },
    )
    storage.write_bytes(storage.join(job.output_uri, REPORT_FILE), report.encode())
    storage.write_json(storage.join(job.output_uri, AUDIT_FILE), document)
    return document


def parse_max_leak(text: str | None) -> float | None:
    """Parse a share, as 5% or 0.05, or raise a ConfigError; None stays None."""
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


def list_excessive_leaks(document: dict[str, Any]) -> dict[str, float]:
    """Return the near-duplicate share of each held-out split that exceeds ``max_leak``."""
    limit = document["max_leak"]
    return {
        split: leak["share_near_duplicate"]
        for split, leak in document["leaks"].items()
        if limit is not None and leak["share_near_duplicate"] > limit
    }


def _find_duplicates(grouped: GroupedData) -> AuditedData:
    """Find the duplicates and the nearest training images of the readable scans."""
    samples, scan, kept = grouped.found.samples, grouped.scan.table, pa.array(grouped.kept)
    splits = np.array(samples["split"].take(kept).to_pylist(), dtype="<U5")
    return AuditedData(
        grouped=grouped,
        samples=samples,
        scan=scan,
        kept=grouped.kept,
        labels=grouped.labels[grouped.kept],
        groups=grouped.groups,
        splits=splits,
        exact_duplicates=findings.number_exact_duplicates(
            scan["pixel_sha256"].take(kept).to_pylist()
        ),
        near=group_near_duplicates(
            grouped.standardised, min_correlation=NEAR_DUPLICATE_CORRELATION
        ),
        nearest=findings.find_nearest_references(splits, grouped.standardised),
    )


def _describe_findings(job: AuditJob, data: AuditedData) -> dict[str, Any]:
    """Summarise the findings, ready for JSON."""
    search: dict[str, Any] = {"search": "every pair"}
    if not is_exact(len(data.kept)):
        recall = measure_recall(
            data.grouped.standardised,
            data.groups,
            min_correlation=job.group_correlation,
            seed=job.seed,
        )
        search = {"search": "by cells", "recall": recall}
    return {
        "schema_version": AUDIT_SCHEMA_VERSION,
        "data_uri": job.data_uri,
        "classes": list(job.classes),
        "num_scans": data.samples.num_rows,
        "num_usable": len(data.kept),
        "skipped": data.grouped.found.describe_skipped(),
        "unreadable": _count_unreadable(data),
        "class_balance": {
            split: {
                name: int((data.labels[data.splits == split] == label).sum())
                for label, name in enumerate(job.classes)
            }
            for split in ("train", "val", "test", "")
            if (data.splits == split).any()
        },
        "exact_duplicates": findings.describe_groups(data.exact_duplicates, data.labels),
        "near_duplicates": {
            "min_correlation": NEAR_DUPLICATE_CORRELATION,
            **findings.describe_groups(data.near, data.labels),
        },
        "groups": {
            "min_correlation": job.group_correlation,
            **findings.describe_groups(data.groups, data.labels),
            "sizes": findings.count_sizes(data.groups),
            **search,
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
        "resolution": _describe_resolution(data.scan.take(data.kept)),
    }


def _count_unreadable(data: AuditedData) -> list[dict[str, Any]]:
    """Count the scans that could not be decoded, by reason and split; most frequent first."""
    columns = {"reason": data.scan["reason"], "split": data.samples["split"]}
    rejected = pd.DataFrame({name: column.to_pylist() for name, column in columns.items()}).dropna()
    rows = [
        {
            "reason": reason,
            "n": len(rows),
            "by_split": rows["split"].value_counts(sort=False).sort_index().to_dict(),
        }
        for reason, rows in rejected.groupby("reason")
    ]
    return sorted(rows, key=lambda row: -row["n"])


def _describe_resolution(scan: pa.Table) -> dict[str, Any]:
    """Count sizes, colour modes and file types."""
    sizes = Counter(zip(scan["width_px"].to_pylist(), scan["height_px"].to_pylist(), strict=True))
    listed = sizes.most_common(NUM_SIZES_LISTED)
    widths, heights = scan["width_px"].to_numpy(), scan["height_px"].to_numpy()

    def compute_percentiles(values: NDArray[Any]) -> list[float]:
        return [float(value) for value in np.percentile(values, [0, 25, 50, 75, 100])]

    return {
        "num_sizes": len(sizes),
        "sizes": [{"width_px": w, "height_px": h, "n": n} for (w, h), n in listed],
        "other_sizes": scan.num_rows - sum(n for _, n in listed),
        "width_px": compute_percentiles(widths),
        "height_px": compute_percentiles(heights),
        "aspect_ratio": compute_percentiles(widths / heights),
        "modes": dict(Counter(scan["mode"].to_pylist()).most_common()),
        "formats": dict(Counter(scan["format"].to_pylist()).most_common()),
    }


def _build_groups_table(job: AuditJob, data: AuditedData) -> pa.Table:
    """Build the table with a row for every scan, readable or not."""
    samples, scan, count = data.samples, data.scan, data.samples.num_rows
    nearest, correlation = np.full(count, -1), np.full(count, np.nan)
    for one in data.nearest.values():
        nearest[data.kept[one.rows]] = data.kept[one.nearest]
        correlation[data.kept[one.rows]] = one.correlation
    alone = nearest < 0
    other = samples.take(pa.array(nearest, pa.int64(), mask=alone))
    labels = pa.array(job.classes)

    def fill(values: Numbers) -> pa.Array:
        """Put values of readable images into rows of all; null elsewhere, and for −1."""
        column = np.full(count, -1)
        column[data.kept] = values
        return pa.array(column, pa.int64(), mask=column < 0)

    columns = {
        "path": samples["path"],
        "uri": samples["uri"],
        "content_sha256": scan["content_sha256"],
        "pixel_sha256": scan["pixel_sha256"],
        "label": labels.take(samples["label"].combine_chunks()),
        "split": samples["split"],
        "reason": scan["reason"],
        "group": fill(data.groups),
        "near_duplicate_group": fill(data.near),
        "exact_duplicate_set": fill(data.exact_duplicates),
        "nearest_correlation": pa.array(correlation, pa.float32(), mask=alone),
        "nearest_path": other["path"],
        "nearest_label": labels.take(other["label"].combine_chunks()),
        **{name: scan[name] for name in PROPERTY_TYPES if name != "pixel_sha256"},
    }
    return pa.table(columns)


def _write_split(job: AuditJob, data: AuditedData) -> dict[str, Any]:
    """Write a new split that keeps every group whole; return its URI and balance."""
    splits = assign_splits(
        [""] * len(data.kept),
        data.labels,
        data.groups,
        val_fraction=job.val_fraction,
        test_fraction=job.test_fraction,
        seed=job.seed,
    )
    in_fold = splits != "test"
    folds = np.full(len(data.kept), -1)
    folds[in_fold] = assign_folds(
        data.labels[in_fold], data.groups[in_fold], job.folds, seed=job.seed
    )
    rows = data.samples.take(pa.array(data.kept))
    manifest = pa.table(
        {
            **{name: rows[name] for name in LOCATION_COLUMNS},
            "label": pa.array(job.classes).take(rows["label"].combine_chunks()),
            "split": pa.array(splits.tolist()),
            "group": pa.array([str(group) for group in data.groups]),
            "fold": pa.array(folds, pa.int64(), mask=~in_fold),
            "content_sha256": data.scan["content_sha256"].take(pa.array(data.kept)),
        }
    )
    uri = storage.join(job.output_uri, SPLIT_FILE)
    storage.write_table(uri, manifest)
    return {
        "uri": uri,
        "num_groups": len(np.unique(data.groups)),
        "splits": describe_balance(splits, ("train", "val", "test"), data.labels, len(job.classes)),
        "folds": describe_balance(
            folds[in_fold].astype(str),
            [str(number) for number in range(job.folds)],
            data.labels[in_fold],
            len(job.classes),
        ),
    }


def _choose_pairs(data: AuditedData) -> dict[str, list[Pair]]:
    """Choose the pairs that the report shows, by gallery."""
    copies, chosen = data.exact_duplicates, {}
    held_out = next((split for split in findings.REFERENCES if split in data.nearest), None)
    if held_out is None:
        chosen["exact_duplicates"] = findings.list_exact_duplicates(copies, NUM_PAIRS_SHOWN)
    else:
        nearest = data.nearest[held_out]
        references = np.isin(data.splits, findings.REFERENCES[held_out])
        chosen["exact"] = findings.list_crossing_exact_duplicates(
            copies, nearest, references, NUM_PAIRS_SHOWN
        )
        chosen["near"] = findings.list_crossing_near_duplicates(copies, nearest, NUM_PAIRS_SHOWN)
    conflicts = findings.find_conflicts(data.groups, data.labels, data.grouped.standardised)
    return chosen | {"conflicts": conflicts[:NUM_PAIRS_SHOWN]}


def _draw_pairs(pairs: list[Pair], data: AuditedData, classes: Sequence[str]) -> list[PicturedPair]:
    """Draw pairs of scans; a pair whose file is gone is left out."""
    drawn = []
    for pair in pairs:
        numbers = data.kept[[pair.left, pair.right]]
        try:
            opened = data.grouped.scan.store.open_slices(numbers.tolist())
            left, right = (render_picture(show_slice(file, index)) for file, index in opened)
        except RejectedImage:
            continue
        rows = data.samples.take(pa.array(numbers)).to_pylist()
        sets = data.exact_duplicates[[pair.left, pair.right]]
        drawn.append(
            PicturedPair(
                paths=(rows[0]["path"], rows[1]["path"]),
                labels=(classes[rows[0]["label"]], classes[rows[1]["label"]]),
                images_png=(left, right),
                correlation=pair.correlation,
                is_exact=bool(sets[0] >= 0 and sets[0] == sets[1]),
            )
        )
    return drawn
