"""Scan, group and split a data set, for training and for evaluation."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from brainray.data.findings import REFERENCES, find_nearest_references
from brainray.data.fingerprint import Fingerprints, expand_files, fingerprint_samples
from brainray.data.labelled import FoundSamples
from brainray.data.near_duplicates import (
    THUMBNAIL_PX,
    group_near_duplicates,
    merge_groups,
    standardise_thumbnails,
)
from brainray.data.scan_store import ScanStore
from brainray.data.splits import MANIFEST_SCHEMA
from brainray.errors import DataError
from brainray.images.preprocess import Preprocessing
from brainray.images.slices import ReadOptions
from brainray.inference.schema import SCAN_SCHEMA

MANIFEST_FILE = "manifest.parquet"
IDENTIFIERS = ("patient", "study", "series", "sop_instance")
"""Columns of identifier hashes that are dropped when the groups are made."""


@dataclass(frozen=True, slots=True)
class GroupedData:
    """A data set that is scanned and grouped, but not split."""

    found: FoundSamples
    scan: Fingerprints
    labels: NDArray[np.int64]
    """Class of every sample, shape (N,)."""
    kept: NDArray[np.int64]
    """Numbers of the readable samples, shape (n,)."""
    standardised: NDArray[np.float32]
    """Their thumbnails, shape (n, 576)."""
    groups: NDArray[np.int64]
    """Their groups, shape (n,)."""
    num_named: int
    """Scans whose group or patient the data set or the file names."""


@dataclass(frozen=True, slots=True)
class PreparedData:
    """A data set that is ready for training or evaluation."""

    found: FoundSamples
    manifest: pa.Table
    """Rows of :data:`brainray.data.splits.MANIFEST_SCHEMA`, in sample order."""
    labels: NDArray[np.int64]
    """Class of every sample, shape (N,)."""
    splits: NDArray[np.str_]
    """train, val, test or rejected, shape (N,); in cross-validation fold-0, fold-1 …, rejected."""
    store: ScanStore
    """Opens any sample."""
    scans: pa.Table
    """Rows of :data:`brainray.inference.schema.SCAN_SCHEMA`, in sample order, without identifier
    hashes."""
    num_named: int
    """As in :class:`GroupedData`."""

    def select(self, split: str) -> NDArray[np.int64]:
        """Return the sample numbers of a split, ascending."""
        return np.flatnonzero(self.splits == split)

    def count_rejected(self, given_split: str | None = None) -> dict[str, int]:
        """Count rejected scans by reason, of all or of a split that the data set gives."""
        given = self.found.samples["split"].to_pylist()
        reasons = zip(self.manifest["reason"].to_pylist(), given, strict=True)
        counts = Counter(why for why, split in reasons if why and given_split in (None, split))
        return dict(sorted(counts.items()))


def group_samples(
    found: FoundSamples,
    classes: Sequence[str],
    *,
    keep: Sequence[Preprocessing],
    reading: ReadOptions,
    min_correlation: float,
    with_properties: bool = False,
) -> GroupedData:
    """Decode every scan once, and group scans of one patient and similar scans.

    Files with several slices are expanded first: a scan is one slice. ``keep``, ``reading`` and
    ``with_properties`` are those of :func:`brainray.data.fingerprint.fingerprint_samples`.
    Thumbnails of one group correlate at least ``min_correlation``, in (0, 1].

    Raises
    ------
    DataError
        No scan of a class is readable.
    """
    found = expand_files(found, reading)
    samples = found.samples
    scan = fingerprint_samples(samples, reading=reading, keep=keep, with_properties=with_properties)
    labels = samples["label"].to_numpy().astype(np.int64)
    kept = _find_readable(labels, scan.table, classes)
    standardised = standardise_thumbnails(stack_thumbnails(scan.table["thumbnail"].take(kept)))
    near_duplicates = group_near_duplicates(standardised, min_correlation=min_correlation)
    groups = join_groups(near_duplicates, samples, scan.table, kept)
    named = pc.coalesce(samples["group"], find_patients(samples, scan.table))
    num_named = len(named) - named.null_count
    return GroupedData(found, scan, labels, kept, standardised, groups, num_named)


def join_groups(
    near_duplicates: NDArray[np.int64], samples: pa.Table, scan: pa.Table, kept: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Join groups of similar slices with the data set's own groups, and with patients.

    ``near_duplicates`` are the groups of the samples with the numbers ``kept``. The result are
    connected components: each patient and each given group is in one of them. Their numbers do not
    depend on the key of the hashes.
    """
    for names in (samples["group"], find_patients(samples, scan)):
        near_duplicates = merge_groups(near_duplicates, names.take(pa.array(kept)).to_pylist())
    return near_duplicates


def find_patients(samples: pa.Table, scan: pa.Table) -> pa.ChunkedArray:
    """Return an identifier of each scan's patient; null for images in formats without one.

    It is the keyed hash of the patient's identifier; without one, that of the study, else of the
    series (for a NIfTI volume, its content), else the URI of a file with several slices.
    """
    several = pc.if_else(
        pc.greater_equal(samples["frame"], 0), samples["uri"], pa.scalar(None, pa.string())
    )
    return pc.coalesce(scan["patient"], scan["study"], scan["series"], several)


def split_samples(
    data: GroupedData,
    classes: Sequence[str],
    splits: NDArray[np.str_],
    references: Mapping[str, Sequence[str]] = REFERENCES,
) -> PreparedData:
    """Assign splits, and find the most similar scan among those that a scan is held out from.

    ``splits`` are those of the readable scans, shape (n,). ``references`` has for each held-out
    split the splits that it is held out from.
    """
    every_split = np.full(len(data.labels), "rejected", dtype="<U12")
    every_split[data.kept] = splits
    manifest = _build_manifest(data, classes, every_split)
    for nearest in find_nearest_references(splits, data.standardised, references).values():
        labels = manifest["label"].take(pa.array(data.kept[nearest.nearest])).to_pylist()
        rows = data.kept[nearest.rows]
        manifest = write_nearest(manifest, rows, nearest.correlation, labels)
    absent = {*IDENTIFIERS, "modified_ns"}
    scans = [
        pa.nulls(len(data.labels), column.type)
        if column.name in absent
        else data.scan.table[column.name]
        for column in SCAN_SCHEMA
    ]
    return PreparedData(
        found=data.found,
        manifest=manifest,
        labels=data.labels,
        splits=every_split,
        store=data.scan.store,
        scans=pa.table(scans, SCAN_SCHEMA),
        num_named=data.num_named,
    )


def _build_manifest(
    data: GroupedData, classes: Sequence[str], splits: NDArray[np.str_]
) -> pa.Table:
    """Build the manifest, still without nearest scans; a rejected sample is its own group."""
    samples, scan = data.found.samples, data.scan.table
    groups = np.arange(samples.num_rows) + (data.groups.max(initial=-1) + 1)
    groups[data.kept] = data.groups
    return pa.table(
        {
            "path": samples["path"],
            "content_sha256": scan["content_sha256"],
            "label": [classes[label] for label in data.labels],
            "group": groups,
            "split": splits.tolist(),
            "reason": scan["reason"],
            "nearest_correlation": pa.nulls(samples.num_rows, pa.float32()),
            "nearest_label": pa.nulls(samples.num_rows, pa.string()),
            "thumbnail": scan["thumbnail"].cast(pa.binary()),
        },
        schema=MANIFEST_SCHEMA,
    )


def write_nearest(
    manifest: pa.Table,
    rows: NDArray[np.int64],
    correlation: NDArray[np.float32],
    labels: Sequence[str],
) -> pa.Table:
    """Fill the columns on the nearest scan in some rows of a manifest."""
    columns: dict[str, Any] = {"nearest_correlation": correlation, "nearest_label": labels}
    for name, values in columns.items():
        column = np.array(manifest[name].to_pylist(), dtype=object)
        column[rows] = values
        field = MANIFEST_SCHEMA.field(name)
        index = MANIFEST_SCHEMA.get_field_index(name)
        manifest = manifest.set_column(index, field, pa.array(column, field.type))
    return manifest


def stack_thumbnails(column: pa.ChunkedArray) -> NDArray[np.uint8]:
    """Return thumbnails as an array of uint8, shape (N, 576)."""
    return np.frombuffer(b"".join(column.to_pylist()), np.uint8).reshape(-1, THUMBNAIL_PX**2)


def _find_readable(
    labels: NDArray[np.int64], scan: pa.Table, classes: Sequence[str]
) -> NDArray[np.int64]:
    """Return the numbers of the scans that could be decoded; raise if no scan of a class could."""
    reasons = scan["reason"].to_pylist()
    is_readable = np.array([reason is None for reason in reasons])
    for label in np.unique(labels):
        of_class = np.flatnonzero(labels == label)
        if not is_readable[of_class].any():
            raise DataError(
                f"None of the {len(of_class)} images of class {classes[label]} can be opened "
                f"(the first is {reasons[of_class[0]]}). "
                "Expected JPEG, PNG, BMP, GIF, TIFF or WebP pictures, DICOM or NIfTI files."
            )
    return np.flatnonzero(is_readable)
